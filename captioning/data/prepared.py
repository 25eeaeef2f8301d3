"""What create_input_files.py prepared, checked whenever a file of it is opened; the special words.

    data = Prepared("data_output")
    data.word_map()                             # {"<pad>": 0, "a": 1, ...}
    captions, lengths = data.captions("train")
    images = data.images("train")               # uint8 (I, 3, S, S), read from the HDF5 file row by row

`prepared.json` has a digest of every file, so that a file which is damaged, or of another preparation, is
noticed. Folders that were prepared before there were digests are accepted where their content is sound.
"""

from __future__ import annotations

import math
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from captioning.command_line import LARGEST
from captioning.files import AnyOf, Number, find_mismatch
from utils import UserError, read_json, readable_size

PAD, UNK, START, END = "<pad>", "<unk>", "<start>", "<end>"
REMEDY = "run create_input_files.py again"
RECORD = {  # the content of prepared.json
    "settings": {
        "image_size": Number(1, LARGEST["image_size"]),
        "captions_per_image": Number(1, LARGEST["captions_per_image"]),
    },
    "inputs": dict,
    "splits": {str: {"images": Number(1), "captions": Number(0)}},
    "words": Number(1),
    "skipped": list,
    "files?": {str: str},
}


def find_word_map_problem(word_map: object) -> str | None:
    """What is wrong with a word map, whatever it was read from; None where nothing is."""
    problem = find_mismatch(word_map, {str: int}, "the word map")
    if problem:
        return problem
    lacking = [word for word in (PAD, UNK, START, END) if word not in word_map]
    if lacking:
        return f"the word map lacks {', '.join(lacking)}"
    if word_map[PAD] != 0 or set(word_map.values()) != set(range(len(word_map))):
        return f"the word map's {len(word_map)} words are not numbered from 0, {PAD}, without gaps"
    return None


@dataclass
class Record:
    """One image with its captions, of an annotation file or of the prepared data.

    Attributes:
        image_id: the id that the file gives it.
        path: the image file; None where none was found, or none was looked for.
        captions: as written, in file order; the references that scores are computed against.
        tokens: the words of each caption, as `metrics.tokenize` finds them; Karpathy's JSON brings its own.
        split: "train", "val" or "test" where the file says so, else None.
        file_name: the name of the image file, where the annotations give it beside the id.
    """

    image_id: str
    path: str | None
    captions: list[str] = field(default_factory=list)
    tokens: list[list[str]] = field(default_factory=list)
    split: str | None = None
    file_name: str | None = None


def read_prepared(data_folder: str | Path) -> dict:
    """The record `prepared.json` that create_input_files.py writes last, when everything else is complete.

    Raises:
        UserError: it is missing or damaged.
    """
    path = Path(data_folder) / "prepared.json"
    if not path.is_file():
        raise UserError(f"{data_folder}: no prepared data in it; run create_input_files.py first")
    record = read_json(path)
    mismatch = find_mismatch(record, RECORD)
    if mismatch:
        raise UserError(f"{path}: damaged ({mismatch}); {REMEDY}")
    return record


def training_data(record: dict) -> dict:
    """What a checkpoint keeps of `prepared.json`, by which `is_same_training_data` knows the data again."""
    return {"settings": record["settings"], "inputs": record["inputs"], "files": _training_digests(record)}


def _training_digests(record: dict) -> dict[str, str]:
    digests = record.get("files", {})
    return {name: digests[name] for name in digests if not name.startswith("test_")}


class Prepared:
    """A folder of prepared data as it is now; files that are replaced later are refused.

    Raises (all methods):
        UserError: a file is missing, damaged or of another preparation.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.record = read_prepared(folder)
        self.digests: dict[str, str] = dict(self.record.get("files", {}))

    def digests_of(self, split: str) -> dict[str, str]:
        """By what the split's data are recognized: the digests of its files."""
        return {name: digest for name, digest in self.digests.items() if name.startswith(f"{split}_")}

    def require_split(self, split: str) -> int:
        """The number of the split's images."""
        if split not in self.record["splits"]:
            raise UserError(f"{self.folder}: no {split} split in it; run create_input_files.py with one")
        return self.record["splits"][split]["images"]

    def word_map(self) -> dict[str, int]:
        """word -> index, from 0 without gaps."""
        name = "word_map.json"
        words = self._read(name)
        problem = find_word_map_problem(words)
        if problem is None and len(words) != self.record["words"] + 4:
            problem = f"it has {len(words)} words where prepared.json counts {self.record['words']} + 4"
        return self._require(words, name, problem)

    def records(self, split: str) -> list[Record]:
        """The split's images with all their captions, without tokens, in the order of the HDF5 file."""
        size, columns = self.require_split(split), []
        parts = {"image_ids": [str], "image_paths": [AnyOf(str, None)], "references": [[str]]}
        for part, schema in parts.items():
            name = f"{split}_{part}.json"
            column = self._read(name)
            problem = find_mismatch(column, schema)
            if problem is None and len(column) != size:
                problem = f"{len(column)} entries for {size} images"
            columns.append(self._require(column, name, problem))
        return [Record(*row) for row in zip(*columns)]

    def captions(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Encoded captions (I, N_c, L), small integers; their lengths (I, N_c) int16."""
        size, per_image = self.require_split(split), self.record["settings"]["captions_per_image"]
        words = self.word_map()
        name = f"{split}_encoded_captions.json"
        captions = self._integers(name, len(words), 2)
        lengths = self._integers(f"{split}_caption_lengths.json", captions.shape[1] + 1, 1)
        if not len(captions) == len(lengths) == size * per_image:
            self._require(None, name, f"{len(captions)} captions for {size} images of {per_image} each")
        ends = lengths.astype(np.int64) - 1
        good = lengths.min() > 1 and (captions[:, 0] == words[START]).all()
        good = good and (captions[np.arange(len(captions)), ends] == words[END]).all()
        good = good and (np.count_nonzero(captions, axis=1) == lengths).all()  # <pad> behind <end> alone
        self._require(None, name, None if good else "not <start>, words, <end>, <pad>")
        return captions.reshape(size, per_image, -1), lengths.astype(np.int16).reshape(size, per_image)

    def images(self, split: str) -> Rows:
        """The split's images, uint8 (I, 3, S, S)."""
        size, side, name = (
            self.require_split(split), self.record["settings"]["image_size"], f"{split}_images.hdf5"
        )  # fmt: skip
        try:
            images, problem = open_dataset(self.folder / name, "images", np.uint8, 4, REMEDY), None
        except ValueError as error:
            self._require(None, name, str(error))
        digest = str(images.file.attrs.get("digest"))
        if images.shape != (size, 3, side, side):
            problem = f"images {images.shape} where {(size, 3, side, side)} were expected"
        elif self.digests.setdefault(name, digest) != digest:
            problem = "other images"
        if problem:
            images.file.close()
        return self._require(images, name, problem)

    def images_digest(self, split: str) -> str:
        """A fingerprint of the split's images."""
        with self.images(split).file as file:
            return str(file.attrs.get("digest"))

    def _read(self, name: str) -> object:
        digest = self.digests.get(name)
        if self.record.get("files") and digest is None:
            raise UserError(f"{self.folder / name}: not in prepared.json; {REMEDY}")
        return read_json(self.folder / name, digest)

    def _require(self, value, name: str, problem: str | None):
        if problem:
            raise UserError(f"{self.folder / name}: damaged, or of another preparation ({problem}); {REMEDY}")
        return value

    def _integers(self, name: str, end: int, dimensions: int) -> np.ndarray:
        """A JSON file of integers in [0, end), as an array of the smallest type."""
        content, problem = self._read(name), None
        try:
            values = np.array(content)
        except (ValueError, OverflowError):  # rows of different lengths
            values = np.array("")
        if values.dtype.kind != "i" or values.ndim != dimensions or not values.size:
            problem = "no whole numbers in rows of one length"
        elif values.min() < 0 or values.max() >= end:
            problem = f"numbers from {values.min()} to {values.max()} where {end - 1} is the largest"
        return self._require(values, name, problem).astype(np.min_scalar_type(end))


# --- rows of HDF5 files -------------------------------------------------------------------------------------
# Beside a dataset with a row for each image lies another, uint32: the CRC-32 of the bytes of each row, or
# where rows have views, of each view. It is compared whenever they are read; files of earlier releases have
# none.

CHECKSUMS = "checksums"


def checksum_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of rows (I, ...) each has a checksum: (I,); of (I, views, h, w, D) each view: (I, views)."""
    return shape[: max(1, len(shape) - 3)]


def find_checksums(values: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """The CRC-32 of each of the parts into which the shape, that of `checksum_shape`, divides the values."""
    shape = checksum_shape(values.shape) if shape is None else shape
    parts = np.ascontiguousarray(values).reshape(math.prod(shape), -1)
    return np.array([zlib.crc32(part) for part in parts], np.uint32).reshape(shape)


def require_disk_space(folder: Path, needed: int, remedy: str) -> None:
    """Raise UserError unless `needed` bytes are free on the folder's disk."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder}: {readable_size(free)} free, {readable_size(needed)} needed: {remedy}")


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
