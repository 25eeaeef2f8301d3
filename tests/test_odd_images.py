"""Every script that reads images, on images that are too long, too small, too large, or cannot be read.

Each is taken or named, and the rest of the folder goes on.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, assert_one_line
from PIL import Image

import caption
import caption_from_checkpoint
import create_input_files
import direct_caption
import eval as evaluation
import train_model
import view_captions
from captioning.captioners.attention import Captioner

GOOD = {
    "long.png": (30000, 40),
    "high.jpg": (40, 30000),
    "dot.png": (1, 1),
    "grey.jpg": (64, 48),
    "other.webp": (9, 5),
}
BAD = ("bomb.png", "pipe.png", "text.jpg", "phone.heic")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder of images and captions.csv."""
    folder = tmp_path_factory.mktemp("odd")
    images = folder / "images"
    images.mkdir()
    for number, (name, size) in enumerate(GOOD.items()):
        mode = "L" if name.startswith("grey") else "RGB"
        Image.new(mode, size, 90 if mode == "L" else (200, 30 * number, 60)).save(images / name)
    Image.new("1", (30000, 10000)).save(images / "bomb.png")
    os.mkfifo(images / "pipe.png")
    (images / "text.jpg").write_text("404 not found")
    (images / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    with (folder / "captions.csv").open("w", newline="") as stream:
        rows = [(Path(name).stem, f"a {word} dog") for name in (*GOOD, *BAD) for word in ("red", "small")]
        csv.writer(stream).writerows([("image_id", "caption"), *rows])
    return folder


def assert_named(result, status: int = 0) -> None:
    """No traceback, and each bad image is named."""
    said = result.stdout + result.stderr
    assert result.returncode == status, said
    assert "Traceback" not in said and "Warning" not in said, said
    for name in BAD:
        assert name in said, (name, said)


def test_preparation(odd, tmp_path, run_main):
    result = run_main(
        create_input_files, "--annotations", odd / "captions.csv", "--image_folder", odd / "images",
        "--output_folder", tmp_path, "--min_word_freq", 1, "--image_size", 32, "--val_fraction", 0.2,
    )  # fmt: skip
    assert_named(result)
    assert "train 4 images" in result.stdout and "val   1 images" in result.stdout


def test_training_of_blip(odd, tmp_path, run_main):
    result = run_main(
        train_model, "--annotations", odd / "captions.csv", "--image_folder", odd / "images", "--epochs", 1,
        "--base_model", "tiny", "--output_folder", tmp_path, "--val_fraction", 0.2, "--workers", 1,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    log = (tmp_path / "train.log").read_text()
    assert all(name in log for name in BAD) and "Traceback" not in result.stderr


@pytest.mark.parametrize("script", [caption, caption_from_checkpoint, direct_caption])
def test_captions_of_a_folder(script, odd, models, blip_folder, tmp_path, run_main):
    model = {
        caption: ("--model", models / "best_checkpoint.pth"),
        caption_from_checkpoint: ("--checkpoint", models / "best_checkpoint.pth"),
        direct_caption: ("--model_path", blip_folder, "--checks", "none"),
    }[script]
    output = tmp_path / "captions.csv"
    result = run_main(script, *model, "--test_folder", odd / "images", "--output_csv", output)
    assert_named(result, status=1)
    assert f"{len(GOOD)} images captioned, {len(BAD)} without a caption" in result.stdout
    with output.open(newline="") as stream:
        captions = {row["image_id"]: row["caption"] for row in csv.DictReader(stream)}
    assert len(captions) == len(GOOD) + len(BAD) and not any(captions[Path(name).stem] for name in BAD)


MEASURE = """
import json, resource, sys, time
from pathlib import Path
import numpy as np
from captioning.captioners.loading import load_captioner
from captioning.data.images import check_image, read_image
from captioning.data.annotations import Record
from captioning.report import figures, gallery
blip, found = load_captioner(sys.argv[1]), []
for file in (sys.argv[2], *sys.argv[2:4]):  # at first, much is imported and cached
    began = time.process_time()
    check_image(file)
    read_image(file, 256)
    blip.prepare(file)
    figures.draw_attention(sys.argv[4] + "/a.png", file, ["a", "dog", "runs"], np.ones((3, 14, 14)))
    gallery.write_thumbnails(Path(sys.argv[4]), [Record("a", file)])
    found.append((time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))
print(json.dumps(found))
"""


def test_a_large_photograph_costs_little_more_than_a_small_one(blip_folder, tmp_path):
    """All that the captioning of one image of 12 megapixels does with it, beside the models' work."""
    small = Image.effect_mandelbrot((500, 375), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    small.save(tmp_path / "small.jpg")
    small.resize((4000, 3000)).save(tmp_path / "large.jpg", quality=90)
    files = (blip_folder, tmp_path / "small.jpg", tmp_path / "large.jpg", tmp_path)
    command = [sys.executable, "-c", MEASURE, *map(str, files)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    _, (small_time, before), (large_time, after) = json.loads(result.stdout)
    assert after - before < 0.15 and large_time - small_time < 2  # gigabytes, seconds


def test_one_picture_in_lossless_formats_has_one_caption(demo, models, tmp_path):
    image = Image.open(demo / "test" / "test" / "test_0001.jpg").convert("RGB")
    turned, exif = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # to be turned right by a quarter
    files = {
        "a.png": {},
        "a.webp": {"lossless": True},
        "a.tif": {},
        "a.bmp": {},
        "turned.png": {"exif": exif},
    }
    for name, options in files.items():
        (turned if "exif" in options else image).save(tmp_path / name, **options)
    captioner = Captioner.load(models)
    found = captioner.caption([tmp_path / name for name in files], details=True, min_length=3)
    assert len({(one.text, one.log_prob) for one in found}) == 1 and found[0].text


@pytest.mark.parametrize("script", [caption, direct_caption])
def test_single_images(script, odd, models, blip_folder, tmp_path, run_main, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ("--model", models / "best_checkpoint.pth")
    model = model if script is caption else ("--model_path", blip_folder)
    for name in GOOD:
        result = run_main(script, odd / "images" / name, *model)
        assert result.returncode == 0, result.stderr
        figure = np.asarray(Image.open(f"attention_{Path(name).stem}.png").convert("RGB"))
        assert min(figure.shape[:2]) > 20
    for name in BAD:
        assert_one_line(run_main(script, odd / "images" / name, *model), name)


def test_galleries(odd, models, tmp_path, run_main):
    result = run_main(
        view_captions, "--checkpoint", models / "best_checkpoint.pth", "--references", odd / "captions.csv",
        "--image_folder", odd / "images", "--output_folder", tmp_path / "g", "--figures", tmp_path / "f",
    )  # fmt: skip
    assert_named(result)
    assert len(list((tmp_path / "g" / "images").iterdir())) == len(GOOD)
    assert len(list((tmp_path / "f").glob("0*.png"))) == len(GOOD)
    for name in GOOD:
        result = run_main(
            view_captions, "--checkpoint", models / "best_checkpoint.pth", "--img", odd / "images" / name,
            "--output_folder", tmp_path / "one",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr


def test_the_worst_captions(odd, tmp_path, run_main, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [(Path(name).stem, "a cat") for name in (*GOOD, *BAD)]
    with open("captions.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([("image_id", "caption"), *rows])
    result = run_main(
        evaluation, "--submission", "captions.csv", "--references", odd / "captions.csv",
        "--image_folder", odd / "images", "--worst", len(rows),
    )  # fmt: skip
    assert_named(result)
    assert Path("worst.png").is_file()
