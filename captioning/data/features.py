"""A frozen encoder's output, computed once and kept on disk, for both trainings."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from captioning.data.prepared import (
    CHECKSUMS,
    Prepared,
    Rows,
    checksum_shape,
    find_checksums,
    open_dataset,
    require_disk_space,
)
from captioning.files import OutputFile, is_in_place, lock_file
from models import Encoder, normalize_images
from utils import UserError, progress_bar, readable_size, replace_file, say

REMEDY = "delete it, and it will be made anew"
CPU_BATCH = 8  # images; ran 1.2 (resnet101) to 2.5 times (efficientnet_lite0) as fast as 32


@torch.inference_mode()
def encode_images(encoder: Encoder, images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W) in [0, 255] -> the encoder's native grid (N, h, w, D), without gradients."""
    batch_size = CPU_BATCH if images.device.type == "cpu" else len(images)
    return torch.cat([encoder.grid(normalize_images(batch)) for batch in images.split(batch_size)])


def weights_digest(module: nn.Module) -> str:
    """A fingerprint of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- the cache file -----------------------------------------------------------------------------------------


def write_features(
    file: str | Path,
    fingerprints: dict[str, str],
    batches: Callable[[int], Iterable[Tensor]],
    encode: Callable[[Tensor], Tensor],
    size: int,
    batch_size: int,
    description: str,
) -> None:
    """Encode `size` images batch by batch into an HDF5 file; go on where an earlier run was interrupted.

    The file has the dataset `features`, float16 (size, *shape of an image's features), and `fingerprints` as
    its attributes, by which `is_up_to_date` knows it again.

    Args:
        batches: the number of the first image, a multiple of `batch_size` -> what `encode` takes of this and
            the following ones, in order.
        encode: a batch -> its features (N, ...).
        description: what is encoded, such as "train images".

    Raises:
        UserError: the disk has not enough space.
    """
    remedy = "free some disk space, or give --cache_features False to encode the images anew in every epoch"
    with ResumableRowWriter(file, "features", size, fingerprints, remedy) as writer:
        if is_up_to_date(file, fingerprints, size):  # another run has just written it
            return
        writer.written -= writer.written % batch_size  # features depend, in the last digit, on their batch
        options = {"total": size, "initial": writer.written, "desc": f"encoding {description}"}
        with progress_bar(unit="image", **options) as progress:
            if writer.written:
                say(f"{writer.written} of {size} {description} were encoded by an earlier run")
            try:
                for batch in batches(writer.written):
                    features = encode(batch).half().cpu().numpy()
                    if not np.isfinite(features).all():
                        raise UserError(
                            f"the encoder's features of some {description} are no finite numbers in half "
                            f"precision: its weights are damaged, or need --cache_features False"
                        )
                    if writer.written == 0:
                        needed = size * features[0].nbytes
                        say(f"features of {size} {description}: {readable_size(needed)} in {file}")
                    writer.append(features)
                    progress.update(len(features))
            except KeyboardInterrupt as interrupt:
                interrupt.args = (f"{writer.written} of {size} {description} are encoded; the same command "
                                  f"goes on from there",)  # fmt: skip
                raise


def is_up_to_date(file: str | Path, fingerprints: dict[str, str], size: int) -> bool:
    """Whether the file is there, whole, of `size` images, and its fingerprints are these."""
    try:
        features = open_dataset(file, "features", np.float16)
    except ValueError:
        return False
    with features.file as cache:
        return has_attributes(cache, fingerprints) and len(features) == size


def open_features(file: str | Path, data: Prepared, split: str) -> Rows:
    """The features (I, h, w, D) or (I, views, h, w, D) that `cache_features` wrote of these images.

    Raises:
        UserError: they are damaged, or of other images.
    """
    try:
        features = open_dataset(file, "features", np.float16, remedy=REMEDY)
        if len(features.shape) not in (4, 5):
            features.file.close()
            raise ValueError(f"its features have {len(features.shape)} dimensions")
        if features.file.attrs.get("pictures") != data.images_digest(split):
            features.file.close()
            raise ValueError("of other images")
        return features
    except ValueError as error:
        raise UserError(f"{file}: {error}; {REMEDY}") from None


def has_attributes(file: h5py.File, attributes: dict[str, str]) -> bool:
    return all(str(file.attrs.get(name)) == value for name, value in attributes.items())


# --- the attention model's encoder --------------------------------------------------------------------------


def cache_features(
    encoder: Encoder,
    data_folder: str | Path,
    split: str,
    device: torch.device,
    views: int = 1,
    draw_views: Callable[[int], Tensor] | None = None,
    drawn_with: str = "",
) -> Path:
    """Encode each image of a prepared split once; return the HDF5 file with `features`, float16
    (I, h, w, D), or of several views of each image (I, views, h, w, D).

    A file that is there and up to date is used as it is, any other is replaced.

    Args:
        draw_views: the index of an image -> its views, uint8 (views, 3, S, S), the same in every run.
        drawn_with: a fingerprint of what the views depend on beside the images.

    Raises:
        UserError: the disk has not enough space.
    """
    file, data = _cache_file(encoder, data_folder, split, views), Prepared(data_folder)
    fingerprints = _fingerprints(encoder, data, split) | ({"views": drawn_with} if draw_views else {})
    if is_up_to_date(file, fingerprints, data.require_split(split)):
        return file
    images, batch_size = data.images(split), max(1, 64 // views)
    size, description = len(images), f"{split} images" if views == 1 else f"{split} images in {views} views"

    def read_batch(start: int) -> Tensor:  # (N, 3, S, S) or (N, views, 3, S, S)
        stop = min(start + batch_size, size)
        if draw_views is None:
            return torch.from_numpy(images[start:stop])
        return torch.stack([draw_views(index) for index in range(start, stop)])

    def encode(batch: Tensor) -> Tensor:
        encoded = encode_images(encoder, batch.flatten(0, -4).to(device))
        return encoded.unflatten(0, batch.shape[:-3])

    with images.file:

        def batches(first: int) -> Iterator[Tensor]:
            return map(read_batch, range(first, size, batch_size))

        write_features(file, fingerprints, batches, encode, size, batch_size, description)
    return file


def cached_features(encoder: Encoder, data_folder: str | Path, split: str) -> Path | None:
    """The HDF5 file that `cache_features` wrote of this encoder and these images, if there is one."""
    file, data = _cache_file(encoder, data_folder, split), Prepared(data_folder)
    if not file.is_file():
        return None
    is_good = is_up_to_date(file, _fingerprints(encoder, data, split), data.require_split(split))
    return file if is_good else None


def _cache_file(encoder: Encoder, data_folder: str | Path, split: str, views: int = 1) -> Path:
    suffix = f"_{views}_views" if views > 1 else ""
    return Path(data_folder) / f"{split}_features_{encoder.name}{suffix}.hdf5"


def _fingerprints(encoder: Encoder, data: Prepared, split: str) -> dict[str, str]:
    # "pictures" is what files on users' disks have
    return {"weights": weights_digest(encoder), "pictures": data.images_digest(split)}


# --- writing that goes on -----------------------------------------------------------------------------------


class ResumableRowWriter:
    """Writes a new HDF5 file row by row, and goes on where a killed run stopped; a context manager.

    Until the last row is there the file is called `.NAME.partial`. All its space is laid out at the start, so
    that a kill at any moment leaves a sound HDF5 file; rows follow in order, each with its checksum, which
    tells the rows that were written from the rest. The file stays behind when the run is interrupted or a
    write fails, but not when the work itself is at fault, which a `UserError` says. A second run that would
    write the same file waits.

    Args:
        path: the complete file.
        name: of the dataset.
        rows: how many there will be.
        attributes: of the file; rows that an earlier run wrote with others are not used.
        remedy: what to do where the disk has not enough space.

    Attributes:
        written: the number of rows that are there; may be lowered to write some again.

    Raises:
        UserError: the disk has not enough space. OSError: a write failed.
    """

    def __init__(self, path: str | Path, name: str, rows: int, attributes: dict[str, str], remedy: str):
        self.path, self.name, self.rows = Path(path), name, rows
        self.attributes, self.remedy = attributes, remedy
        self.tmp_path = self.path.with_name(f".{self.path.name}.partial")
        self.row: tuple | None = None  # shape and type of a row
        self.written = 0

    def __enter__(self) -> ResumableRowWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self.stream = OutputFile(self.tmp_path, self.path, keep=True)
            lock_file(self.stream, f"waiting for another run, which writes {self.path}")
            if is_in_place(self.stream, self.tmp_path):
                break
            self.stream.close()  # the other run has finished it
        self.written = self._count_written()
        if not self.written:
            self.row = None  # what is laid out there, if anything, is not to be relied on
        return self

    def append(self, values: np.ndarray) -> None:
        """Write the next rows (n, ...)."""
        row = (values.shape[1:], values.dtype)
        if self.row is None:
            require_disk_space(self.path.parent, self.rows * values[0].nbytes, self.remedy)
            self._lay_out(*row)
        if self.row != row:
            raise UserError(f"{self.path}: the run before had rows of another shape; start it again")
        checksums = find_checksums(values)
        self._write(self.row_start + self.written * values[0].nbytes, values)
        self._write(self.checksum_start + self.written * checksums[0].nbytes, checksums)
        self.written += len(values)

    def __exit__(self, kind, error, traceback) -> None:
        with self.stream:
            if os.name == "nt":  # where open files cannot be renamed, and none is locked
                self.stream.close()
            if error is None and self.written == self.rows:
                replace_file(self.tmp_path, self.path)
            elif not self.written or error is None or isinstance(error, UserError):
                self.tmp_path.unlink()

    def _lay_out(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.stream.truncate(0)
        with h5py.File(self.stream, "w") as file:
            file.attrs.update(self.attributes)
            self.row_start = _create_contiguous(file, self.name, (self.rows, *shape), dtype)
            sums = checksum_shape((self.rows, *shape))
            self.checksum_start = _create_contiguous(file, CHECKSUMS, sums, np.dtype(np.uint32))
        self.stream.check()
        self.row = (shape, dtype)

    def _count_written(self) -> int:
        """The number of rows that an earlier run wrote of the same dataset."""
        try:
            with h5py.File(self.stream, "r") as file:
                rows, checksums = file[self.name], file[CHECKSUMS]
                if not has_attributes(file, self.attributes) or len(rows) != self.rows:
                    return 0
                self.row_start, self.checksum_start = rows.id.get_offset(), checksums.id.get_offset()
                shape, dtype, expected = rows.shape, rows.dtype, checksums[:]
            if None in (self.row_start, self.checksum_start) or expected.shape != checksum_shape(shape):
                return 0
            self.row = (shape[1:], dtype)
            self.stream.seek(self.row_start)
            size = math.prod(shape[1:]) * dtype.itemsize
            for number in range(self.rows):
                row = np.frombuffer(self.stream.read(size), np.uint8).reshape(1, *expected.shape[1:], -1)
                if (find_checksums(row, expected[number : number + 1].shape) != expected[number]).any():
                    return number
        except (OSError, KeyError, RuntimeError, TypeError, ValueError, AttributeError, MemoryError):
            return 0  # damaged, or not ours
        return self.rows

    def _write(self, offset: int, values: np.ndarray) -> None:
        self.stream.seek(offset)
        self.stream.write(values)
        self.stream.check()


def _create_contiguous(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Make a dataset whose space in the file is fixed at once, and nothing is written to it; where it
    begins."""
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_layout(h5py.h5d.CONTIGUOUS)
    options.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    options.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    options.set_obj_track_times(False)  # the same rows make the same file, bit for bit
    kind, space = h5py.h5t.py_create(dtype), h5py.h5s.create_simple(shape)
    return h5py.h5d.create(file.id, name.encode(), kind, space, options).get_offset()
