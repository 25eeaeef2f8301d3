"""How a later run tells that files have not changed: by their names, sizes and times.

If only the time of a file differs, as after a copy or a checkout, its content is compared.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import h5py
import numpy as np

from captioning.data.images import has_image_extension, parallel_map, read_image
from captioning.data.prepared import Prepared, Record, find_checksums, training_data
from captioning.files import AnyOf, find_mismatch
from utils import UserError, read_json, write_json

Stamps = dict[str, list]  # path -> size in bytes, time of change in nanoseconds and, where taken, SHA-256


def list_image_files(folders: Iterable[str | Path]) -> Iterator[str]:
    """The paths of all image files in the folders and, through links too, in the folders in these."""
    seen: set[tuple[int, int]] = set()  # links may lead in a circle
    waiting = [str(Path(folder)) for folder in folders]
    while waiting:
        folder = waiting.pop()
        try:
            status = os.stat(folder)
            entries = [] if (key := (status.st_dev, status.st_ino)) in seen else list(os.scandir(folder))
        except OSError:
            continue  # there is none, or it may not be read
        seen.add(key)
        for entry in entries:
            if has_image_extension(entry.name):
                yield entry.path
            elif not entry.name.startswith(".") and _is_folder(entry):
                waiting.append(entry.path)


def _is_folder(entry: os.DirEntry) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def stamp_times(files: Iterable[str | Path]) -> Stamps:
    """The stamps of files, without digests; of those that are not there size -1."""
    return {str(file): _size_and_time(file) or [-1, 0] for file in files}


def stamp_files(files: Iterable[str | Path], workers: int = 4) -> Stamps:
    """The stamps of the files that are there, with digests: each is read."""
    stamps = _stamps_of_files(files)
    for stamp, digest in zip(stamps.values(), parallel_map(digest_file, stamps, workers)):
        stamp.append(digest)
    return stamps


def are_as_recorded(
    recorded: Stamps, current: Stamps, has_same_content: Callable[[str, list], bool], workers: int = 4
) -> bool:
    """Whether the files are those that were recorded.

    Args:
        has_same_content: a path and its recorded stamp -> whether the file's content is what it was; asked
            where the time alone differs.
    """
    if recorded.keys() != current.keys():
        return False
    if any(recorded[path][0] != current[path][0] for path in current):
        return False
    doubtful = [path for path in current if recorded[path][1] != current[path][1]]
    return all(parallel_map(lambda path: has_same_content(path, recorded[path]), doubtful, workers))


def files_are_as_recorded(recorded: object, files: Iterable[str | Path]) -> bool:
    """Whether the files that are there are those of `stamp_files`."""
    if find_mismatch(recorded, {str: list}) or any(
        list(map(type, s)) != [int, int, str] for s in recorded.values()
    ):
        return False  # of an earlier release, or damaged
    current = _stamps_of_files(files)
    return are_as_recorded(recorded, current, lambda path, stamp: digest_file(path) == stamp[2])


def _stamps_of_files(files: Iterable[str | Path]) -> Stamps:
    """Those of the files that are there, and no folders."""
    return {str(file): stamp for file in files if (stamp := _size_and_time(file, regular=True))}


def _size_and_time(file: str | Path, regular: bool = False) -> list[int] | None:
    """None where there is none, or no `regular` file."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    if regular and not stat.S_ISREG(status.st_mode):
        return None
    return [status.st_size, status.st_mtime_ns]


def digest_file(path: str | Path) -> str:
    """SHA-256 of a file's content; "" where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest()


# --- the images of prepared data ----------------------------------------------------------------------------

IMAGE_FILES = "image_files.json"


def record_image_files(records: Iterable[Record], folders: Iterable[str | Path]) -> dict:
    """The content of image_files.json: `stamps` of the records' image files; where some records have none,
    `others`, the image files that there are beside them, else null."""
    paths = [record.path for record in records]
    stamps = stamp_times(filter(None, paths))
    others = sorted(set(list_image_files(folders)) - stamps.keys()) if None in paths else None
    return {"stamps": stamps, "others": others}


def images_are_as_prepared(data: Prepared, folders: Iterable[str | Path]) -> bool:
    """Whether the image files are those that the data were made of, and those that were missing still are.

    Where of some the time alone has changed, their pixels are compared, and if these are the same, the new
    times are noted.

    Args:
        folders: that have the image files.
    """
    file = data.folder / IMAGE_FILES
    recorded = read_json(file) if file.is_file() else None
    if find_mismatch(recorded, {"stamps": {str: [int]}, "others": AnyOf([str], None)}):
        return False  # prepared before there was this file
    stamps, others = recorded["stamps"], recorded["others"]
    if others is not None and set(list_image_files(folders)) - stamps.keys() - set(others):
        return False
    current = stamp_times(stamps)
    if current == stamps:
        return True
    checksums, size = _checksums_by_path(data), data.record["settings"]["image_size"]

    def has_same_pixels(path: str, _: list) -> bool:
        try:
            pixels = read_image(path, size)
        except UserError:
            return False
        return path in checksums and int(find_checksums(pixels[np.newaxis])[0]) == checksums[path]

    if not are_as_recorded(stamps, current, has_same_pixels):
        return False
    write_json(file, {"stamps": current, "others": others})
    return True


def _checksums_by_path(data: Prepared) -> dict[str, int]:
    """Of each image file the checksum of its row; none where these were prepared without checksums."""
    found = {}
    for split in data.record["splits"]:
        rows = data.images(split)
        rows.file.close()
        if rows.checksums is not None:
            found |= zip((record.path for record in data.records(split)), rows.checksums.tolist())
    return found


# --- prepared data ------------------------------------------------------------------------------------------


def digest_files(folder: str | Path) -> dict[str, str]:
    """The digest of each file of a preparation: of a JSON file's bytes, of an HDF5 file's pixels."""
    digests = {}
    for path in filter(Path.is_file, sorted(Path(folder).glob("*.json"))):  # and no pipe
        digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in filter(Path.is_file, sorted(Path(folder).glob("*_images.hdf5"))):
        with h5py.File(path, "r") as file:
            digests[path.name] = file.attrs["digest"]
    return digests


def is_whole(data: Prepared) -> bool:
    """Whether all files of a preparation that have a digest are there and have it."""
    try:
        found = digest_files(data.folder)
    except (OSError, KeyError, RuntimeError):
        return False
    return all(found.get(name) == digest for name, digest in data.digests.items())


def is_same_training_data(earlier: object, record: dict) -> bool:
    """Whether a checkpoint's `training_data` are those of `prepared.json`: the same images, captions and
    words, or where an earlier release noted no digests, made of the same files with the same settings."""
    if not isinstance(earlier, dict):
        return False
    if earlier.get("files") and record.get("files"):
        return earlier["files"] == training_data(record)["files"]
    return all(earlier.get(name) == record[name] for name in ("settings", "inputs"))
