"""Every script that writes, on a full disk, under a limit of file sizes and on a read-only disk: one line and
exit status 2, the old files whole, the work so far kept, nothing unfinished left."""

import json
import shutil
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import assert_one_line, without_progress
from PIL import Image
from tutorial_files import WORD_MAP, make_tutorial, save

import caption
import caption_from_checkpoint
import convert_checkpoint
import create_input_files
import direct_caption
import eval as evaluation
import make_demo_data
import run_pipeline
import train
import train_model
import view_captions
from captioning.data.annotations import read_annotations
from captioning.data.submissions import write_submission

resource = pytest.importorskip("resource")


@contextmanager
def file_size_limit(size: int):
    """As `ulimit -f` does, in bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def small_disk(folder: Path, size: int):
    """A file system of so many bytes in a folder; only root can make one."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        result = subprocess.run(command, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if result.returncode:
        pytest.skip("only root can mount a small disk, and not in every container")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def change_disk(folder: Path, option: str) -> None:
    """Give a `small_disk` another size, or make it read-only, with all that is on it."""
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


@pytest.fixture(scope="module")
def captions(demo, tmp_path_factory) -> Path:
    """The first reference of each test image as a file of captions."""
    file = tmp_path_factory.mktemp("captions") / "captions.csv"
    records = read_annotations(demo / "test_captions.csv")
    write_submission(file, [(record.image_id, record.captions[0]) for record in records])
    return file


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory) -> str:
    """The options of convert_checkpoint.py for a checkpoint as the 2018 tutorial has it."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "words.json").write_text(json.dumps(WORD_MAP))
    file = save(make_tutorial(), folder / "tutorial.pth.tar", "legacy")
    return f"--checkpoint {file} --word_map {folder}/words.json"


@pytest.fixture
def work(demo, prepared, models, blip_folder, captions, tutorial):
    """By name a script and its options, with `OUT` for the folder that it writes to."""
    annotations = f"--annotations {demo}/train.csv --image_folder {demo}/train/train"
    small = "--encoder_name efficientnet_lite0 --encoder_weights none --emb_dim 8 --decoder_dim 16 --epochs 1"
    alone = f"{small} --workers 0"  # what loader processes send is limited in size too
    tiny = "--base_model tiny --epochs 1 --batch_size 16 --captions_per_image 1"
    tests, best = f"{demo}/test/test", f"{models}/best_checkpoint.pth"
    scoring = f"--submission {captions} --references {demo}/test_captions.csv --image_folder {tests}"
    few, greedy = "--image_size 64 --min_word_freq 1", "--beam_size 1"
    results = "--data_folder OUT/data --output_folder OUT/model --output_csv OUT/a.csv"
    attention = f"{results} {small} {few} {greedy}"
    blip = "--model blip --blip_base tiny --blip_folder OUT/blip --blip_csv OUT/b.csv --blip_epochs 1"
    lines = {
        "preparation": (create_input_files, f"{annotations} {few} --output_folder OUT/data"),
        "demonstration": (make_demo_data, "--output_folder OUT/demo --train_images 20 --test_images 10"),
        "conversion": (convert_checkpoint, f"{tutorial} --output OUT/tutorial.pth"),
        "training": (train, f"--data_folder {prepared} --output_folder OUT/model {alone}"),
        "state": (train, f"--data_folder {prepared} --output_folder OUT/model {alone} --save_every 1e-6"),
        "features": (train, f"--data_folder OUT/data --output_folder {prepared}/../m {alone} --seed 5"),
        "BLIP training": (train_model, f"{annotations} --output_folder OUT/blip {tiny}"),
        "BLIP features": (train_model, f"{annotations} --output_folder OUT/blip {tiny} --freeze_vision"),
        "scores": (evaluation, f"{scoring} --output_json OUT/scores.json"),
        "scores per image": (evaluation, f"{scoring} --per_image_csv OUT/scores.csv"),
        "scored captions": (
            evaluation,
            f"--checkpoint {best} --data_folder {prepared} --beam_sizes 1 --output_captions OUT/a.csv",
        ),
        "worst": (evaluation, f"{scoring} --worst 2 --figure OUT/worst.png"),
        "captions": (caption, f"--model {best} --test_folder {tests} --output_csv OUT/a.csv {greedy}"),
        "sidecars": (
            caption,
            f"--model {best} --test_folder OUT/photos --sidecars {greedy} --existing overwrite",
        ),
        "figure": (caption, f"--model {best} --img {tests}/test_0001.jpg --figure OUT/a.png"),
        "checkpoint": (
            caption_from_checkpoint,
            f"--checkpoint {best} --test_folder {tests} --output_csv OUT/a.jsonl {greedy}",
        ),
        "BLIP": (
            direct_caption,
            f"--model_path {blip_folder} --test_folder {tests} --output_csv OUT/a.json --checks none",
        ),
        "gallery": (view_captions, f"{scoring} --output_folder OUT/gallery"),
        "one image": (
            view_captions,
            f"--checkpoint {best} --img {tests}/test_0001.jpg --output_folder OUT/gallery",
        ),
        "figures": (
            view_captions,
            f"--checkpoint {best} --data_folder {prepared} --limit 2 --output_folder OUT/gallery "
            f"--figures OUT/figures",
        ),
        "pipeline": (run_pipeline, f"{annotations} --test_folder {tests} {attention}"),
        "pipeline of BLIP": (run_pipeline, f"{annotations} --test_folder {tests} {blip}"),
        "pipeline of the demonstration": (run_pipeline, f"--demo_images 20 {attention}"),
    }
    return {name: (script, options.split()) for name, (script, options) in lines.items()}


@pytest.fixture
def run_form(work, demo, prepared, run_main, tmp_path, monkeypatch):
    """By name what runs a form, in the folder that it writes to, with what it takes from there."""

    def start(name: str, out: Path) -> Callable[..., subprocess.CompletedProcess]:
        out.mkdir(exist_ok=True)
        if name == "sidecars":
            shutil.copytree(demo / "test" / "test", out / "photos")
        if name == "features":
            shutil.copytree(prepared, out / "data", ignore=shutil.ignore_patterns("*features*"))
        monkeypatch.chdir(out)
        script, options = work[name]
        arguments = [option.replace("OUT", str(out)) for option in options]
        return lambda *more: without_progress(run_main(script, *arguments, *more))

    return start


QUICK = ("preparation", "demonstration", "conversion", "scores", "scores per image", "scored captions",
         "worst", "captions", "sidecars", "figure", "checkpoint", "BLIP", "gallery", "one image",
         "figures")  # fmt: skip
SLOW = ("training", "state", "features", "BLIP training", "BLIP features", "pipeline", "pipeline of BLIP",
        "pipeline of the demonstration")  # fmt: skip
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
LARGER = ("conversion", "training", "state", "pipeline", "pipeline of the demonstration")  # than 20 MB
CHANGED = {  # by which a form that has run before has something else to write
    "demonstration": ("--train_images", "60"),
    "features": ("--cached_views", "2"),
    "pipeline": ("--emb_dim", "12"),
    "pipeline of BLIP": ("--blip_learning_rate", "0.001"),
    "pipeline of the demonstration": ("--emb_dim", "12"),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_nothing_is_lost(before: dict[str, bytes], out: Path) -> None:
    """Old files are whole, wherever they are now, and nothing unfinished is there but encoded features."""
    after = contents(out)
    assert not [path for path in after if (".partial" in path and "features" not in path) or ".lock" in path]
    lost = [path for path, content in before.items() if content not in after.values()]
    assert not [path for path in lost if not path.endswith(("train.log", "curves.png", ".hdf5"))]
    for path in [*out.rglob("*.jpg"), *out.rglob("*.png")]:
        Image.open(path).load()


def assert_refused(result, before: dict[str, bytes], out: Path, *parts: str) -> None:
    """One line that has one of the `parts` in it and names a file or folder; nothing is lost."""
    assert_one_line(result)
    assert "while writing" not in result.stderr
    assert any(part in result.stderr for part in parts), result.stderr
    check_nothing_is_lost(before, out)


@pytest.mark.parametrize("name", NAMES)
def test_a_limit_of_file_sizes(name, run_form, tmp_path):
    out = tmp_path / "out"
    run = run_form(name, out)
    before, refusals = contents(out), 0
    for limit in (0, 30, 3000, 100_000, resource.RLIM_INFINITY):
        with file_size_limit(limit):
            result = run()
        if result.returncode == 0:  # all its files are smaller
            break
        assert_refused(result, before, out, "File too large")
        refusals += 1
    assert refusals and result.returncode == 0, result.stderr
    before = {} if name == "demonstration" else contents(out)  # whose files are replaced one by one
    with file_size_limit(0):
        result = run()
    if result.returncode or name not in CHANGED:
        assert_refused(result, before, out, "File too large")


@pytest.mark.parametrize("name", NAMES)
def test_a_full_and_a_read_only_disk(name, run_form, tmp_path):
    disk = tmp_path / "disk"
    out = disk / "out"
    full = "No space left on device", " free, "
    with small_disk(disk, 20_000_000):
        run = run_form(name, out)
        before = contents(out)
        result = run()
        assert bool(result.returncode) == (name in LARGER), result.stderr
        if result.returncode:
            assert_refused(result, before, out, *full)
            change_disk(disk, "size=200000000")
            result = run()
        assert result.returncode == 0, result.stderr
        before, refusals, more = contents(out), 0, CHANGED.get(name, ())
        if name == "demonstration":
            before = {}  # whose files are replaced one by one
        for free in (0, 4096, 20_000, 100_000, 1_000_000, 10_000_000):
            change_disk(disk, f"size={shutil.disk_usage(disk).used + free}")
            result = run(*more)
            if result.returncode == 0:
                break
            assert_refused(result, before, out, *full)
            refusals += 1
        assert refusals
        change_disk(disk, "ro")
        result = run(*more)
        change_disk(disk, "rw")
        if result.returncode or name != "features":  # which are written by now
            assert_refused(result, before, out, "Read-only", "can be written")
