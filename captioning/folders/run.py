"""Captions for a folder of images, by any captioner: what caption.py, caption_from_checkpoint.py and
direct_caption.py do with one.

The main process plans (folder_plan.py). Every process captions its share into a journal (journal.py). The
main process makes the output of the journals.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from captioning.data.sidecars import Sidecars
from captioning.data.submissions import ScoredCaption, caption_rows, metadata_name, write_submission
from captioning.decoding.options import DecodingOptions
from captioning.files import is_alive
from captioning.folders.journal import Entry, Journal
from captioning.folders.plan import (
    FolderOptions,
    Plan,
    Problem,
    ReadRow,
    Row,
    plan_folder,
    read_row,
)
from utils import (
    Messages,
    UserError,
    counted,
    is_main_process,
    on_main_process,
    parallel_map,
    printable,
    processes,
    progress_bar,
    tell,
)

if TYPE_CHECKING:
    from torch import Tensor

    Decode = Callable[..., list[list[ScoredCaption]]]  # of prepared images (N, ...) and their `ids`


def caption_folder(
    options: FolderOptions,
    load: Callable[[], Any],
    model: str | Sequence[str | Path],
    decoding: DecodingOptions,
    search: dict[str, Any] | None = None,
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
        decoding, with search, further arguments of `decode_prepared`, and
        depends_on, anything else that captions depend on, a journal is known as one of the same run. The
            batch size is not among them, as captions do not depend on it.

    Returns:
        What was wrong with the images that could not be captioned, one line each; they have an empty row
        and no sidecar.

    Raises:
        UserError: wrong input, or not one readable image.
    """
    options.check(decoding)
    plan, search, messages = None, search or {}, Messages("no caption")
    journal = options.journal()

    def prepare() -> tuple[list[Row], list[Problem], dict, int]:
        nonlocal plan
        journal.remove_unfinished()
        plan = plan_folder(options, model, asdict(decoding) | search | (depends_on or {}), messages)
        return plan.pending, plan.problems, plan.depends_on, os.getpid()

    pending, problems, key, main_process = on_main_process(prepare)
    if pending:
        captioner = load()
        on_main_process(lambda: journal.begin(key, plan.done.values()))
        bar = None
        if is_main_process():
            total = len(plan.done) + len(pending)
            bar = progress_bar(total=total, initial=len(plan.done), desc="captioning", unit="image")
        try:
            how = {"options": decoding, "with_scores": options.with_scores} | search
            decode = partial(captioner.decode_prepared, **how)
            found = caption_share(decode, captioner.prepare, pending, options, key, bar, messages)
        except KeyboardInterrupt as interrupt:
            kept = f"{journal.count()} captions are kept in {journal}; the same command goes on from there"
            interrupt.args = (kept,)
            if is_main_process():
                journal.end_early()
            elif not is_alive(main_process) and not journal.ended_early():  # it can no longer say so
                print(f"interrupted: {kept}", file=sys.stderr)
            raise
        finally:
            if bar is not None:
                bar.close()
        problems = problems + _gather(found, journal)
    messages.finish(f"; their rows in {options.output_csv} are empty" if options.output_csv else "")
    on_main_process(lambda: write_output(options, plan, problems, decoding.num_captions > 1))
    return [problem.text for problem in problems]


# --- a process's share -------------------------------------------------------------------------------------


def caption_share(
    decode: Decode,
    prepare: Callable[[str], Tensor],
    pending: list[Row],
    options: FolderOptions,
    depends_on: dict,
    bar: tqdm | None,
    messages: Messages,
) -> list[Problem]:
    """Caption this process's share of the pending rows into its journal and, where asked for, sidecars.

    bar: the progress of all processes, which is reckoned by that of this one. messages: get the problems.
    """
    state = processes()
    share = pending[state.process_index :: state.num_processes]
    journal, sidecars = options.journal(), options.as_sidecars
    caption = HalvingCaptioner(decode, options.batch_size)
    problems: list[Problem] = []

    def report(problem: Problem) -> None:
        messages.add(problem.text)
        problems.append(problem)

    def finish(batch: list[ReadRow]) -> None:
        captions = caption([item.image for item in batch], [item.row.image_id for item in batch])
        entries = []
        for item, own in zip(batch, captions, strict=True):
            before = sidecars.read(item.row.path) if sidecars and sidecars.keeps() else ""
            entries.append(Entry(item.row.image_id, own, item.file, before))
        journal.append(state.process_index, depends_on, entries)
        if sidecars:
            for item, entry in zip(batch, entries):
                if problem := _write_sidecar(sidecars, item.row.path, entry):
                    report(problem)

    def readable() -> Iterator[ReadRow]:
        read = parallel_map(
            lambda row: read_row(row, options, prepare),
            share,
            options.workers,
            ahead=2 * options.batch_size,
        )
        with closing(read):
            for item in read:
                if bar is not None:
                    bar.update(min(state.num_processes, bar.total - bar.n))
                if item.problem:
                    report(Problem(item.row.image_id, item.problem))
                else:
                    yield item

    batch: list[ReadRow] = []
    with closing(readable()) as items:
        for item in items:
            batch.append(item)
            if len(batch) == options.batch_size:
                finish(batch)
                batch = []
        if batch:
            finish(batch)
    return problems


class HalvingCaptioner:
    """Captions batches in parts that the GPU's memory holds: when it is full, the parts are halved."""

    def __init__(self, decode: Decode, batch_size: int):
        self.decode = decode
        self.size = batch_size

    def __call__(self, images: list[Tensor], ids: list[str]) -> list[list[ScoredCaption]]:
        """Prepared images -> the captions of each. Raises torch.OutOfMemoryError where one image is too
        much."""
        import torch

        captions: list[list[ScoredCaption]] = []
        while len(captions) < len(images):
            now = slice(len(captions), len(captions) + self.size)
            part = images[now]
            try:
                captions += self.decode(torch.stack(part), ids=ids[now])
                continue
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
            # here, where the exception no longer holds on to what filled the memory
            torch.cuda.empty_cache()
            self.size = len(part) // 2
            tell(f"the GPU's memory is full with {len(part)} images at a time; going on with {self.size}")
        return captions


def _write_sidecar(sidecars: Sidecars, image: str, entry: Entry) -> Problem | None:
    """Returns what was wrong with the place, if anything was."""
    try:
        sidecars.write(image, entry.caption, entry.before)
    except (PermissionError, IsADirectoryError) as error:
        text = f"{sidecars.path(image)}: cannot be written ({error.strerror})"
        return Problem(entry.image_id, text)
    return None


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


# --- the output --------------------------------------------------------------------------------------------


def write_output(options: FolderOptions, plan: Plan, problems: Sequence[Problem], with_ranks: bool) -> None:
    """Write the output of the journals, remove these, and say where the captions are."""
    sidecars, journal = options.as_sidecars, options.journal()
    entries = journal.read(plan.depends_on)[0] if plan.depends_on else {}
    failed = {problem.image_id for problem in problems}
    missing = [row.image_id for row in plan.pending if row.image_id not in failed | entries.keys()]
    if missing:
        raise UserError(
            f"{len(missing)} captions, such as that of {missing[0]}, are not in {journal} and its like: all "
            f"machines must write to one shared folder; the same command goes on from there"
        )
    captions = []
    for image_id, path in plan.rows:
        entry = entries.get(image_id)
        # an earlier run may have been killed before it wrote this
        problem = _write_sidecar(sidecars, path, entry) if sidecars and image_id in plan.done else None
        if problem:
            tell(f"no caption: {problem.text}")
        kept = sidecars.read(path) if options.output_csv and path in plan.skipped and not entry else ""
        captions.append((image_id, entry.captions if entry else [ScoredCaption(kept)]))
    places = []
    if options.output_csv:
        if options.metadata:
            captions = metadata_rows(captions, plan, options)
        rows, columns = caption_rows(captions, with_ranks, options.with_scores)
        write_submission(options.output_csv, rows, columns, options.escape_formulas)
        places.append(str(options.output_csv))
    if sidecars:
        places.append(str(Path(options.test_folder, *["**"] * options.recursive, f"*{sidecars.extension}")))
    journal.remove()
    made = [entries[row.image_id].caption for row in plan.rows if row.image_id in entries]
    _warn_of_bad_captions(made)
    counts = [f"{counted(len(made), 'image')} captioned"]
    skipped = sum(row.path in plan.skipped and row.image_id not in entries for row in plan.rows)
    if skipped:
        counts.append(f"{skipped} had a sidecar before")
    if problems:
        counts.append(f"{len(problems)} without a caption")
    print(printable(f"{', '.join(counts)}: captions in {' and '.join(places)}"))


def metadata_rows(
    captions: Sequence[tuple[str, list[ScoredCaption]]], plan: Plan, options: FolderOptions
) -> list[tuple[str, list[ScoredCaption]]]:
    """(file name, caption with prefix and suffix) of each image of a metadata.jsonl that has a caption."""
    rows = []
    for (_, path), (_, own) in zip(plan.rows, captions, strict=True):
        if path is not None and own[0].text:
            name = metadata_name(path, options.output_csv, options.test_folder)
            text = own[0].text if path in plan.skipped else options.metadata.text(path, own[0].text)
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
