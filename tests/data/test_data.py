"""Annotation readers, images, preparation, data sets and feature caches, on real files."""

import csv
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import skimage
import torch
from conftest import ROOT, SHARED
from PIL import Image

import create_input_files as preparation
from captioning.data.annotations import read_annotations, split_records
from captioning.data.images import list_images, natural_order, parallel_map, read_image
from captioning.data.submissions import write_submission
from datasets import CaptionDataset, Request
from utils import UserError

FLICKR, COCO = SHARED / "flickr8k_small", SHARED / "coco_small"
needs_flickr = pytest.mark.skipif(not FLICKR.is_dir(), reason="no real photographs here")
needs_coco = pytest.mark.skipif(not COCO.is_dir(), reason="no real photographs here")


# --- images -----------------------------------------------------------------------------------------------


def colourful(width: int = 40, height: int = 24) -> Image.Image:
    """Left half red, right half blue."""
    values = np.zeros((height, width, 3), np.uint8)
    values[:, : width // 2], values[:, width // 2 :] = (255, 0, 0), (0, 0, 255)
    return Image.fromarray(values)


KINDS = "a.png RGB, a.jpg RGB, a.png P, a.jpg CMYK, a.png RGBA, a.webp RGB, a.gif P, a.tif RGB"


@pytest.mark.parametrize("name, mode", [kind.split() for kind in KINDS.split(", ")])
def test_every_kind_of_image_keeps_its_colours(tmp_path, name, mode):
    colourful().convert(mode).save(tmp_path / name)
    pixels = read_image(tmp_path / name)
    assert pixels.dtype == np.uint8 and pixels.shape == (3, 24, 40)
    expected = np.asarray(colourful()).transpose(2, 0, 1).astype(int)
    inner = np.s_[:, 4:-4, [4, 10, 30, 36]]  # away from the edge, where JPEG blurs
    assert np.abs(pixels[inner].astype(int) - expected[inner]).max() < 16


def test_grey_and_deep_images(tmp_path):
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray((grey.astype(np.uint16) // 4) * 257).save(tmp_path / "dark.png")
    Image.fromarray((grey / 255).astype(np.float32)).save(tmp_path / "float.tif")
    assert (read_image(tmp_path / "grey.png") == grey).all()
    assert (read_image(tmp_path / "deep.png") == grey).all()
    assert (read_image(tmp_path / "dark.png") == grey // 4).all()
    assert (read_image(tmp_path / "float.tif") == grey).all()


def test_transparency_is_laid_on_white(tmp_path):
    image = colourful().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    image.save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 255).all()


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned right by 90 degrees
    colourful(64, 32).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels = read_image(tmp_path / "turned.jpg")
    assert pixels.shape == (3, 64, 32)
    assert pixels[0, 5, 16] > 150 and pixels[2, 58, 16] > 150  # red above, blue below


def test_large_jpeg_is_reduced_like_any_other(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    image = Image.fromarray(values).resize((1200, 1100), Image.Resampling.BICUBIC)
    image.save(tmp_path / "a.jpg", quality=95)
    image.save(tmp_path / "a.png")
    a, b = (
        read_image(tmp_path / "a.jpg", 256).astype(int),
        read_image(tmp_path / "a.png", 256).astype(int),
    )
    assert a.shape == (3, 256, 256) and np.abs(a - b).mean() < 2


@pytest.mark.parametrize("content", [b"this is text", b"", b"\xff\xd8\xff\xe0 broken"])
def test_no_image(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jpg") as error:
        read_image(tmp_path / "a.jpg", 64)
    assert "\n" not in str(error.value)


def test_truncated_image(tmp_path):
    colourful(300, 300).save(tmp_path / "a.jpg", quality=95)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:1500])
    with pytest.raises(UserError, match=r"b\.jpg"):
        read_image(tmp_path / "b.jpg", 64)


def test_natural_order_and_listing(tmp_path):
    for name in ("img10.jpg", "img2.jpg", "img1.JPG", "notes.txt"):
        colourful().save(tmp_path / name, "JPEG") if not name.endswith("txt") else (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["img1.JPG", "img2.jpg", "img10.jpg"]
    assert sorted(["b", "a10", "a9", "9"], key=natural_order) == ["9", "a9", "a10", "b"]


def test_parallel_map_keeps_order_and_few_results():
    started = []

    def square(value):
        started.append(value)
        return value * value

    results = parallel_map(square, range(1000), workers=2)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert len(started) < 30
    assert list(results) == [value * value for value in range(5, 1000)]


# --- annotations --------------------------------------------------------------------------------------------


PHOTOGRAPHS = {  # that scikit-image brings along
    "astronaut.png": ["A woman in an orange space suit.", "An astronaut smiles, a flag behind her."],
    "camera.png": ["A man looks through a camera on a tripod.", "A photographer on a lawn"],
    "chelsea.png": ["A tabby cat's face.", "The cat isn't asleep."],
    "coffee.png": ["A cup of coffee, a saucer and a spoon.", "black coffee on a table"],
    "motorcycle_left.png": ["A motorcycle in a garage.", "A red motorcycle, seen from the left"],
    "rocket.jpg": ["A rocket on its launch pad.", "Lights shine on a rocket at night."],
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """A folder with images/ and their captions in the four layouts."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "images").mkdir()
    for name in PHOTOGRAPHS:
        shutil.copy(Path(skimage.__file__).parent / "data" / name, folder / "images")
    rows = [(name, caption) for name, captions in PHOTOGRAPHS.items() for caption in captions]
    for file, id_column, ids in (("kaggle.csv", "image_id", "stem"), ("captions.txt", "image", "name")):
        with (folder / file).open("w", newline="") as stream:
            csv.writer(stream).writerow((id_column, "caption"))
            csv.writer(stream).writerows((getattr(Path(name), ids), caption) for name, caption in rows)
    splits = ["train", "restval", "train", "val", "val", "test"]
    karpathy = [
        {"filename": name, "split": split, "sentences": [
            {"raw": caption, "tokens": caption.rstrip(".").split()} for caption in captions]}
        for (name, captions), split in zip(PHOTOGRAPHS.items(), splits)
    ]  # fmt: skip
    (folder / "karpathy.json").write_text(json.dumps({"images": karpathy, "dataset": "coco"}))
    numbers = {name: 100 + number for number, name in enumerate(PHOTOGRAPHS)}
    coco = {
        "images": [{"id": number, "file_name": name} for name, number in numbers.items()],
        "annotations": [{"image_id": numbers[name], "caption": caption} for name, caption in rows],
    }
    (folder / "coco.json").write_text(json.dumps(coco))
    return folder


def test_four_layouts_of_the_same_photographs_agree(photographs):
    images = photographs / "images"
    files = ("kaggle.csv", "captions.txt", "coco.json", "karpathy.json")
    kaggle, flickr, coco, karpathy = (read_annotations(photographs / file, images) for file in files)
    for records in (kaggle, flickr, coco, karpathy):
        assert [record.path for record in records] == [str(images / name) for name in PHOTOGRAPHS]
        assert [record.captions for record in records] == list(PHOTOGRAPHS.values())
    for records in (kaggle, flickr, coco):
        assert [record.tokens for record in records] == [record.tokens for record in kaggle]
        assert not any(record.split for record in records)
    assert kaggle[2].tokens == [["a", "tabby", "cat", "'s", "face"], ["the", "cat", "is", "n't", "asleep"]]
    assert [record.image_id for record in kaggle] == [Path(name).stem for name in PHOTOGRAPHS]
    assert [record.image_id for record in flickr] == list(PHOTOGRAPHS)
    assert [record.image_id for record in coco] == ["100", "101", "102", "103", "104", "105"]
    splits = split_records(karpathy, 0.5, seed=0)  # the file's own, whatever fraction is asked for
    assert [len(splits[name]) for name in ("train", "val", "test")] == [3, 2, 1]


def test_photographs_are_prepared(photographs, tmp_path):
    """From files to arrays: another shape, grey, with transparency, a JPEG."""
    settings = preparation.Settings(
        str(photographs / "karpathy.json"), str(photographs / "images"), output_folder=str(tmp_path),
        min_word_freq=1, captions_per_image=2, image_size=96,
    )  # fmt: skip
    record = preparation.create_input_files(settings)
    assert [counts["images"] for counts in record["splits"].values()] == [3, 2, 1]
    dataset, paths = CaptionDataset(tmp_path, "train"), list(PHOTOGRAPHS)[:3]
    images, captions, _ = dataset[Request(np.arange(3), 0)]
    assert images.shape == (3, 3, 96, 96) and captions.shape[:2] == (3, 2)
    assert (images[1, 0] == images[1, 1]).all() and images.float().std(dim=(1, 2, 3)).min() > 20
    for path, image in zip(paths, images):
        assert torch.equal(image, torch.from_numpy(read_image(photographs / "images" / path, 96)))


@needs_flickr
def test_three_layouts_of_flickr8k_agree():
    kaggle = read_annotations(FLICKR / "train.csv", FLICKR / "train" / "train")
    flickr = read_annotations(FLICKR / "captions.txt", FLICKR / "train" / "train")
    karpathy = read_annotations(FLICKR / "dataset_flickr8k_small.json", FLICKR / "train" / "train")
    karpathy_train = [record for record in karpathy if record.split != "test"]
    assert len(kaggle) == len(flickr) == len(karpathy_train) == 750
    assert {r.path for r in kaggle} == {r.path for r in flickr} == {r.path for r in karpathy_train}
    assert all(r.path for r in kaggle) and all(len(r.captions) == 5 for r in kaggle)
    captions = {r.path: sorted(r.captions) for r in kaggle}
    assert captions == {r.path: sorted(r.captions) for r in flickr}
    assert kaggle[0].image_id + ".jpg" == flickr[0].image_id
    assert {r.split for r in karpathy} == {"train", "val", "test"}


@needs_coco
def test_coco_layout():
    records = read_annotations(COCO / "captions_train2017.json", COCO / "train2017")
    assert records and all(r.path and len(r.captions) >= 5 and r.image_id.isdecimal() for r in records)


def test_karpathy_details(tmp_path):
    (tmp_path / "val2014").mkdir()
    colourful().save(tmp_path / "val2014" / "x.jpg")
    sentence = {"tokens": ["A", "Dog"], "raw": "A Dog."}
    image = {"filename": "x.jpg", "filepath": "val2014", "split": "restval", "sentences": [sentence]}
    (tmp_path / "d.json").write_text(json.dumps({"images": [image], "dataset": "coco"}))
    (record,) = read_annotations(tmp_path / "d.json", tmp_path)
    assert record.path.endswith("val2014/x.jpg") and record.split == "train"
    assert record.tokens == [["a", "dog"]] and record.captions == ["A Dog."]


def test_csv_details(tmp_path):
    file = tmp_path / "train.csv"
    file.write_bytes(
        '\ufeffimage_id,caption\r\n007,"A dog, running."\r\n8,Two dogs, one cat\r\n007,\r\n'.encode()
    )
    colourful().save(tmp_path / "007.PNG")
    first, second = read_annotations(file, tmp_path)
    assert (
        first.image_id == "007" and first.path.endswith("007.PNG") and first.captions == ["A dog, running."]
    )
    assert second.path is None and second.captions == ["Two dogs, one cat"]


@pytest.mark.parametrize(
    "content, problem",
    [
        ("", "is empty"),
        ("a,b\n1,2\n", '"a,b"; looked for a header'),
        ("image_id,caption\n", "no images"),
        ("{}", 'JSON of no known layout; its first line is "{}"; looked for'),
        ("{", "not a JSON file"),
        ('{"images": [{"id": 1}], "annotations": []}', "damaged annotations .image 1 has no file_name"),
        ('{"images": [1]}', "looked for .* Karpathy's, COCO's"),
    ],
)
def test_wrong_annotation_files(tmp_path, content, problem):
    (tmp_path / "file.csv").write_text(content)
    with pytest.raises(UserError, match=problem) as error:
        read_annotations(tmp_path / "file.csv", tmp_path)
    assert "file.csv" in str(error.value) and "\n" not in str(error.value)


# --- preparation --------------------------------------------------------------------------------------------


def read_record(folder):
    return json.loads((folder / "prepared.json").read_text())


def test_prepared_files_fit_each_other(demo, prepared):
    record, word_map = read_record(prepared), json.loads((prepared / "word_map.json").read_text())
    assert record["splits"]["train"]["images"] == 32 and record["splits"]["val"]["images"] == 8
    assert record["splits"]["test"]["images"] == 12 and record["skipped"] == []
    assert word_map["<pad>"] == 0 and list(word_map)[-3:] == ["<unk>", "<start>", "<end>"]
    words = {index: word for word, index in word_map.items()}
    truth = {p.path: p for p in read_annotations(demo / "train.csv", demo / "train" / "train")}
    for split, images in (("train", 32), ("val", 8)):
        paths = json.loads((prepared / f"{split}_image_paths.json").read_text())
        dataset = CaptionDataset(prepared, split)
        assert len(dataset) == len(paths) == images
        for i in (0, images - 1):
            (pixels,), (captions,), (lengths,) = dataset[Request(np.array([i]), 0)]
            assert torch.equal(pixels, torch.from_numpy(read_image(paths[i], 64)))
            for caption, length in zip(captions.tolist(), lengths.tolist()):
                text = [words[index] for index in caption]
                assert (
                    text[0] == "<start>" and text[length - 1] == "<end>" and set(text[length:]) <= {"<pad>"}
                )
                if split == "train":  # min_word_freq is 1
                    assert text[1 : length - 1] in truth[paths[i]].tokens


def test_words_are_counted_on_the_training_split_alone(tmp_path):
    for split in ("train", "val", "test"):
        colourful().save(tmp_path / f"{split}.png")
    images = [
        {"filename": f"{split}.png", "split": split, "sentences": [{"tokens": tokens}]}
        for split, tokens in (("train", ["a", "dog"]), ("val", ["a", "cat"]), ("test", ["a", "cat"]))
    ]
    (tmp_path / "d.json").write_text(json.dumps({"images": images}))
    settings = preparation.Settings(
        str(tmp_path / "d.json"),
        str(tmp_path),
        output_folder=str(tmp_path / "out"),
        min_word_freq=1,
        image_size=32,
    )
    record = preparation.create_input_files(settings)
    word_map = json.loads((tmp_path / "out" / "word_map.json").read_text())
    assert list(word_map) == ["<pad>", "a", "dog", "<unk>", "<start>", "<end>"]
    assert record["splits"]["train"]["unknown_share"] == 0 and record["splits"]["val"]["unknown_share"] == 0.5


def test_validation_split_does_not_depend_on_the_order_of_the_file(demo, tmp_path):
    records = read_annotations(demo / "train.csv", demo / "train" / "train")
    held_out = []
    for _ in range(2):
        splits = split_records(records, 0.1, seed=123)
        held_out.append({record.image_id for record in splits["val"]})
        assert held_out[-1].isdisjoint(record.image_id for record in splits["train"])
        assert len(splits["train"]) == 36 and splits["test"] == []
        random.Random(0).shuffle(records)
    assert held_out[0] == held_out[1] and len(held_out[0]) == 4
    assert {record.image_id for record in split_records(records, 0.1, seed=5)["val"]} != held_out[0]


def test_bad_images_are_named_and_skipped(tmp_path, capsys):
    rows = ["image_id,caption"]
    for name in ("a", "b", "c", "d"):
        colourful().save(tmp_path / f"{name}.png")
        rows += [f"{name},a red and blue image"] * 2
    (tmp_path / "b.png").write_text("text")
    (tmp_path / "d.png").unlink()
    (tmp_path / "train.csv").write_text("\n".join(rows))
    options = {"min_word_freq": 1, "val_fraction": 0, "image_size": 32}
    settings = preparation.Settings(
        str(tmp_path / "train.csv"), str(tmp_path), output_folder=str(tmp_path / "out"), **options
    )
    preparation.create_input_files(settings)
    printed = capsys.readouterr()
    assert "b.png" in printed.err and "d: no image file of this name" in printed.err
    assert "skipped 2" in printed.out
    record = read_record(tmp_path / "out")
    assert record["splits"]["train"]["images"] == 2
    assert [name for name, _ in record["skipped"]] == ["b", "d"]
    with pytest.raises(UserError, match=r"b\.png"):
        preparation.create_input_files(replace(settings, strict=True, output_folder=str(tmp_path / "strict")))
    assert not (tmp_path / "strict").exists()


def test_thousands_of_missing_images_do_not_flood_the_terminal(tmp_path, capsys):
    colourful().save(tmp_path / "here.png")
    names = ["here", *(f"missing{number}" for number in range(2000))]
    write_submission(tmp_path / "train.csv", [(name, "a red and blue image") for name in names])
    settings = preparation.Settings(
        str(tmp_path / "train.csv"), str(tmp_path), output_folder=str(tmp_path / "out"),
        min_word_freq=1, val_fraction=0, image_size=32,
    )  # fmt: skip
    preparation.create_input_files(settings)
    lines = [line.split("\r")[-1] for line in capsys.readouterr().err.splitlines() if "skipped: " in line]
    assert len(lines) == 6 and lines[0].startswith("skipped: missing0: no image file of this name")
    assert lines[5] == "skipped: ... and 1995 more; prepared.json lists all"
    assert [name for name, _ in read_record(tmp_path / "out")["skipped"]] == names[1:]


def test_interrupted_preparation_keeps_the_earlier_one(demo, tmp_path, monkeypatch):
    settings = preparation.Settings(
        str(demo / "train.csv"),
        str(demo / "train" / "train"),
        output_folder=str(tmp_path / "out"),
        image_size=32,
    )
    preparation.create_input_files(settings)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "write_encoded_captions", interrupt)
    with pytest.raises(KeyboardInterrupt):
        preparation.create_input_files(settings)
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before


def test_preparation_does_not_depend_on_workers(demo, tmp_path):
    digests = []
    for workers in (1, 4):
        settings = preparation.Settings(
            str(demo / "train.csv"),
            str(demo / "train" / "train"),
            output_folder=str(tmp_path / str(workers)),
            image_size=32,
            workers=workers,
        )
        preparation.create_input_files(settings)
        with h5py.File(tmp_path / str(workers) / "train_images.hdf5") as file:
            digests.append((file.attrs["digest"], file["images"][:].sum()))
    assert digests[0] == digests[1]


# --- how quickly scripts start ------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["create_input_files.py", "make_demo_data.py"])
def test_scripts_that_need_no_torch_start_without_it(script):
    """What they import, also for --help, is light: importing torch takes more than a second."""
    code = (
        "import runpy, sys\n"
        "sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as ended: assert not ended.code\n"
        "heavy = {'torch', 'accelerate', 'transformers', 'skimage', 'nltk', 'matplotlib', 'scipy'}\n"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code, script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "--output_folder" in run.stdout
