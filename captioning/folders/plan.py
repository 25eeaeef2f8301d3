"""Which images of a folder are to be captioned, and what an earlier run has done of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from captioning.command_line import check_at_least, check_different_files
from captioning.data.annotations import read_annotations, test_records
from captioning.data.image_names import ImageFinder, require_image
from captioning.data.images import IMAGE_EXTENSIONS, read_image, walk_images
from captioning.data.sidecars import EXISTING, Backup, Sidecars, shared_beginnings
from captioning.data.submissions import FORMATS, METADATA
from captioning.decoding.options import DecodingOptions
from captioning.files import OUT_OF_FILES, is_locked, lock_file_of, lock_output, remove_unfinished
from captioning.folders.journal import Entry, Journal, SidecarChanges, file_stamp, files_digest
from utils import Messages, UserError, check_output, counted, say


@dataclass
class FolderOptions:
    """A folder of images: what to caption, where the captions go.

    Raises:
        UserError: values that cannot be, or do not go together.
    """

    test_folder: str | Path = "test/test"  # images to caption
    test_csv: str | Path | None = None  # ids and their order; None: test.csv in or up to two folders above
    recursive: bool = False  # caption the images in its subfolders too
    output_csv: str | Path | None = None  # .csv, .json (COCO), .jsonl, or metadata.jsonl (Hugging Face)
    with_scores: bool = False  # log-probabilities too, in columns log_prob and log_prob_per_word
    escape_formulas: bool = False  # in a CSV: ' before what spreadsheets would take for a formula
    sidecars: bool = False  # write each caption beside its image: photo.txt for photo.jpg
    sidecar_extension: str = ".txt"  # file extension of the sidecars
    existing: EXISTING = "skip"  # where a sidecar exists already
    backup: bool = True  # keep what sidecars, or an output among the images, said before: in .sidecar_backup
    prefix: str = ""  # words with which a sidecar or metadata text begins; {name}, {folder}: the image's
    suffix: str = ""  # words with which it ends
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
        check_different_files(self, ("output_csv",), ("test_csv",))
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
        return Journal(self.output_csv or self._sidecar_name(self.test_folder))

    def _sidecar_name(self, folder: str | Path, tree: str = "") -> Path:
        """What stands for all sidecars of a folder, or `tree`, in the names of journals and locks."""
        return Path(folder) / f".captions{self.as_sidecars.extension}{tree}"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the output and the sidecars. Raises UserError where another run does."""
        with ExitStack() as held:
            if self.output_csv is not None:
                refusal = (
                    f"{self.output_csv}: another run is writing it; wait for its end, or give another file"
                )
                held.enter_context(lock_output(self.output_csv, refusal))
            if self.sidecars and Path(self.test_folder).is_dir():
                refusal = self._sidecar_refusal(self.test_folder)
                held.enter_context(lock_output(self._sidecar_name(self.test_folder), refusal))
                if self.recursive or self.test_csv:
                    held.enter_context(lock_output(self._sidecar_name(self.test_folder, ".tree"), refusal))
                for folder in Path(self.test_folder).resolve().parents:
                    self.check_unlocked(folder, ".tree")
            yield

    def check_unlocked(self, folder: str | Path, tree: str = "") -> None:
        """Raise UserError where another run writes sidecars in this folder, or `tree`."""
        if is_locked(lock_file_of(self._sidecar_name(folder, tree))):
            raise UserError(self._sidecar_refusal(folder))

    def _sidecar_refusal(self, folder: str | Path) -> str:
        extension = self.as_sidecars.extension
        return (
            f"{folder}: another run is writing {extension} sidecars there; wait for its end, or give another "
            f"--sidecar_extension"
        )

    def sidecar_changes(self, process: int, triggers: Sequence[str]) -> SidecarChanges | None:
        """What writes the sidecars; None where none are asked for."""
        if not self.as_sidecars:
            return None
        backup = Backup(self.test_folder, process) if self.keeps_backup() else None
        return SidecarChanges(self.as_sidecars, backup, triggers)

    @contextmanager
    def replacing_output(self) -> Iterator[None]:
        """Where the output is among the images, keep what a file of its name says that the block replaces."""
        root, output = os.path.realpath(self.test_folder), Path(self.output_csv)
        place = os.path.join(os.path.realpath(output.parent), output.name)
        if self.backup and Path(place).is_relative_to(root):
            with Backup(root).keeping(place):
                yield
        else:
            yield

    def keeps_backup(self) -> bool:
        return self.sidecars and self.backup and self.existing != "skip"

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


NO_CAPTION, NO_SIDECAR = "no caption", "sidecar not written"  # kinds of problems


class Problem(NamedTuple):
    image_id: str | None  # None: a subfolder
    text: str
    kind: str = NO_CAPTION


# --- which images ------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What is to be done, as the main process knows it.

    Attributes:
        rows: of the output.
        skipped: what the sidecars say that are left as they are, by image file; "" where no output needs it.
        done: what an earlier run left in its journal, by image id.
        pending: rows still to be captioned.
        problems: what is known already to have no caption.
        depends_on: what the captions depend on; empty where there is nothing to do.
        triggers: words that stay first in the sidecars that begin with them.
    """

    rows: list[Row]
    skipped: dict[str, str] = field(default_factory=dict)
    done: dict[str, Entry] = field(default_factory=dict)
    pending: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    depends_on: dict = field(default_factory=dict)
    triggers: list[str] = field(default_factory=list)


def plan_folder(
    options: FolderOptions, model: str | Sequence[str | Path], search: dict, messages: dict[str, Messages]
) -> Plan:
    """Find the images and what an earlier run has done of them; say what is left out.

    messages: get the problems, by their kinds.
    """
    _check_output_is_no_list(options)
    rows, left_out, unreadable = _find_rows(options.test_folder, options.test_csv, options.recursive)
    if left_out:
        places = f"{counted(left_out, 'image')} in subfolders of {options.test_folder}"
        say(f"left out: {places}; --recursive takes them too")
    plan = Plan(rows, problems=[Problem(None, text) for text in unreadable])
    if options.as_sidecars:
        _check_sidecars(options, plan)

    def describe() -> None:
        name = model if isinstance(model, str) else files_digest(model)
        plan.depends_on = {"model": name} | options.described() | search

    if options.journal().files():
        describe()
    _find_triggers(options, plan)
    if plan.depends_on:
        _read_done(options, plan)
    if options.as_sidecars and options.existing == "skip":
        _find_skipped(options, plan)
    failed = {problem.image_id for problem in plan.problems}
    plan.pending = [
        row
        for row in rows
        if row.image_id not in plan.done and row.path not in plan.skipped and row.image_id not in failed
    ]
    # no model is loaded before there is an image for it
    while plan.pending and (problem := read_row(plan.pending[0], options, read_image).problem):
        plan.problems.append(Problem(plan.pending.pop(0).image_id, problem))
    for problem in plan.problems:
        messages[problem.kind].add(problem.text)
    if not (plan.pending or plan.done or plan.skipped or failed - {None}):
        raise UserError(f"{options.test_folder}: not one readable image among {len(rows)}")
    if plan.pending and not plan.depends_on:
        describe()
    return plan


def _check_output_is_no_list(options: FolderOptions) -> None:
    """Raise UserError where the output would take the place of the test.csv that names the images."""
    if options.output_csv is not None and options.test_csv is None and not options.recursive:
        output = Path(options.output_csv).resolve()
        if output in test_csv_places(options.test_folder) and output.is_file():
            raise UserError(f"--output_csv {options.output_csv}: has the images' ids; give another name")


def _check_sidecars(options: FolderOptions, plan: Plan) -> None:
    """See to it that sidecars can be written, and that no other run writes them."""
    sidecars, images = options.as_sidecars, [row.path for row in plan.rows if row.path is not None]
    sidecars.check(images, options.test_folder)
    for folder in {os.path.dirname(image) or "." for image in images}:
        if not os.path.samefile(folder, options.test_folder):
            options.check_unlocked(folder)
        remove_unfinished(Path(folder), extension=sidecars.extension)
    if options.keeps_backup():
        Backup(options.test_folder).check()


def _find_triggers(options: FolderOptions, plan: Plan) -> None:
    """Say what stays first in sidecars, where several begin with it; an interrupted run goes on with what it
    found at its beginning."""
    if not options.sidecars or options.existing != "prepend" or options.prefix:
        return
    kept = options.journal().triggers(plan.depends_on) if plan.depends_on else None
    starts, texts = options.as_sidecars.count_beginnings(
        row.path for row in plan.rows if row.path is not None
    )
    plan.triggers = shared_beginnings(starts, texts) if kept is None else kept
    shown = [f'"{start}" ({starts[start]} of {texts})' for start in plan.triggers]
    if shown:
        say(f"captions go behind what several sidecars begin with: {', '.join(shown)}")
    for start, count in starts.most_common(1):
        if count > 1 and not shown:
            say(
                f'{count} of {texts} sidecars begin with "{start}", too few to keep it first: captions go in '
                f'front of it; --prefix "{start}," puts it first in all'
            )


def _read_done(options: FolderOptions, plan: Plan) -> None:
    """Take the journal's entries whose image files are as they were, and let their sidecars be as these
    entries say, unless they were changed since."""
    journal, changes = options.journal(), options.sidecar_changes(0, plan.triggers)
    entries, different = journal.read(plan.depends_on)
    paths, changed = dict(plan.rows), 0
    for image_id, entry in entries.items():
        path = paths.get(image_id)
        if path is None:
            continue
        try:
            is_same = file_stamp(path) == entry.file
        except OSError:
            continue
        try:
            if not is_same and changes:
                changes.undo(path, entry)
            if is_same and changes and not changes.finish(path, entry):
                changed += 1
                is_same = options.existing != "skip"  # which then finds the text of the user
        except UserError as error:
            plan.problems.append(Problem(image_id, str(error), NO_SIDECAR))
        if is_same:
            plan.done[image_id] = entry
    if plan.done:
        say(f"going on: {len(plan.done)} captions are in {journal} already")
    if changed:
        say(f"sidecars that were changed since they were written and are left as they are: {changed}")
    if different:
        what = [
            "another model" if name == "model" else f"another {name}" for name in dict.fromkeys(different)
        ]
        say(f"{journal}: from a run with {' and '.join(what)}; not used, starting anew")


def _find_skipped(options: FolderOptions, plan: Plan) -> None:
    """The images whose sidecars have a text already."""
    sidecars, ids = options.as_sidecars, {row.path: row.image_id for row in plan.rows}
    for image in sidecars.exist(path for path in ids if path is not None):
        if ids[image] in plan.done:
            continue
        try:
            if not options.output_csv:
                plan.skipped |= {image: ""} if sidecars.has_text(image) else {}
            elif text := sidecars.read_text(image):
                plan.skipped[image] = text
        except UserError as error:
            plan.problems.append(Problem(ids[image], str(error)))


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
        images = test_records(read_annotations(test_csv, folder, need_words=False))
        return [Row(image.image_id, image.path) for image in images], 0, []
    if not recursive:
        rows = _rows_of_found_csv(folder)
        if rows:
            return rows, 0, []
    found = walk_images(folder, recursive)
    names, left_out, unreadable = found
    if not names:
        inside = f"; {left_out} in its subfolders, which --recursive takes" if left_out else ""
        raise UserError(f"{folder}: no images in it ({', '.join(IMAGE_EXTENSIONS)}){inside}")
    # a name that is not UTF-8 has its odd bytes as \xe9
    shown = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in names]
    for name in (name for name, count in Counter(shown).items() if count > 1):
        raise UserError(f"{folder}: two files whose names are written {name}; rename one")
    stems = [os.path.splitext(name)[0] for name in shown]
    counts = Counter(stems)
    ids = [stem if counts[stem] == 1 and not recursive else name for stem, name in zip(stems, shown)]
    return [Row(*row) for row in zip(ids, found.paths(folder))], left_out, unreadable


def test_csv_places(folder: str | Path) -> list[Path]:
    """Where a test.csv counts for the images of a folder: in it, or in one of the two folders above it."""
    resolved = Path(folder).resolve()
    return [place / "test.csv" for place in (resolved, resolved.parent, resolved.parent.parent)]


def _rows_of_found_csv(folder: Path) -> list[Row]:
    for file in test_csv_places(folder):
        if file.is_file():
            finder = ImageFinder(folder)
            ids = [image.image_id for image in read_annotations(file, need_words=False)]
            if any(finder(image_id) for image_id in ids):  # otherwise it is about other images
                return [Row(image_id, finder(image_id)) for image_id in ids]
    return []


class ReadRow(NamedTuple):
    row: Row
    image: Any  # what `prepare` gave; None where there is a problem
    file: list  # the file's stamp
    problem: str


@lru_cache(maxsize=4096)
def _is_inside(place: str, folder: str) -> bool:
    """Whether a folder is `folder`, or in it without a link that leads out."""
    top = os.path.realpath(folder)
    return os.path.commonpath([os.path.realpath(place), top]) == top


def read_row(row: Row, options: FolderOptions, prepare: Callable[[str], Any]) -> ReadRow:
    try:
        path = require_image(row.image_id, row.path, options.test_folder)
        if not _is_inside(os.path.dirname(path), str(options.test_folder)):
            raise UserError(
                f"{path}: in a folder that a link leads to; give that one as --test_folder, or copy it"
            )
        image = prepare(path)
        return ReadRow(row, image, file_stamp(path), "")
    except UserError as error:
        problem = str(error)
    except OSError as error:
        if error.errno in OUT_OF_FILES:
            raise
        problem = f"{row.path}: cannot be read ({error.strerror})"
    except MemoryError:
        problem = f"{row.path}: too large for this machine's memory; make it smaller"
    return ReadRow(row, None, [], problem)
