"""Annotations of every layout, read into one list of records, and the splits made from them.

Which layout a file has is recognized by its content: Karpathy's and COCO's JSON, tables (tables.py: delimited
text, JSON objects, Parquet), Flickr8k's text file with its lists of splits, and folders of images with
sidecars. docs/file_formats.md has a line for each.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from captioning.data.image_names import ImageFinder
from captioning.data.images import natural_order, walk_images
from captioning.data.prepared import Record
from captioning.data.tables import (
    Columns,
    Row,
    is_parquet,
    objects_of,
    read_delimited,
    read_objects,
    read_parquet,
)
from captioning.data.text_files import parse_json_lines, read_text, read_told, report_problems, say_once
from captioning.files import AnyOf, Choice, find_mismatch
from metrics import tokenize
from metrics.tokenizer import find_unsegmented
from utils import UserError, counted, parse_json

METADATA = (
    "metadata.jsonl",
    "metadata.csv",
    "metadata.parquet",
)  # as Hugging Face has them beside the images
SIDECARS = (".txt", ".caption")  # extensions of the captions beside images; where both are there, the first
FLICKR_LISTS = {"train": "*trainImages.txt", "val": "*devImages.txt", "test": "*testImages.txt"}
FLICKR_LINE = re.compile(r"(.+?)#\d+\t(.*)")
Image = tuple[Record, tuple[str, ...]]  # and the names of its file
SPLITS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def read_annotations(
    files: str | Path | Sequence[str | Path],
    image_folders: str | Path | Sequence[str | Path] | None = None,
    columns: Columns | None = None,
    lowercase: bool = True,
) -> list[Record]:
    """The images of annotation files of any layout; those of several files together.

    Args:
        files: also folders with images and sidecars.
        image_folders: where the image files are; as many as files: each file's own, which is searched first,
            as is a folder given in place of a file. With None every `path` stays None, but for images beside
            sidecars.
        columns: names of columns that the user gives.
        lowercase: the words of `Record.tokens` are in lower case.

    Raises:
        UserError: a file or folder is missing, has none of the layouts, or no images.
    """
    files, folders = as_paths(files), None if image_folders is None else as_paths(image_folders)
    asked, merged = columns or Columns(), []
    for number, file in enumerate(files):
        finder = None if folders is None else _finder(file, number, len(files), folders)
        images = _read(file, finder, asked, lowercase)
        if not images:
            raise UserError(f"{file}: no images in it; expected one line per caption below the header")
        if finder is not None:
            nameless = next((record for record, names in images if not (names or record.path)), None)
            if nameless is not None:
                raise UserError(f"{file}: damaged annotations (image {nameless.image_id} has no file_name)")
            finder.assign(images, file)
        merged = _merge(merged, [record for record, _ in images], file)
    return merged


def _finder(file: Path, number: int, files: int, folders: list[Path]) -> ImageFinder:
    """That of the images of one of the files."""
    if file.is_dir():
        return ImageFinder([file], [folder for folder in folders if folder != file and folder.is_dir()])
    own = [folders[number]] if len(folders) == files else []
    if file.is_file() and is_parquet(file):  # it may have the images itself
        (own or folders)[0].mkdir(parents=True, exist_ok=True)
    return ImageFinder(own, [folder for folder in folders if folder not in own])


def as_paths(files: str | Path | Sequence[str | Path]) -> list[Path]:
    return [Path(file) for file in ([files] if isinstance(files, (str, Path)) else files)]


def sources(file: str | Path) -> list[str]:
    """The files that annotations are read from: lists of splits and sidecars are among them."""
    file = Path(file)
    if file.is_dir():
        metadata = _metadata_in(file)
        return [str(metadata)] if metadata else [f"{file}/{name}" for name in _sidecars_in(file)]
    lists = [path for pattern in FLICKR_LISTS.values() for path in sorted(file.parent.glob(pattern))]
    has_lists = lists and file not in lists and _is_flickr_text(read_text(file)[0])
    return [str(path) for path in (file, *(lists if has_lists else ()))]


def _sidecars_in(folder: Path) -> list[str]:
    """The sidecars in a folder and the folders in it, relative to it, each folder's files together."""
    found: list[str] = []
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        start = "".join(f"{part}/" for part in Path(place).relative_to(folder).parts)
        found += [start + name for name in names if name.endswith(SIDECARS)]
    return sorted(found, key=lambda name: name.split("/"))


def _merge(earlier: list[Record], records: list[Record], file: Path) -> list[Record]:
    """The records of earlier files and of a further one, with captions of the same images or of others."""
    merged, renamed = [*earlier], []
    by_id = {record.image_id: record for record in earlier}
    for record in records:
        known = by_id.get(record.image_id)
        if known is not None and record.path and known.path and known.path != record.path:
            record.image_id = f"{Path(record.path).parent.name}/{record.image_id}"
            renamed.append(record.image_id)
            known = by_id.get(record.image_id)
            if known is not None and known.path != record.path:
                raise UserError(
                    f"{file}: {known.path} and {record.path} have the same id; rename one of them"
                )
        if known is None:
            merged.append(record)
            continue
        if known.split != record.split:
            raise UserError(f"{file}: {record.image_id} is in the {known.split} and the {record.split} split")
        known.captions += record.captions
        known.tokens += record.tokens
        known.path = known.path or record.path
    if renamed:
        say_once(
            f"{file}: {counted(len(renamed), 'id')} of other images in an earlier file; the folder's name "
            f"is put in front, as in {renamed[0]}"
        )
    return merged


# --- splits -------------------------------------------------------------------------------------------------


def read_training_splits(
    files: str | Path | Sequence[str | Path],
    image_folders: str | Path | Sequence[str | Path],
    val_fraction: float,
    seed: int,
    columns: Columns | None = None,
    lowercase: bool = True,
) -> dict[str, list[Record]]:
    """The splits of annotation files, see `split_records`.

    Raises:
        UserError: as `read_annotations` does, or the training split has no captions, or those that
            `require_words` refuses.
    """
    records = read_annotations(files, image_folders, columns, lowercase)
    names = ", ".join(map(str, as_paths(files)))
    if columns is not None:
        columns.check()
    if any(record.split for record in records):
        if unsorted := sum(record.split is None for record in records):
            say_once(f"{names}: {counted(unsorted, 'image')} in no split, left out")
        if not any(record.split == "val" for record in records):
            say_once(
                f"{names}: none of its images are to validate on; a share of the others is (--val_fraction)"
            )
    splits = split_records(records, val_fraction, seed)
    if not any(record.captions for record in splits["train"]):
        raise UserError(f"{names}: no training captions in it; expected a caption column with text")
    require_words((text for record in splits["train"] for text in record.captions), names)
    return splits


def split_records(records: list[Record], val_fraction: float, seed: int) -> dict[str, list[Record]]:
    """The records of "train", "val" and "test": the file's own splits; where it names no "val", a random
    `val_fraction` of the images to train on.

    The random split is drawn among the captioned images by id, so it does not depend on the order of the
    file.
    """
    splits: dict[str, list[Record]] = {"train": [], "val": [], "test": []}
    has_splits = any(record.split for record in records)
    for record in records:
        name = record.split if has_splits else "train"
        if name in splits:
            splits[name].append(record)
    if not splits["val"]:
        ids = sorted(record.image_id for record in splits["train"] if record.captions)
        random.Random(seed).shuffle(ids)
        held_out = set(ids[: round(val_fraction * len(ids))])
        splits["val"] = [record for record in splits["train"] if record.image_id in held_out]
        splits["train"] = [record for record in splits["train"] if record.image_id not in held_out]
    return splits


def test_records(records: list[Record], split: str = "test") -> list[Record]:
    """Those of the split, where the records name splits; else all."""
    named = any(record.split for record in records)
    return [record for record in records if not named or record.split == split]


def require_words(captions: Iterable[str], name: str | Path) -> None:
    """Raise UserError where sentences have no blanks between the words: each would count as one word."""
    captions = list(captions)
    found = find_unsegmented(captions)
    if found:
        script, sentences = found
        raise UserError(
            f"{name}: {len(sentences)} of {len(captions)} captions are {script} without blanks between words "
            f'("{sentences[0][:30]}"): each would count as one word; put blanks between words, or characters'
        )


def require_image(image_id: str, path: str | None, folder: str | Path = "the image folder") -> str:
    """`path`, the image file of this id. Raises UserError where there is none."""
    if path is None:
        raise UserError(f"{image_id}: no image file of this name in {folder}")
    return path


# --- layouts ------------------------------------------------------------------------------------------------


def _read(file: Path, finder: ImageFinder | None, columns: Columns, lowercase: bool) -> list[Image]:
    """finder: gets the images that the file has itself."""
    if file.is_dir():
        metadata = _metadata_in(file)
        return _read(metadata, finder, columns, lowercase) if metadata else _read_folder(file, lowercase)
    if is_parquet(file):
        return _images_of(read_parquet(file, columns), file, finder, lowercase)
    text = read_told(file)
    if text.lstrip()[:1] in ("{", "["):
        return _read_json(text, file, columns, lowercase)
    if _is_flickr_text(text):
        return _read_flickr_text(text, file, lowercase)
    return _images_of(read_delimited(text, file, columns), file, None, lowercase)


def _images_of(rows: Iterable[Row], name: Path, finder: ImageFinder | None, lowercase: bool) -> list[Image]:
    """The images of a table's rows, which may be several of each."""
    images: dict[str, Image] = {}
    for row in rows:
        split = row.split and row.split.strip().lower()
        image = images.get(row.image_id)
        if image is None:
            path = finder.save(row.file_name or row.image_id, row.image) if finder and row.image else None
            names = tuple(filter(None, (row.file_name, row.image_id)))
            image = Record(row.image_id, path, split=split, file_name=row.file_name), names
            images[row.image_id] = image
        record = image[0]
        if record.split != split:
            raise UserError(
                f"{name}: {row.image_id} is in the {record.split} and the {split} split; mend one row"
            )
        captions = row.captions or []
        record.captions += captions
        if row.tokens is None:
            record.tokens += [tokenize(caption, lowercase) for caption in captions]
        else:
            record.tokens += [_cased(words, lowercase) for words in row.tokens]
    splits = {record.split: None for record, _ in images.values()}
    unknown = [str(split) for split in splits if split not in SPLITS]
    if unknown and unknown != ["None"]:
        if len(unknown) < len(splits):
            raise UserError(f"{name}: the split of some images is {unknown[0]}; expected train, val or test")
        say_once(f"{name}: its column split has {', '.join(unknown)[:60]}, not train, val and test; not used")
    for record, _ in images.values():
        record.split = SPLITS.get(record.split)
    return list(images.values())


def _cased(words: Iterable[str], lowercase: bool) -> list[str]:
    return [word.lower() for word in words] if lowercase else list(words)


def _is_flickr_text(text: str) -> bool:
    """Whether it begins as Flickr8k.token.txt does: name.jpg#0, a tab, a caption."""
    return bool(FLICKR_LINE.fullmatch(text.lstrip().partition("\n")[0].rstrip("\r")))


def _read_flickr_text(text: str, file: Path, lowercase: bool) -> list[Image]:
    """Flickr8k.token.txt, with the lists of splits beside it."""
    splits: dict[str, str] = {}
    for split, pattern in FLICKR_LISTS.items():
        for path in sorted(file.parent.glob(pattern)):
            for name in filter(None, map(str.strip, read_text(path)[0].splitlines())):
                if splits.setdefault(name, split) != split:
                    raise UserError(f"{path}: {name} is in the list of another split too; remove it from one")
    rows, problems = [], []
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        found = FLICKR_LINE.fullmatch(line)
        if not found:
            problems += (
                [f"line {number}: not like photo.jpg#0<TAB>A dog ({line[:60]})"] if line.strip() else []
            )
            continue
        caption = found[2].strip()
        problems += [] if caption else [f"line {number}: no caption ({found[1]})"]
        rows.append(Row(f"line {number}", found[1], [caption] if caption else []))
    report_problems(file, problems)
    images = _images_of(rows, file, None, lowercase)
    for record, _ in images:
        record.split = splits.get(record.image_id)
    if splits:
        say_once(f"{file}: its splits are those of the lists beside it, {', '.join(FLICKR_LISTS.values())}")
    return images


def _metadata_in(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _read_folder(folder: Path, lowercase: bool) -> list[Image]:
    """A folder, with subfolders, of images with sidecars, or of sidecars alone; each line is a caption."""
    images = walk_images(folder, recursive=True).names
    texts = {name: folder / name for name in _sidecars_in(folder)}
    names = {name.rpartition(".")[0] or name: name for name in reversed(images)}
    if not images:  # captions alone; the images are elsewhere
        names = {name.rpartition(".")[0]: name.rpartition(".")[0] for name in texts}
    rows, problems, codecs = [], [], Counter()
    for stem in sorted(names, key=natural_order):
        sidecar = next((texts[stem + own] for own in SIDECARS if stem + own in texts), None)
        captions: list[str] = []
        if sidecar is not None:
            try:
                text, codec = read_text(sidecar)
                captions = [line.strip() for line in text.splitlines() if line.strip()]
                codecs[codec] += not codec.startswith("utf-8")
            except UserError as error:
                problems.append(f"{names[stem]}: {error}")
                continue
        problems += [] if captions else [f"{names[stem]}: no caption beside it"]
        rows.append(Row("", names[stem], captions))
    if not any(row.captions for row in rows):
        inside = (
            ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file())[:5]) or "nothing else"
        )
        raise UserError(
            f"{folder}: a folder with {counted(len(images), 'image')}, but no captions beside them "
            f"(photo.txt or photo.caption for photo.jpg, or {METADATA[0]}); it has {inside}; give the file "
            f"of captions"
        )
    report_problems(folder, problems)
    for codec, count in codecs.items():
        if count:
            say_once(f"{folder}: {counted(count, 'sidecar')} not UTF-8; read as {codec}")
    found = _images_of(rows, folder, None, lowercase)
    for record, _ in found if images else ():
        record.path = str(folder / record.image_id)
    return found


# --- JSON ---------------------------------------------------------------------------------------------------

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


def _read_json(text: str, file: Path, columns: Columns, lowercase: bool) -> list[Image]:
    lines = parse_json_lines(text, file)
    content = None if lines is not None else parse_json(text, file)
    is_coco = isinstance(content, dict) and {"images", "annotations"} <= content.keys()
    if is_coco or (isinstance(content, dict) and "sentences" in str(content.get("images"))[:10_000]):
        mismatch = find_mismatch(content, COCO if is_coco else KARPATHY)
        if mismatch:
            raise UserError(f"{file}: damaged annotations ({mismatch}); mend or replace the file")
        try:
            images = (_read_coco if is_coco else _read_karpathy)(content, lowercase)
        except ValueError as error:
            raise UserError(f"{file}: damaged annotations ({error}); mend or replace the file") from None
    else:
        objects = (lines,) if lines is not None else (objects_of(content, text, file), "entry")
        images = _images_of(read_objects(objects[0], file, columns, *objects[1:]), file, None, lowercase)
    for record, _ in images:
        try:
            json.dumps([record.image_id, record.captions, record.tokens], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{file}: half a character (an unpaired surrogate) in the id or captions of image "
                f"{record.image_id!a}; mend or replace the file"
            ) from None
    return images


def _read_karpathy(content: dict, lowercase: bool) -> list[Image]:
    images = []
    for image in content["images"]:
        name = image["filename"]
        names = (f"{image['filepath']}/{name}", name) if image.get("filepath") else (name,)
        record = Record(name, None, split=SPLITS[image["split"]])
        for sentence in image["sentences"]:
            tokens = _cased(sentence["tokens"], lowercase)
            record.tokens.append(tokens)
            record.captions.append(sentence.get("raw") or " ".join(tokens))
        images.append((record, names))
    return images


def _read_coco(content: dict, lowercase: bool) -> list[Image]:
    images: dict[int | str, Image] = {}
    for image in content["images"]:
        if image["id"] in images:
            raise ValueError(f"two images have the id {image['id']}")
        name = image.get("file_name")
        record = Record(str(image["id"]), None, file_name=name)
        images[image["id"]] = record, () if name is None else (name,)
    for annotation in content["annotations"]:
        if annotation["image_id"] not in images:
            raise ValueError(f"a caption of image {annotation['image_id']}, which is not among the images")
        record, _ = images[annotation["image_id"]]
        caption = annotation["caption"].strip()
        record.captions.append(caption)
        record.tokens.append(tokenize(caption, lowercase))
    return list(images.values())
