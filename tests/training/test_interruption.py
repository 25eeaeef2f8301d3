"""A training that was interrupted within an epoch ends as one that was not: bit for bit, on the CPU."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TWO_PROCESSES, blip_settings, small_settings
from interrupted_training import OPTIONS, assert_same_training, interrupt, start

import train
import train_model
from captioning.command_line import parse_settings

RESNET = {"encoder_name": "resnet18", "encoder_weights": "none", "encoder_lr": 1e-4}


CASES = {  # settings, and the steps in which the training is interrupted: of 4 an epoch, or 2
    "frozen, in the first epoch": ({}, [1]),
    "twice": ({"lr_schedule": "cosine", "warmup": 0.2}, [6, 1]),
    "after the last step": ({"decay_after": 1}, [8]),
    "augmented": ({**RESNET, "fine_tune_encoder": True, "augment": True, "workers": 2}, [6]),
    "accumulated": ({"grad_accumulation": 2, "grad_clip_by": "norm"}, [3]),
    "fine-tuned later": ({**RESNET, "fine_tune_encoder": True, "fine_tune_after": 1}, [7]),
    "averaged, with sampled and dropped words": (
        {"average_weights": 0.9, "scheduled_sampling": 0.5, "word_dropout": 0.2, "cached_views": 2}, [7]
    ),
    "self-critical, in its first epoch": (
        {"self_critical_after": 1, "average_weights": 0.9, "patience": 0, "embedding_dropout": 0.1}, [6]
    ),
}  # fmt: skip


LONG = [pytest.param("augmented", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", [*(name for name in CASES if name != "augmented"), *LONG])
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


def test_blip_goes_on_in_mid_epoch(demo, tmp_path, monkeypatch):
    options = {"augment": True, "captions_per_image": 2, "grad_accumulation": 2}
    whole, cut = (blip_settings(demo, tmp_path / run, **options) for run in ("whole", "cut"))
    train_model.train(whole)
    interrupt(monkeypatch, train_model.train, cut, 1)
    interrupt(monkeypatch, train_model.train, replace(cut, resume=True), 3)
    train_model.train(replace(cut, resume=True))
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "train_model.py"])
def test_two_processes_go_on_in_mid_epoch(script, prepared, demo, tmp_path):
    """SIGTERM to the launcher, which passes it on; then to its processes too, so that they get it twice."""

    def settings(run: str, **options):
        if script == "train.py":
            return small_settings(prepared, tmp_path / run, **OPTIONS, **options)
        return blip_settings(demo, tmp_path / run, **options)

    process = start(script, settings("whole"), TWO_PROCESSES)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    last = tmp_path / "cut" / "last.pth"
    for to_all in (False, True):
        cut = settings("cut", save_every=1e-9, resume=last.exists())
        if last.exists():
            os.utime(last, (0, 0))
        process = start(script, cut, TWO_PROCESSES)
        while process.poll() is None and not (last.exists() and last.stat().st_mtime > 1):
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for receiver in (process.pid, *map(int, children if to_all else ())):
            os.kill(receiver, signal.SIGTERM)
        out, err = process.communicate(timeout=300)
        assert err.count("interrupted: epoch") == 1 and last.exists(), err
        assert "Traceback" not in err.partition("interrupted: epoch")[0], err  # the launcher has its own
    process = start(script, settings("cut", resume=True), TWO_PROCESSES)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "going on in epoch" in out, err
    assert_same_training(tmp_path / "whole", tmp_path / "cut")
    files = {file.name for file in (tmp_path / "cut").iterdir()}
    assert "last.pth" not in files and not any(name.endswith(".partial") for name in files)


@pytest.mark.slow
def test_the_pipeline_goes_on_by_itself(demo, tmp_path, monkeypatch, capsys):
    import run_pipeline

    def pipeline(folder: Path) -> run_pipeline.Settings:
        values = {"annotations": demo / "train.csv", "image_folder": demo / "train" / "train"}
        values |= {"data_folder": tmp_path / "data", "output_folder": folder / "models"}
        options = [f"--{name}={value}" for name, value in values.items()]
        options += ["--image_size=64", "--min_word_freq=1", "--encoder_name=efficientnet_lite0"]
        options += ["--emb_dim=32", "--attention_dim=32", "--decoder_dim=64", "--epochs=2", "--workers=1"]
        options += ["--batch_size=8"]
        return parse_settings(run_pipeline.Settings, options)

    monkeypatch.chdir(tmp_path)  # where there are no images to caption
    run_pipeline.main(pipeline(tmp_path / "whole"))
    for step in (1, 6):
        interrupt(monkeypatch, run_pipeline.main, pipeline(tmp_path / "cut"), step)
    capsys.readouterr()
    run_pipeline.main(pipeline(tmp_path / "cut"))
    assert "going on in epoch 2 after" in capsys.readouterr().out
    assert_same_training(tmp_path / "whole" / "models", tmp_path / "cut" / "models")
    run_pipeline.main(pipeline(tmp_path / "cut"))
    assert "up to date, skipped" in capsys.readouterr().out
