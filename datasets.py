"""The prepared images and captions as a data set, the batches of both trainings, augmentation of images."""

from __future__ import annotations

import atexit
import hashlib
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captioning.data.features import open_features
from captioning.data.prepared import Prepared, Rows
from utils import UserError, start_worker


class Request(NamedTuple):
    """A batch: the indices of its images, ascending, and a seed for their augmentation."""

    indices: np.ndarray
    seed: int


class CaptionDataset(Dataset):
    """The images of one prepared split, each with its N_c captions, read a batch at a time.

    For a `Request` of n images it returns (images, captions, lengths): images uint8 (n, 3, S, S), or where a
    cache is given their features float16 (n, h, w, D), of several views of an image one that the seed draws;
    captions int64 (n, N_c, L), padded with 0; lengths
    int64 (n, N_c), `<start>` and `<end>` included.

    Captions are kept as small integers in one array, which worker processes share.

    Args:
        features_file: HDF5 file of features, as `captioning.data.features.cache_features` writes it.
        augment: change images at random, see `augment_image`.

    Raises:
        UserError: the split is missing, or its files are damaged or do not fit each other.
    """

    def __init__(
        self,
        data_folder: str | Path,
        split: str,
        features_file: str | Path | None = None,
        augment: bool = False,
    ):
        self.data, self.split, self.features_file = Prepared(data_folder), split, features_file
        captions, self.lengths = self.data.captions(split)
        self.captions = captions[:, :, : self.lengths.max()].copy()
        self.size = len(captions)
        self._open().file.close()
        self.augment = augment
        if augment:
            words = self.data.word_map()
            no_flip = [index for word, index in words.items() if LEFT_OR_RIGHT.search(word)]
            self.may_flip = ~np.isin(self.captions, no_flip).any(axis=(1, 2))  # (size,)
        self.stored = None  # opened by the process that reads it: an open HDF5 file must not be inherited

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor, Tensor]:
        if self.stored is None:
            self.stored = self._open()
        indices = request.indices
        places = indices
        if len(self.stored.shape) == 5:  # (I, views, h, w, D)
            views = np.random.default_rng(request.seed).integers(self.stored.shape[1], size=len(indices))
            places = list(zip(indices, views))
        images = torch.from_numpy(self.stored.read(places))
        if self.augment:
            rng = Random(request.seed)
            augmented = [
                augment_image(image, rng, self.may_flip[index]) for image, index in zip(images, indices)
            ]
            images = torch.stack(augmented)
        lengths = self.lengths[indices].astype(np.int64)
        captions = self.captions[indices, :, : lengths.max()].astype(np.int64)
        return images, torch.from_numpy(captions), torch.from_numpy(lengths)

    def draw_views(self, index: int, count: int) -> Tensor:
        """Views of an image, uint8 (count, 3, S, S): itself, then it changed at random, always in the same
        ways."""
        if self.stored is None:
            self.stored = self._open()
        image, flip = torch.from_numpy(self.stored[index]), self.may_flip[index]
        changed = [augment_image(image, Random(f"{index} {view}"), flip) for view in range(1, count)]
        return torch.stack([image, *changed])

    def view_digest(self) -> str:
        """A fingerprint of what `draw_views` depends on beside the images: which may be mirrored."""
        return hashlib.sha256(self.may_flip.tobytes()).hexdigest()

    def _open(self) -> Rows:
        """The images or features, which must be of the preparation that the captions are of."""
        if self.features_file is None:
            return self.data.images(self.split)
        return open_features(self.features_file, self.data, self.split)

    def __getstate__(self) -> dict:
        return vars(self) | {"stored": None}


class BatchSampler:
    """The batches of an epoch: steps, shared out to processes and cut into micro-batches.

    A step takes batch_size * accumulation_steps * processes images. All steps of an epoch differ in size by
    at most one image, and so do the micro-batches of a step. Which images make up a step depends only on
    how many they are, not on how the step is divided.

    Args:
        size: number of images.
        batch_size: images in a micro-batch, at most.
        accumulation_steps: micro-batches per step in each process.
        rank, processes: this process among how many.
        shuffle: draw a new order in each epoch; otherwise file order.

    Raises:
        UserError: fewer images than micro-batches in a step.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        accumulation_steps: int = 1,
        rank: int = 0,
        processes: int = 1,
        shuffle: bool = False,
        seed: int = 0,
    ):
        micro_batches = accumulation_steps * processes  # per step, of all processes
        if size < micro_batches:
            raise UserError(
                f"{size} images cannot be divided into {micro_batches} batches per step: "
                f"lower --grad_accumulation or the number of processes"
            )
        self.size, self.shuffle, self.seed = size, shuffle, seed
        self.accumulation_steps, self.rank, self.processes = accumulation_steps, rank, processes
        # no micro-batch may be empty
        self.count = min(-(-size // (batch_size * micro_batches)), size // micro_batches)
        self.start_epoch(0)

    def start_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Draw the order of an epoch, the same for the same seed and epoch; give out its batches from
        `first_step` on."""
        self.epoch, self.first_step = epoch, first_step
        order = np.arange(self.size)
        if self.shuffle:
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        self.steps = np.array_split(order, self.count)

    def __len__(self) -> int:
        return (self.count - self.first_step) * self.accumulation_steps

    def __iter__(self) -> Iterator[Request]:
        for number, step in enumerate(self.steps[self.first_step :], start=self.first_step):
            micro_batches = np.array_split(step, self.accumulation_steps * self.processes)
            for accumulated in range(self.accumulation_steps):
                place = accumulated * self.processes + self.rank
                seed = np.random.SeedSequence([self.seed, self.epoch, number, place]).generate_state(1)[0]
                yield Request(np.sort(micro_batches[place]), int(seed))


class BatchLoader(DataLoader):
    """The sampler's batches, read by worker processes that live through all epochs.

    Where one of these is killed, as by the system when memory is full, the others are ended too, and this
    process reads the rest of the pass itself: the batches are the same.

    Args:
        workers: how many processes; 0: this one reads.
        on_death: called with the number of the signal that killed a worker, 0 where it ended by itself.

    Raises:
        UserError: this process may not open as many files as the workers need.
    """

    def __init__(
        self,
        dataset: CaptionDataset,
        sampler: BatchSampler,
        workers: int,
        device: torch.device,
        on_death: Callable[[int], None],
    ):
        super().__init__(
            dataset,
            batch_size=None,  # the dataset reads a batch at a time
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=start_worker,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # so that starting workers draws nothing from the training's
        )
        self.on_death = on_death
        self.processes: list[multiprocessing.Process] = []
        if workers:
            require_open_files(FILES_PER_WORKER * workers + OTHER_FILES)
            atexit.register(kill_children)

    def __iter__(self) -> Iterator[list[Tensor]]:
        if not self.num_workers:
            yield from super().__iter__()
            return
        loaded = self._load_with_workers()
        for request in self.sampler:
            batch = next(loaded, None)
            yield list(self.dataset[request]) if batch is None else batch

    def _load_with_workers(self) -> Iterator[list[Tensor]]:
        """The batches up to the death of a worker, if one dies."""
        try:
            earlier = multiprocessing.active_children()
            batches = super().__iter__()
            self.processes += [child for child in multiprocessing.active_children() if child not in earlier]
            ignore_ends_of_children()  # torch's handler raises, wherever this process is; here it is noticed
            yield from batches  # within five seconds
        except UserError:
            raise
        except Exception:
            signals = self._signals_of_the_dead()
            if not signals:
                raise  # it is an error of the dataset's
            kill_children()  # they may wait for what the dead one held
            self.on_death(max(signals))

    def _signals_of_the_dead(self) -> list[int]:
        deadline = time.monotonic() + 1  # a process closes its files a moment before it has ended
        while not (dead := [child for child in self.processes if not child.is_alive()]):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return [max(0, -child.exitcode) for child in dead]


def describe_death(number: int) -> str:
    """What is likely to have ended a worker process by this signal, and what helps; 0: no signal."""
    how = f"was killed by signal {number}" if number else "ended"
    why = {
        getattr(signal, "SIGKILL", None): "memory is full: give fewer --workers (0: none)",
        getattr(signal, "SIGBUS", None): "shared memory (/dev/shm) is full: enlarge it, or give --workers 0",
    }
    reason = f", likely because {why[number]}" if number in why else "; --workers 0 does without"
    return f"a process that loads batches {how}{reason}"


def kill_children() -> None:
    """End the loaders' worker processes: at exit, as they take no SIGTERM, and multiprocessing would wait for
    them without end where somebody still holds the loader, as a shell holds its last traceback."""
    ignore_ends_of_children()
    for child in multiprocessing.active_children():
        child.kill()


def ignore_ends_of_children() -> None:
    """Take off torch's handler, which raises an error where a worker process ends."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


FILES_PER_WORKER, OTHER_FILES = 12, 24  # at most, of two loaders with their batches on the way; of the rest


def require_open_files(count: int) -> None:
    """Raise the number of files that this process may have open, where that is needed for `count` more.

    Raises:
        UserError: the system allows no more.
    """
    try:
        import resource

        in_use = len(os.listdir("/dev/fd"))
    except (ImportError, OSError):  # Windows
        return
    limit, largest = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = in_use + count
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return
    if largest != resource.RLIM_INFINITY and largest < needed:
        raise UserError(
            f"only {largest} files may be open at once (ulimit -n), and the processes that load batches need "
            f"{needed}: give fewer --workers (0: none)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, largest))


# --- augmentation -------------------------------------------------------------------------------------------

CROP_AREA = (0.7, 1.0)  # share of the image's area
CROP_ASPECT = (0.8, 1.25)  # width / height
# Words that are no longer true of a mirrored image
LEFT_OR_RIGHT = re.compile(r"(^|-)(left|right)(most|wards?|hand|handed|side)?(-|$)")


def augment_image(image: Tensor, rng: Random, flip: bool) -> Tensor:
    """A random crop, enlarged to the old size, in slightly different colours.

    Args:
        image: uint8 (3, S, S).
        rng: every random choice is drawn from it.
        flip: mirror the image in half of the cases; not for images whose captions say left or right.
    """
    from torchvision.transforms.v2 import functional

    size = image.shape[-1]
    area, aspect = rng.uniform(*CROP_AREA), rng.uniform(*CROP_ASPECT)
    height = min(round(size * (area / aspect) ** 0.5), size)
    width = min(round(size * (area * aspect) ** 0.5), size)
    top, left = rng.randint(0, size - height), rng.randint(0, size - width)
    image = functional.resized_crop(image, top, left, height, width, [size, size], antialias=True)
    if flip and rng.random() < 0.5:
        image = functional.horizontal_flip(image)
    image = functional.adjust_brightness(image, rng.uniform(0.8, 1.2))
    image = functional.adjust_contrast(image, rng.uniform(0.8, 1.2))
    image = functional.adjust_saturation(image, rng.uniform(0.8, 1.2))
    return functional.adjust_hue(image, rng.uniform(-0.02, 0.02))
