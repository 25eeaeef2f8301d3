import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: test processes share the cores

import csv
import gzip
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch

import create_input_files
import make_demo_data
import train
from captioning import command_line
from captioning.data.annotations import read_annotations
from captioning.data.text_files import say_once
from metrics import Meteor, MeteorDataError
from metrics.meteor_data import find_data

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(autouse=True)
def fresh_process():
    """Each test as if it were the first of its process."""
    torch.manual_seed(0)
    say_once.cache_clear()


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """A small demonstration set, drawn as users draw it."""
    return draw_demo(tmp_path_factory.mktemp("data") / "demo", 40, 12)


def draw_demo(folder: Path, train_images: int, test_images: int) -> Path:
    make_demo_data.make_demo_data(make_demo_data.Settings(str(folder), train_images, test_images))
    return folder


@pytest.fixture(scope="session")
def demo_captions(demo) -> list[list[str]]:
    """The five captions of each of the demonstration's training images."""
    return [record.captions for record in read_annotations(demo / "train.csv")]


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


def random_captions(images: int, group: int, words: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions (N, G, longest) of words from 1 to `words`, padded with 0, and their lengths (N, G), 3 to
    `longest`."""
    lengths = torch.randint(3, longest + 1, (images, group))
    captions = torch.randint(1, words + 1, (images, group, longest))
    return captions * (torch.arange(longest) < lengths.unsqueeze(2)), lengths


def small_settings(prepared: Path, output: Path, **options) -> train.Settings:
    """Settings of train.py for a short training on the prepared demonstration set."""
    sizes = {"emb_dim": 32, "attention_dim": 32, "decoder_dim": 64, "decoder_lr": 4e-3, "alpha_c": 0.1}
    names = {"data_folder": str(prepared), "output_folder": str(output), "encoder_name": "efficientnet_lite0"}
    return train.Settings(**names | sizes | {"workers": 0, "epochs": 2} | options)


def blip_settings(demo: Path, output: Path, **options):
    """Settings of train_model.py for a short training of the tiny BLIP on the demonstration set."""
    import train_model

    names = {"annotations": str(demo / "train.csv"), "image_folder": str(demo / "train" / "train")}
    names |= {"base_model": "tiny", "output_folder": str(output)}
    few = {"epochs": 2, "patience": 0, "workers": 2, "batch_size": 8, "captions_per_image": 1}
    return train_model.Settings(**names | few | options)


TWO_PROCESSES = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def as_arguments(settings) -> list[str]:
    """The arguments that give a script these settings; a tuple that is empty is one by default."""
    arguments = []
    for name, value in asdict(settings).items():
        if isinstance(value, tuple):
            arguments += [f"--{name}", *map(str, value)] if value else []
        else:
            arguments.append(f"--{name}={value}")
    return arguments


def read_history(output: Path) -> list[dict[str, float]]:
    """The lines of a training's history.csv."""
    with (output / "history.csv").open() as stream:
        lines = csv.DictReader(stream)
        return [{name: float(value) for name, value in line.items() if value} for line in lines]


@pytest.fixture(scope="session")
def blip_folder(demo, tmp_path_factory) -> Path:
    """A tiny BLIP with random weights: its captions are nonsense, its numbers are numbers."""
    from captioning.captioners.blip import tiny_captioner
    from captioning.data.annotations import read_annotations

    torch.manual_seed(3)
    captions = [caption for record in read_annotations(demo / "train.csv") for caption in record.captions]
    folder = tmp_path_factory.mktemp("tiny") / "blip"
    tiny_captioner(captions).save(folder)
    return folder


def assert_one_line(result: subprocess.CompletedProcess, *parts) -> None:
    """The script ended with exit status 2 and one line of error that has the `parts` in it."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for part in parts:
        assert str(part) in lines[0], result.stderr


def without_progress(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    lines = [line.split("\r")[-1] for line in result.stderr.splitlines()]
    lines = [line for line in lines if not line.rstrip("]").endswith(("image/s", "?image/s", "step/s"))]
    result.stderr = "\n".join(line for line in lines if "|" not in line)
    return result


@pytest.fixture
def run_script():
    """Run a real script from the repository root: run_script("train.py", "--epochs", 1)."""

    def run(*arguments, cwd=ROOT) -> subprocess.CompletedProcess:
        script, *rest = [str(argument) for argument in arguments]
        command = [sys.executable, str(ROOT / script), *rest]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def keep_signals():
    """What `run_script` makes of Ctrl-C and SIGTERM ends with the test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run_main(monkeypatch, capsys, keep_signals):
    """As `run_script`, but in this process and without its imports: run_main(train, "--epochs", 1)."""

    def run(script: ModuleType, *arguments) -> subprocess.CompletedProcess:
        command = [f"{script.__name__}.py", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command_line.run_script(script.main, script.Settings)
        return subprocess.CompletedProcess(command, ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def meteor_cache(tmp_path_factory) -> Path:
    """A cache directory in which METEOR's paraphrase table is built once for all tests."""
    folder = tmp_path_factory.mktemp("meteor")
    try:
        Meteor(cache_dir=folder)
    except MeteorDataError as error:
        pytest.skip(str(error))
    return folder


@pytest.fixture(scope="session")
def scorer(meteor_cache) -> Meteor:
    return Meteor(cache_dir=meteor_cache)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Where METEOR's word lists and paraphrases are."""
    try:
        return find_data()
    except MeteorDataError as error:
        pytest.skip(str(error))


@pytest.fixture
def small_data(data_dir, tmp_path) -> Path:
    """A data directory with three paraphrases, so that its table is built at once."""
    pairs = [("next to", "near"), ("next to", "beside the"), ("man", "people")]
    return make_meteor_data(tmp_path / "data_dir", data_dir, pairs)


def make_meteor_data(folder: Path, data_dir: Path, pairs: list[tuple[str, str]]) -> Path:
    """A data directory with the real word lists and a paraphrase table of these pairs."""
    (folder / "data").mkdir(parents=True)
    shutil.copy(data_dir / "meteor-1.5.jar", folder)
    lines = "".join(f"0.5\n{source}\n{target}\n" for source, target in pairs)
    (folder / "data" / "paraphrase-en.gz").write_bytes(gzip.compress(lines.encode(), 1))
    return folder
