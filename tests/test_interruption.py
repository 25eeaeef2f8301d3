"""A training that was interrupted within an epoch ends as one that was not: bit for bit, on the CPU."""

import itertools
import os
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import read_history, small_settings

import train
from captioning.engine import Run
from utils import Terminated

TIMES = ("seconds", "captions_per_second")
RESNET = {"encoder_name": "resnet18", "encoder_weights": "none", "encoder_lr": 1e-4}


def assert_same(one, other, name="it") -> None:
    """Nested dictionaries and lists with the same tensors, bit for bit, and the same values."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            if key not in TIMES:
                assert_same(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), name
        for index, pair in enumerate(zip(one, other)):
            assert_same(*pair, f"{name}[{index}]")
    else:
        assert one == other, name


def assert_same_training(whole: Path, resumed: Path) -> None:
    """The same files; the same weights, states of the optimizer, history and captions."""
    names = [sorted(file.name for file in folder.iterdir()) for folder in (whole, resumed)]
    assert names[0] == names[1]
    for file in whole.glob("*.pth"):
        contents = [torch.load(folder / file.name, weights_only=True) for folder in (whole, resumed)]
        for content in contents:
            for setting in ("output_folder", "resume", "save_every"):
                del content["settings"][setting]
        assert_same(*contents, file.name)
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (resumed / file.name).read_bytes()
    assert_same(read_history(whole), read_history(resumed))
    logs = [(folder / "train.log").read_text().splitlines() for folder in (whole, resumed)]
    captions = [[line for line in log if line.startswith("    train_")] for log in logs]
    assert captions[0] == captions[1] and captions[0]


@contextmanager
def signal_in_step(monkeypatch, count: int, number: int = signal.SIGTERM):
    """Within the training's step of this number, counted from 1 over all epochs, comes a signal."""
    step, calls = Run.step, itertools.count(1)

    def counted(*arguments):
        step(*arguments)
        if next(calls) == count:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", counted)
        yield


def interrupt(monkeypatch, run, settings, step: int, number: int = signal.SIGTERM) -> str:
    """Train until the signal comes in this step; return what the user is told."""
    ending = Terminated if number == signal.SIGTERM else KeyboardInterrupt
    with signal_in_step(monkeypatch, step, number), pytest.raises(ending) as raised:
        run(settings)
    assert type(raised.value) is ending
    return str(raised.value)


CASES = {  # settings, and the steps in which the training is interrupted: of 4 an epoch, or 2
    "frozen, in the first epoch": ({}, [1]),
    "twice": ({"lr_schedule": "cosine", "warmup": 0.2}, [6, 1]),
    "after the last step": ({"decay_after": 1}, [8]),
    "augmented": ({**RESNET, "fine_tune_encoder": True, "augment": True, "workers": 2}, [6]),
    "accumulated": ({"grad_accumulation": 2, "grad_clip_by": "norm"}, [3]),
    "fine-tuned later": ({**RESNET, "fine_tune_encoder": True, "fine_tune_after": 1}, [7]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_training_goes_on_in_mid_epoch(name, prepared, tmp_path, monkeypatch):
    options, steps = CASES[name]
    options = {"dropout": 0.5, "batch_size": 8, **options}
    whole, cut = (small_settings(prepared, tmp_path / run, **options) for run in ("whole", "cut"))
    train.train(whole)
    for number, step in enumerate(steps):
        told = interrupt(monkeypatch, train.train, replace(cut, resume=number > 0), step)
        assert "last.pth" in told and "--resume" in told
    random_use = torch.rand(3)  # between the two runs
    assert len(random_use) == 3
    train.train(replace(cut, resume=True))
    assert_same_training(tmp_path / "whole", tmp_path / "cut")
