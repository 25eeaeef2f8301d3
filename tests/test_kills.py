"""Runs that are killed at random moments, and before every rename: nothing is lost, nothing is left over.

Wherever a preparation, a training, the encoding of features or the pipeline is killed, every file that is
there can be read, and the same command, run again, ends with the files of a run that was not killed, bit for
bit. 12 kills by default; `CAPTIONING_KILLS=100` in the environment asks for more.
"""

from __future__ import annotations

import csv
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import draw_demo
from fork_server import Run, Server
from PIL import Image

from captioning.data.prepared import open_dataset
from captioning.training.resume import best_epoch
from captioning.weights.checkpoints import BEST_FILES, epoch_checkpoints, read_checkpoint
from utils import read_json

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc"),
]

KILLS = int(os.environ.get("CAPTIONING_KILLS", 12))
ENDS = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15), signal.SIGINT: (130, -2)}
MEASURED = {"seconds", "captions_per_second"}  # columns of the history that no two runs share
# the server's own; what a run left that was killed in its first epoch, before it could be gone on with
DOCUMENTED = {"output.log", "earlier_1", "earlier_2", "earlier_3"}

SIZES = (
    "--emb_dim 8 --attention_dim 8 --decoder_dim 16 --encoder_name efficientnet_lite0 --encoder_weights none"
)
SMALL = f"{SIZES} --epochs 2 --batch_size 16 --workers 0 --decoder_lr 0.01"
PREPARED = "--image_size 32 --min_word_freq 1 --val_fraction 0.1"
BLIP = "--base_model tiny --epochs 2 --batch_size 8 --captions_per_image 1 --workers 2"


def demo_options(demo: Path) -> list:
    return ["--annotations", demo / "train.csv", "--image_folder", demo / "train" / "train"]


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory) -> Path:
    return draw_demo(tmp_path_factory.mktemp("kills") / "demo", 150, 10)


@pytest.fixture(scope="module")
def smaller_demo(tmp_path_factory) -> Path:
    return draw_demo(tmp_path_factory.mktemp("kills") / "demo", 24, 10)


class Work:
    """A command whose runs are killed: in a folder of its own, with the same names, each time."""

    def __init__(self, server: Server, script: str, arguments: list, inputs: Path | None = None):
        self.server, self.script, self.arguments, self.inputs = server, script, arguments, inputs

    def start(self, folder: Path) -> None:
        folder.mkdir()
        if self.inputs:
            (folder / "data").mkdir()
            for file in self.inputs.iterdir():
                os.link(file, folder / "data" / file.name)

    def run(self, folder: Path, **options) -> Run:
        """Run the command, as the one that goes on where there is something to go on from."""
        going_on = []
        if self.script.startswith("train") and self.states(folder):
            going_on = ["--resume"]
        return self.server.run(folder, self.script, *self.arguments, *going_on, **options)

    def states(self, folder: Path) -> list[Path]:
        return [*epoch_checkpoints(folder / "model"), *folder.glob("model/last.pth")]

    def complete(self, folder: Path) -> None:
        run = self.run(folder)
        assert "Traceback" not in run.output, run.output
        has_all_epochs = run.status == 2 and "raise --epochs to go on" in run.output
        assert run.status == 0 or has_all_epochs, run.output


def make_work(server: Server, name: str, small_demo: Path, smaller_demo: Path, tmp_path: Path) -> Work:
    if name == "preparation":
        return Work(
            server,
            "create_input_files.py",
            [*demo_options(small_demo), *PREPARED.split(), "--output_folder", "data"],
        )
    if name in ("training", "caching"):
        (tmp_path / "input").mkdir()
        prepare = make_work(server, "preparation", small_demo, smaller_demo, tmp_path)
        assert server.run(tmp_path / "input", prepare.script, *prepare.arguments).status == 0
        inputs = tmp_path / "input" / "data"
        options = ["--data_folder", "data", "--output_folder", "model", *SMALL.split()]
        if name == "caching":
            return Work(server, "train.py", options, inputs)
        assert server.run(tmp_path / "input", "train.py", *options, "--epochs", 1).status == 0  # the caches
        return Work(server, "train.py", options, inputs)
    if name == "blip":
        return Work(
            server, "train_model.py", [*demo_options(smaller_demo), *BLIP.split(), "--output_folder", "model"]
        )
    if name == "blip caching":
        options = [*demo_options(smaller_demo), *BLIP.split(), "--output_folder", "model", "--freeze_vision"]
        return Work(server, "train_model.py", options)
    blip = [f"--blip_{option[2:]}" if option[:2] == "--" else option for option in BLIP.split()[2:]]
    options = ["--model", "both", "--data_folder", "data", "--output_folder", "model", "--blip_base", "tiny"]
    options += [
        "--test_folder",
        smaller_demo / "test" / "test",
        *demo_options(smaller_demo),
        *PREPARED.split(),
    ]
    options += [*SMALL.split(), *blip, "--workers", 1, "--beam_size", 1]
    return Work(server, "run_pipeline.py", options)


# --- what is looked at --------------------------------------------------------------------------------------


def list_files(folder: Path) -> set[str]:
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {str(path) for path in files if not DOCUMENTED & set(path.parts)}


def check_all_load(folder: Path) -> None:
    """Every file that a killed run has left can be read, but for those that say that they are not whole."""
    for name in list_files(folder):
        path = folder / name
        if path.suffix == ".partial" or ".partial" in name or path.name == ".lock" or "journal" in path.name:
            continue
        readers: dict[str, Callable] = {
            ".pth": read_checkpoint,
            ".json": read_json,
            ".hdf5": lambda path: read_rows(path),
            ".png": lambda path: Image.open(path).load(),
            ".csv": lambda path: list(csv.reader(path.open())),
            ".safetensors": read_safetensors,
        }
        readers.get(path.suffix, Path.read_text)(path)


def read_rows(path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        (name,) = set(file) - {"checksums"}
        dtype = file[name].dtype
    return open_dataset(path, name, dtype)[:]


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def content(path: Path) -> object:
    """What must be the same in two runs: all but times."""
    if path.suffix == ".hdf5":
        return read_rows(path).tobytes()
    if path.suffix == ".pth":
        checkpoint = read_checkpoint(path)
        checkpoint["history"] = [without_times(line) for line in checkpoint["history"]]
        for name in ("resume", "checkpoint"):  # said how to go on
            del checkpoint["settings"][name]
        return flatten(checkpoint)
    if path.name == "history.csv":
        with path.open() as stream:
            return [without_times(line) for line in csv.DictReader(stream)]
    if path.suffix == ".log" or path.suffix == ".png" or path.name.endswith("_fingerprint.json"):
        return None  # times
    return path.read_bytes()


def without_times(line: dict) -> dict:
    return {name: value for name, value in line.items() if name not in MEASURED}


def flatten(value: object) -> object:
    """Tensors as bytes, so that == compares all."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {name: flatten(item) for name, item in value.items()}
    return [flatten(item) for item in value] if isinstance(value, list) else value


def check_same(folder: Path, whole: Path) -> None:
    assert list_files(folder) == list_files(whole)
    for name in list_files(whole):
        assert content(folder / name) == content(whole / name), name


def check_best(folder: Path) -> None:
    """The best files are those of the best epoch."""
    files = epoch_checkpoints(folder / "model")
    if not files or not (folder / "model" / "encoder.pth").exists():
        return
    newest = read_checkpoint(files[-1])
    history = newest["history"]
    best = history[: best_epoch(history, f"val_{newest['settings']['select_by']}") + 1]
    assert all(read_checkpoint(folder / "model" / name)["history"] == best for name in BEST_FILES)


# --- the kills ----------------------------------------------------------------------------------------------

SHARES = {"preparation": 4, "caching": 4, "training": 5, "blip": 3, "blip caching": 2, "pipeline": 2}


@pytest.mark.parametrize("name", SHARES)
def test_killed_at_random_moments(name, server, small_demo, smaller_demo, tmp_path, capsys):
    rng, kills = random.Random(name), max(1, round(KILLS * SHARES[name] / sum(SHARES.values())))
    work = make_work(server, name, small_demo, smaller_demo, tmp_path)
    whole = tmp_path / "whole"
    work.start(whole)
    seconds = work.run(whole).seconds
    counts = dict.fromkeys([*ENDS, "ended before"], 0)
    case = 0
    while sum(counts.values()) < kills:
        folder = tmp_path / f"case_{case}"
        work.start(folder)
        for _ in range(min(rng.randint(1, 3), kills - sum(counts.values()))):
            end = rng.choice(list(ENDS))
            run = work.run(folder, end=end, after=rng.uniform(0, seconds))
            assert "Traceback" not in run.output, run.output
            counts[end if run.status in ENDS[end] else "ended before"] += 1
            check_all_load(folder)
        work.complete(folder)
        check_same(folder, whole)
        check_best(folder)
        case += 1
    with capsys.disabled():
        shown = ", ".join(f"{getattr(end, 'name', end)} {count}" for end, count in counts.items())
        print(f"\n{name}: {shown}; {case} runs completed after them, {seconds:.1f} s each")


@pytest.mark.parametrize("name", SHARES)
def test_killed_before_every_rename(name, server, small_demo, smaller_demo, tmp_path, capsys):
    work = make_work(server, name, small_demo, smaller_demo, tmp_path)
    whole = tmp_path / "whole"
    work.start(whole)
    assert work.run(whole).status == 0
    number, step = 1, 4 if name != "pipeline" else 12  # that has the renames of all the others
    step = 1 if KILLS >= 100 else step
    killed = 0
    while True:
        folder = tmp_path / f"case_{number}"
        work.start(folder)
        run = work.run(folder, before_rename=number)
        if run.status == 0:
            break
        assert run.status == -9, run.output
        killed += 1
        check_all_load(folder)
        work.complete(folder)
        check_same(folder, whole)
        check_best(folder)
        number += step
    with capsys.disabled():
        print(f"\n{name}: killed before {killed} renames, every {step}. one")
