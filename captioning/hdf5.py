"""HDF5 files with one dataset that has a row for each image: written as a whole, read with suspicion."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import h5py
import numpy as np

from captioning.files import OutputFile
from utils import UserError


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
        self.written = 0
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
        self.dataset[self.written : self.written + len(values)] = values
        self.stream.check()
        self.written += len(values)

    def __exit__(self, kind, error, traceback) -> None:
        with self.stream:
            if self.dataset is not None:
                self.dataset.resize(self.written, axis=0)
            self.file.close()
            if error is not None:
                raise error


def require_disk_space(folder: Path, needed: int, remedy: str) -> None:
    """Raise UserError unless `needed` bytes are free on the folder's disk."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed: {remedy}")


def open_dataset(path: str | Path, name: str, dtype: type, dimensions: int | None = None) -> h5py.Dataset:
    """A dataset of an HDF5 file, whose values are all in this file; `dataset.file.close()` closes it.

    Raises:
        ValueError: it is missing, cut short, of another kind, or leads to another file.
    """
    try:
        file = h5py.File(path, "r")
    except (OSError, RuntimeError):
        if not Path(path).is_file():
            raise ValueError("the file is missing") from None
        raise ValueError("it is cut short or no HDF5 file") from None
    try:
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"it has no dataset {name} of its own")
        dataset = file[name]
        if not isinstance(dataset, h5py.Dataset) or dataset.dtype != dtype:
            raise ValueError(f"its {name} are not {np.dtype(dtype)}")
        if dataset.ndim != (dimensions or dataset.ndim):
            raise ValueError(f"its {name} have {dataset.ndim} dimensions, not {dimensions}")
        if dataset.is_virtual or dataset.external or dataset.compression or dataset.scaleoffset is not None:
            raise ValueError(f"its {name} are compressed or in other files")
        if dataset.id.get_storage_size() < math.prod(dataset.shape) * dataset.dtype.itemsize:
            raise ValueError(f"some of its {name} were never written")
        return dataset
    except (KeyError, RuntimeError, OSError, TypeError) as error:
        file.close()
        raise ValueError(f"it is damaged ({type(error).__name__})") from None
    except ValueError:
        file.close()
        raise
