"""Which image a name means: files and ids have other folders, extensions and zeros on other machines."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from pathlib import Path

from captioning.data.images import (
    IMAGE_EXTENSIONS,
    PACKAGES,
    has_image_extension,
    natural_order,
    walk_images,
)
from captioning.data.prepared import Record
from captioning.data.text_files import no_such, read_text, say_once
from utils import UserError, atomic_write, counted

SIGNATURES = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}
IMAGE_NAME = re.compile(
    rf"\S.*({'|'.join(map(re.escape, (*IMAGE_EXTENSIONS, *PACKAGES)))})(\.\d+)?(#\d+)?", re.IGNORECASE
)


def stem(name: str) -> str:
    """A name without an image file's extension."""
    start, extension = os.path.splitext(name)
    return start if extension.lower() in (*IMAGE_EXTENSIONS, *PACKAGES) else name


def is_image_name(text: str) -> bool:
    """Whether a text ends as the name of an image file does."""
    return bool(IMAGE_NAME.fullmatch(text))


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
        """Raises UserError where two in different folders, or with other zeros, have as much in common with
        the name."""
        if name in self.names:
            return name
        parts = parts_of(name)
        for key in _keys(parts):
            candidates = [(self._common(parts, other), other) for other in self.by_key.get(key, ())]
            best = [other for common, other in candidates if common == max(candidates)[0] >= 0]
            if best:
                if len({tuple(self.parts[other][:-1]) for other in best}) > 1:
                    raise UserError(f"{name}: may be {best[0]} or {best[1]}; write more of its folders")
                if key[0] == "number" and len({stem(self.parts[other][-1]) for other in best}) > 1:
                    raise UserError(f"{name}: may be {best[0]} or {best[1]}; write all of its name")
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


def may_mean_the_same(one: str, other: str) -> bool:
    """Whether nothing in two names, neither a folder nor an extension, says that they are of two images."""
    parts, others = parts_of(one), parts_of(other)
    if not (parts and others) or any(a != b for a, b in zip(parts[-2::-1], others[-2::-1])):
        return False
    stems = stem(parts[-1]), stem(others[-1])
    extensions = parts[-1].lower()[len(stems[0]) :], others[-1].lower()[len(stems[1]) :]
    is_same = stems[0] == stems[1] or coco_id(stems[0]) == coco_id(stems[1])
    return is_same and (extensions[0] == extensions[1] or "" in extensions)


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
                raise no_such(folder, "no such folder of images; give the one that holds the image files")
        self.listed = {folder: _list(folder) for tier in self.tiers for folder in tier}
        self.stems: dict[str, Counter[str]] = {}  # of the images in a folder, counted when they are needed

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

        Names that no folder has are matched as `NameIndex` does, and a line says so. Several names may mean
        one file, as 100 and 00000100 do, unless something in them says that they are of different images, or
        a name without extension may be another file too.

        Raises:
            UserError: there are several files for a name.
        """
        for record, names in images:
            record.path = record.path or self(*names)
        loose = self._match_loosely([(record, names) for record, names in images if record.path is None])
        names_of: dict[str, list[Sequence[str]]] = defaultdict(list)
        for record, names in images:
            if record.path:
                names_of[record.path].append(names)
        claims = {record.path: names_of[record.path] for record, _ in loose}
        contested = {path for path, names in claims.items() if not _agree(names)}
        doubtful = {id(record): (record, name) for record, name in loose if record.path in contested}
        doubtful |= {
            id(record): (record, names[0])
            for record, names in images
            if len(names_of.get(record.path, ())) > 1 and self._has_namesakes(record.path, names)
        }
        matched = [(record, name) for record, name in loose if id(record) not in doubtful]
        if matched:
            record, name = matched[0]
            shown = f"{counted(len(matched), 'image')} found by the end of the path or by the number"
            say_once(f"{source}: {shown}, such as {record.path} for {name}")
        if doubtful:
            shown = ", ".join(name for _, name in [*doubtful.values()][:3])
            shown = f"{counted(len(doubtful), 'name')} without an image, as others fit it too: {shown}"
            say_once(f"{source}: {shown}")
            for record, _ in doubtful.values():
                record.path = None

    def _match_loosely(self, missing: Sequence[tuple[Record, Sequence[str]]]) -> list[tuple[Record, str]]:
        """Give records paths as `NameIndex` finds them; return those that got one, with the name that led to
        it."""
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
                if record.path is None:
                    found = next(((name, file) for name in names if (file := index.find(name))), None)
                    if found:
                        record.path = paths[found[1]]
                        loose.append((record, found[0]))
        return loose

    def _has_namesakes(self, path: str, names: Sequence[str]) -> bool:
        """Whether no name has the extension of the file that was found, and another file differs in it."""
        folder, last = os.path.split(path)
        if folder not in self.stems:
            self.stems[folder] = Counter(map(stem, filter(has_image_extension, os.listdir(folder or "."))))
        is_named = any(parts_of(name)[-1:] == [last] for name in names)
        return self.stems[folder][stem(last)] > 1 and not is_named

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


def _agree(names: Sequence[Sequence[str]]) -> bool:
    """Whether records with these names may all be of one image."""
    return all(
        any(may_mean_the_same(one, other) for one in first for other in second)
        for first, second in combinations(names, 2)
    )


def require_image(image_id: str, path: str | None, folder: str | Path = "the image folder") -> str:
    """`path`, the image file of this id. Raises UserError where there is none."""
    if path is None:
        raise UserError(f"{image_id}: no image file of this name in {folder}")
    return path


# --- records of the same image ------------------------------------------------------------------------------


def merge_records(earlier: list[Record], records: list[Record], file: Path) -> list[Record]:
    """The records of earlier files and of a further one, with captions of the same ids or of others.

    Raises:
        UserError: an image is in two splits, or two images have the same id, also with their folder's name.
    """
    merged, renamed = [*earlier], []
    by_id = {record.image_id: record for record in earlier}
    for record in records:
        known = by_id.get(record.image_id)
        if known is not None and record.path and known.path and known.path != record.path:
            record.image_id = f"{Path(record.path).parent.name}/{record.image_id}"
            renamed.append(record.image_id)
            known = by_id.get(record.image_id)
            if known is not None and known.path != record.path:
                raise UserError(
                    f"{file}: {known.path} and {record.path} have the same id; rename one of them"
                )
        if known is None:
            merged.append(record)
        else:
            _add(known, record, file)
    if renamed:
        say_once(
            f"{file}: {counted(len(renamed), 'id')} of other images in an earlier file; the folder's name "
            f"is put in front, as in {renamed[0]}"
        )
    return merged


def join_same_files(records: list[Record], source: str) -> list[Record]:
    """The records, with the captions of the same image file put together; a line says so.

    Rows of the same file without captions stay as they are, as they do in a list of images to caption.

    Raises:
        UserError: an image file is in two splits.
    """
    return _join(records, [_file_of(record.path) if record.path else None for record in records], source)


def _join(records: list[Record], keys: Sequence[str | None], source: str) -> list[Record]:
    """keys: the same for records of the same image; None: of another image than all others."""
    first: dict[str, Record] = {}
    joined, doubled = [], []
    for record, key in zip(records, keys):
        known = record if key is None else first.setdefault(key, record)
        if known is record or not (known.captions or record.captions):
            require_same_split(known, record, source)
            joined.append(record)
        else:
            doubled.append(f"{known.image_id} and {record.image_id}")
            _add(known, record, source)
    if doubled:
        shown = f"{counted(len(doubled), 'image')} under two names, such as {doubled[0]}"
        say_once(f"{source}: {shown}; the captions of the same image file are put together")
    return joined


def join_same_names(records: list[Record], source: str) -> list[Record]:
    """The records, as `join_same_files` puts them together, where there are no image files to ask.

    Names that may mean the same image, as 100 and 00000100 or a.jpg and images/a.jpg, are taken to do so
    where there is no third that contradicts one of them.
    """
    groups: dict[int | str, list[Record]] = defaultdict(list)
    for record in records:
        last = parts_of(record.file_name or record.image_id)[-1:]
        groups[coco_id(stem(*last)) if last else record.image_id].append(record)
    same: dict[int, str] = {}
    for group in groups.values():
        if len(group) > 1 and _agree([(record.file_name or record.image_id,) for record in group]):
            same |= dict.fromkeys(map(id, group), group[0].image_id)
    return _join(records, [same.get(id(record)) for record in records], source)


def require_apart(splits: Mapping[str, Sequence[Record]]) -> None:
    """Raise UserError where an image file is in two splits."""
    places: dict[str, str] = {}
    for split, records in splits.items():
        for record in records:
            other = places.setdefault(_file_of(record.path), split) if record.path else split
            if other != split:
                raise UserError(f"{record.path}: in the {other} and in the {split} split; remove it from one")


def require_same_split(known: Record, record: Record, source: str | Path) -> None:
    """Raise UserError where two records of the same image are in different splits."""
    if known.split != record.split:
        places = [f"in the {one.split} split" if one.split else "in no split" for one in (known, record)]
        other = "" if known.image_id == record.image_id else f"as {record.image_id} "
        raise UserError(f"{source}: {known.image_id} is {places[0]} and {other}{places[1]}; mend one of them")


def _add(known: Record, record: Record, source: str | Path) -> None:
    """Add the captions of another record of the same image."""
    require_same_split(known, record, source)
    known.captions += record.captions
    known.tokens += record.tokens
    known.path = known.path or record.path


@lru_cache
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _file_of(path: str) -> str:
    """The path by which a file is known, whatever way leads to its folder."""
    folder, name = os.path.split(path)
    return os.path.join(_real_folder(folder), name)


# --- lists of splits ----------------------------------------------------------------------------------------


def match_list(path: Path, index: NameIndex, file: Path, is_its_own: bool) -> list[str]:
    """The names of an annotation file that a list beside it, of the images of a split, means.

    Args:
        index: the names in the annotation file.
        is_its_own: whether the list must belong to the file; else one that fits none of its names is of
            another.

    Raises:
        UserError: less than half of the list's names are in the file.
    """
    listed = [line.strip() for line in read_text(path)[0].splitlines() if line.strip()]
    found = {name: index.find(name) for name in listed}
    lacking = [name for name in listed if found[name] is None]
    if len(lacking) == len(listed) and not is_its_own:
        return []
    if not listed or 2 * len(lacking) > len(listed):
        shown = f'its first line is "{listed[0][:60]}"' if listed else "it is empty"
        wanted = next(iter(index.names), "none")
        fitting = f"{len(listed) - len(lacking)} of its {counted(len(listed), 'name')}"
        raise UserError(
            f"{path}: {fitting} are in {file}; {shown}; looked for names like {wanted}, with or without "
            f"folder and extension; mend or remove the list"
        )
    if lacking:
        say_once(f"{path}: {counted(len(lacking), 'name')} not in {file}, such as {lacking[0]}")
    return list(filter(None, found.values()))
