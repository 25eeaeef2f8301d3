"""Sidecar files: the caption of photo.jpg in photo.txt, as trainings of image generators want it.

The text that a user has in one is never damaged: it is read and written in its own encoding, and what it was
before a change is kept (`Backup`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from captioning.data.images import IMAGE_EXTENSIONS, PACKAGES
from captioning.data.text_files import BYTE_ORDER_MARKS, decode_text, encode_text
from captioning.files import OF_THE_DISK, OUT_OF_FILES, open_regular, open_to_append, remove_unfinished
from utils import UserError, atomic_write, check_output

EXISTING = Literal["skip", "overwrite", "append", "prepend"]
LARGEST = 2**20  # bytes of a sidecar; more is no caption
BLANKS = " \t\r\n\v\f\0"  # in every encoding alike, as a space without a break is not
STOPS = ",.;:!?"  # end a part of a caption
TRIGGER_WORDS = 3  # of a trigger, at most, where none is named


@dataclass
class Sidecars:
    """How sidecars are named and what is in them.

    Attributes:
        extension: of the sidecars, such as ".txt".
        existing: what happens to a sidecar that is there before: its image is not captioned, or the caption
            takes its place, or goes behind or in front of its text. An empty or blank one counts as none.
        prefix, suffix: words with which a sidecar begins and ends; {name} and {folder} in them stand for the
            image file's name without extension and the name of the folder that it is in.
    """

    extension: str = ".txt"
    existing: EXISTING = "skip"
    prefix: str = ""
    suffix: str = ""

    def __post_init__(self):
        self.extension = "." + self.extension.removeprefix(".")
        if self.extension.lower() in (".", *IMAGE_EXTENSIONS, *PACKAGES) or "/" in self.extension:
            raise UserError(f"--sidecar_extension {self.extension}: give one of a text file, such as .txt")

    def path(self, image: str) -> str:
        """That of the image's sidecar; where one with the extension in capitals is there, of that."""
        start = os.path.splitext(image)[0]
        path, capital = start + self.extension, start + self.extension.upper()
        return capital if os.path.lexists(capital) and not os.path.lexists(path) else path

    def check(self, images: Sequence[str], root: str | Path) -> None:
        """Raise UserError where two images would share a sidecar, or no sidecar can be written.

        root: the folder of all images; the links in it may lead images in from elsewhere, but no sidecar out.
        """
        owners: dict[str, str] = {}
        for image in images:
            other = owners.setdefault(self.path(image), image)
            if other != image:
                raise UserError(
                    f"{self.path(image)} would be the sidecar of {other} and of {image}: rename one of them, "
                    f"or give --output_csv in place of --sidecars"
                )
        inside = Path(os.path.realpath(root))
        for folder in {os.path.dirname(image) for image in images}:
            if not os.access(folder or ".", os.W_OK):
                raise UserError(f"{folder}: no sidecars can be written there; change its permissions")
            if not Path(os.path.realpath(folder)).is_relative_to(inside):
                raise UserError(
                    f"{folder}: leads out of {root}, where no sidecars are written; copy it there"
                )

    def exist(self, images: Iterable[str]) -> list[str]:
        """Those of `images` that have a file of their sidecar's name; each folder is listed once."""
        names = cache(lambda folder: set(os.listdir(folder or ".")))
        sidecars = {image: os.path.split(self.path(image)) for image in images}
        return [image for image, (folder, name) in sidecars.items() if name in names(folder)]

    def read(self, image: str) -> bytes | None:
        """What is in the image's sidecar; None where it has none, or a blank one.

        Raises:
            UserError: it is no file, cannot be read, or is too large for a caption.
        """
        path = self.path(image)
        try:
            with open(open_regular(path), "rb") as stream:
                content = stream.read(LARGEST + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in OUT_OF_FILES:
                raise
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        if len(content) > LARGEST:
            raise UserError(f"{path}: larger than {LARGEST} bytes, which is no caption; left as it is")
        return None if _is_blank(content) else content

    def has_text(self, image: str) -> bool:
        """Whether `read` gives something; of a file of the usual kind its beginning is enough to see that."""
        path = self.path(image)
        with suppress(OSError):
            status = os.stat(path)
            if stat.S_ISREG(status.st_mode) and status.st_size <= LARGEST:
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    start = os.read(descriptor, 100)
                finally:
                    os.close(descriptor)
                if not start.startswith(tuple(BYTE_ORDER_MARKS.values())) and not _is_blank(start):
                    return True
        return self.read(image) is not None

    def read_text(self, image: str) -> str:
        """Its text, "" where there is none. Raises UserError, also where the encoding cannot be told."""
        content = self.read(image)
        return decode_text(content, self.path(image))[0].strip(BLANKS) if content else ""

    def keeps(self) -> bool:
        """Whether the text of a sidecar that is there becomes part of the new one."""
        return self.existing in ("append", "prepend")

    def count_beginnings(self, images: Iterable[str]) -> tuple[Counter[str], int]:
        """The words before the first comma, at most `TRIGGER_WORDS`, of all sidecars, with their frequencies;
        how many sidecars have a text."""
        starts, texts = Counter[str](), 0
        for image in self.exist(images):
            with suppress(UserError):
                start, comma, _ = self.read_text(image).partition(",")
                texts += bool(start)
                starts[start.strip()] += bool(comma) and 0 < len(start.split()) <= TRIGGER_WORDS
        return +starts, texts

    def compose(
        self, image: str, caption: str, before: bytes | None, triggers: Collection[str] = ()
    ) -> bytes:
        """What the image's sidecar is to contain.

        Args:
            before: what it contains; kept, in its encoding, where the caption is appended or prepended.
            triggers: what stays first in a sidecar that begins with it and a comma, where there is no prefix.

        Raises:
            UserError: the encoding of `before` cannot be told, or lacks a character of the caption.
        """
        path = self.path(image)
        text, codec = ("\n", "utf-8")
        if before is not None and self.keeps():
            text, codec = decode_text(before, path)
        body = text.strip(BLANKS)
        start = text[: len(text) - len(text.lstrip(BLANKS))] if body else ""
        end = text[len(start) + len(body) :]
        first = body.partition(",")[0].rstrip()
        trigger = first if first in triggers else ""
        caption = " ".join(caption.split())
        joined = join(body, caption, *self._around(image), trigger, self.existing == "prepend")
        if body and joined == body:
            return before
        try:
            return encode_text(start + joined + end, codec)
        except UnicodeEncodeError as error:
            character = error.object[error.start]
            raise UserError(
                f"{path}: left as it is, as its encoding, {codec}, has no {character!r}; save it as UTF-8"
            ) from None

    def require_writable(self, image: str) -> None:
        """Raise UserError where the image's sidecar is read-only, also to whom the system lets write it."""
        path = self.path(image)
        with _named_alone(path), suppress(FileNotFoundError):
            effective = os.access in os.supports_effective_ids
            if not os.stat(path).st_mode & 0o222 or not os.access(path, os.W_OK, effective_ids=effective):
                raise PermissionError(errno.EACCES, "it is read-only")

    def write(self, image: str, content: bytes) -> None:
        """Write the image's sidecar, with the permissions that it has; a link of its name is replaced.

        Raises:
            UserError: it cannot be written. OSError: nothing can be written, as on a full disk.
        """
        path = self.path(image)
        with _named_alone(path):
            os.stat(os.path.dirname(path) or ".")  # a folder that is gone is not made anew
            with atomic_write(path) as tmp_path:
                tmp_path.write_bytes(content)

    def remove(self, image: str) -> None:
        """Remove the image's sidecar. Raises UserError where it cannot be removed."""
        with _named_alone(self.path(image)):
            os.unlink(self.path(image))

    def _around(self, image: str) -> list[str]:
        """Prefix and suffix of an image."""
        around = [self.prefix.strip(), self.suffix.strip()]
        if any("{" in words for words in around):
            path = Path(image).absolute()
            for placeholder, name in (("{name}", path.stem), ("{folder}", path.parent.name)):
                # a name that is not UTF-8 has its odd bytes as \xe9
                shown = os.fsencode(name).decode("utf-8", "backslashreplace")
                around = [words.replace(placeholder, shown).strip() for words in around]
        return around


@contextmanager
def _named_alone(path: str) -> Iterator[None]:
    """An OSError of the block that concerns this one file becomes a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in OF_THE_DISK:
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def shared_beginnings(starts: Counter[str], texts: int) -> list[str]:
    """Of what `Sidecars.count_beginnings` gave, the words that several sidecars begin with, as they do with
    the trigger word of a concept that an image generator is taught.

    Several are three and a tenth of all that have a text, or more than half of up to four. One sidecar alone
    is taken to begin with such a word where there is a single one before its comma.
    """
    least = min(max(3, texts / 10), texts // 2 + 1)
    return [start for start, count in starts.items() if count >= least and (texts > 1 or " " not in start)]


def _is_blank(content: bytes) -> bool:
    if content.startswith(tuple(BYTE_ORDER_MARKS.values())):
        with suppress(UserError):
            return not decode_text(content, "")[0].strip(BLANKS)
        return False
    return not content.strip(BLANKS.encode("ascii"))


# --- the text -----------------------------------------------------------------------------------------------


def join(body: str, caption: str, prefix: str, suffix: str, trigger: str, in_front: bool) -> str:
    """The text of a sidecar: prefix or trigger, then what it said and the caption, then the suffix.

    Each is there once: a prefix, suffix or caption that `body` has already is not added again.

    Args:
        trigger: words with which `body` may begin and which then stay first.
        in_front: whether the caption goes in front of what `body` says.
    """
    opening, inner = _cut_opening(body, prefix or trigger)
    inner, closing = _cut_closing(inner, suffix)
    if not _has_part(inner, caption):
        first, second = (caption, inner) if in_front else (inner, caption)
        between = "" if not (first and second) else " " if first[-1] in STOPS else ", "
        inner = f"{first}{between}{second}"
    if prefix and not (opening and body != opening):
        opening = f"{prefix} "
    elif opening and body == opening:
        opening = f"{opening.rstrip(STOPS + ' ')}, "
    if suffix and not closing and not (inner.endswith(suffix) and not suffix.strip(STOPS)):
        closing = suffix if suffix[0] in STOPS else f" {suffix}"
    return f"{opening}{inner}{closing}".strip(" ")


def _cut_opening(text: str, words: str) -> tuple[str, str]:
    """(`words` with the comma and the spaces behind them, the rest); ("", text) where it begins otherwise."""
    core = words.rstrip(STOPS + " ")
    if not core or not text.startswith(core) or re.match(r"\w", text[len(core) :]):
        return "", text
    rest = text[len(core) :].lstrip(STOPS + " ")
    return text[: len(text) - len(rest)], rest


def _cut_closing(text: str, words: str) -> tuple[str, str]:
    """(the rest, `words` with the comma and the spaces before them); (text, "") where it ends otherwise."""
    core = words.lstrip(STOPS + " ")
    if not core or not text.endswith(core) or re.search(r"\w$", text[: -len(core)]):
        return text, ""
    rest = text[: -len(core)].rstrip(STOPS + " ")
    return rest, text[len(rest) :]


def _has_part(text: str, caption: str) -> bool:
    """Whether the caption is one of the parts of the text, or several in a row."""
    core = caption.strip(STOPS + " ")
    if core not in text:
        return False
    stop = f"[{re.escape(STOPS)}\\r\\n]"
    return re.search(rf"(?:\A|{stop})\s*{re.escape(core)}\s*(?:{stop}|\Z)", text) is not None


# --- what was there before ----------------------------------------------------------------------------------


class Backup:
    """Keeps what sidecars say before they are changed: in one folder, under their names, once, in `FIRST`.

    What was changed by hand after that is kept too, in `LATER` with a number behind the name. What a run of
    ours wrote is not: of this the folder has a record, a file `.written-N` for each process. The names of
    those that were not there before are in the file `NEW`, a line each.

    Args:
        root: the folder of all images. process: the number of this process.
    """

    FOLDER, FIRST, LATER, NEW = ".sidecar_backup", "first", "later", "new_files.txt"

    def __init__(self, root: str | Path, process: int = 0):
        self.root, self.folder = str(root), Path(root) / self.FOLDER
        self.record_file = self.folder / f".written-{process}"
        self.written: set[str] | None = None
        self.unrecorded: list[str] = []
        self.new: list[str] = []  # not in the list yet
        self.listed: set[str] = set()
        self.inside: set[str] = set()  # its folders that were found to be no links

    def check(self) -> None:
        """Raise UserError where the folder cannot be, and remove what killed runs left unfinished in it."""
        if self.folder.is_symlink():
            raise UserError(f"{self.folder}: a link; remove it, or give --backup False")
        check_output(self.folder, folder=True)
        for place, _, _ in os.walk(self.folder):
            remove_unfinished(Path(place))

    def keep(self, path: str, content: bytes | None, new: bytes) -> None:
        """Keep the content of a sidecar that is about to become `new`; `record` is to be called before it
        does.

        content: None where it is blank, or there is none.

        Raises:
            UserError: it cannot be kept. OSError: nothing can be written, as on a full disk.
        """
        name = os.path.relpath(path, self.root)
        self._keep_unless_ours(name, _content(path) if content is None else content)
        self._note(name, new)

    @contextmanager
    def keeping(self, path: str) -> Iterator[None]:
        """Keep the content of another file among the images, which the block writes anew.

        Raises:
            UserError: it cannot be kept. OSError: nothing can be written, as on a full disk.
        """
        content, name = _content(path), os.path.relpath(path, self.root)
        if content:
            self.check()
            self._keep_unless_ours(name, content)
        yield
        if content:
            self._note(name, Path(path).read_bytes())
            self.record()

    def _keep_unless_ours(self, name: str, content: bytes | None) -> None:
        """content: None where there is no file yet."""
        if self.written is None:
            self._read_record()
        with _named_alone(os.path.join(self.root, name)):
            if content is None:
                # a line end in a name would make a line of the list the name of another file
                known = name in self.listed or os.path.lexists(self.folder / self.FIRST / name)
                if not known and len(name.splitlines()) == 1:
                    self.new.append(name)
            elif self._digest(name, content) not in self.written:
                self._copy(name, content)

    def _note(self, name: str, new: bytes) -> None:
        digest = self._digest(name, new)
        self.written.add(digest)
        self.unrecorded.append(digest)

    def record(self) -> None:
        """Note what is about to be written. Raises OSError, and UserError where the record is no file."""
        if self.unrecorded:
            (self.folder / self.FIRST).mkdir(parents=True, exist_ok=True)
            for file, lines in ((self.record_file, self.unrecorded), (self.folder / self.NEW, self.new)):
                with open_to_append(file) as stream:
                    stream.buffer.writelines(os.fsencode(f"{line}\n") for line in lines)
            self.listed.update(self.new)
            self.unrecorded, self.new = [], []

    def _read_record(self) -> None:
        self.written = set()
        for file in (*self.folder.glob(".written-*"), self.folder / self.NEW):
            with suppress(OSError, UserError):
                known = self.listed if file.name == self.NEW else self.written
                known.update(map(os.fsdecode, (_content(file) or b"").split(b"\n")))

    def _copy(self, name: str, content: bytes) -> None:
        place, number = self._place(self.FIRST, name), 1
        while os.path.lexists(place) and not _contains(place, content):
            number += 1
            place = self._place(self.LATER, f"{name}.{number}")
        path = os.path.join(self.root, name)
        if not os.path.lexists(place) and not _link(path, place):
            with atomic_write(place, like=path) as tmp_path:
                tmp_path.write_bytes(content)

    def _place(self, part: str, name: str) -> str:
        """Where a file is kept, in a folder that is made for it."""
        folder = os.path.join(part, os.path.dirname(name)).rstrip("/")
        if folder not in self.inside:
            inside = os.path.join(os.path.realpath(self.folder), folder)
            if os.path.realpath(self.folder / folder) != inside:
                raise UserError(f"{self.folder / folder}: leads out of {self.folder}; remove it")
            os.makedirs(inside, exist_ok=True)
            self.inside.add(folder)
        return os.path.join(self.folder, part, name)

    @staticmethod
    def _digest(name: str, content: bytes) -> str:
        return hashlib.sha256(os.fsencode(name) + b"\0" + content).hexdigest()[:32]


def _link(path: str, place: str) -> bool:
    """Give a file that is about to be replaced the name `place` too: quicker than a copy, and with its times.

    Returns:
        Whether that was possible. Not of a link, and not of a file that has further names: it might be
        changed by one of these.
    """
    try:
        os.link(path, place, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a file system, or an owner, that allows none
        return False
    status = os.lstat(place)
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 2:
        return True
    os.unlink(place)
    return False


def _content(file: str | Path) -> bytes | None:
    """None where there is no such file. Raises UserError where it is something else."""
    with suppress(FileNotFoundError), open(open_regular(file), "rb") as stream:
        return stream.read()
    return None


def _contains(file: str, content: bytes) -> bool:
    with suppress(OSError, UserError), open(open_regular(file), "rb") as stream:
        return stream.read(len(content) + 1) == content
    return False
