"""Files of captions, written and read.

Three formats are written, by the file's extension: a CSV `image_id,caption` as Kaggle takes it; COCO results
JSON, `[{"image_id": 391895, "caption": "..."}, ...]`, as the official evaluation server takes it; and JSON
lines, `{"image_id": "photo", "caption": "..."}`. A metadata.jsonl has lines as Hugging Face reads them beside
the images, `{"file_name": "cats/photo.jpg", "text": "..."}`. Where asked for, each caption has its rank among
those of its image and its log-probabilities, in columns or keys `MORE_COLUMNS`; JSON lines have that of each
word too. All tables (tables.py) are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import NamedTuple

from captioning.data.image_names import coco_id
from captioning.data.tables import (
    Columns,
    Row,
    is_parquet,
    objects_of,
    read_delimited,
    read_objects,
    read_parquet,
)
from captioning.data.text_files import parse_json_lines, read_told, say_once
from utils import UserError, atomic_write, parse_json, say, write_csv, write_json

FORMATS = (".csv", ".json", ".jsonl")
MORE_COLUMNS = ("rank", "log_prob", "log_prob_per_word", "words")
METADATA = "metadata.jsonl"


class ScoredCaption(NamedTuple):
    """A caption and how sure the model is of it; None if that is not known.

    log_prob: natural logarithm of the caption's probability under the model, including that of its end.
    log_prob_per_word: log_prob divided by the number of words plus one, for the end.
    words: each word with its log-probability.
    """

    text: str
    log_prob: float | None = None
    log_prob_per_word: float | None = None
    words: Sequence[tuple[str, float]] | None = None

    @classmethod
    def of(
        cls, text: str, log_prob: float, count: int, words: Sequence[tuple[str, float]] | None = None
    ) -> ScoredCaption:
        """count: of the caption's words."""
        return cls(text, log_prob, log_prob / (count + 1), words)


def caption_rows(
    captions: Iterable[tuple[str, Sequence[ScoredCaption]]], with_ranks: bool, with_scores: bool
) -> tuple[list[tuple], tuple[str, ...]]:
    """Rows and further columns, as `write_submission` takes them, of each image's captions.

    Args:
        captions: (id, captions) of each image.
        with_ranks: number the captions of an image from 1. with_scores: give their log-probabilities.
    """
    wanted = [with_ranks, with_scores, with_scores, with_scores]
    rows = []
    for image_id, of_image in captions:
        for rank, (text, *scores, words) in enumerate(of_image, start=1):
            values = [rank, *(None if score is None else round(score, 4) for score in scores)]
            values.append(None if words is None else [(word, round(score, 4)) for word, score in words])
            rows.append((image_id, text, *compress(values, wanted)))
    return rows, tuple(compress(MORE_COLUMNS, wanted))


def write_submission(
    path: str | Path, rows: Sequence[tuple], more_columns: Sequence[str] = (), escape_formulas: bool = False
) -> None:
    """Write (id, caption, ...) rows: as COCO results or JSON lines where the file's name ends in .json or
    .jsonl, else as a CSV. In a metadata.jsonl the ids are `metadata_name`s.

    more_columns: names of the values behind the caption; "words" are for JSON lines alone.
    escape_formulas: in a CSV, as `escape_formula` does.
    """
    extension = Path(path).suffix.lower()
    names = ("file_name", "text") if Path(path).name == METADATA else ("image_id", "caption")
    if extension != ".jsonl" and "words" in more_columns:
        place = len(names) + [*more_columns].index("words")
        rows = [(*row[:place], *row[place + 1 :]) for row in rows]
        more_columns = [name for name in more_columns if name != "words"]
    columns = (*names, *more_columns)
    if extension == ".json":
        write_json(path, [dict(zip(columns, (coco_id(image_id), *rest))) for image_id, *rest in rows])
        return
    with atomic_write(path) as tmp_path:
        if extension == ".jsonl":
            lines = (json.dumps(dict(zip(columns, row)), ensure_ascii=False) + "\n" for row in rows)
            with tmp_path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
                stream.writelines(lines)
        else:
            cells = (map(escape_formula, row) for row in rows) if escape_formulas else rows
            write_csv(tmp_path, [columns, *cells])


def metadata_name(image: str | Path, output: str | Path, folder: str | Path = ".") -> str:
    """An image's `file_name` in the metadata.jsonl `output`: its path from the folder of that file, or of an
    image outside of it from its own `folder`."""
    absolute = Path(image).absolute()
    for place in (Path(output).absolute().parent, Path(folder).absolute()):
        if absolute.is_relative_to(place):
            return absolute.relative_to(place).as_posix()
    return absolute.name


def say_metadata_place(output: str | Path, images: Iterable[str | Path], folder: str | Path = ".") -> None:
    """Say where a metadata.jsonl belongs that is not above all its images: Hugging Face's loader looks for
    its file names from the folder that it is in, and only in this folder and those in it."""
    place = Path(output).absolute().parent
    if not all(Path(image).absolute().is_relative_to(place) for image in images):
        say(
            f"{output}: its file names start from {Path(folder).absolute()}; put it there, as loaders look "
            f"for the images from the folder that it is in"
        )


FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n")  # how a cell begins that spreadsheets take for a formula


def escape_formula(value: object) -> object:
    """Text that begins as a formula with an apostrophe in front, which makes it text to a spreadsheet too."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULAS) else value


def _unescape_formula(text: str) -> str:
    return text[1:] if text[:1] == "'" and text[1:].startswith(FORMULAS) else text


def read_submission(path: str | Path, columns: Columns | None = None) -> list[tuple[str, str]]:
    """The (id, caption) rows of a table in any of the layouts of tables.py, in file order, doubled ones too.

    If the file has several captions per image, only those of rank 1 are returned, and a line says so.

    Raises:
        UserError: the file is missing, damaged or of another layout, or holds no row.
    """
    path, rows = Path(path), []
    for row in _read_table(Path(path), columns or Columns()):
        where = f"{path}, {row.place}"
        if row.captions is None:
            raise UserError(f"{where}: no caption in it; give a file of captions")
        if len(row.captions) > 1:
            raise UserError(f"{where}: {len(row.captions)} captions; give one for each image")
        if row.rank is not None and not (row.rank.isdecimal() and len(row.rank) < 19):
            raise UserError(f"{where}: its rank is {row.rank[:20]!r}; give a number from 1")
        rows.append(row)
    best = [row for row in rows if row.rank is None or int(row.rank) == 1]
    if not best:
        raise UserError(f"{path}: no captions {'of rank 1 ' if rows else ''}in it")
    if len(best) < len(rows):
        say_once(f"{path}: several captions per image; those of rank 1 count, {len(rows) - len(best)} do not")
    for row in best:
        try:
            row.image_id.encode("utf-8", "surrogateescape")  # bytes of a file name that is not UTF-8 may be
            "".join(row.captions).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{path}, {row.place}: half a character (an unpaired surrogate) in the id or caption of "
                f"{row.image_id!r}; mend or replace the file"
            ) from None
    return [(_unescape_formula(row.image_id), _unescape_formula("".join(row.captions))) for row in best]


def _read_table(path: Path, columns: Columns) -> Iterator[Row]:
    """The rows of a file with any of these tables.

    Raises:
        UserError: there is no such file, or it is damaged, or something else.
    """
    if is_parquet(path):
        return read_parquet(path, columns)
    text = read_told(path)
    if text.lstrip()[:1] not in ("{", "["):
        return read_delimited(text, path, columns)
    lines = parse_json_lines(text, path)
    if lines is not None:
        return read_objects(lines, path, columns)
    return read_objects(objects_of(parse_json(text, path), text, path), path, columns, "entry")
