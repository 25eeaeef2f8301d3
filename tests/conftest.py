import subprocess
import sys
from pathlib import Path

import pytest
import torch

import create_input_files
import make_demo_data
import train

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """A small demonstration set, drawn as users draw it."""
    folder = tmp_path_factory.mktemp("data") / "demo"
    make_demo_data.make_demo_data(make_demo_data.Settings(str(folder), train_images=40, test_images=12))
    return folder


@pytest.fixture(scope="session")
def prepared(demo) -> Path:
    """The demonstration set, prepared; small images, so that a real network runs quickly."""
    output = demo.parent / "data_output"
    settings = create_input_files.Settings(
        annotations=str(demo / "train.csv"),
        image_folder=str(demo / "train" / "train"),
        output_folder=str(output),
        min_word_freq=1,
        image_size=64,
        val_fraction=0.2,
    )
    create_input_files.create_input_files(settings)
    return output


@pytest.fixture(scope="session")
def models(prepared, tmp_path_factory) -> Path:
    """A model after four epochs: bad captions, good files."""
    output = tmp_path_factory.mktemp("models")
    sizes = {"emb_dim": 16, "attention_dim": 16, "decoder_dim": 32, "decoder_lr": 1e-2}
    train.train(
        train.Settings(str(prepared), str(output), "efficientnet_lite0", epochs=4, workers=0, **sizes)
    )
    return output


def assert_one_line(result: subprocess.CompletedProcess, *parts) -> None:
    """The script ended with exit status 2 and one line of error that has the `parts` in it."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for part in parts:
        assert str(part) in lines[0], result.stderr


@pytest.fixture
def run_script():
    """Run a real script from the repository root: run_script("train.py", "--epochs", 1)."""

    def run(*arguments, cwd=ROOT) -> subprocess.CompletedProcess:
        script, *rest = [str(argument) for argument in arguments]
        command = [sys.executable, str(ROOT / script), *rest]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)

    return run
