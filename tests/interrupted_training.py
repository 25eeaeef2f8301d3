"""Trainings that are interrupted in a given step, and what it means that two are the same."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, as_arguments, read_history

from captioning.training.optimization import Run
from captioning.training.resume import OF_THIS_RUN
from utils import Terminated

TIMES = ("seconds", "captions_per_second")


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
            for setting in OF_THIS_RUN & content["settings"].keys():
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


OPTIONS = {"dropout": 0.5, "batch_size": 4}


def start(script: str, settings, launcher: Sequence[str] = (sys.executable,)) -> subprocess.Popen:
    command = [*launcher, str(ROOT / script), *as_arguments(settings)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
