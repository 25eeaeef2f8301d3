"""Which images of a folder are to be captioned, and what an earlier run has done of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from captioning.command_line import check_at_least
from captioning.data.annotations import read_annotations, require_image, test_records
from captioning.data.image_names import ImageFinder
from captioning.data.images import IMAGE_EXTENSIONS, read_image, walk_images
from captioning.data.sidecars import EXISTING, Sidecars
from captioning.data.submissions import FORMATS, METADATA
from captioning.decoding.options import DecodingOptions
from captioning.folders.journal import Entry, Journal, file_stamp, files_digest
from utils import Messages, UserError, check_output, counted


@dataclass
class FolderOptions:
    """A folder of images: what to caption, where the captions go.

    Raises:
        UserError: values that cannot be, or do not go together.
    """

    test_folder: str | Path = "test/test"  # images to caption
    test_csv: str | Path | None = None  # ids and their order; None: test.csv in or up to two folders above
    recursive: bool = False  # caption the images in its subfolders too
    output_csv: str | Path | None = None  # .csv, .json (COCO) or .jsonl
    with_scores: bool = False  # log-probabilities too, in columns log_prob and log_prob_per_word
    escape_formulas: bool = False  # in a CSV: ' before what spreadsheets would take for a formula
    sidecars: bool = False  # write each caption beside its image: photo.txt for photo.jpg
    sidecar_extension: str = ".txt"  # file extension of the sidecars
    existing: EXISTING = "skip"  # where a sidecar exists already
    prefix: str = ""  # words before each caption in a sidecar; {name}, {folder}: the image's
    suffix: str = ""  # words after each caption in a sidecar
    batch_size: int = 32  # images captioned at a time
    workers: int = 4  # threads that read and prepare images

    def __post_init__(self):
        check_at_least(self, 1, "batch_size", "workers")
        self.as_sidecars = Sidecars(self.sidecar_extension, self.existing, self.prefix, self.suffix)
        self.metadata = Sidecars(prefix=self.prefix, suffix=self.suffix) if self.writes_metadata() else None
        if not self.sidecars:
            if self.as_sidecars != (self.metadata or Sidecars()):
                raise UserError(
                    f"--sidecar_extension, --existing, --prefix and --suffix are for --sidecars: add it (the "
                    f"last two are for {METADATA} too)"
                )
            self.as_sidecars = None
        if self.output_csv is not None:
            check_output(self.output_csv)
        if self.output_csv is not None and Path(self.output_csv).suffix.lower() not in FORMATS:
            raise UserError(f"{self.output_csv}: give a file name that ends in {', '.join(FORMATS)}")

    @classmethod
    def of(cls, settings: FolderOptions, default_output: str) -> FolderOptions:
        """The options that a script's settings have. default_output: where they name no output."""
        values = {option.name: getattr(settings, option.name) for option in fields(cls)}
        if values["output_csv"] is None and not settings.sidecars:
            values["output_csv"] = default_output
        return cls(**values)

    def writes_metadata(self) -> bool:
        return self.output_csv is not None and Path(self.output_csv).name == METADATA

    def check(self, decoding: DecodingOptions) -> None:
        """Raise UserError where the captions and scores have no place in the output."""
        if self.sidecars and (self.with_scores or decoding.num_captions > 1):
            raise UserError(
                "--num_captions and --with_scores are for an output file: a sidecar holds one caption; leave "
                "--sidecars out"
            )
        is_coco = str(self.output_csv).lower().endswith(".json")
        if decoding.num_captions > 1 and (is_coco or self.writes_metadata()):
            raise UserError(
                f"{self.output_csv}: {'COCO results' if is_coco else 'metadata'} hold one caption per image; "
                f"give --num_captions 1, or a file of another name that ends in .csv or .jsonl"
            )

    def journal(self) -> Journal:
        return Journal(self.output_csv or Path(self.test_folder) / ".captions")

    def described(self) -> dict:
        """Those that decide what the captions and sidecars say, in the terms of JSON."""
        described = {"test_folder": str(self.test_folder), "recursive": self.recursive}
        described["with_scores"] = self.with_scores
        if self.as_sidecars or self.metadata:
            described |= vars(self.as_sidecars or self.metadata)
        return described


class Row(NamedTuple):
    image_id: str
    path: str | None  # None: there is no such file


class Problem(NamedTuple):
    image_id: str | None  # None: a subfolder
    text: str


# --- which images ------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What is to be done, as the main process knows it.

    Attributes:
        rows: of the output.
        skipped: images that have a sidecar, which is left as it is.
        done: what an earlier run left in its journal, by image id.
        pending: rows still to be captioned.
        problems: what is known already to have no caption.
        depends_on: what the captions depend on; empty where there is nothing to do.
    """

    rows: list[Row]
    skipped: set[str]
    done: dict[str, Entry]
    pending: list[Row]
    problems: list[Problem] = field(default_factory=list)
    depends_on: dict = field(default_factory=dict)


def plan_folder(
    options: FolderOptions, model: str | Sequence[str | Path], search: dict, messages: Messages
) -> Plan:
    """Find the images and what an earlier run has done of them; say what is left out.

    messages: get the problems.
    """
    rows, left_out, unreadable = _find_rows(options.test_folder, options.test_csv, options.recursive)
    if left_out:
        images = counted(left_out, "image")
        print(f"left out: {images} in subfolders of {options.test_folder}; --recursive takes them too")
    skipped: set[str] = set()
    if options.as_sidecars:
        images = [row.path for row in rows if row.path is not None]
        options.as_sidecars.check(images)
        if options.existing == "skip":
            skipped = options.as_sidecars.exist(images)

    plan = Plan(rows, skipped, {}, [])
    journal = options.journal()

    def describe() -> None:
        name = model if isinstance(model, str) else files_digest(model)
        plan.depends_on = {"model": name} | options.described() | search

    if journal.files():
        describe()
        plan.done = _read_done(journal, plan)
    plan.pending = [row for row in rows if row.image_id not in plan.done and row.path not in skipped]
    plan.problems = [Problem(None, text) for text in unreadable]
    # no model is loaded before there is an image for it
    while plan.pending and (problem := read_row(plan.pending[0], options, read_image).problem):
        plan.problems.append(Problem(plan.pending.pop(0).image_id, problem))
    for problem in plan.problems:
        messages.add(problem.text)
    if not plan.pending and not plan.done and not skipped:
        raise UserError(f"{options.test_folder}: not one readable image among {len(rows)}")
    if plan.pending and not plan.depends_on:
        describe()
    return plan


def _read_done(journal: Journal, plan: Plan) -> dict[str, Entry]:
    """The journal's entries whose image files are as they were."""
    entries, different = journal.read(plan.depends_on)
    paths = dict(plan.rows)
    done = {}
    for image_id, entry in entries.items():
        try:
            if paths.get(image_id) is not None and file_stamp(paths[image_id]) == entry.file:
                done[image_id] = entry
        except OSError:
            continue
    if done:
        print(f"going on: {len(done)} captions are in {journal} already")
    if different:
        what = [
            "another model" if name == "model" else f"another {name}" for name in dict.fromkeys(different)
        ]
        print(f"{journal}: from a run with {' and '.join(what)}; not used, starting anew")
    return done


def find_images(
    test_folder: str | Path, test_csv: str | Path | None = None, recursive: bool = False
) -> list[tuple[str, str | None]]:
    """(id, path) of each image to caption; the path is None where there is no file.

    With a test.csv, given or found in the folder or up to two folders above it, its ids in its order;
    otherwise every image of the folder in natural order, by its name without extension. With `recursive`
    and no test.csv given, every image in the folder and the folders in it, by its path in the folder.

    Raises:
        UserError: no such folder, or no images in it.
    """
    return _find_rows(test_folder, test_csv, recursive)[0]


def _find_rows(
    test_folder: str | Path, test_csv: str | Path | None, recursive: bool
) -> tuple[list[Row], int, list[str]]:
    """The rows; images in subfolders that are left out; subfolders that cannot be read, one line each."""
    folder = Path(test_folder)
    if test_csv is not None:
        images = test_records(read_annotations(test_csv, folder))
        return [Row(image.image_id, image.path) for image in images], 0, []
    if not recursive:
        rows = _rows_of_found_csv(folder)
        if rows:
            return rows, 0, []
    names, left_out, unreadable = walk_images(folder, recursive)
    if not names:
        inside = f"; {left_out} in its subfolders, which --recursive takes" if left_out else ""
        raise UserError(f"{folder}: no images in it ({', '.join(IMAGE_EXTENSIONS)}){inside}")
    stems = Counter(os.path.splitext(name)[0] for name in names)
    rows = []
    for name in names:
        stem = os.path.splitext(name)[0]
        image_id = stem if stems[stem] == 1 and not recursive else name
        # a name that is not UTF-8 has its odd bytes as \xe9
        image_id = os.fsencode(image_id).decode("utf-8", "backslashreplace")
        rows.append(Row(image_id, str(folder / name)))
    return rows, left_out, unreadable


def test_csv_places(folder: str | Path) -> list[Path]:
    """Where a test.csv counts for the images of a folder: in it, or in one of the two folders above it."""
    resolved = Path(folder).resolve()
    return [place / "test.csv" for place in (resolved, resolved.parent, resolved.parent.parent)]


def _rows_of_found_csv(folder: Path) -> list[Row]:
    for file in test_csv_places(folder):
        if file.is_file():
            finder = ImageFinder(folder)
            ids = [image.image_id for image in read_annotations(file)]
            if any(finder(image_id) for image_id in ids):  # otherwise it is about other images
                return [Row(image_id, finder(image_id)) for image_id in ids]
    return []


class ReadRow(NamedTuple):
    row: Row
    image: Any  # what `prepare` gave; None where there is a problem
    file: list  # the file's stamp
    problem: str


def read_row(row: Row, options: FolderOptions, prepare: Callable[[str], Any]) -> ReadRow:
    try:
        path = require_image(row.image_id, row.path, options.test_folder)
        try:
            str(Path(path).relative_to(options.test_folder)).encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{row.image_id}: the file's name is not UTF-8; rename it") from None
        image = prepare(path)
        return ReadRow(row, image, file_stamp(path), "")
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{row.path}: cannot be read ({error.strerror})"
    except MemoryError:
        problem = f"{row.path}: too large for this machine's memory; make it smaller"
    return ReadRow(row, None, [], problem)
