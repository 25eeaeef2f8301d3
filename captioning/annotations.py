"""Annotation files in four layouts, read into one list of records.

Kaggle's CSV, Flickr8k's captions.txt, Karpathy's JSON and COCO's JSON; the content of a file tells which.
"""

from __future__ import annotations

import csv
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

from captioning.images import IMAGE_EXTENSIONS
from metrics import tokenize
from utils import UserError, natural_order, read_json

PAD, UNK, START, END = "<pad>", "<unk>", "<start>", "<end>"


@dataclass
class Record:
    """One image of an annotation file.

    image_id: as the file names it. path: None where no image file was found (or none was looked for).
    captions: raw, in file order; what scores are counted against. tokens: the same captions in words.
    split: "train", "val", "test" where the file says so, else None.
    """

    image_id: str
    path: str | None
    captions: list[str] = field(default_factory=list)
    tokens: list[list[str]] = field(default_factory=list)
    split: str | None = None


def read_annotations(file: str | Path, image_folder: str | Path | None = None) -> list[Record]:
    """Read an annotation file; its content tells the layout.

    * Kaggle CSV: columns `image_id,caption` (or `image_id` alone); ids are file names, less the extension
    * Flickr8k `captions.txt`: columns `image,caption`
    * Karpathy JSON: `images`, each with `filename`, `split` and `sentences`
    * COCO captions JSON: `images` and `annotations`

    Args:
        image_folder: where the images are looked for; None leaves every `path` None.

    Raises:
        UserError: the file or folder is missing, or the file has none of these layouts or no image.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"{file}: no such annotation file; give the CSV or JSON file that holds the captions")
    finder = ImageFinder(image_folder) if image_folder is not None else None
    with file.open("rb") as stream:
        first = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    try:
        images = _read_json(file, finder) if first[:1] in (b"{", b"[") else _read_csv(file, finder)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    if not images:
        raise UserError(f"{file}: no images in it; expected one line a caption below the header")
    return images


def held_out(images: list[Record], fraction: float, seed: int) -> set[str]:
    """Ids of a `fraction` of the captioned images, drawn by image, whatever the order of the file."""
    ids = sorted(image.image_id for image in images if image.captions)
    random.Random(seed).shuffle(ids)
    return set(ids[: round(fraction * len(ids))])


class ImageFinder:
    """Finds the image files of a folder by file name, with or without the extension."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{folder}: no such folder of images; give the one that holds the image files")
        names = sorted(os.listdir(self.folder), key=natural_order)
        self.by_name = {name: name for name in names}
        for name in reversed(names):  # of several images with one stem, the first by name
            stem, extension = os.path.splitext(name)
            if extension.lower() in IMAGE_EXTENSIONS:
                self.by_name.setdefault(stem, name)

    def __call__(self, *names: str) -> str | None:
        """The path of the first of `names` that exists, else None."""
        for name in names:
            if name in self.by_name:
                return str(self.folder / self.by_name[name])
            if "/" in name and (self.folder / name).is_file():
                return str(self.folder / name)
        return None


def _read_csv(file: Path, finder: ImageFinder | None) -> list[Record]:
    images: dict[str, Record] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, restkey="rest")
            columns = [(name or "").strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            id_column = next((name for name in ("image_id", "image") if name in columns), None)
            if id_column is None or (id_column == "image" and "caption" not in columns):
                found = f"has the columns {','.join(columns)[:100]}" if columns else "is empty"
                raise UserError(
                    f"{file}: {found}; expected image_id,caption or image,caption, or Karpathy or COCO JSON"
                )
            for row in reader:
                image_id = row[id_column]
                if not image_id:
                    continue
                if image_id not in images:
                    images[image_id] = Record(image_id, finder(image_id) if finder else None)
                # a caption with commas that nobody quoted goes on in the columns that have no name
                parts = [row.get("caption"), *row.get("rest", [])]
                caption = ",".join(part for part in parts if part).strip()
                if caption:
                    images[image_id].captions.append(caption)
                    images[image_id].tokens.append(tokenize(caption))
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: not a CSV file ({error})") from None
    return list(images.values())


def _read_json(file: Path, finder: ImageFinder | None) -> list[Record]:
    content = read_json(file)
    images = content.get("images") if isinstance(content, dict) else None
    try:
        if isinstance(images, list) and "annotations" in content:
            return _read_coco(images, content["annotations"], finder)
        if isinstance(images, list) and all("sentences" in image for image in images):
            return _read_karpathy(images, finder)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged annotations: an entry lacks or misuses {error}") from None
    raise UserError(
        f"{file}: neither Karpathy JSON (images with sentences) nor COCO JSON (images, annotations)"
    )


def _read_karpathy(images: list[dict], finder: ImageFinder | None) -> list[Record]:
    records = []
    for image in images:
        name = image["filename"]
        names = [f"{image['filepath']}/{name}", name] if image.get("filepath") else [name]
        split = "train" if image["split"] == "restval" else image["split"]
        record = Record(name, finder(*names) if finder else None, split=split)
        for sentence in image["sentences"]:
            tokens = [token.lower() for token in sentence["tokens"]]
            record.tokens.append(tokens)
            record.captions.append(sentence.get("raw") or " ".join(tokens))
        records.append(record)
    return records


def _read_coco(images: list[dict], annotations: list[dict], finder: ImageFinder | None) -> list[Record]:
    records = {}
    for image in images:
        path = finder(image["file_name"]) if finder else None
        records[image["id"]] = Record(str(image["id"]), path)
    for annotation in annotations:
        record = records[annotation["image_id"]]
        caption = annotation["caption"].strip()
        record.captions.append(caption)
        record.tokens.append(tokenize(caption))
    return list(records.values())
