"""Annotation files in four layouts, read into one list of records, and the splits made from them.

The layouts are Kaggle's CSV, Flickr8k's captions.txt, Karpathy's JSON and COCO's JSON; which one a file has
is recognized by its content.
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

    Attributes:
        image_id: the id that the file gives it.
        path: the image file; None where none was found, or none was looked for.
        captions: as written, in file order; the references that scores are computed against.
        tokens: the words of each caption, as `metrics.tokenize` finds them; Karpathy's JSON brings its own.
        split: "train", "val" or "test" where the file says so, else None.
    """

    image_id: str
    path: str | None
    captions: list[str] = field(default_factory=list)
    tokens: list[list[str]] = field(default_factory=list)
    split: str | None = None


def read_annotations(file: str | Path, image_folder: str | Path | None = None) -> list[Record]:
    """Read an annotation file. Its content decides which layout it has:

    * Kaggle CSV: columns `image_id,caption` (or `image_id` alone); ids are file names without extension
    * Flickr8k `captions.txt`: columns `image,caption`
    * Karpathy JSON: `images`, each with `filename`, `split` and `sentences`
    * COCO captions JSON: `images` and `annotations`

    Args:
        image_folder: the folder that has the image files; with None every `path` stays None.

    Raises:
        UserError: the file or folder is missing, or the file has none of these layouts, or no images.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"{file}: no such annotation file; give the CSV or JSON file that holds the captions")
    finder = ImageFinder(image_folder) if image_folder is not None else None
    with file.open("rb") as stream:
        first = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    try:
        records = _read_json(file, finder) if first[:1] in (b"{", b"[") else _read_csv(file, finder)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    if not records:
        raise UserError(f"{file}: no images in it; expected one line per caption below the header")
    return records


def read_training_splits(
    file: str | Path, image_folder: str | Path, val_fraction: float, seed: int
) -> dict[str, list[Record]]:
    """The splits of an annotation file, see `split_records`.

    Raises:
        UserError: as `read_annotations` does, or the training split has no captions.
    """
    splits = split_records(read_annotations(file, image_folder), val_fraction, seed)
    if not any(record.captions for record in splits["train"]):
        raise UserError(f"{file}: no training captions in it; expected a caption column with text")
    return splits


def split_records(records: list[Record], val_fraction: float, seed: int) -> dict[str, list[Record]]:
    """The records of "train", "val" and "test": the file's own splits, or else a random `val_fraction`.

    The random split is drawn among the captioned images by id, so it does not depend on the order of the
    file; its test split is empty.
    """
    splits: dict[str, list[Record]] = {"train": [], "val": [], "test": []}
    if any(record.split for record in records):
        for record in records:
            if record.split in splits:
                splits[record.split].append(record)
        return splits
    ids = sorted(record.image_id for record in records if record.captions)
    random.Random(seed).shuffle(ids)
    held_out = set(ids[: round(val_fraction * len(ids))])
    for record in records:
        splits["val" if record.image_id in held_out else "train"].append(record)
    return splits


def require_image(image_id: str, path: str | None, folder: str | Path = "the image folder") -> str:
    """`path`, the image file of this id. Raises UserError where there is none."""
    if path is None:
        raise UserError(f"{image_id}: no image file of this name in {folder}")
    return path


class ImageFinder:
    """Finds the image files of a folder by file name, with or without the extension."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{folder}: no such folder of images; give the one that holds the image files")
        names = sorted(os.listdir(self.folder), key=natural_order)
        self.by_name = {name: name for name in names}
        for name in reversed(names):  # of several images with the same stem, the first by name
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
    records: dict[str, Record] = {}
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
                if image_id not in records:
                    records[image_id] = Record(image_id, finder(image_id) if finder else None)
                # the rest of an unquoted caption with commas is in columns without a name
                parts = [row.get("caption"), *row.get("rest", [])]
                caption = ",".join(part for part in parts if part).strip()
                if caption:
                    records[image_id].captions.append(caption)
                    records[image_id].tokens.append(tokenize(caption))
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: not a CSV file ({error})") from None
    return list(records.values())


def _read_json(file: Path, finder: ImageFinder | None) -> list[Record]:
    content = read_json(file)
    images = content.get("images") if isinstance(content, dict) else None
    try:
        if isinstance(images, list) and "annotations" in content:
            return _read_coco(images, content["annotations"], finder)
        if isinstance(images, list) and all("sentences" in image for image in images):
            return _read_karpathy(images, finder)
    except KeyError as error:
        raise UserError(f"{file}: damaged annotations: {error} is missing") from None
    except (TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged annotations ({error})") from None
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
