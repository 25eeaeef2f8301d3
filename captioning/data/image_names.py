"""Which image a name means: files and ids have other folders, extensions and zeros on other machines."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from captioning.data.images import IMAGE_EXTENSIONS, PACKAGES, natural_order, walk_images
from captioning.data.prepared import Record
from captioning.data.text_files import say_once
from utils import UserError, atomic_write, counted

SIGNATURES = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


def stem(name: str) -> str:
    """A name without an image file's extension."""
    start, extension = os.path.splitext(name)
    return start if extension.lower() in (*IMAGE_EXTENSIONS, *PACKAGES) else name


def coco_id(image_id: str) -> int | str:
    """COCO's number of an image: its file names are like COCO_val2014_000000391895.jpg. Other ids stay."""
    number = re.fullmatch(r"(?:COCO_\w+?_)?0*(\d{1,18})(?:\.jpg)?", image_id)
    return int(number[1]) if number else image_id


def parts_of(name: str) -> list[str]:
    """The folders and the file's name of a path of any system, without `.` and all up to `..`."""
    parts = [part for part in re.split(r"[\\/]+", name) if part not in ("", ".")]
    return parts[len(parts) - parts[::-1].index("..") :] if ".." in parts else parts


class NameIndex:
    """Finds a name among others that mean the same image.

    That is the name itself; else those with the same last part, with or without an image's extension; else
    those with the same number as COCO counts. Of several the one that has the longest end of the path in
    common.
    """

    def __init__(self, names: Iterable[str]):
        self.names = dict.fromkeys(names)
        self.parts = {name: parts_of(name) for name in self.names}
        self.folders = {folder for parts in self.parts.values() for folder in parts[:-1]}
        self.by_key: dict[tuple, list[str]] = defaultdict(list)
        for name, parts in self.parts.items():
            for key in _keys(parts):
                self.by_key[key].append(name)

    def find(self, name: str) -> str | None:
        """Raises UserError where two in different folders have as much in common with the name."""
        if name in self.names:
            return name
        parts = parts_of(name)
        for key in _keys(parts):
            candidates = [(self._common(parts, other), other) for other in self.by_key.get(key, ())]
            best = [other for common, other in candidates if common == max(candidates)[0] >= 0]
            if best:
                if len({tuple(self.parts[other][:-1]) for other in best}) > 1:
                    raise UserError(f"{name}: may be {best[0]} or {best[1]}; write more of its folders")
                return best[0]
        return None

    def _common(self, parts: list[str], other: str) -> int:
        """How many folders before the name are the same; -1 where they say that it is another image."""
        folders, others = parts[-2::-1], self.parts[other][-2::-1]
        common = next((i for i, pair in enumerate(zip(folders, others)) if pair[0] != pair[1]), None)
        if common is None:
            return min(len(folders), len(others))
        return common if common or folders[0] not in self.folders else -1


def _keys(parts: list[str]) -> list[tuple]:
    if not parts:
        return []
    last = stem(parts[-1])
    number = coco_id(last)
    return [("name", parts[-1]), ("stem", last), *([("number", number)] if isinstance(number, int) else [])]


class ImageFinder:
    """Finds the image files that names of annotations mean.

    Args:
        folders: searched first; a name that several of them have is refused.
        others: searched where these have none.
    """

    def __init__(self, folders: str | Path | Sequence[str | Path], others: Sequence[str | Path] = ()):
        folders = [folders] if isinstance(folders, (str, Path)) else folders
        self.tiers = [[Path(folder) for folder in tier] for tier in (folders, others) if tier]
        for folder in (folder for tier in self.tiers for folder in tier):
            if not folder.is_dir():
                raise UserError(
                    f"{folder}: no such folder of images; give the one that holds the image files"
                )
        self.listed = {folder: _list(folder) for tier in self.tiers for folder in tier}

    def __call__(self, *names: str) -> str | None:
        """The path of the first of `names`, with or without extension, that a folder has, else None.

        Raises:
            UserError: several folders have it.
        """
        for name in names:
            for folders in self.tiers:
                found = [path for folder in folders if (path := self._find_in(folder, name)) is not None]
                if len(found) > 1:
                    raise UserError(f"{name}: may be {found[0]} or {found[1]}; give each file its own folder")
                if found:
                    return found[0]
        return None

    def _find_in(self, folder: Path, name: str) -> str | None:
        if name in self.listed[folder]:
            return str(folder / self.listed[folder][name])
        leads_out = os.path.isabs(name) or ".." in Path(name).parts
        return str(folder / name) if "/" in name and not leads_out and os.path.isfile(folder / name) else None

    def assign(self, images: Sequence[tuple[Record, Sequence[str]]], source: str | Path) -> None:
        """Give each record that has no path that of the first of its names for which there is a file.

        Names that no folder has are matched as `NameIndex` does, and a line says so; a file that is another
        record's already, or that fits two names, is not used for them.

        Raises:
            UserError: there are several files for a name.
        """
        for record, names in images:
            record.path = record.path or self(*names)
        taken = Counter(record.path for record, _ in images if record.path)
        missing = [(record, names) for record, names in images if record.path is None]
        loose: list[tuple[Record, str]] = []
        for folders in self.tiers if missing else ():
            # with the folders' own names, by which two of them can be told apart
            paths = {
                str(folder.absolute() / file): str(folder / file)
                for folder in folders
                for file in walk_images(folder, recursive=True).names
            }
            index = NameIndex(paths)
            for record, names in missing:
                found = next(((name, file) for name in names if (file := index.find(name))), None)
                if found and record.path is None:
                    record.path = paths[found[1]]
                    loose.append((record, found[0]))
        taken.update(record.path for record, _ in loose)
        doubtful = [(record, name) for record, name in loose if taken[record.path] > 1]
        matched = [(record, name) for record, name in loose if taken[record.path] == 1]
        if matched:
            record, name = matched[0]
            shown = f"{counted(len(matched), 'image')} found by the end of the path or by the number"
            say_once(f"{source}: {shown}, such as {record.path} for {name}")
        if doubtful:
            shown = ", ".join(name for _, name in doubtful[:3])
            shown = f"{counted(len(doubtful), 'name')} without an image, as others fit it too: {shown}"
            say_once(f"{source}: {shown}")
            for record, _ in doubtful:
                record.path = None

    def save(self, name: str, content: bytes) -> str:
        """Write an image that annotations hold themselves to the first folder, unless it is there already.

        Raises:
            UserError: another file of that name is there.
        """
        parts = [
            "".join(c if c.isprintable() and c not in '<>:"|?*' else "_" for c in p) for p in parts_of(name)
        ]
        last = (parts or ["image"])[-1].lstrip(".") or "image"
        if stem(last) == last:
            last += next((own for start, own in SIGNATURES.items() if content.startswith(start)), ".jpg")
        path = self.tiers[0][0].joinpath(*parts[:-1], last)
        if path.is_file():
            if path.read_bytes() != content:
                raise UserError(
                    f"{path}: is another image than the annotations'; give an empty --image_folder"
                )
        else:
            with atomic_write(path) as tmp_path:
                tmp_path.write_bytes(content)
        return str(path)


def _list(folder: Path) -> dict[str, str]:
    """The folder's files by name, and by name without extension; of several of these the first by name."""
    names = sorted(os.listdir(folder), key=natural_order)
    listed = {name: name for name in names}
    for name in names:
        if stem(name) != name:
            listed.setdefault(stem(name), name)
    return listed
