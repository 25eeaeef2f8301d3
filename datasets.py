"""The torch data set of prepared images and captions, its batches, and augmentation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from utils import UserError, read_json

# --- prepared data ------------------------------------------------------------------------------------------


def read_prepared(data_folder: str | Path) -> dict:
    """The record `prepared.json` that create_input_files.py writes last, when everything else is complete."""
    path = Path(data_folder) / "prepared.json"
    if not path.is_file():
        raise UserError(f"{data_folder}: no prepared data in it; run create_input_files.py first")
    return read_json(path)


class Request(NamedTuple):
    """A batch: which images, in file order, and a seed for what is random in it."""

    indices: np.ndarray
    seed: int


class CaptionDataset(Dataset):
    """The images of one prepared split, each with its N_c captions, read a batch at a time.

    Of a `Request` for n images it gives (images, captions, lengths): images as uint8 (n, 3, S, S), or
    their features as float16 (n, h, w, D) where a cache is given; captions int64 (n, N_c, L), padded with 0;
    lengths int64 (n, N_c), `<start>` and `<end>` counted.

    Captions are kept as small integers in one array, which worker processes share; their memory stays flat.

    Args:
        augment: change images at random, see `augment_image`.

    Raises:
        UserError: the split is missing or its files do not fit each other.
    """

    def __init__(
        self,
        data_folder: str | Path,
        split: str,
        features_file: str | Path | None = None,
        augment: bool = False,
    ):
        folder = Path(data_folder)
        if split not in read_prepared(folder)["splits"]:
            raise UserError(f"{folder}: no {split} split in it; run create_input_files.py with one")
        self.file = Path(features_file) if features_file else folder / f"{split}_images.hdf5"
        self.key = "features" if features_file else "images"
        words = read_json(folder / "word_map.json")
        lengths = np.array(read_json(folder / f"{split}_caption_lengths.json"), dtype=np.int16)
        captions = np.array(
            read_json(folder / f"{split}_encoded_captions.json"), dtype=np.min_scalar_type(len(words))
        )
        with h5py.File(folder / f"{split}_images.hdf5", "r") as images:
            per_image = int(images.attrs["captions_per_image"])
            self.size = len(images["images"])
        if len(captions) != self.size * per_image or len(lengths) != len(captions):
            raise UserError(
                f"{folder}: the {split} split's files do not fit each other; run create_input_files.py"
            )
        longest = lengths.max(initial=1)
        self.captions = captions[:, :longest].reshape(self.size, per_image, longest).copy()
        self.lengths = lengths.reshape(self.size, per_image)
        self.augment = augment
        if augment:
            sided = [index for word, index in words.items() if SIDED.search(word)]
            self.sided = np.isin(self.captions, sided).any(
                axis=(1, 2)
            )  # (I,) some caption says left or right
        self.stored = None  # opened where it is read: an open HDF5 file must not cross into a worker process

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, request: Request) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.stored is None:
            self.stored = h5py.File(self.file, "r")[self.key]
        indices = request.indices
        images = np.empty((len(indices), *self.stored.shape[1:]), self.stored.dtype)
        for row, index in enumerate(indices):
            self.stored.read_direct(images, np.s_[index], np.s_[row])
        images = torch.from_numpy(images)
        if self.augment:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(request.seed)
                images = torch.stack(
                    [
                        augment_image(image, flip=not self.sided[index])
                        for image, index in zip(images, indices)
                    ]
                )
        lengths = self.lengths[indices].astype(np.int64)
        captions = self.captions[indices, :, : lengths.max()].astype(np.int64)
        return images, torch.from_numpy(captions), torch.from_numpy(lengths)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"stored": None}


class BatchSampler:
    """The batches of an epoch, shared out to processes and cut into parts that fit the device.

    A step takes batch_size * parts * processes images. All steps of an epoch are equally large, to one
    image, and so are the parts of a step. Which images make a step depends only on their number, not on
    how the step is cut up.

    Args:
        size: images in all. batch_size: the largest part. parts: of a step in each process.
        shuffle: new order in each epoch; otherwise file order.

    Raises:
        UserError: fewer images than parts.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        parts: int = 1,
        rank: int = 0,
        processes: int = 1,
        shuffle: bool = False,
        seed: int = 0,
    ):
        if size < parts * processes:
            raise UserError(
                f"{size} images cannot be shared out to {parts * processes} batches a step: "
                f"lower --grad_accumulation or the number of processes"
            )
        self.size, self.shuffle, self.seed = size, shuffle, seed
        self.parts, self.rank, self.processes = parts, rank, processes
        # no part of a step may be empty
        self.count = min(-(-size // (batch_size * parts * processes)), size // (parts * processes))
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Draw the order of an epoch; the same for the same seed and epoch."""
        self.epoch = epoch
        order = np.arange(self.size)
        if self.shuffle:
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        self.steps = np.array_split(order, self.count)

    def __len__(self) -> int:
        return self.count * self.parts

    def __iter__(self) -> Iterator[Request]:
        for number, step in enumerate(self.steps):
            shares = np.array_split(step, self.parts * self.processes)
            for part in range(self.parts):
                place = part * self.processes + self.rank
                seed = np.random.SeedSequence([self.seed, self.epoch, number, place]).generate_state(1)[0]
                yield Request(np.sort(shares[place]), int(seed))


SIDED = re.compile(r"(^|-)(left|right)(most|wards?|hand|handed|side)?(-|$)")  # words that a flip makes false


def augment_image(image: torch.Tensor, flip: bool) -> torch.Tensor:
    """A random crop of at least 70 % of the area, brought back to size, with other colours, perhaps flipped.

    Args:
        image: uint8 (3, S, S).
        flip: whether a horizontal flip may happen; not where a caption says left or right.
    """
    image = v2.functional.to_image(image)
    transforms = [
        v2.RandomResizedCrop(image.shape[1:], scale=(0.7, 1.0), ratio=(0.8, 1.25), antialias=True),
        v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02),
    ]
    if flip:
        transforms.append(v2.RandomHorizontalFlip())
    return v2.Compose(transforms)(image).as_subclass(torch.Tensor)
