"""Memory of training's data loading with as many captions as COCO has: 566,000 of 113,200 images.

    python benchmarks/memory.py

Writes such a prepared split with made-up captions and features to a temporary folder (about 650 MB), then
goes through an epoch of it with the loader of train.py and reports, at the start, in the middle and at the
end, the resident memory of the main process and the private memory of each worker, which is what a worker
really costs: pages that it shares with the main process are not counted. An aim that is missed is an error.
Features are kept small on disk (4 KB an image in place of 256 KB for resnet101): they are read as they are
needed, so their number matters here, not their size. Linux only. On two CPU cores it takes about three
minutes.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from common import make_captions, make_word_map, write_record
from torch import nn

import train
from captioning.command_line import check_at_least, run_script
from captioning.data.features import weights_digest
from captioning.training.optimization import Run
from utils import UserError, progress_bar, write_json

MAX_LEN = 50  # words


@dataclass
class Settings:
    images: int = 113_200  # of the training split
    captions_per_image: int = 5  # captions of each image
    vocabulary: int = 9490  # entries of the word map
    grid: int = 8  # cells, height and width of an image's features
    feature_dim: int = 32  # channels of the features
    batch_size: int = 16  # images
    workers: int = 2  # processes that load batches
    epoch_share: float = 1.0  # part of the epoch to go through
    main_aim: int = 1500  # MB, resident memory of the main process
    worker_aim: int = 300  # MB, private memory of a worker
    growth_aim: int = 50  # MB by which either may grow from the start of the epoch to its end

    def __post_init__(self):
        check_at_least(self, 100, "images")
        check_at_least(self, 1, "captions_per_image", "grid", "feature_dim", "batch_size", "workers")
        check_at_least(self, 5, "vocabulary")
        if not 0 < self.epoch_share <= 1:
            raise UserError(f"--epoch_share is {self.epoch_share}: give more than 0 and at most 1")


class NoEncoder(nn.Module):
    """Stands for the frozen encoder whose features are on disk: only its name and weights are looked at."""

    name = "none"

    def fine_tune(self, fine_tune: bool) -> None:
        pass


def main(settings: Settings) -> None:
    if not Path("/proc/self/smaps_rollup").is_file():
        raise UserError("memory of processes is read from /proc/PID/smaps_rollup, which only Linux has")
    with tempfile.TemporaryDirectory() as folder:
        # in a process of its own, whose memory is not counted
        writer = multiprocessing.get_context("spawn").Process(
            target=write_data, args=(Path(folder), settings)
        )
        writer.start()
        writer.join()
        if writer.exitcode:
            sys.exit("the data could not be written")
        captions = settings.images * settings.captions_per_image
        print(f"{captions:,} captions of {settings.images:,} images, {settings.workers} workers; MB")
        print(f"{'':>8} {'main, resident':>15} {'workers, private':>18}")
        show("before", [main_memory()])
        lines = go_through(make_loader(Path(folder), settings), settings)
    print(f"peak of the main process: {status('VmHWM'):.0f}")
    check(lines, settings)


def write_data(folder: Path, settings: Settings) -> None:
    """Splits train and val as create_input_files.py and the feature cache of train.py write them."""
    write_json(folder / "word_map.json", make_word_map(settings.vocabulary))
    splits = {"train": settings.images, "val": 100}
    cells = (settings.grid, settings.grid, settings.feature_dim)
    some_features = np.random.default_rng(0).random((1000, *cells)).astype(np.float16)
    for seed, (split, images) in enumerate(splits.items()):
        with h5py.File(folder / f"{split}_images.hdf5", "w") as file:  # small images: nobody reads them
            stored = file.create_dataset("images", (images, 3, 32, 32), "uint8")
            for start in range(0, images, 1000):
                stored[start : start + 1000] = 0
            file.attrs.update({"captions_per_image": settings.captions_per_image, "digest": split})
        with h5py.File(folder / f"{split}_features_{NoEncoder.name}.hdf5", "w") as file:
            file.attrs.update({"weights": weights_digest(NoEncoder()), "pictures": split})
            stored = file.create_dataset("features", (images, *cells), "float16")
            for start in range(0, images, len(some_features)):
                stored[start : start + len(some_features)] = some_features[: images - start]
        captions, lengths = make_captions(
            images, settings.captions_per_image, settings.vocabulary, MAX_LEN, seed
        )
        write_json(folder / f"{split}_encoded_captions.json", captions.flatten(0, 1).tolist())
        write_json(folder / f"{split}_caption_lengths.json", lengths.flatten().tolist())
    write_record(folder, splits, settings.captions_per_image, 32, settings.vocabulary)


def make_loader(folder: Path, settings: Settings) -> Iterable:
    """The training loader of train.py."""
    training = train.Settings(
        data_folder=str(folder), batch_size=settings.batch_size, workers=settings.workers
    )
    run, stage = Run.start("no"), train.Stage(is_fine_tuned=False, is_self_critical=False)
    sampler = train.build_sampler(settings.images, training, run, training=True)
    loader, _ = train.start_stage(stage, 1, NoEncoder(), sampler, training, run)
    return loader


def go_through(loader: Iterable, settings: Settings) -> list[list[float]]:
    """Memory of the main process and the workers at the start, in the middle and at the end of an epoch."""
    last = max(round(len(loader) * settings.epoch_share), 1)
    places = {1: "start", (1 + last) // 2: "middle", last: "end"}
    lines = []
    for step, _ in enumerate(progress_bar(loader, unit="batch", leave=False), start=1):
        if step in places:
            workers = multiprocessing.active_children()
            lines.append([main_memory(), *(private_memory(worker.pid) for worker in workers)])
            show(places[step], lines[-1])
        if step == last:
            break
    return lines


def show(place: str, line: list[float]) -> None:
    print(f"{place:>8} {line[0]:15.0f} " + "".join(f"{megabytes:9.0f}" for megabytes in line[1:]), flush=True)


def main_memory() -> float:
    return status("VmRSS")


def status(field: str) -> float:
    """A field of this process's /proc/self/status in MB."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)[1]) / 1000


def private_memory(pid: int) -> float:
    """Memory of a process that no other process shares, in MB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return (
        sum(int(kilobytes) for kilobytes in re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.MULTILINE))
        / 1000
    )


def check(lines: list[list[float]], settings: Settings) -> None:
    start, end = lines[0], lines[-1]
    missed = []
    if max(line[0] for line in lines) > settings.main_aim:
        missed.append(f"the main process takes more than {settings.main_aim} MB")
    if max(max(line[1:]) for line in lines) > settings.worker_aim:
        missed.append(f"a worker takes more than {settings.worker_aim} MB of its own")
    if max(after - before for before, after in zip(start, end, strict=True)) > settings.growth_aim:
        missed.append(f"memory grew by more than {settings.growth_aim} MB over the epoch")
    if missed:
        sys.exit("; ".join(missed))


if __name__ == "__main__":
    run_script(main, Settings)
