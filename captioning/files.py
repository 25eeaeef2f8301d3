"""Files that survive two runs at once, a killed run and a full disk; checks of untrusted values."""

from __future__ import annotations

import errno
import glob
import io
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import UserError, atomic_write, is_main_process, kind_of_file, say, tell

try:
    import fcntl
except ImportError:  # Windows: there two runs at once are not noticed
    fcntl = None

LOCK_FILE = ".lock"
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)  # this process, or the machine, can have no more open
# errors that concern the whole disk, or this process, and not the one file that met them
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ENOMEM, errno.ESTALE,
               *OUT_OF_FILES)  # fmt: skip
HELD = (errno.EACCES, errno.EAGAIN)  # what locking says where another process has the lock
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # where a file system, as of some clouds, has none
NOT_THROUGH_LINKS = getattr(os, "O_NOFOLLOW", 0)  # opening fails with ELOOP where the name is a link's


@contextmanager
def lock_folder(folder: str | Path, reading: bool = False) -> Iterator[None]:
    """Hold a folder: to write to it, alone, or for `reading`, together with other readers.

    The lock dies with its process, so that an empty `.lock` which a killed one leaves means nothing. Whoever
    writes creates the folder, removes it again where it stays empty, and removes what killed runs left
    unfinished in it. Of several processes of a training the main one holds the lock.

    Raises:
        UserError: another run holds the folder.
    """
    folder = Path(folder)
    what = "writing to it" if reading else "at work with it"
    refusal = f"{folder}: another run is {what}; wait for its end, or give another folder"
    with nullcontext() if reading else _folder_for(folder), _locked(folder / LOCK_FILE, refusal, reading):
        if not reading and is_main_process():
            remove_unfinished(folder)
        yield


@contextmanager
def lock_output(path: str | Path, refusal: str) -> Iterator[None]:
    """Hold the name of a file that is being made, alone, by the empty file `.NAME.lock` beside it; as
    `lock_folder` holds a folder.

    Raises:
        UserError: another run holds it; `refusal` is the message.
    """
    with _folder_for(Path(path).parent), _locked(lock_file_of(path), refusal):
        yield


def lock_file_of(path: str | Path) -> Path:
    return Path(path).with_name(f".{Path(path).name.removeprefix('.')}.lock")


@contextmanager
def _folder_for(folder: Path) -> Iterator[None]:
    """In the main process, create a folder for the block; remove it again, with the parents that it needed,
    where it stays empty."""
    new = []
    if is_main_process():
        new = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # it is not empty
            for place in new:
                place.rmdir()


@contextmanager
def _locked(path: Path, refusal: str, reading: bool = False) -> Iterator[None]:
    descriptor = None
    if fcntl is not None and is_main_process():
        descriptor = _lock(path, refusal, reading)
    try:
        yield
    finally:
        if descriptor is not None:
            _unlock(path, descriptor)


def _lock(path: Path, refusal: str, reading: bool) -> int | None:
    """The descriptor of the locked file; None in a folder that nobody can write to, and where there are no
    locks."""
    kind = fcntl.LOCK_SH if reading else fcntl.LOCK_EX
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NOT_THROUGH_LINKS | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if reading and error.errno != errno.ELOOP:
                return None
            raise
        try:
            # unlike flock, lockf is not inherited: workers that outlive their training do not hold it
            fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in NO_LOCKS:
                path.unlink(missing_ok=True)
                tell(f"{path.parent}: this file system has no locks; start no second run that writes there")
                return None
            if error.errno not in HELD:
                raise
            raise UserError(refusal) from None
        if is_in_place(descriptor, path):
            return descriptor
        os.close(descriptor)  # its last holder has just removed it


def _unlock(path: Path, descriptor: int) -> None:
    with suppress(OSError):  # others are still reading
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_in_place(descriptor, path):
            path.unlink()
    os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether another process holds this lock file."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | NOT_THROUGH_LINKS | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in HELD
    finally:
        os.close(descriptor)
    return False


def is_in_place(file: int | io.FileIO, path: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.stat(file if isinstance(file, int) else file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def lock_file(stream: io.FileIO, waiting: str) -> None:
    """Hold an open file alone until it is closed, by whatever descriptor; `waiting` is printed where another
    process has it, whose end is then waited for."""
    if fcntl is None:
        return
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in HELD:
            raise
        say(waiting)
        fcntl.lockf(stream, fcntl.LOCK_EX)


def remove_unfinished(folder: Path, name: str = "", extension: str = "") -> None:
    """Remove what `utils.atomic_write` and the like left when their process was killed; of files whose names
    begin with `name` and end with `extension`."""
    for path in folder.glob(f".{glob.escape(name)}*{glob.escape(extension)}.*.partial"):
        number = re.search(r"\.(\d{1,9})\.partial$", path.name)
        if number and not is_alive(int(number[1])):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def open_regular(path: str | Path, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
    """`os.open` of a file, created with `mode` where `flags` say so; not of a pipe, for which one would wait
    for ever, or of a device.

    Raises:
        UserError: there is something else of this name. OSError: it cannot be opened.
    """
    with suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise UserError(f"{path}: a {kind_of_file(mode)}, not a file; remove it")
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), mode)


def open_to_append(path: str | Path, mode: int = 0o666) -> io.TextIOWrapper:
    """A text file to write more lines to. Where the path is a link, a new file takes the link's place, as in
    `utils.atomic_write`. Raises UserError where it is something else, as `open_regular` does."""
    with suppress(FileNotFoundError):
        if os.path.islink(path):
            os.unlink(path)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | NOT_THROUGH_LINKS
    return open(open_regular(path, flags, mode), "a", encoding="utf-8")


@contextmanager
def named_in_errors(path: str | Path) -> Iterator[None]:
    """Give an OSError of the block the name of the file or folder that is written, where it has none: one of
    a write, unlike one of an opening, does not say where there was no room."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_encoded(path: str | Path, encode: Callable[[io.BytesIO], object]) -> None:
    """Write a file that Pillow or matplotlib encodes, through memory: Pillow itself takes no notice when only
    the first part of what it writes has room on the disk."""
    encoded = io.BytesIO()
    encode(encoded)
    with atomic_write(path) as tmp_path:
        tmp_path.write_bytes(encoded.getbuffer())


def _open_or_create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | NOT_THROUGH_LINKS, 0o666)


class OutputFile(io.FileIO):
    """A file for libraries that crash when a write fails, as HDF5 and `torch.save` do on a full disk.

    To them every write succeeds; the first error is raised by `check`, and at the end of a `with` block.
    """

    def __init__(self, path: str | Path, shown: str | Path | None = None, keep: bool = False):
        """shown: the name in an error, if it is not `path`. keep: what is in the file."""
        self.error: OSError | None = None
        self.shown = str(shown or path)
        try:
            super().__init__(path, "r+" if keep else "w+", opener=_open_or_create)
        except OSError as error:
            error.filename = self.shown
            raise

    def check(self) -> None:
        if self.error:
            raise self.error

    def write(self, data) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest and not self.error:
            rest = rest[self._try(super().write, rest) :]
        return size

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        self._try(super().truncate, size)
        return size

    def _try(self, action: Callable[[Any], int], value: Any) -> int:
        if not self.error:
            try:
                return action(value)
            except OSError as error:
                error.filename = self.shown
                self.error = error
        return 0

    def __exit__(self, kind, error, traceback) -> None:
        super().__exit__(kind, error, traceback)
        if self.error and (kind is None or issubclass(kind, Exception)):
            raise self.error from None


# --- untrusted values ---------------------------------------------------------------------------------------

NAMES = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "a dictionary"}


@dataclass(frozen=True)
class Number:
    """A finite number in a range, both ends included."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = True

    def describe(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if math.isfinite(self.high):
            return f"{kind} from {self.low} to {self.high}"
        return f"{kind} of at least {self.low}" if math.isfinite(self.low) else kind

    def accepts(self, value: object) -> bool:
        if not _is(value, int if self.whole else float) or not math.isfinite(value):
            return False
        return self.low <= value <= self.high


class Choice:
    """One of several values."""

    def __init__(self, *values: object):
        self.values = values

    def describe(self) -> str:
        return f"one of {', '.join(map(repr, self.values))}"

    def accepts(self, value: object) -> bool:
        return any(value is known or (type(value) is type(known) and value == known) for known in self.values)


class AnyOf:
    """What one of several schemas accepts; None accepts itself."""

    def __init__(self, *schemas: object):
        self.schemas = schemas

    def describe(self) -> str:
        return " or ".join("null" if schema is None else _describe(schema) for schema in self.schemas)

    def accepts(self, value: object) -> bool:
        if value is None:
            return None in self.schemas
        return any(schema is not None and find_mismatch(value, schema) is None for schema in self.schemas)


def find_mismatch(value: object, schema: object, name: str = "") -> str | None:
    """Where the value first differs from the schema, such as "images[3].id is missing"; None where it does
    not."""
    return next(_mismatches(value, schema, name), None)


def _mismatches(value: object, schema: object, name: str) -> Iterator[str]:
    kind = type(schema) if isinstance(schema, (list, dict)) else schema
    if hasattr(schema, "accepts") or isinstance(kind, type):
        good = schema.accepts(value) if hasattr(schema, "accepts") else _is(value, kind)
        if not good:
            yield f"{name or 'it'} is {_shorten(value)}: expected {_describe(schema)}"
            return
    if isinstance(schema, list):
        (inner,) = schema
        if isinstance(inner, type) and all(type(item) is inner for item in value):
            return  # the quick way for long lists
        for index, item in enumerate(value):
            yield from _mismatches(item, inner, f"{name}[{index}]")
    elif isinstance(schema, dict):
        for key, inner in schema.items():
            if (
                key is str
                and isinstance(inner, type)
                and all(type(own) is str and type(item) is inner for own, item in value.items())
            ):
                continue  # the quick way for long dictionaries
            if key is str:
                for own, item in value.items():
                    yield from _mismatches(own, str, f"a key of {name or 'it'}")
                    yield from _mismatches(item, inner, f"{name}[{_shorten(own)}]")
            elif key.removesuffix("?") in value:
                key = key.removesuffix("?")
                yield from _mismatches(value[key], inner, f"{name}.{key}" if name else key)
            elif not key.endswith("?"):
                yield f"{name}.{key} is missing" if name else f"{key} is missing"


def _is(value: object, kind: type) -> bool:
    """isinstance, but that True is no number and that every whole number is a number."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _describe(schema: object) -> str:
    if hasattr(schema, "describe"):
        return schema.describe()
    kind = type(schema) if isinstance(schema, (list, dict)) else schema
    return NAMES.get(kind, kind.__name__)


def _shorten(value: object) -> str:
    if isinstance(value, (str, int, float, bool, type(None))):
        text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
        return text if len(text) <= 40 else f"{text[:37]}..."
    return NAMES.get(type(value), type(value).__name__)
