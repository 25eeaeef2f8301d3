"""HDF5 files with one dataset that has a row for each image: written as a whole, read with suspicion.

Beside the dataset lies another, `checksums`, uint32: the CRC-32 of the bytes of each row, or where rows have
views, of each view. It is compared whenever they are read; files of earlier releases have none.
"""

from __future__ import annotations

import math
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from captioning.files import OutputFile, is_in_place, lock_file
from utils import UserError, readable_size

CHECKSUMS = "checksums"


class RowWriter:
    """Writes a dataset row by row to a new HDF5 file; a context manager.

    Args:
        path: the file; give it the temporary path of an `atomic_write`.
        name: of the dataset.
        rows: how many there will be, at most.
        remedy: what to do where the disk has not enough space for them.

    Raises:
        UserError: the disk has not enough space. OSError: a write failed.
    """

    def __init__(self, path: str | Path, name: str, rows: int, remedy: str):
        self.path, self.name, self.rows, self.remedy = Path(path), name, rows, remedy
        self.checksums: list[int] = []
        self.dataset: h5py.Dataset | None = None

    def __enter__(self) -> RowWriter:
        self.stream = OutputFile(self.path)
        self.file = h5py.File(self.stream, "w")
        return self

    def append(self, values: np.ndarray) -> None:
        """Write the next rows (n, ...)."""
        if self.dataset is None:
            shape = values.shape[1:]
            require_disk_space(self.path.parent, self.rows * values[0].nbytes, self.remedy)
            chunks = (1,) * max(1, values.ndim - 3) + values.shape[1:][-3:]  # an image, or one view of it
            options = {"maxshape": (None, *shape), "chunks": chunks}
            self.dataset = self.file.create_dataset(self.name, (self.rows, *shape), values.dtype, **options)
        written = len(self.checksums)
        self.dataset[written : written + len(values)] = values
        self.stream.check()
        self.checksums += find_checksums(values).tolist()

    def __exit__(self, kind, error, traceback) -> None:
        with self.stream:
            if self.dataset is not None:
                self.dataset.resize(len(self.checksums), axis=0)
                self.file[CHECKSUMS] = np.array(self.checksums, np.uint32)
            self.file.close()
            if error is not None:
                raise error


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
        self.path, self.name, self.rows = Path(os.path.realpath(path)), name, rows
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
                os.replace(self.tmp_path, self.path)
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


def checksum_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of rows (I, ...) each has a checksum: (I,); of (I, views, h, w, D) each view: (I, views)."""
    return shape[: max(1, len(shape) - 3)]


def find_checksums(values: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """The CRC-32 of each of the parts into which the shape, that of `checksum_shape`, divides the values."""
    shape = checksum_shape(values.shape) if shape is None else shape
    parts = np.ascontiguousarray(values).reshape(math.prod(shape), -1)
    return np.array([zlib.crc32(part) for part in parts], np.uint32).reshape(shape)


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


def require_disk_space(folder: Path, needed: int, remedy: str) -> None:
    """Raise UserError unless `needed` bytes are free on the folder's disk."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder}: {readable_size(free)} free, {readable_size(needed)} needed: {remedy}")


def has_attributes(file: h5py.File, attributes: dict[str, str]) -> bool:
    return all(str(file.attrs.get(name)) == value for name, value in attributes.items())


class Rows:
    """A dataset of an open file, for reading; every row that has a checksum is compared with it.

    Raises (on reading):
        UserError: a row is damaged. OSError: it cannot be read.
    """

    def __init__(self, dataset: h5py.Dataset, checksums: np.ndarray | None, remedy: str):
        self.dataset, self.checksums, self.remedy = dataset, checksums, remedy
        self.file, self.shape, self.dtype = dataset.file, dataset.shape, dataset.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> np.ndarray:
        """A row, or consecutive ones."""
        if isinstance(index, slice):
            return self.read(range(*index.indices(len(self))))
        return self.read([index])[0]

    def read(self, places: Sequence[int | tuple[int, ...]]) -> np.ndarray:
        """Rows (n, ...) of these numbers; where rows have views, (row, view) is a place too."""
        first = self.shape[len(np.atleast_1d(places[0])) :]
        values = np.empty((len(places), *first), self.dtype)
        for number, place in enumerate(places):
            self.dataset.read_direct(values, place, np.s_[number])
            if self.checksums is None:
                continue
            expected = self.checksums[place]
            if (find_checksums(values[number], expected.shape) != expected).any():
                raise UserError(f"{self.file.filename}: its row {place} is damaged; {self.remedy}")
        return values


def open_dataset(
    path: str | Path, name: str, dtype: type, dimensions: int | None = None, remedy: str = "make it anew"
) -> Rows:
    """A dataset of an HDF5 file, whose values are all in this file; `.file.close()` closes it.

    Args:
        remedy: what to do where a row that is read later is damaged.

    Raises:
        ValueError: it is missing, cut short, of another kind, or leads to another file.
    """
    if not Path(path).is_file():
        raise ValueError("the file is missing, or no file")
    try:
        file = h5py.File(path, "r")
    except (OSError, RuntimeError):
        raise ValueError("it is cut short or no HDF5 file") from None
    try:
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"it has no dataset {name} of its own")
        dataset = file[name]
        if not isinstance(dataset, h5py.Dataset) or dataset.dtype != dtype:
            raise ValueError(f"its {name} are not {np.dtype(dtype)}")
        if dataset.ndim != (dimensions or dataset.ndim):
            raise ValueError(f"its {name} have {dataset.ndim} dimensions, not {dimensions}")
        if _leads_elsewhere(dataset):
            raise ValueError(f"its {name} are compressed or in other files")
        if dataset.id.get_storage_size() < math.prod(dataset.shape) * dataset.dtype.itemsize:
            raise ValueError(f"some of its {name} were never written")
        return Rows(dataset, _read_checksums(file, dataset.shape), remedy)
    except (KeyError, RuntimeError, OSError, TypeError) as error:
        file.close()
        raise ValueError(f"it is damaged ({type(error).__name__})") from None
    except ValueError:
        file.close()
        raise


def _leads_elsewhere(dataset: h5py.Dataset) -> bool:
    """Whether its values are compressed, or in other files."""
    packed = dataset.compression or dataset.scaleoffset is not None
    return bool(dataset.is_virtual or dataset.external or packed)


def _read_checksums(file: h5py.File, shape: tuple[int, ...]) -> np.ndarray | None:
    link = file.get(CHECKSUMS, getlink=True)
    if link is None:  # written by an earlier release
        return None
    checksums = file[CHECKSUMS] if isinstance(link, h5py.HardLink) else None
    if not isinstance(checksums, h5py.Dataset) or checksums.dtype != np.uint32 or _leads_elsewhere(checksums):
        raise ValueError(f"its {CHECKSUMS} are damaged")
    if checksums.shape != checksum_shape(shape):
        raise ValueError(f"its {CHECKSUMS} are not those of its rows")
    return checksums[:]
