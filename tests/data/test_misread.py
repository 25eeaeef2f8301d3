"""Annotations and images that used to be misread without a word, or led out of their folder."""

import json
import threading
import time

import numpy as np
import pytest
from PIL import Image

from captioning.data import images
from captioning.data.annotations import read_annotations
from captioning.data.image_names import ImageFinder
from captioning.data.images import Budget, read_image
from utils import UserError

# --- annotations --------------------------------------------------------------------------------------------


def read(tmp_path, text: str, name: str = "a.csv"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return {record.image_id: record.captions for record in read_annotations(tmp_path / name)}


def refused(tmp_path, content, *parts: str, folder=None) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "a.file").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_annotations(tmp_path / "a.file", folder)
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("row", range(1, 12))
@pytest.mark.parametrize("later", ["", '"A cat, black"', '"A ""big"" cat"', 'A "big" cat'])
def test_a_quote_that_is_not_closed_swallows_nothing(tmp_path, row, later):
    lines = ["image_id,caption", *(f"i{number},{later or 'A dog'}" for number in range(1, 20))]
    lines[row] = f'i{row},"A dog runs'
    refused(tmp_path, "\n".join(lines) + "\n", f"line {row + 1}:", "not closed")


def test_quotes_that_are_sound_are_read(tmp_path):
    text = 'image_id,caption\na,"over\ntwo lines"\nb,"A ""big"" dog, black"\nc,A "big" dog\nd,"A" dog\n'
    captions = ["over\ntwo lines", 'A "big" dog, black', 'A "big" dog', "A dog"]
    assert [own for (own,) in read(tmp_path, text).values()] == captions


def test_columns_of_any_name_and_blank_lines(tmp_path):
    rest = "image_id,caption,rest\na,A dog,hidden\nb,A cat,\n"
    assert read(tmp_path, rest) == {"a": ["A dog"], "b": ["A cat"]}
    assert read(tmp_path, "\n\r\n\nimage_id,caption\n\na,A dog\n") == {"a": ["A dog"]}
    assert read(tmp_path, "image_id,caption\na,A dog, black, and a cat\n") == {
        "a": ["A dog, black, and a cat"]
    }
    refused(tmp_path, "image_id,caption,caption\na,A dog,A cat\n", "two columns caption")
    refused(tmp_path, "image_id,image_id,caption\na,b,A cat\n", "two columns image_id")
    refused(tmp_path, "\n\n", "is empty")


def coco(images, annotations) -> dict:
    return {"images": images, "annotations": annotations}


def karpathy(**changes) -> dict:
    image = {"filename": "a.png", "split": "train", "sentences": [{"tokens": ["a"], "raw": "A"}]}
    return {"images": [image, image | changes]}


ONE = [{"id": 1, "file_name": "a.png"}]
CAPTION = {"image_id": 1, "caption": "A dog"}
BAD = {
    "doubled ids": (coco(ONE * 2, [CAPTION]), "two images have the id 1"),
    "unknown id": (coco(ONE, [CAPTION | {"image_id": 2}]), "image 2"),
    "list as id": (coco([{"id": [1]}], []), "images[0].id"),
    "true as id": (coco([{"id": True}], []), "images[0].id"),
    "two ids of one image": (coco([{"id": "a"}, {"id": "a"}], []), "two images have the id a"),
    "number as name": (coco([{"id": 1, "file_name": 5}], []), "images[0].file_name"),
    "caption null": (coco(ONE, [CAPTION, CAPTION | {"caption": None}]), "annotations[1].caption is None"),
    "no caption": (coco(ONE, [{"image_id": 1}]), "annotations[0].caption is missing"),
    "annotations a dictionary": (coco(ONE, {}), "annotations"),
    "images a dictionary": (coco({}, []), "images"),
    "images of text": (coco(["a"], []), "images[0]"),
    "surrogate": (coco(ONE, [CAPTION | {"caption": "a \ud83d dog"}]), "surrogate"),
    "unknown split": (karpathy(split="training"), "images[1].split is 'training'"),
    "split null": (karpathy(split=None), "images[1].split"),
    "tokens of numbers": (karpathy(sentences=[{"tokens": [1]}]), "images[1].sentences[0].tokens[0]"),
    "no tokens": (karpathy(sentences=[{}]), "images[1].sentences[0].tokens is missing"),
    "tokens as text": (karpathy(sentences=[{"tokens": "a dog"}]), "tokens"),
    "name null": (karpathy(filename=None), "images[1].filename"),
    "path a number": (karpathy(filepath=5), "images[1].filepath"),
    "surrogate in a name": (karpathy(filename="\udcff.png"), "surrogate"),
    "surrogate in a token": (karpathy(sentences=[{"tokens": ["\ud800"]}]), "surrogate"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_json_is_refused_with_its_place(name, tmp_path):
    content, part = BAD[name]
    refused(tmp_path, content, part)


OUTSIDE = ["../a.png", "../../etc/passwd", "/etc/passwd", "sub/../../a.png", "..", "x/../../../a"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_of_the_folder_find_nothing_there(name, tmp_path):
    """Only the end of the path counts: `../a.png` may be the folder's own a.png, nothing outside."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    assert ImageFinder(folder)(name) is None
    layouts = {
        "a.csv": f"image_id,caption\n{name},A dog runs\n",
        "b.json": json.dumps(karpathy(filename=name)),
        "c.json": json.dumps(karpathy(filepath=name, filename="x.png")),
        "d.json": json.dumps(coco([{"id": 1, "file_name": name}], [])),
    }
    for file, text in layouts.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
        assert not any(record.path for record in read_annotations(tmp_path / file, folder)), file


def test_strange_names_are_not_found(tmp_path):
    finder = ImageFinder(tmp_path)
    for name in ("a\0b", "sub/a\0b", "x" * 5000, "sub/" + "x" * 5000, "", ".", "\udcff", "a\nb", "..a"):
        assert finder(name) is None


# --- images -------------------------------------------------------------------------------------------------


def test_other_programs_formats_are_refused(tmp_path):
    for name in ("EPS", "PDF", "PCX", "SGI", "TGA"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.jpg", name)
        with pytest.raises(UserError, match="none of the formats JPEG, PNG"):
            read_image(tmp_path / f"{name}.jpg")


def test_transparency_is_laid_on_white_in_strips_as_at_once(tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (700, 30, 4), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert (read_image(tmp_path / "a.png") == np.asarray(whole).transpose(2, 0, 1)).all()


def test_threads_share_what_may_be_decoded_at_once(monkeypatch):
    budget, now, most = Budget(100), [0], [0]

    def work(amount):
        with budget.share(amount):
            now[0] += min(amount, 100)
            most[0] = max(most[0], now[0])
            time.sleep(0.002)
            now[0] -= min(amount, 100)

    threads = [threading.Thread(target=work, args=(amount,)) for amount in [30, 60, 100, 5000, 1, 45] * 5]
    [thread.start() for thread in threads]
    [thread.join(20) for thread in threads]
    assert 50 < most[0] <= 100 and budget.free == 100


def test_a_failed_image_gives_its_share_back(tmp_path):
    Image.new("RGB", (300, 300)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-60])
    free = images.DECODING.free
    with pytest.raises(UserError):
        read_image(tmp_path / "a.png", 64)
    assert images.DECODING.free == free
