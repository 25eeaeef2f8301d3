"""By what a later run knows that files are as they were: names, sizes and times.

Where of a file the time alone differs, as after a copy or a checkout, its content decides.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from captioning.data.images import has_image_extension
from utils import parallel_map

Stamps = dict[str, list]  # path -> size in bytes, time of change in nanoseconds and, where taken, SHA-256


def stamp_images(*folders: str | Path) -> Stamps:
    """The stamps of all image files in the folders and the folders in these, without digests."""
    stamps: Stamps = {}
    seen: set[tuple[int, int]] = set()  # folders, as links may lead in a circle
    waiting = [str(folder) for folder in folders]
    while waiting:
        folder = waiting.pop()
        try:
            status = os.stat(folder)
            entries = [] if (key := (status.st_dev, status.st_ino)) in seen else list(os.scandir(folder))
        except OSError:
            continue  # there is none, or it may not be read
        seen.add(key)
        for entry in entries:
            try:
                if has_image_extension(entry.name):
                    status = entry.stat()
                    stamps[entry.path] = [status.st_size, status.st_mtime_ns]
                elif entry.is_dir() and not entry.name.startswith("."):
                    waiting.append(entry.path)
            except OSError:
                stamps[entry.path] = [-1, 0]  # a link that leads nowhere
    return stamps


def stamp_files(files: Iterable[str | Path], workers: int = 4) -> Stamps:
    """The stamps of the files that are there, with digests: each is read."""
    there = [str(file) for file in files if os.path.isfile(file)]
    digests = parallel_map(digest_file, there, workers)
    return {file: [*_size_and_time(file), digest] for file, digest in zip(there, digests)}


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


def files_are_as_recorded(recorded: Stamps, files: Iterable[str | Path]) -> bool:
    """Whether the files that are there are those of `stamp_files`."""
    current = {str(file): _size_and_time(file) for file in files if os.path.isfile(file)}
    return are_as_recorded(recorded, current, lambda path, stamp: digest_file(path) == stamp[2])


def _size_and_time(file: str | Path) -> list[int]:
    status = os.stat(file)
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
