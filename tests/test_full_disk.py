"""Every script that writes, on a full disk, under a limit of file sizes and on a read-only disk: one line and
exit status 2, the old files whole, the work so far kept, nothing unfinished left."""

import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import assert_one_line, without_progress
from PIL import Image

import caption
import caption_from_checkpoint
import create_input_files
import direct_caption
import eval as evaluation
import make_demo_data
import run_pipeline
import train
import train_model
import view_captions
from captioning.annotations import read_annotations
from captioning.submissions import write_submission

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


@pytest.fixture(scope="module")
def captions(demo, tmp_path_factory) -> Path:
    """The first reference of each test image as a file of captions."""
    file = tmp_path_factory.mktemp("captions") / "captions.csv"
    records = read_annotations(demo / "test_captions.csv")
    write_submission(file, [(record.image_id, record.captions[0]) for record in records])
    return file


@pytest.fixture
def work(demo, prepared, models, blip_folder, captions):
    """By name a script and its options, with `OUT` for the folder that it writes to."""
    annotations = f"--annotations {demo}/train.csv --image_folder {demo}/train/train"
    small = "--encoder_name efficientnet_lite0 --encoder_weights none --emb_dim 8 --decoder_dim 16 --epochs 1"
    tiny = "--base_model tiny --epochs 1 --batch_size 16 --captions_per_image 1"
    tests, best = f"{demo}/test/test", f"{models}/best_checkpoint.pth"
    scoring = f"--submission {captions} --references {demo}/test_captions.csv --image_folder {tests}"
    few, greedy = "--image_size 64 --min_word_freq 1", "--beam_size 1"
    results = f"--data_folder OUT/data --output_folder OUT/model --output_csv OUT/a.csv --test_folder {tests}"
    lines = {
        "preparation": (create_input_files, f"{annotations} {few} --output_folder OUT/data"),
        "demonstration": (make_demo_data, "--output_folder OUT/demo --train_images 20 --test_images 10"),
        "training": (train, f"--data_folder {prepared} --output_folder OUT/model {small}"),
        "features": (train, f"--data_folder OUT/data --output_folder {prepared}/../m {small} --seed 5"),
        "BLIP training": (train_model, f"{annotations} --output_folder OUT/blip {tiny}"),
        "BLIP features": (train_model, f"{annotations} --output_folder OUT/blip {tiny} --freeze_vision"),
        "scores": (evaluation, f"{scoring} --output_json OUT/scores.json"),
        "scores per image": (evaluation, f"{scoring} --per_image_csv OUT/scores.csv"),
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
        "BLIP": (direct_caption, f"--model_path {blip_folder} --test_folder {tests} --output_csv OUT/a.json"),
        "gallery": (view_captions, f"{scoring} --output_folder OUT/gallery"),
        "figures": (
            view_captions,
            f"--checkpoint {best} --data_folder {prepared} --limit 2 --output_folder OUT/gallery "
            f"--figures OUT/figures",
        ),
        "pipeline": (run_pipeline, f"{annotations} {results} {small} {few} {greedy}"),
    }
    return {name: (script, options.split()) for name, (script, options) in lines.items()}


def prepare_folder(name: str, out: Path, demo: Path, prepared: Path) -> None:
    """Put into the folder what a script takes from there."""
    out.mkdir(exist_ok=True)
    if name == "sidecars":
        shutil.copytree(demo / "test" / "test", out / "photos")
    if name == "features":
        shutil.copytree(prepared, out / "data", ignore=shutil.ignore_patterns("*features*"))


QUICK = ("preparation", "demonstration", "scores", "scores per image", "worst", "captions", "sidecars",
         "figure", "checkpoint", "BLIP", "gallery", "figures")  # fmt: skip
SLOW = ("training", "features", "BLIP training", "BLIP features", "pipeline")
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


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


@pytest.mark.parametrize("name", NAMES)
def test_a_limit_of_file_sizes(name, work, demo, prepared, run_main, tmp_path):
    script, options = work[name]
    prepare_folder(name, tmp_path / "out", demo, prepared)
    arguments = [option.replace("OUT", str(tmp_path / "out")) for option in options]
    before, refusals = contents(tmp_path / "out"), 0
    for limit in (0, 30, 3000, 100_000):
        with file_size_limit(limit):
            result = without_progress(run_main(script, *arguments))
        if result.returncode == 0:  # all its files are smaller
            break
        assert_one_line(result, "File too large")
        check_nothing_is_lost(before, tmp_path / "out")
        refusals += 1
    assert refusals


@pytest.mark.parametrize("name", NAMES)
def test_a_full_and_a_read_only_disk(name, work, demo, prepared, run_main, tmp_path):
    script, options = work[name]
    disk = tmp_path / "disk"
    out = disk / "out"
    arguments = [option.replace("OUT", str(out)) for option in options]
    with small_disk(disk, 150_000_000):
        prepare_folder(name, out, demo, prepared)
        result = run_main(script, *arguments)
        assert result.returncode == 0, result.stderr
        before, refusals = contents(out), 0
        if name == "demonstration":
            arguments += ["--train_images", "60"]  # as many would take the place of those that are there
            before = {}  # they are replaced one by one
        for free in (0, 10_000, 100_000, 1_000_000, 10_000_000):
            (disk / "other").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - free)))
            result = without_progress(run_main(script, *arguments))
            (disk / "other").unlink()
            if result.returncode == 0:
                break
            assert_one_line(result)
            assert "No space left on device" in result.stderr or "GB free" in result.stderr, result.stderr
            check_nothing_is_lost(before, out)
            refusals += 1
        nothing_to_write = name in ("pipeline", "features")  # up to date
        assert refusals or nothing_to_write
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        result = without_progress(run_main(script, *arguments))
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        if result.returncode or not nothing_to_write:
            assert_one_line(result)
            assert "Read-only" in result.stderr or "can be written" in result.stderr
        check_nothing_is_lost(before, out)
