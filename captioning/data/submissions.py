"""Files of captions, written and read.

Three formats, by the file's extension: a CSV `image_id,caption` as Kaggle takes it; COCO results JSON,
`[{"image_id": 391895, "caption": "..."}, ...]`, as the official evaluation server takes it; and JSON lines,
`{"image_id": "photo", "caption": "..."}`. Where asked for, each caption has its rank among those of its image
and its log-probabilities, in columns or keys `MORE_COLUMNS`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from pathlib import Path
from typing import NamedTuple, TextIO

from utils import UserError, atomic_write, read_json, require_regular_file, write_csv, write_json

FORMATS = (".csv", ".json", ".jsonl")
MORE_COLUMNS = ("rank", "log_prob", "log_prob_per_word")


class ScoredCaption(NamedTuple):
    """A caption and how sure the model is of it; None if that is not known.

    log_prob: natural logarithm of the caption's probability under the model, including that of its end.
    log_prob_per_word: log_prob divided by the number of words plus one, for the end.
    """

    text: str
    log_prob: float | None = None
    log_prob_per_word: float | None = None

    @classmethod
    def of(cls, text: str, log_prob: float, words: int) -> ScoredCaption:
        return cls(text, log_prob, log_prob / (words + 1))


def caption_rows(
    captions: Iterable[tuple[str, Sequence[ScoredCaption]]], with_ranks: bool, with_scores: bool
) -> tuple[list[tuple], tuple[str, ...]]:
    """Rows and further columns, as `write_submission` takes them, of each image's captions.

    Args:
        captions: (id, captions) of each image.
        with_ranks: number the captions of an image from 1. with_scores: give their log-probabilities.
    """
    wanted = [with_ranks, with_scores, with_scores]
    rows = []
    for image_id, of_image in captions:
        for rank, (text, *scores) in enumerate(of_image, start=1):
            values = [rank, *(None if score is None else round(score, 4) for score in scores)]
            rows.append((image_id, text, *compress(values, wanted)))
    return rows, tuple(compress(MORE_COLUMNS, wanted))


def write_submission(
    path: str | Path, rows: Sequence[tuple], more_columns: Sequence[str] = (), escape_formulas: bool = False
) -> None:
    """Write (id, caption, ...) rows: as COCO results or JSON lines where the file's name ends in .json or
    .jsonl, else as a CSV.

    more_columns: names of the values behind the caption. escape_formulas: in a CSV, as `escape_formula` does.
    """
    columns = ("image_id", "caption", *more_columns)
    if Path(path).suffix.lower() == ".json":
        write_json(path, [dict(zip(columns, (coco_id(image_id), *rest))) for image_id, *rest in rows])
        return
    with atomic_write(path) as tmp_path:
        if Path(path).suffix.lower() == ".jsonl":
            lines = (json.dumps(dict(zip(columns, row)), ensure_ascii=False) + "\n" for row in rows)
            with tmp_path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
                stream.writelines(lines)
        else:
            cells = (map(escape_formula, row) for row in rows) if escape_formulas else rows
            write_csv(tmp_path, [columns, *cells])


FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n")  # how a cell begins that spreadsheets take for a formula


def escape_formula(value: object) -> object:
    """Text that begins as a formula with an apostrophe in front, which makes it text to a spreadsheet too."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULAS) else value


def _unescape_formula(text: str) -> str:
    return text[1:] if text[:1] == "'" and text[1:].startswith(FORMULAS) else text


def coco_id(image_id: str) -> int | str:
    """COCO's number of an image: its file names are like COCO_val2014_000000391895.jpg. Other ids stay."""
    number = re.fullmatch(r"(?:COCO_\w+?_)?0*(\d{1,18})(?:\.jpg)?", image_id)
    return int(number[1]) if number else image_id


def read_submission(path: str | Path) -> list[tuple[str, str]]:
    """The (id, caption) rows of a file in any of the formats, in file order, doubled ones too.

    If the file has several captions per image, only those of rank 1 are returned, and a line says so.

    Raises:
        UserError: the file is missing, damaged or of another layout, or holds no row.
    """
    path = Path(path)
    readers = {".json": _read_results, ".jsonl": _read_lines}
    rows = readers.get(path.suffix.lower(), _read_rows)(path)
    best = [(image_id, caption) for image_id, caption, rank in rows if rank in (None, 1)]
    if not best:
        raise UserError(f"{path}: no captions {'of rank 1 ' if rows else ''}in it")
    if len(best) < len(rows):
        print(f"{path}: several captions per image; those of rank 1 count, {len(rows) - len(best)} do not")
    for image_id, caption in best:
        try:
            f"{image_id}{caption}".encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{path}: half a character (an unpaired surrogate) in the id or caption of {image_id!a}; "
                f"mend or replace the file"
            ) from None
    return best


RankedRow = tuple[str, str, int | None]  # id, caption, rank; None: the file has no ranks


def _read_results(path: Path) -> list[RankedRow]:
    rows = _rows_of(read_json(path))
    if rows is None:
        raise UserError(f'{path}: not COCO results; expected [{{"image_id": 1, "caption": "a dog"}}, ...]')
    return rows


def _read_lines(path: Path) -> list[RankedRow]:
    rows: list[RankedRow] = []
    with _open_text(path) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                row = _rows_of([json.loads(line)]) if line.strip() else []
            except (ValueError, RecursionError):  # the former also of a number with thousands of digits
                row = None
            if row is None:
                raise UserError(
                    f'{path}, line {number}: not like {{"image_id": "photo", "caption": "a dog"}}'
                )
            rows += row
    return rows


def _rows_of(entries: object) -> list[RankedRow] | None:
    """The rows of [{"image_id": ..., "caption": ...}, ...]; None where it is something else."""
    try:
        rows = [(str(entry["image_id"]), entry["caption"], entry.get("rank")) for entry in entries]
    except (KeyError, TypeError, AttributeError):
        return None
    return rows if all(isinstance(caption, str) for _, caption, _ in rows) else None


def _read_rows(path: Path) -> list[RankedRow]:
    with _open_text(path) as stream:
        reader = csv.DictReader(stream, restkey="rest", restval="")
        try:
            columns = [(name or "").strip() for name in reader.fieldnames or []]
            if columns[:2] not in (["image_id", "caption"], ["image", "caption"]):
                raise UserError(f"{path}: its first line is not image_id,caption")
            reader.fieldnames = columns
            rows = []
            for row in reader:
                if len(row.get("rest", [])) or not {*columns[2:]} <= {*MORE_COLUMNS}:
                    raise UserError(
                        f"{path}, line {reader.line_num}: other columns than image_id, caption and "
                        f"{', '.join(MORE_COLUMNS)}; quote captions with commas"
                    )
                image_id, caption = map(_unescape_formula, (row[columns[0]].strip(), row["caption"]))
                rows.append((image_id, caption, _rank(row.get("rank"), f"{path}, line {reader.line_num}")))
            return rows
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not a CSV file ({error})") from None


def _rank(text: str | None, place: str) -> int | None:
    """The rank in a CSV's row. place: for the message."""
    if text is None:
        return None
    if not text.strip().isdecimal() or len(text) > 18:
        raise UserError(f"{place}: its rank is {text[:20]!r}; give a number from 1, or leave out the column")
    return int(text)


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    require_regular_file(path, "no such file of captions")
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
