"""Annotation files in four layouts, read into one list of records, and the splits made from them.

The layouts are Kaggle's CSV, Flickr8k's captions.txt, Karpathy's JSON and COCO's JSON; which one a file has
is recognized by its content.
"""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from captioning.data.images import IMAGE_EXTENSIONS
from captioning.data.prepared import Record
from captioning.files import AnyOf, Choice, find_mismatch
from metrics import tokenize
from utils import UserError, natural_order, read_json


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
        """The path of the first of `names` that exists, else None.

        Raises:
            UserError: a name leads out of the folder.
        """
        for name in names:
            if os.path.isabs(name) or ".." in Path(name).parts:
                raise UserError(f"{name}: leads out of {self.folder}; give names of images that are in it")
            if name in self.by_name:
                return str(self.folder / self.by_name[name])
            if "/" in name and os.path.isfile(self.folder / name):
                return str(self.folder / name)
        return None


def _read_csv(file: Path, finder: ImageFinder | None) -> list[Record]:
    records: dict[str, Record] = {}
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = _read_rows(file, stream)
        columns = [name.strip() for name in next(rows, [])]
        id_column = next((name for name in ("image_id", "image") if name in columns), None)
        if id_column is None or (id_column == "image" and "caption" not in columns):
            found = f"has the columns {','.join(columns)[:100]}" if columns else "is empty"
            raise UserError(
                f"{file}: {found}; expected image_id,caption or image,caption, or Karpathy or COCO JSON"
            )
        doubled = [name for name in (id_column, "caption") if columns.count(name) > 1]
        if doubled:
            raise UserError(f"{file}: has two columns {doubled[0]}; remove or rename one")
        id_index, end = columns.index(id_column), len(columns)
        caption_index = columns.index("caption") if "caption" in columns else None
        for row in rows:
            image_id = row[id_index] if id_index < len(row) else ""
            if not image_id:
                continue
            if image_id not in records:
                records[image_id] = Record(image_id, finder(image_id) if finder else None)
            # the rest of an unquoted caption with commas is in columns without a name
            own = [] if caption_index is None else row[caption_index : caption_index + 1]
            caption = ",".join(part for part in (*own, *row[end:]) if part).strip()
            if caption:
                records[image_id].captions.append(caption)
                records[image_id].tokens.append(tokenize(caption))
    return list(records.values())


def _read_rows(file: Path, stream: Iterable[str]) -> Iterator[list[str]]:
    """The rows of a CSV that are not blank.

    Raises:
        UserError: no CSV, or a row over several lines whose quotes do not match: a quote that is not closed
            would swallow the lines up to the next one.
    """
    lines: list[str] = []  # of the row that is being read

    def remember() -> Iterator[str]:
        for line in stream:
            lines.append(line)
            yield line

    reader = csv.reader(remember())
    try:
        for row in reader:
            if len(lines) > 1:
                list(csv.reader(lines, strict=True))
            lines.clear()
            if any(row):
                yield row
    except csv.Error as error:
        line = reader.line_num - len(lines) + 1
        reason = "a quote that is not closed" if len(lines) > 1 else str(error)
        raise UserError(f"{file}, line {line}: not a CSV row ({reason}); mend the line") from None


IDENTIFIER = AnyOf(int, str)
COCO = {
    "images": [{"id": IDENTIFIER, "file_name?": str}],
    "annotations": [{"image_id": IDENTIFIER, "caption": str}],
}
KARPATHY = {
    "images": [
        {
            "filename": str,
            "filepath?": AnyOf(str, None),
            "split": Choice("train", "restval", "val", "test"),
            "sentences": [{"tokens": [str], "raw?": AnyOf(str, None)}],
        }
    ]
}


def _read_json(file: Path, finder: ImageFinder | None) -> list[Record]:
    content = read_json(file)
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        schema, read = COCO, _read_coco
    elif isinstance(content, dict) and "sentences" in str(content.get("images"))[:10_000]:
        schema, read = KARPATHY, _read_karpathy
    else:
        raise UserError(
            f"{file}: neither Karpathy JSON (images with sentences) nor COCO JSON (images, annotations)"
        )
    mismatch = find_mismatch(content, schema)
    if mismatch:
        raise UserError(f"{file}: damaged annotations ({mismatch}); mend or replace the file")
    try:
        records = read(content, finder)
    except ValueError as error:
        raise UserError(f"{file}: damaged annotations ({error}); mend or replace the file") from None
    for record in records:
        try:
            json.dumps([record.image_id, record.captions, record.tokens], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{file}: half a character (an unpaired surrogate) in the id or captions of image "
                f"{record.image_id!a}; mend or replace the file"
            ) from None
    return records


def _read_karpathy(content: dict, finder: ImageFinder | None) -> list[Record]:
    records = []
    for image in content["images"]:
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


def _read_coco(content: dict, finder: ImageFinder | None) -> list[Record]:
    records = {}
    for image in content["images"]:
        if image["id"] in records:
            raise ValueError(f"two images have the id {image['id']}")
        if finder and "file_name" not in image:
            raise ValueError(f"image {image['id']} has no file_name")
        path = finder(image["file_name"]) if finder else None
        records[image["id"]] = Record(str(image["id"]), path)
    for annotation in content["annotations"]:
        if annotation["image_id"] not in records:
            raise ValueError(f"a caption of image {annotation['image_id']}, which is not among the images")
        record = records[annotation["image_id"]]
        caption = annotation["caption"].strip()
        record.captions.append(caption)
        record.tokens.append(tokenize(caption))
    return list(records.values())
