"""Tables of captions as rows of one kind: delimited text, JSON objects and Parquet.

Which separator a text has, whether it has a header, and which columns have the images and the captions is
recognized by its content; `Columns` are the names that the user gives.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

from captioning.data.image_names import is_image_name, parts_of
from captioning.data.text_files import captions_of_cell, no_such, report_problems, say_once, split_rows
from utils import UserError

SEPARATORS = "\t|;,"  # the rarest in captions first
IDS = (  # usual names of columns, the likeliest first
    "image_id", "image", "image_name", "img", "img_id", "img_name", "imageid", "image_file", "image_path",
    "file_name", "filename", "file", "file_path", "filepath", "path", "photo", "picture", "name", "key", "id",
)  # fmt: skip
FILES = ("file_name", "filename", "image_file", "image_path", "file_path", "path", "image_name", "image")
CAPTIONS = (
    "caption", "captions", "text", "texts", "description", "comment", "sentence", "sentences", "raw",
    "image_caption", "caption_text",
)  # fmt: skip
NUMBERED = tuple(rf"{name}_?\d*" for name in CAPTIONS)  # caption, caption_1, caption_2
FLICKR_LINE = re.compile(r"([^\t]+?)#\d+\t(.*)")
SAMPLE = 200  # rows by which the columns are recognized


class Row(NamedTuple):
    """A row of a table: an image with captions.

    Attributes:
        place: in the file, for messages, such as "line 3".
        image_id: as the file has it.
        captions: without blanks around them; None where there is no column for them.
        file_name: a further name of the image file, where there is a column for it.
        split: "train", "val" or "test", or what the file says instead.
        rank: of the caption among those of its image, where there is a column for it.
        tokens: the captions' words, where the file has them.
        image: the image file's content, where the table has it.
    """

    place: str
    image_id: str
    captions: list[str] | None
    file_name: str | None = None
    split: str | None = None
    rank: str | None = None
    tokens: list[list[str]] | None = None
    image: bytes | None = None


@dataclass
class Columns:
    """The names that the user gives for the columns of ids and of captions. A file that lacks one is read by
    the usual names; `check` refuses a name that no file had."""

    id: str | None = None
    caption: str | None = None
    found: set[str] = field(default_factory=set)
    seen: tuple[str, ...] = ()  # the last file's columns

    def pick(self, names: Sequence[str], given: str | None, usual: tuple[str, ...]) -> list[str]:
        """The name of `names` that was given, else the `usual_names`."""
        self.seen = tuple(names)
        self.found |= {given} & {*names}
        return [given] if given in names else usual_names(self.seen, usual)

    def check(self) -> None:
        """Raise UserError where a name was given that no file has."""
        for setting, name in (("--id_column", self.id), ("--caption_column", self.caption)):
            if name is not None and name not in self.found:
                there = ", ".join(self.seen)[:100] or "none with names"
                raise UserError(f"{setting} {name}: no such column; there are {there}")


@lru_cache
def usual_names(names: tuple[str, ...], usual: tuple[str, ...]) -> list[str]:
    """The names that match the first of these patterns that any matches; capitals do not matter."""
    plain = [(name, re.sub(r"[\s-]+", "_", name.strip().lower())) for name in names]
    found = ([name for name, own in plain if re.fullmatch(pattern, own)] for pattern in usual)
    return next(filter(None, found), [])


def is_parquet(path: Path) -> bool:
    """Raises UserError where there is no such file."""
    if not path.is_file():
        raise no_such(path, "no such file; give the one that holds the captions")
    with path.open("rb") as stream:
        return stream.read(4) == b"PAR1"


def refuse(name: str | Path, text: str, reason: str = "its layout is not recognized") -> UserError:
    """The error for a file with none of the layouts: its first line, and what was looked for."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    shown = first[:80] + ("..." if len(first) > 80 else "")
    return UserError(
        f'{name}: {reason}; its first line is "{shown}"; looked for a header with a column of images '
        f"({', '.join(IDS[:3])}, file_name, ...) and one of captions ({', '.join(CAPTIONS[:3])}, ...), for "
        f"lines like photo.jpg,A dog or photo.jpg#0<TAB>A dog, and for JSON: Karpathy's, COCO's, objects of "
        f"image_id and caption; --id_column and --caption_column name other columns"
    )


# --- delimited text -----------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """The columns of a delimited text, by their index; width: how many there are."""

    width: int
    has_header: bool
    captions: list[int]
    places: list[int]  # of id, file name, split and rank; -1: there is none


def read_delimited(text: str, name: str | Path, columns: Columns) -> Iterator[Row]:
    """The rows of delimited text, with or without a header; what is wrong with some is reported at the end.

    Raises:
        UserError: no such text, or a quote that is not closed.
    """
    text, separator = _find_separator(text, columns)
    rows = list(split_rows(text, name, separator))
    if not rows:
        raise UserError(f"{name}: is empty; give the file that holds the captions")
    layout = _find_layout(name, rows, columns)
    if layout is None:
        raise refuse(name, text)
    problems, without = [], 0
    for line, fields in rows[layout.has_header :]:
        fields, problem = _fit(fields, layout, separator)
        width = len(fields)
        image_id, *others = [fields[i].strip() if 0 <= i < width else "" for i in layout.places]
        if "#" in image_id:
            image_id = re.sub(r"(\.\w+)#\d+$", r"\1", image_id)
        cells = [fields[i].strip() for i in layout.captions if i < width and not problem]
        captions = [one for cell in cells for one in captions_of_cell(cell)] if layout.captions else None
        if not image_id:
            problem = problem or "no image named"
        elif captions == []:
            problem = problem or f"no caption ({image_id})"
            without += 1
        if problem:
            problems.append(f"line {line}: {problem}")
        if image_id:
            yield Row(f"line {line}", image_id, captions, *[other or None for other in others])
    if 0 < without == len(rows) - layout.has_header:
        say_once(f"{name}: none of its rows has a caption")
    else:
        report_problems(name, problems)


def _find_separator(text: str, columns: Columns) -> tuple[str, str]:
    """The text without Excel's first line `sep=;`, and the separator of its columns."""
    hint = re.match(r"sep=([^\w\s]|\t)(?=[\r\n])", text)
    if hint:
        return text[hint.end() :], hint[1]
    lines = list(islice((line for line in io.StringIO(text, newline="") if line.strip()), SAMPLE))
    found = [(False, 0, 0, ",")]
    for order, separator in enumerate(SEPARATORS):
        with suppress(csv.Error):
            rows = [row for row in csv.reader(lines, delimiter=separator) if row] or [[]]
            width = _usual_width(rows)
            header = [cell.strip() for cell in rows[0]]
            known = len(header) > 1 and Columns().pick(header, columns.id, IDS) != []
            if known or width > 1:
                images = sum(is_image_name(cell.strip()) for row in rows for cell in row)
                found.append((known, sum(len(row) >= width for row in rows) + images, -order, separator))
    return text, max(found)[-1]


def _usual_width(rows: list[list[str]]) -> int:
    """The number of columns: more are captions with separators, fewer are broken rows."""
    return sorted(map(len, rows))[len(rows) // 10]


def _find_layout(name: str | Path, rows: list[tuple[int, list[str]]], columns: Columns) -> Layout | None:
    """By the names in the header, else by what the columns look like; None where neither tells."""
    header = [cell.strip().strip("\ufeff") for cell in rows[0][1]]
    named = [columns.pick(header, columns.id, IDS)[:1], columns.pick(header, columns.caption, NUMBERED)]
    for column in (*named[0], *named[1]):
        if header.count(column) > 1:
            raise UserError(f"{name}: has two columns {column}; remove or rename one")
    sample = [fields for _, fields in rows[1 : SAMPLE + 1]]
    has_header = named != [[], []] or not _is_image_row(header, sample)
    if not has_header:
        sample = [header, *sample]
        header = [""] * _usual_width(sample)
    looks = _Looks(sample, len(header))
    ids, captions = ([header.index(column) for column in own] for own in named)
    ids = ids or looks.find_ids(captions)
    captions = captions or looks.find_captions(ids)
    if not ids or not (captions or named[0] or len(header) == 1):
        return None
    if has_header:
        _say_what_is_taken(name, header, all(named), ids[0], captions)
    others = [usual_names(tuple(header), usual) for usual in (FILES, ("split",), ("rank",))]
    others = [header.index(found[0]) if found else -1 for found in others]
    return Layout(len(header), has_header, captions, ids + others)


def _say_what_is_taken(
    name: str | Path, header: list[str], all_named: bool, ids: int, captions: list[int]
) -> None:
    """A line where columns are not known by their names."""
    if not captions and len(header) > 1:
        there = ", ".join(header)[:100]
        say_once(f"{name}: no column of captions in {there} (--caption_column names one): a list of images")
    elif not all_named and len(header) > 1:
        texts = ", ".join(header[index] for index in captions)
        taken = f"{header[ids]} is taken for the images, {texts} for the captions"
        say_once(f"{name}: {taken}; --id_column and --caption_column name other columns")


class _Looks:
    """What the columns of some rows look like."""

    def __init__(self, rows: list[list[str]], width: int):
        cells = [[row[index].strip() for row in rows if index < len(row)] for index in range(width)]
        self.images, self.sentences, self.words = (
            [sum(map(looks, column)) / max(len(rows), 1) for column in cells]
            for looks in (is_image_name, _is_sentence, _is_word)
        )

    def find_ids(self, captions: list[int]) -> list[int]:
        """The one column of names of image files; of two columns that of words beside that of sentences."""
        free = [index for index in range(len(self.images)) if index not in captions]
        images = [index for index in free if self.images[index] > 0.9]
        if len(images) == 1:
            return images
        words = [index for index in free if self.words[index] > 0.9]
        others = [index for index in range(len(self.images)) if self.sentences[index] > 0.5]
        return words if len(self.images) == 2 and len(words) == 1 and others else []

    def find_captions(self, ids: list[int]) -> list[int]:
        """The one column of sentences."""
        found = [index for index, share in enumerate(self.sentences) if share > 0.5 and index not in ids]
        return found if len(found) == 1 else []


def _is_sentence(cell: str) -> bool:
    return " " in cell and len(re.findall(r"[^\W\d_]{2,}", cell)) > 1


def _is_word(cell: str) -> bool:
    return bool(cell) and not re.search(r"\s", cell)


def _is_image_row(fields: list[str], sample: list[list[str]]) -> bool:
    """Whether the first row is like the others, and so no header: it has an image's name, or a sentence."""
    if any(map(is_image_name, fields)):
        return True
    looks = _Looks(sample, len(fields))
    return any(_is_sentence(cell) and share > 0.5 for cell, share in zip(fields, looks.sentences))


def _fit(fields: list[str], layout: Layout, separator: str) -> tuple[list[str], str]:
    """The fields as wide as the header, and what is wrong with the row, if anything is.

    A caption with separators that is not quoted has become several fields: they are joined again where no
    other column can have had them.
    """
    while len(fields) > layout.width and not fields[-1].strip():
        fields = fields[:-1]
    surplus = len(fields) - layout.width
    if surplus > 0:
        if len(layout.captions) != 1 or not (layout.captions[0] == layout.width - 1 or layout.width == 2):
            problem = f"{len(fields)} columns in place of {layout.width}; quote captions with {separator}"
            return fields, problem
        (caption,) = layout.captions
        own = separator.join(fields[caption : caption + surplus + 1])
        return [*fields[:caption], own, *fields[caption + surplus + 1 :]], ""
    if layout.captions and 1 < len(fields) <= layout.captions[0]:
        return fields, f"{len(fields)} columns in place of {layout.width} ({separator.join(fields)[:60]})"
    return fields, ""


def is_flickr_text(text: str) -> bool:
    """Whether it begins as Flickr8k.token.txt does: name.jpg#0, a tab, a caption."""
    return bool(FLICKR_LINE.fullmatch(text.lstrip().partition("\n")[0].rstrip("\r")))


def read_flickr_text(text: str, file: Path) -> list[Row]:
    """Those of Flickr8k.token.txt."""
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
    return rows


# --- JSON objects and Parquet -------------------------------------------------------------------------------


def read_objects(
    entries: Iterable[tuple[int, Any]], name: str | Path, columns: Columns, unit: str = "line"
) -> Iterator[Row]:
    """The rows of objects such as {"image_id": "photo", "caption": "A dog"} or {"file_name": "a/b.jpg",
    "text": ["A dog", "A cat"]}.

    entries: (number for messages, object). unit: what the number counts.

    Raises:
        UserError: another object.
    """
    problems, count, lacking, width, images = [], 0, 0, 0, {}
    for number, entry in entries:
        if not isinstance(entry, Mapping):
            raise UserError(f'{name}, {unit} {number}: not like {{"image_id": "photo", "caption": "A dog"}}')
        row = _row_of(entry, f"{unit} {number}", name, columns)
        if not row.image_id and row.image is None:
            there = ", ".join(map(str, entry))[:100]
            problems.append(f"{unit} {number}: no image named in it; it has {there}")
            lacking += 1
            continue
        if row.image is not None:
            of_name = images.setdefault(row.image_id, hash(row.image))
            if not row.image_id or of_name != hash(row.image):  # no name, or that of another image
                row = row._replace(image_id=f"{Path(name).stem}_{number:06d}", file_name=None)
        count, width = count + 1, max(width, len(entry))
        if not row.captions:
            problems.append(f"{unit} {number}: no caption ({row.image_id})")
        yield row
    if lacking and not count:
        raise UserError(f"{name}, {problems[0]}; --id_column and --caption_column name other keys")
    if count and len(problems) - lacking == count:
        problems = [problem for problem in problems if ": no image" in problem]
        if width > 1:
            say_once(f"{name}: no captions in it (--caption_column names their key): a list of images")
    report_problems(name, problems)


def _row_of(entry: Mapping[str, Any], place: str, name: str | Path, columns: Columns) -> Row:
    """The row of one object; without `image_id` where it names no image."""
    keys = [key for key in entry if isinstance(key, str)]
    names = [key for key in keys if isinstance(entry[key], (str, int)) and not isinstance(entry[key], bool)]
    id_keys, file_keys = columns.pick(names, columns.id, IDS), usual_names(tuple(names), FILES)
    caption_keys = columns.pick(keys, columns.caption, NUMBERED)
    image, path = _image_of(entry)
    file_name = str(entry[file_keys[0]]) if file_keys else path
    if entry.get("filepath") and "filename" in entry:  # Karpathy's: folder and file
        file_name = f"{entry['filepath']}/{entry['filename']}"
    image_id = str(entry[id_keys[0]]).strip() if id_keys else "/".join(parts_of(path or ""))
    captions, tokens = None, None
    if caption_keys:
        values = [entry[key] for key in caption_keys]
        value = values[0] if len(values) == 1 else [one for one in values if one is not None]
        captions, tokens = _captions_of_value(value, f"{name}, {place}")
    split, rank = (None if entry.get(key) is None else str(entry[key]) for key in ("split", "rank"))
    return Row(place, image_id, captions, file_name, split, rank, tokens, image)


def _image_of(entry: Mapping[str, Any]) -> tuple[bytes | None, str | None]:
    """The content of the image file that the object has itself, and its path, where it has these."""
    for value in entry.values():
        if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
            return value["bytes"], value.get("path")
        if isinstance(value, bytes):
            return value, None
    return None, None


def _captions_of_value(value: Any, where: str) -> tuple[list[str], list[list[str]] | None]:
    """The captions of a text, a list of texts, or Karpathy's sentences, and the words of these.

    Raises:
        UserError: something else.
    """
    values, tokens = value if isinstance(value, list) else [] if value is None else [value], None
    if values and all(isinstance(one, Mapping) for one in values):
        own = [one.get("tokens") for one in values]
        tokens = own if all(_is_list_of(words, str) for words in own) else None
        values = [one.get("raw") or " ".join(words) for one, words in zip(values, tokens or repeat(()))]
    if not all(isinstance(one, str) for one in values):
        raise UserError(f"{where}: its caption is {str(value)[:60]}; expected a text, or a list of texts")
    return ([one.strip() for one in values if one.strip()] if tokens is None else values), tokens


def objects_of(content: Any, text: str, name: str | Path) -> Iterable[tuple[int, Any]]:
    """(number, object) of a list of objects or ids, of one object, or of {id: caption, or captions}."""
    if isinstance(content, dict) and content.keys() & {*IDS} and usual_names((*content,), NUMBERED):
        content = [content]
    elif isinstance(content, dict):
        values = [*content.values()]
        is_text = _is_list_of(values, str) and sum(map(_is_sentence, values)) > len(values) / 2
        if values and (is_text or all(_is_list_of(value, str) for value in values)):
            content = [{"image_id": key, "caption": value} for key, value in content.items()]
    elif _is_list_of(content, str):
        content = [{"image_id": value} for value in content]
    if not _is_list_of(content, dict):
        raise refuse(name, text, "JSON of no known layout")
    return enumerate(content, start=1)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, kind) for one in value)


def read_parquet(path: Path, columns: Columns) -> Iterator[Row]:
    """The rows of a Parquet file, with the images that it holds.

    Raises:
        UserError: pyarrow is not installed, the file is damaged, or has other columns.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path}: to read Parquet, pip install pyarrow; or save it as CSV") from None

    def entries() -> Iterator[tuple[int, Any]]:
        number = 0
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=64):
                    for entry in batch.to_pylist():
                        number += 1
                        yield number, entry
        except (ArrowException, OSError, ValueError) as error:
            reason, *_ = str(error).split("\n")
            raise UserError(f"{path}: not a Parquet file, or damaged ({reason})") from None

    yield from read_objects(entries(), path, columns, "row")
