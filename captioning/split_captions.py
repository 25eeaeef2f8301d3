"""The images of a prepared split, decoded with one or several `DecodingOptions`: what eval.py scores.

Each of the options has a name, which the captions that they give are found by.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from captioning.annotations import Record
from captioning.decoding import DecodingOptions, ScoredCaption
from captioning.hdf5 import Rows
from utils import parallel_map, processes, progress_bar

if TYPE_CHECKING:
    from captioning.captioner import Captioner
    from captioning.interface import BaseCaptioner

Decoded = dict[Any, list[list[ScoredCaption]]]  # by the options' name: the captions of each image


def decode_split(
    captioner: Captioner,
    ids: Sequence[str],
    indices: Sequence[int],
    stored: Sequence[Rows],
    options: Mapping[Any, DecodingOptions],
    batch_size: int,
) -> tuple[Decoded, dict[Any, float]]:
    """The captions of some images of a split, and the seconds of "encoding" and of each search.

    Each image is encoded once for all options.

    Args:
        ids: of all images of the split.
        indices: of the images to caption.
        stored: the split's images, or its features for each of the captioner's encoders.
    """
    decoded: Decoded = {name: [] for name in options}
    seconds = dict.fromkeys(("encoding", *options), 0.0)
    device = captioner.decoders[0].fc.weight.device

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    with progress_bar(
        total=len(indices), desc="evaluation", unit="image", disable=not processes().is_main_process
    ) as progress:
        for now, values in read_batches(indices, stored, batch_size):
            began = clock()
            is_images = values[0].dtype == torch.uint8
            grids = captioner.encode(values[0]) if is_images else [features.to(device) for features in values]
            ended = clock()
            seconds["encoding"] += ended - began
            for name, own in options.items():
                began = ended
                found = captioner.decode(grids, own, [ids[index] for index in now])
                decoded[name] += captioner.scored(found)
                ended = clock()
                seconds[name] += ended - began
            progress.update(len(now))
    return decoded, seconds


def read_batches(
    indices: Sequence[int], stored: Sequence[Rows], batch_size: int
) -> Iterator[tuple[Sequence[int], list[torch.Tensor]]]:
    """Batches of indices with their rows of each of `stored`, which are closed at the end; a thread reads
    ahead."""
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]

    def read(batch: Sequence[int]) -> tuple[Sequence[int], list[torch.Tensor]]:
        return batch, [torch.from_numpy(rows.read(batch)) for rows in stored]

    try:
        yield from parallel_map(read, batches, workers=1)
    finally:
        for rows in stored:
            rows.file.close()


def decode_files(
    captioner: BaseCaptioner,
    records: Sequence[Record],
    options: Mapping[Any, DecodingOptions],
    batch_size: int,
    with_scores: bool = False,
) -> tuple[Decoded, dict[Any, float]]:
    """The same from image files, for a captioner that prepares them itself; each is encoded anew for each of
    the options."""
    decoded: Decoded = {name: [] for name in options}
    seconds = dict.fromkeys(("encoding", *options), 0.0)
    batches = [records[start : start + batch_size] for start in range(0, len(records), batch_size)]
    for name, own in options.items():
        began = time.perf_counter()
        for batch in progress_bar(batches, desc=f"evaluation, {name}", unit="batch"):
            images = torch.stack([captioner.prepare(record.path) for record in batch])
            ids = [record.image_id for record in batch]
            decoded[name] += captioner.decode_prepared(images, own, ids, with_scores)
        seconds[name] = time.perf_counter() - began
    return decoded, seconds
