"""Replaced, touched, missing and added images: the pipeline does again what they change, and nothing else."""

import os
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import small_settings
from PIL import Image

import create_input_files as preparation
import run_pipeline
import train
from captioning.data import fingerprints
from captioning.data.fingerprints import (
    IMAGE_FILES,
    files_are_as_recorded,
    images_are_as_prepared,
    is_same_training_data,
    list_image_files,
    record_image_files,
    stamp_files,
    stamp_times,
)
from captioning.data.prepared import Prepared, Record, training_data
from utils import read_json, write_json


def touch(path, seconds: int = 10) -> None:
    """Another time of change, as after a copy."""
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns + seconds * 10**9))


def replace_image(path) -> None:
    """Another image in a file of the same name, size and time."""
    status = path.stat()
    size, time_ns = status.st_size, status.st_mtime_ns
    with Image.open(path) as image:
        flipped = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    for quality in range(95, 20, -5):
        flipped.save(path, "JPEG", quality=quality)
        if path.stat().st_size <= size:
            break
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    os.utime(path, ns=(time_ns, time_ns + 10**9))


@pytest.fixture
def data(demo, tmp_path):
    """A copy of the demonstration set, with a missing image, prepared: its folder and the settings."""
    copy = tmp_path / "demo"
    shutil.copytree(demo, copy)
    missing = copy / "train" / "train" / "train_0005.jpg"
    missing.rename(tmp_path / "missing.jpg")
    settings = preparation.Settings(
        str(copy / "train.csv"), str(copy / "train" / "train"), output_folder=str(tmp_path / "data"),
        min_word_freq=1, image_size=64, val_fraction=0.2,
    )  # fmt: skip
    preparation.create_input_files(settings)
    return copy, settings


def test_images_that_change_are_noticed(data):
    copy, settings = data
    images = copy / "train" / "train"
    assert preparation.is_prepared(settings)
    touch(images / "train_0003.jpg")
    touch(copy / "test" / "test" / "test_0002.jpg")
    before = read_json(f"{settings.output_folder}/{IMAGE_FILES}")
    assert preparation.is_prepared(settings), "the contents are the same"
    after = read_json(f"{settings.output_folder}/{IMAGE_FILES}")
    assert after != before and preparation.is_prepared(settings)
    (images / "notes.txt").write_text("no image")
    assert preparation.is_prepared(settings)

    def noticed(change, undo) -> None:
        change()
        assert not preparation.is_prepared(settings)
        undo()
        assert preparation.is_prepared(settings)

    photo, kept = images / "train_0003.jpg", copy / "kept.jpg"
    shutil.copy2(photo, kept)
    noticed(lambda: replace_image(photo), lambda: shutil.copy2(kept, photo))
    noticed(lambda: photo.unlink(), lambda: shutil.copy2(kept, photo))
    added = images / "train_0005.jpg"
    noticed(lambda: shutil.copy2(kept, added), lambda: added.unlink())
    test_photo = copy / "test" / "test" / "test_0003.jpg"
    shutil.copy2(test_photo, kept)
    noticed(lambda: replace_image(test_photo), lambda: shutil.copy2(kept, test_photo))


def test_a_preparation_of_before_is_made_once_more(data):
    _, settings = data
    file = f"{settings.output_folder}/{IMAGE_FILES}"
    for content in (None, [], {"stamps": {"a": ["x"]}, "others": None}, {"stamps": 1}):
        write_json(file, content)
        assert not preparation.is_prepared(settings)
    os.unlink(file)
    assert not preparation.is_prepared(settings)


def test_a_training_is_known_by_its_data_and_not_by_times(data, tmp_path):
    copy, settings = data
    output = tmp_path / "models"
    wanted = small_settings(settings.output_folder, output, epochs=1)
    train.train(wanted)

    def is_same() -> bool:
        record = Prepared(settings.output_folder).record
        found = run_pipeline.find_earlier_run(
            wanted, lambda checkpoint: is_same_training_data(checkpoint["data"], record)
        )
        return not found.obstacles

    assert is_same()
    touch(copy / "train.csv")  # other inputs, and the same captions
    preparation.create_input_files(settings)
    assert is_same()
    replace_image(copy / "test" / "test" / "test_0003.jpg")
    preparation.create_input_files(settings)
    assert is_same(), "no training looks at the test images"
    replace_image(copy / "train" / "train" / "train_0003.jpg")
    preparation.create_input_files(settings)
    assert not is_same()
    preparation.create_input_files(replace(settings, seed=5))
    assert not is_same()


def test_training_data_of_earlier_releases_are_known_by_their_inputs(data):
    record = Prepared(data[1].output_folder).record
    earlier = {name: record[name] for name in ("settings", "inputs")}
    assert is_same_training_data(earlier, record) and is_same_training_data(training_data(record), record)
    assert not is_same_training_data(earlier | {"inputs": {}}, record)
    assert not is_same_training_data(None, record)


def test_captions_are_of_these_images_models_and_lists(tmp_path):
    files = [tmp_path / name for name in ("a.jpg", "b.jpg", "model.pth", "s.csv")]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * 100)
    recorded = stamp_files([*files, tmp_path / "none"])
    assert files_are_as_recorded(recorded, [*files, tmp_path / "none"])
    for file in files:
        touch(file)
    assert files_are_as_recorded(recorded, files)
    assert not files_are_as_recorded(recorded, files[1:])
    for content in (b"\xff" * 100, b"\0" * 99):
        files[0].write_bytes(content)
        touch(files[0])
        assert not files_are_as_recorded(recorded, files)
    for damaged in (None, [], {"a": 1}, {str(file): [100, 5] for file in files}):
        assert not files_are_as_recorded(damaged, files)


def test_links_to_folders_are_followed_and_no_circles(tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "far").mkdir()
    for path in ("images/a.jpg", "images/sub/b.PNG", "far/c.webp", "images/.hidden/d.jpg", "images/e.txt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "images" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "images")
    found = {os.path.relpath(path, tmp_path) for path in list_image_files([tmp_path / "images"])}
    assert found == {"images/a.jpg", "images/sub/b.PNG", "images/link/c.webp"}
    assert list(list_image_files([tmp_path / "none", tmp_path / "images" / "a.jpg"])) == []


def test_unchanged_images_are_not_opened(tmp_path, monkeypatch):
    """So that a rerun on many of them costs little: benchmarks/preparation_speed.py."""
    for number in range(20):
        (tmp_path / f"img_{number:06d}.jpg").touch()
    records = [Record(path, path) for path in list_image_files([tmp_path])]
    (tmp_path / "data").mkdir()
    write_json(tmp_path / "data" / IMAGE_FILES, record_image_files([*records, Record("m", None)], [tmp_path]))
    data = Prepared.__new__(Prepared)  # nothing else of it is looked at
    data.folder = tmp_path / "data"
    monkeypatch.setattr(fingerprints, "digest_file", None)
    monkeypatch.setattr(fingerprints, "read_image", None)
    assert images_are_as_prepared(data, [tmp_path])
    recorded = {path: [*stamp, ""] for path, stamp in stamp_times(record.path for record in records).items()}
    assert files_are_as_recorded(recorded, recorded)


@pytest.mark.slow
def test_the_pipeline_does_again_what_changed_images_change(demo, tmp_path, run_main, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "d"
    shutil.copytree(demo, copy)
    given = ["--annotations", copy / "train.csv", "--image_folder", copy / "train/train", "--epochs", 1]
    given += ["--test_folder", copy / "test/test", "--encoder_name", "efficientnet_lite0", "--blip_epochs", 1]
    given += ["--image_size", 32, "--min_word_freq", 1, "--emb_dim", 8, "--decoder_dim", 8, "--workers", 1]
    given += ["--model", "both", "--blip_base", "tiny", "--beam_size", 1]

    def steps() -> str:
        """For each step an s where it was skipped, else an r."""
        result = run_main(run_pipeline, *given)
        assert result.returncode == 0, result.stderr
        lines = [line for line in result.stdout.splitlines() if line.startswith("[")]
        return "".join("s" if line.endswith("skipped") else "r" for line in lines[1:])

    assert steps() == "rrrrr"
    assert steps() == "sssss"
    for folder in ("train/train", "test/test"):
        for path in (copy / folder).iterdir():
            touch(path)
    assert steps() == "sssss"
    replace_image(copy / "test/test" / "test_0003.jpg")
    assert steps() == "rsrsr"  # prepared test images, captions of both
    replace_image(copy / "train/train" / "train_0003.jpg")
    assert steps() == "rrrrr"
    assert steps() == "sssss"


def test_the_picture_is_another_one(data):
    """What these tests stand on."""
    path = data[0] / "train" / "train" / "train_0003.jpg"
    before, size = np.asarray(Image.open(path)), path.stat().st_size
    replace_image(path)
    assert (
        path.stat().st_size == size and np.abs(np.asarray(Image.open(path)).astype(int) - before).max() > 50
    )
