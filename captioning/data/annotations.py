"""Annotations of every layout, read into one list of records, and the splits made from them.

Which layout a file has is recognized by its content: Karpathy's and COCO's JSON, tables (tables.py: delimited
text, JSON objects, Parquet), Flickr8k's text file with its lists of splits, and folders of images with
sidecars. docs/file_formats.md has a line for each.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from captioning.data.image_names import (
    ImageFinder,
    NameIndex,
    join_same_files,
    match_list,
    merge_records,
    require_same_split,
)
from captioning.data.images import natural_order, walk_images
from captioning.data.prepared import Record
from captioning.data.tables import (
    Columns,
    Row,
    is_flickr_text,
    is_parquet,
    objects_of,
    read_delimited,
    read_flickr_text,
    read_objects,
    read_parquet,
)
from captioning.data.text_files import (
    parse_json_lines,
    read_text,
    read_told,
    report_problems,
    require_words,
    say_once,
)
from captioning.files import AnyOf, Choice, find_mismatch
from metrics import tokenize
from utils import UserError, counted, parse_json

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of Hugging Face, beside the images
SIDECARS = (".txt", ".caption")  # extensions of the captions beside images; where both are there, the first
FLICKR_LISTS = {"train": "*trainImages.txt", "val": "*devImages.txt", "test": "*testImages.txt"}
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
    need_words: bool = True,
) -> list[Record]:
    """The images of annotation files of any layout; those of several files together.

    Args:
        files: also folders with images and sidecars.
        image_folders: where the image files are; as many as files: each file's own, which is searched first,
            as is a folder given in place of a file. With None every `path` stays None, but for images beside
            sidecars.
        columns: names of columns that the user gives.
        lowercase: the words of `Record.tokens` are in lower case.
        need_words: refuse captions without blanks between the words; False where captions are not used.

    Raises:
        UserError: a file or folder is missing, has none of the layouts, or no images; an image is in two
            splits; captions that `require_words` refuses.
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
            if file.is_dir() and not any(record.path for record, _ in images):
                raise _no_folder_of_images(file, f"no image for the {counted(len(images), 'caption file')}")
        records = [record for record, _ in images]
        for split in sorted({record.split or "" for record in records if need_words}):
            own = [text for record in records if (record.split or "") == split for text in record.captions]
            require_words(own, file)
        merged = merge_records(merged, records, file)
    return join_same_files(merged, ", ".join(map(str, files)))


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
        return [*map(str, metadata)] or [f"{file}/{name}" for name in _sidecars_in(file)]
    return [str(path) for path in (file, *(path for _, path in _lists_beside(file)))]


def _lists_beside(file: Path) -> list[tuple[str, Path]]:
    """(split, its list of images) of the lists beside an annotation file; none where it is one of them."""
    patterns = FLICKR_LISTS.items()
    lists = [(split, path) for split, own in patterns for path in sorted(file.parent.glob(own))]
    return lists if all(path != file for _, path in lists) else []


def _sidecars_in(folder: Path) -> list[str]:
    """The sidecars in a folder and the folders in it, relative to it, each folder's files together."""
    found: list[str] = []
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        start = "".join(f"{part}/" for part in Path(place).relative_to(folder).parts)
        found += [start + name for name in names if name.lower().endswith(SIDECARS)]
    return sorted(found, key=lambda name: name.split("/"))


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
        UserError: as `read_annotations` does, or the training split has no captions.
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
                f"{names}: has no val split; a share of its train split is held out for it (--val_fraction)"
            )
    splits = split_records(records, val_fraction, seed)
    if not any(record.captions for record in splits["train"]):
        raise UserError(f"{names}: no training captions in it; expected a caption column with text")
    return splits


def split_records(records: list[Record], val_fraction: float, seed: int) -> dict[str, list[Record]]:
    """The records of "train", "val" and "test": the file's own splits; where it names no "val", a random
    `val_fraction` of the images to train on, at least one of two unless it is 0.

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
        count = round(val_fraction * len(ids))
        if val_fraction > 0 and len(ids) > 1:
            count = min(max(count, 1), len(ids) - 1)
        held_out = set(ids[:count])
        splits["val"] = [record for record in splits["train"] if record.image_id in held_out]
        splits["train"] = [record for record in splits["train"] if record.image_id not in held_out]
    return splits


def test_records(records: list[Record], split: str = "test") -> list[Record]:
    """Those of the split, where the records name splits; else all."""
    named = any(record.split for record in records)
    return [record for record in records if not named or record.split == split]


# --- layouts ------------------------------------------------------------------------------------------------


def _read(file: Path, finder: ImageFinder | None, columns: Columns, lowercase: bool) -> list[Image]:
    """finder: gets the images that the file has itself."""
    if file.is_dir():
        return _read_folder(file, finder, columns, lowercase)
    if is_parquet(file):
        return _images_of(read_parquet(file, columns), file, finder, lowercase)
    text = read_told(file)
    is_flickr = is_flickr_text(text)
    if text.lstrip()[:1] in ("{", "["):
        images = _read_json(text, file, columns, lowercase)
    else:
        rows = read_flickr_text(text, file) if is_flickr else read_delimited(text, file, columns)
        images = _images_of(rows, file, None, lowercase)
    if not any(record.split for record, _ in images):
        _take_splits_of_lists(images, file, is_flickr)
    return images


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
            require_same_split(record, Record(row.image_id, None, split=split), name)
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


def _take_splits_of_lists(images: list[Image], file: Path, is_flickr: bool) -> None:
    """Give the images the splits of the lists beside their file, if there are any.

    is_flickr: whether it is Flickr8k.token.txt, so that the lists must be its.
    """
    lists = _lists_beside(file)
    records = {next(iter(names), record.image_id): record for record, names in images}
    index, used = NameIndex(records if lists else ()), []
    for split, path in lists:
        names = match_list(path, index, file, is_flickr)
        for name in names:
            if records[name].split not in (None, split):
                raise UserError(f"{path}: {name} is in the list of another split too; remove it from one")
            records[name].split = split
        used += [path.name] if names else []
    if used:
        say_once(f"{file}: its splits are those of the lists beside it, {', '.join(used)}")


# --- folders ------------------------------------------------------------------------------------------------


def _metadata_in(folder: Path) -> dict[Path, str | None]:
    """The file of metadata in a folder; else of its folders train, validation, test, with their splits."""
    found: dict[Path, str | None] = {}
    for name in (".", *sorted(os.listdir(folder))):
        if name == "." or (name.lower() in SPLITS and folder not in {path.parent for path in found}):
            files = [folder / name / own for own in METADATA if (folder / name / own).is_file()]
            found |= dict.fromkeys(files[:1], SPLITS.get(name.lower()))
    return found


def _read_folder(folder: Path, finder: ImageFinder | None, columns: Columns, lowercase: bool) -> list[Image]:
    metadata = _metadata_in(folder)
    if not metadata:
        return _read_sidecars(folder, lowercase)
    images: list[Image] = []
    for file, split in metadata.items():
        own = _read(file, finder, columns, lowercase)
        start = f"{file.parent.name}/" if split else ""
        for record, names in own:
            if split and record.split not in (None, split):
                raise UserError(f"{file}: {record.image_id} is in the {record.split} split; move it there")
            record.image_id, record.split = start + record.image_id, split or record.split
            record.file_name = record.file_name and start + record.file_name
            images.append((record, tuple(start + name for name in names)))
    files = {*map(_stem, walk_images(folder, recursive=True, in_order=False).names)}
    passed = len(files & {*map(_stem, _sidecars_in(folder))}) if len(images) < len(files) else 0
    if passed:
        read = f"{', '.join(file.name for file in metadata)} names {len(images)} of {len(files)} images"
        say_once(f"{folder}: {read}; the {counted(passed, 'sidecar')} beside images are not read")
    return images


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _read_sidecars(folder: Path, lowercase: bool) -> list[Image]:
    """A folder, with subfolders, of images with sidecars, or of sidecars alone; each line is a caption."""
    images = walk_images(folder, recursive=True).names
    texts: dict[str, list[str]] = defaultdict(list)  # by the image's name without extension, .txt first
    for name in sorted(_sidecars_in(folder), reverse=True):
        texts[_stem(name)].append(name)
    names = {_stem(name) or name: name for name in reversed(images)}
    if not images:  # captions alone; the images are elsewhere
        names = {stem: stem for stem in texts}
    rows, problems, codecs, tokens = [], [], Counter(), []
    for stem in sorted(names, key=natural_order):
        captions: list[str] = []
        if stem in texts:
            try:
                text, codec = read_text(folder / texts[stem][0])
            except UserError as error:
                problems.append(f"{names[stem]}: {error}")
                continue
            tokens += texts[stem][:1] if not images and is_flickr_text(text) else []
            captions = [line.strip() for line in text.splitlines() if line.strip()]
            codecs[codec] += not codec.startswith("utf-8")
        problems += [] if captions else [f"{names[stem]}: no caption beside it"]
        rows.append(Row("", names[stem], captions))
    if tokens:  # the shortest is Flickr8k.token.txt, and not Flickr8k.lemma.token.txt
        raise _no_folder_of_images(folder, "no images in it", min(tokens, key=len))
    if not any(row.captions for row in rows):
        raise _no_folder_of_images(
            folder,
            f"a folder with {counted(len(images), 'image')}, but no captions beside them (photo.txt or "
            f"photo.caption for photo.jpg, or {METADATA[0]})",
        )
    report_problems(folder, problems)
    for codec, count in codecs.items():
        if count:
            say_once(f"{folder}: {counted(count, 'sidecar')} not UTF-8; read as {codec}")
    if twice := [own for stem, own in texts.items() if stem in names and len(own) > 1]:
        shown = f"{counted(len(twice), 'image')} with two sidecars, such as {' and '.join(twice[0])}"
        say_once(f"{folder}: {shown}; the first is read")
    found = _images_of(rows, folder, None, lowercase)
    for record, _ in found if images else ():
        record.path = str(folder / record.image_id)
    return found


def _no_folder_of_images(folder: Path, reason: str, annotations: str | None = None) -> UserError:
    """The error for a folder without images that have captions. annotations: the file in it to give."""
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    inside = ", ".join(files[:5]) + (", ..." if len(files) > 5 else "")
    remedy = f"give {folder / annotations}" if annotations else "give the file of captions"
    return UserError(f"{folder}: {reason}; it has {inside or 'nothing else'}; {remedy}")


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
