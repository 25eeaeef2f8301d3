"""The data sets of both trainings, their batches, and the augmentation of images.

CaptionDataset reads what create_input_files.py prepared, for train.py; BlipDataset reads image files, for
train_model.py. Both change training images with `augment_image`.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captioning.data.features import REMEDY, is_up_to_date, open_features, weights_digest, write_features
from captioning.data.hdf5 import Rows, open_dataset
from captioning.data.prepared import Prepared, Record
from utils import (
    UserError,
    parallel_map,
    pick_device,
    processes,
    progress_bar,
    start_worker,
)

if TYPE_CHECKING:
    from captioning.captioners.blip import BlipCaptioner

# --- prepared data ------------------------------------------------------------------------------------------


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


def make_loader(
    dataset: CaptionDataset, sampler: BatchSampler, workers: int, device: torch.device
) -> DataLoader:
    """A loader of the sampler's batches, read by worker processes that live through all epochs."""
    if workers:
        atexit.register(kill_children)
    return DataLoader(
        dataset,
        batch_size=None,  # the dataset reads a batch at a time
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=start_worker,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # so that starting workers draws nothing from the training's
    )


def kill_children() -> None:
    """End the loaders' worker processes at exit: they take no SIGTERM, and multiprocessing would wait for
    them without end where somebody still holds the loader, as a shell holds its last traceback."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their end
    for child in multiprocessing.active_children():
        child.kill()


# --- BLIP ---------------------------------------------------------------------------------------------------

KEPT_BYTES = 2**31  # of resized images in memory; further ones are read from their files in every epoch


class BlipDataset:
    """The images of a BLIP training; those that cannot be read are left out.

    Args:
        records: images with their captions.
        workers: threads that read images.

    Attributes:
        records: those whose images can be read.
        problems: what is wrong with the others, a line each.
        features: after `cache_features` the vision model's outputs, else None.
    """

    def __init__(self, captioner: BlipCaptioner, records: list[Record], workers: int):
        self.captioner = captioner
        self.workers = workers
        self.kept: dict[str, Tensor] = {}  # path -> resized image, uint8 (3, S, S)
        self.bytes_left = KEPT_BYTES
        self.features: Rows | None = None
        problems = self._find_problems(records)
        self.problems = list(problems.values())
        self.records = [record for record in records if record.image_id not in problems]
        self.may_flip = [
            not any(LEFT_OR_RIGHT.search(word) for tokens in record.tokens for word in tokens)
            for record in self.records
        ]

    def _find_problems(self, records: list[Record]) -> dict[str, str]:
        """Read all images, each process a share: image_id -> what is wrong, for those that cannot be read."""

        def problem(record: Record) -> tuple[str, str] | None:
            try:
                self._resized(record)
            except UserError as error:
                return record.image_id, str(error)
            return None

        state = processes()
        own = records[state.process_index :: state.num_processes]
        results = progress_bar(
            parallel_map(problem, own, self.workers), total=len(own), desc="reading", unit="image"
        )
        problems = [result for result in results if result]
        if state.num_processes > 1:
            from accelerate.utils import gather_object

            problems = gather_object(problems)
        return dict(problems)

    def _resized(self, record: Record) -> Tensor:
        """The image as the processor resizes it, uint8 (3, S, S)."""
        from captioning.data.annotations import require_image  # here, as train.py needs neither
        from captioning.data.images import read_image

        path = require_image(record.image_id, record.path)
        if path in self.kept:
            return self.kept[path]
        image = Image.fromarray(read_image(path).transpose(1, 2, 0))
        pixels = self._process(image, do_rescale=False, do_normalize=False)[0]
        if self.bytes_left >= pixels.nbytes:
            self.bytes_left -= pixels.nbytes
            self.kept[path] = pixels
        return pixels

    def _process(self, images: Image.Image | list[Tensor], **options: bool) -> Tensor:
        return self.captioner.image_processor(images=images, return_tensors="pt", **options)["pixel_values"]

    def batches(self, batches: list[list[int]], augment_seed: str | None = None) -> Iterator[Tensor]:
        """For each batch of indices its images as the vision model takes them, float32 (N, 3, S, S).

        After `cache_features` these are the vision model's outputs instead, float16 (N, tokens, D). Threads
        read ahead.

        Args:
            augment_seed: change the images at random, see `augment_image`; how an image is changed depends
                on this seed and its index, not on its batch.
        """

        def image(index: int) -> Tensor:
            pixels = self._resized(self.records[index])
            if augment_seed is None:
                return pixels
            return augment_image(pixels, Random(f"{augment_seed} {index}"), self.may_flip[index])

        def load(batch: list[int]) -> Tensor:
            if self.features is not None:
                return torch.from_numpy(self.features.read(batch))
            return self._process([image(index) for index in batch], do_resize=False)

        return parallel_map(load, batches, self.workers)

    @torch.no_grad()
    def cache_features(self, file: str | Path) -> None:
        """Replace the images by the vision model's outputs, read from `file` or first written to it.

        The file's fingerprints are of the vision model's weights, of how images are prepared, and of the
        image files' sizes and modification times.

        Raises:
            UserError: the disk has not enough space.
        """
        vision, device = self.captioner.model.vision_model, pick_device()
        stats = [(r.path, os.stat(r.path).st_size, os.stat(r.path).st_mtime_ns) for r in self.records]
        fingerprints = {
            "weights": weights_digest(vision),
            "preparation": self.captioner.image_processor.to_json_string(),
            "images": hashlib.sha256(json.dumps(stats).encode()).hexdigest(),
        }
        with processes().main_process_first():
            if not is_up_to_date(file, fingerprints, len(self.records)):
                vision.to(device).eval()
                size, batch_size = len(self.records), 16

                def batches(first: int) -> Iterator[Tensor]:
                    starts = range(first, size, batch_size)
                    return self.batches([[*range(start, min(start + batch_size, size))] for start in starts])

                write_features(
                    file,
                    fingerprints,
                    batches,
                    lambda pixels: vision(pixel_values=pixels.to(device)).last_hidden_state,
                    size,
                    batch_size,
                    "training images",
                )
        self.kept.clear()
        self.features = open_dataset(file, "features", np.float16, 3, REMEDY)


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
