"""Captions for a folder of images, by any captioner: what caption.py, caption_from_checkpoint.py and
direct_caption.py do with one.

The main process plans (plan.py). Every process captions its share: first into a journal, then into sidecars
(both in journal.py). At the end the main process writes the output file from the journals.
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from captioning.data.images import parallel_map
from captioning.data.sidecars import Backup
from captioning.data.submissions import (
    ScoredCaption,
    caption_rows,
    metadata_name,
    say_metadata_place,
    write_submission,
)
from captioning.decoding.options import DecodingOptions
from captioning.files import is_alive
from captioning.folders.journal import Entry, Journal
from captioning.folders.plan import (
    NO_CAPTION,
    NO_SIDECAR,
    FolderOptions,
    Plan,
    Problem,
    ReadRow,
    Row,
    plan_folder,
    read_row,
)
from utils import Messages, UserError, counted, is_main_process, processes, progress_bar, say, tell

if TYPE_CHECKING:
    Found = list[list[ScoredCaption] | UserError]
    Decode = Callable[..., Found]  # of prepared images and their `ids`


def caption_folder(
    options: FolderOptions,
    load: Callable[[], Any],
    model: str | Sequence[str | Path],
    decoding: DecodingOptions,
    depends_on: dict[str, Any] | None = None,
) -> list[str]:
    """Caption the images that `find_images` finds; write the output file, or sidecars, or both.

    Threads read images while the model works on the batch before. Under torchrun every process calls this,
    and each captions a share. A run that is killed leaves its captions in a journal; the same call goes on
    with it.

    Args:
        load: gives the captioner, with `prepare` and `decode_prepared`; not called where every image has
            its caption already.
        model: the captioner's files, or its name on the hub. By these and by
        decoding, and
        depends_on, anything else that captions depend on, a journal is known as one of the same run. The
            batch size is not among them, as captions do not depend on it.

    Returns:
        What was wrong with the images that could not be captioned, one line each; they have an empty row
        and no sidecar.

    Raises:
        UserError: wrong input, or not one readable image.
    """
    options.check(decoding)
    plan, messages = None, {kind: Messages(kind) for kind in (NO_CAPTION, NO_SIDECAR)}
    journal = options.journal()
    with ExitStack() as held:

        def prepare() -> tuple[list[Row], list[Problem], dict, int]:
            nonlocal plan
            held.enter_context(options.lock())
            journal.remove_unfinished()
            plan = plan_folder(options, model, asdict(decoding) | (depends_on or {}), messages)
            key = {"run": secrets.token_hex(8), "triggers": plan.triggers} | plan.depends_on
            return plan.pending, plan.problems, key, os.getpid()

        pending, problems, key, main_process = on_main_process(prepare)
        if pending:
            captioner = load()
            on_main_process(lambda: journal.begin(key, plan.done.values()))
            total = len(plan.done) + len(pending) if is_main_process() else 0
            decode = partial(captioner.decode_prepared, options=decoding, with_scores=options.with_scores)
            with _interruptions(journal, main_process), _progress(total, total - len(pending)) as bar:
                share = Share(options, key, bar, messages)
                share.caption(decode, captioner.prepare, pending)
            problems = problems + _gather(share.problems, journal)
        empty = f"; their rows in {options.output_csv} are empty" if options.output_csv else ""
        messages[NO_CAPTION].finish(empty)
        messages[NO_SIDECAR].finish()
        on_main_process(lambda: write_output(options, plan, problems, decoding.num_captions > 1))
    return [problem.text for problem in problems]


@contextmanager
def _interruptions(journal: Journal, main_process: int) -> Iterator[None]:
    """Say at Ctrl-C and SIGTERM how many captions are kept; in the main process's stead where it is gone."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        kept = f"{journal.count()} captions are kept in {journal}; the same command goes on from there"
        interrupt.args = (kept,)
        if is_main_process():
            journal.end_early()
        elif not is_alive(main_process) and not journal.ended_early():  # it can no longer say so
            tell(f"interrupted: {kept}")
        raise


@contextmanager
def _progress(total: int, initial: int) -> Iterator[tqdm | None]:
    """The progress of all processes, in the main one."""
    if not is_main_process():
        yield None
        return
    with progress_bar(total=total, initial=initial, desc="captioning", unit="image") as bar:
        yield bar


# --- a process's share -------------------------------------------------------------------------------------


class Share:
    """What this process has of the pending rows: captioned into its journal and, where asked for, sidecars.

    Args:
        key: the journal's first line, what the captions depend on.
        bar: the progress of all processes, which is reckoned by that of this one.
        messages: get the problems, by their kinds.

    Attributes:
        problems: the rows without a caption, or without a sidecar.
    """

    def __init__(self, options: FolderOptions, key: dict, bar: tqdm | None, messages: dict[str, Messages]):
        self.options, self.key, self.bar, self.messages = options, key, bar, messages
        state = processes()
        self.process, self.num_processes = state.process_index, state.num_processes
        self.journal = options.journal()
        self.changes = options.sidecar_changes(self.process, key["triggers"])
        self.problems: list[Problem] = []

    def caption(self, decode: Decode, prepare: Callable[[str], Any], pending: list[Row]) -> None:
        caption = HalvingCaptioner(decode, self.options.batch_size)
        batch: list[ReadRow] = []
        with closing(self._read(prepare, pending[self.process :: self.num_processes])) as items:
            for item in items:
                batch.append(item)
                if len(batch) == self.options.batch_size:
                    self._finish(batch, caption)
                    batch = []
            if batch:
                self._finish(batch, caption)

    def _read(self, prepare: Callable[[str], Any], share: list[Row]) -> Iterator[ReadRow]:
        """The rows whose images can be read, with these."""
        read = parallel_map(
            lambda row: read_row(row, self.options, prepare),
            share,
            self.options.workers,
            ahead=2 * self.options.batch_size,
        )
        with closing(read):
            for item in read:
                if self.bar is not None:
                    self.bar.update(min(self.num_processes, self.bar.total - self.bar.n))
                if item.problem:
                    self._report(Problem(item.row.image_id, item.problem))
                else:
                    yield item

    def _finish(self, batch: list[ReadRow], caption: HalvingCaptioner) -> None:
        """Caption a batch; first into the journal, so that a kill loses nothing, then into sidecars."""
        captions = caption([item.image for item in batch], [item.row.image_id for item in batch])
        rows, entries = [], []
        for item, own in zip(batch, captions, strict=True):
            if isinstance(own, UserError):
                self._report(Problem(item.row.image_id, f"{item.row.path}: {own}"))
                continue
            rows.append(item.row)
            entries.append(Entry(item.row.image_id, own, item.file))
        if self.changes:
            for row, entry in zip(rows, entries):
                with self._reported(row):
                    self.changes.prepare(row.path, entry)
        self.journal.append(self.process, self.key, entries)
        if self.changes:
            self.changes.record()
            for row, entry in zip(rows, entries):
                with self._reported(row):
                    self.changes.make(row.path, entry)

    @contextmanager
    def _reported(self, row: Row) -> Iterator[None]:
        """A UserError of the block is a problem of this row, and of no other."""
        try:
            yield
        except UserError as error:
            self._report(Problem(row.image_id, str(error), NO_SIDECAR))

    def _report(self, problem: Problem) -> None:
        self.messages[problem.kind].add(problem.text)
        self.problems.append(problem)


class HalvingCaptioner:
    """Captions batches in parts that the GPU's memory holds: when it is full, the parts are halved."""

    def __init__(self, decode: Decode, batch_size: int):
        self.decode = decode
        self.size = batch_size

    def __call__(self, images: list[Any], ids: list[str]) -> Found:
        """Prepared images -> the captions of each. Raises torch.OutOfMemoryError where one image is too
        much."""
        import torch

        captions: Found = []
        while len(captions) < len(images):
            now = slice(len(captions), len(captions) + self.size)
            part = images[now]
            try:
                captions += self.decode(part, ids=ids[now])
                continue
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
            # here, where the exception no longer holds on to what filled the memory
            torch.cuda.empty_cache()
            self.size = len(part) // 2
            tell(f"the GPU's memory is full with {len(part)} images at a time; going on with {self.size}")
        return captions


def _gather(problems: list[Problem], journal: Journal) -> list[Problem]:
    """The problems of all processes, in all of them."""
    if processes().num_processes == 1:
        return problems
    from accelerate.utils import gather_object

    try:
        return gather_object(problems)
    except RuntimeError:
        raise UserError(
            f"another process of this run has ended before its share was done; {journal.count()} captions "
            f"are kept in {journal}, and the same command goes on from there"
        ) from None


def on_main_process(work: Callable[[], Any]) -> Any:
    """What `work()` gives in the main process, in every process; an error of the user is raised in all."""
    state = processes()
    result = [None]
    if state.is_main_process:
        try:
            result = [work()]
        except (UserError, OSError) as error:
            if state.num_processes == 1:
                raise
            result = [error]
    if state.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        try:
            broadcast_object_list(result)
        except RuntimeError:
            raise UserError("the main process ended before its work was done") from None
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


# --- the output --------------------------------------------------------------------------------------------


def write_output(options: FolderOptions, plan: Plan, problems: Sequence[Problem], with_ranks: bool) -> None:
    """Write the output of the journals, remove these, and say where the captions are."""
    sidecars, journal = options.as_sidecars, options.journal()
    entries = journal.read(plan.depends_on)[0] if plan.depends_on else {}
    known = {problem.image_id for problem in problems} | entries.keys()
    missing = [row.image_id for row in plan.pending if row.image_id not in known]
    if missing:
        raise UserError(
            f"{len(missing)} captions, such as that of {missing[0]}, are not in {journal} and its like: they "
            f"were removed, or the machines do not write to one shared folder; the same command goes on"
        )
    for image_id, path in plan.rows:
        if path in plan.skipped:
            entries.pop(image_id, None)  # the user has changed its sidecar since
    captions = [
        (row.image_id, entries[row.image_id].captions)
        if row.image_id in entries
        else (row.image_id, [ScoredCaption(plan.skipped.get(row.path, ""))])
        for row in plan.rows
    ]
    places = []
    if options.output_csv:
        if options.metadata:
            captions = metadata_rows(captions, plan, options)
        rows, columns = caption_rows(captions, with_ranks, options.with_scores)
        with options.replacing_output():
            write_submission(options.output_csv, rows, columns, options.escape_formulas)
        places.append(str(options.output_csv))
    if sidecars:
        places.append(str(Path(options.test_folder, *["**"] * options.recursive, f"*{sidecars.extension}")))
    journal.remove()
    made = [entries[row.image_id] for row in plan.rows if row.image_id in entries]
    _warn_of_bad_captions([entry.caption for entry in made])
    say_what_was_done(options, plan, problems, made, places)


def say_what_was_done(
    options: FolderOptions, plan: Plan, problems: Sequence[Problem], made: list[Entry], places: list[str]
) -> None:
    """made: the entries of the images that were captioned. places: the outputs."""
    unchanged = sum(entry.after is not None and entry.after == entry.before for entry in made)
    failed = Counter(problem.kind for problem in problems)
    counts = [f"{counted(len(made), 'image')} captioned"]
    counts += [f"{counted(unchanged, 'sidecar')} unchanged"] if unchanged else []
    counts += [f"{len(plan.skipped)} had a sidecar before"] if plan.skipped else []
    counts += [f"{counted(failed[NO_SIDECAR], 'sidecar')} not written"] if failed[NO_SIDECAR] else []
    counts += [f"{failed[NO_CAPTION]} without a caption"] if failed[NO_CAPTION] else []
    say(f"{', '.join(counts)}: captions in {' and '.join(places)}")
    if options.metadata:
        images = [row.path for row in plan.rows if row.path is not None]
        say_metadata_place(options.output_csv, images, options.test_folder)
    first = Path(options.test_folder, Backup.FOLDER, Backup.FIRST)
    kept = []
    if options.output_csv and (first / os.path.relpath(options.output_csv, options.test_folder)).is_file():
        kept.append(f"{options.output_csv} said before")
    if options.keeps_backup() and any(
        entry.before not in (None, entry.after or entry.before) for entry in made
    ):
        kept.append("the sidecars said before they were changed")
    if kept and first.is_dir():
        say(f"what {' and what '.join(kept)} is in {first}")


def metadata_rows(
    captions: Sequence[tuple[str, list[ScoredCaption]]], plan: Plan, options: FolderOptions
) -> list[tuple[str, list[ScoredCaption]]]:
    """(file name, caption with prefix and suffix) of each image of a metadata.jsonl that has a caption."""
    rows = []
    for (_, path), (_, own) in zip(plan.rows, captions, strict=True):
        if path is not None and own[0].text:
            name = metadata_name(path, options.output_csv, options.test_folder)
            text = own[0].text
            if path not in plan.skipped:  # else it is what the sidecar says
                text = options.metadata.compose(path, text, None).decode("utf-8").strip()
            rows.append((name, [own[0]._replace(text=text)]))
    return rows


def _warn_of_bad_captions(captions: list[str]) -> None:
    different = len(set(captions))
    if different < len(captions) / 20:
        tell(
            f"only {counted(different, 'different caption')} for {len(captions)} images: the model has "
            f"probably collapsed to a few sentences; train it longer, or take an earlier checkpoint"
        )
    empty = sum(not caption.strip() for caption in captions)
    if empty > len(captions) / 100:
        tell(f"{empty} of {len(captions)} captions are empty: the model gave no word for these images")
