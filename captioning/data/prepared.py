"""What create_input_files.py prepared, checked whenever a file of it is opened; the special words.

    data = Prepared("data_output")
    data.word_map()                             # {"<pad>": 0, "a": 1, ...}
    captions, lengths = data.captions("train")
    images = data.images("train")               # uint8 (I, 3, S, S), read from the HDF5 file row by row

`prepared.json` has a digest of every file, so that a file which is damaged, or of another preparation, is
noticed. Folders that were prepared before there were digests are accepted where their content is sound.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from captioning.command_line import LARGEST
from captioning.data.hdf5 import Rows, open_dataset
from captioning.files import AnyOf, Number, find_mismatch
from utils import UserError, read_json

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


def digest_files(folder: str | Path) -> dict[str, str]:
    """The digest of each file of a preparation: of a JSON file's bytes, of an HDF5 file's pixels."""
    digests = {}
    for path in filter(Path.is_file, sorted(Path(folder).glob("*.json"))):  # and no pipe
        digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in filter(Path.is_file, sorted(Path(folder).glob("*_images.hdf5"))):
        with h5py.File(path, "r") as file:
            digests[path.name] = file.attrs["digest"]
    return digests


def training_data(record: dict) -> dict:
    """What a checkpoint keeps of `prepared.json`, by which `is_same_training_data` knows the data again."""
    return {"settings": record["settings"], "inputs": record["inputs"], "files": _training_digests(record)}


def is_same_training_data(earlier: object, record: dict) -> bool:
    """Whether a checkpoint's `training_data` are those of `prepared.json`: the same images, captions and
    words, or where an earlier release noted no digests, made of the same files with the same settings."""
    if not isinstance(earlier, dict):
        return False
    if earlier.get("files") and record.get("files"):
        return earlier["files"] == _training_digests(record)
    return all(earlier.get(name) == record[name] for name in ("settings", "inputs"))


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

    def is_whole(self) -> bool:
        """Whether all files with a digest are there and have it."""
        try:
            found = digest_files(self.folder)
        except (OSError, KeyError, RuntimeError):
            return False
        return all(found.get(name) == digest for name, digest in self.digests.items())

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
