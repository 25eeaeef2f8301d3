"""What every script needs: errors, files, processes, devices.

Nothing here knows about captions or models; every other module may import this one.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import select
import signal
import stat
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:  # not every script needs these, and they take seconds to import
    import torch
    from accelerate import PartialState


class UserError(Exception):
    """Wrong input. The message is one line that names the file or value and says how to mend it."""

    def __init__(self, message: str):
        # one from a worker process of a DataLoader comes with a traceback in front
        super().__init__(message.rpartition("UserError: ")[2].strip())


# --- signals ------------------------------------------------------------------------------------------------


class Terminated(KeyboardInterrupt):
    """SIGTERM came: the same as Ctrl-C, but for the exit status."""


def leave_signals_to_main_process(*_) -> None:
    """For worker processes of a DataLoader: they end with the main process, which finishes its step and says
    what was kept."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def start_worker(*_) -> None:
    """For worker processes of a DataLoader: they leave signals to the main process, and die with it."""
    leave_signals_to_main_process()
    if hasattr(signal, "SIGBUS"):  # shared memory is full: the main process says so, not torch's handler
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
    if sys.platform == "linux":  # elsewhere a worker looks every five seconds, and not while it waits to send
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def printable(text: str) -> str:
    """The text with its line breaks, control characters and undecodable bytes escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`"""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def readable_size(size: float) -> str:
    """A number of bytes in the unit that fits: `1.20 GB`, `34.5 MB`, `6 kB`."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def say(text: str = "") -> None:
    """Print a line on stdout, above the progress bar. Everything is printed by this or `tell`: names from
    anywhere may hold line breaks, and what moves the cursor or cannot be encoded."""
    tqdm.write(printable(text), file=sys.stdout)
    sys.stdout.flush()


def tell(text: str = "") -> None:
    """As `say`, on stderr: what went wrong, and what is no result."""
    tqdm.write(printable(text), file=sys.stderr)


def drop_unread_output() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads any more; what is printed there then is lost."""
    ended = False
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError, AttributeError):  # no file of the system, or a system without poll
            watch = select.poll()
            watch.register(stream.fileno(), 0)  # 0: for errors alone
            if watch.poll(0):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                ended = True
    return ended


class Messages:
    """Messages of one kind, of which there may be thousands: the first five are printed as they come."""

    SHOWN = 5

    def __init__(self, kind: str):
        self.kind = kind
        self.count = 0

    def add(self, text: str) -> None:
        self.count += 1
        if self.count <= self.SHOWN:
            tell(f"{self.kind}: {text}")

    def finish(self, where: str = "") -> None:
        """Say how many more there were; `where`: how all are found."""
        if self.count > self.SHOWN:
            tell(f"{self.kind}: ... and {self.count - self.SHOWN} more{where}")


# --- files --------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | Path, like: str | Path | None = None) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes `path`'s place only when the block ends well.

    A crash or Ctrl-C leaves the old file as it was. Where `path` is a link, the file takes the link's place,
    and what the link leads to stays as it is: in a folder from elsewhere it may lead anywhere.

    like: the file whose permissions and owner the new one gets, by default the one that it replaces; where
        there is none, the new file has those of any new file.

    Raises:
        UserError: `path` is a device or the like. OSError: with `path` as its filename.
    """
    path = Path(path)
    if _check_kind(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    tmp_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.unlink(tmp_path)  # a link of this name is not written through either
        if os.path.isfile(like or path):  # what is private in it is so from the beginning
            tmp_path.touch(0o600)
        yield tmp_path
        replace_file(tmp_path, path, like)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename in (None, str(tmp_path)):
            error.filename = str(path)
        with suppress(OSError):  # its folder may be gone
            os.unlink(tmp_path)
        raise


def replace_file(new: Path, path: Path, like: str | Path | None = None) -> None:
    """Let the file `new` take the place of `path`, with permissions and owner as in `atomic_write`."""
    with suppress(FileNotFoundError):
        old = os.stat(like or path)
        if hasattr(os, "chown"):
            for owner in (old.st_uid, -1):  # who is not root can at most keep the group
                with suppress(OSError):
                    os.chown(new, owner, old.st_gid)
                    break
        with suppress(PermissionError):  # of a file system that has none, or gives them to the whole disk
            os.chmod(new, stat.S_IMODE(old.st_mode) & 0o777)
    os.replace(new, path)


def _check_kind(path: Path) -> bool:
    """Whether it is a folder, or leads to one. Raises UserError where it is neither file nor folder."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # there is none, or a link that leads nowhere
        return False
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path}: is a device or pipe; give the name of a file to write")
    return stat.S_ISDIR(mode)


def require_regular_file(path: str | Path, missing: str = "no such file") -> None:
    """Raise UserError for what is no file with a content of its own: a pipe is waited for, and a device such
    as /dev/zero read, for ever.

    Args:
        missing: what is said where there is nothing of this name.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a ValueError: a name with a NUL
        raise UserError(f"{path}: {missing}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: a {kind_of_file(mode)}, not a file; give another, or remove it")


def kind_of_file(mode: int) -> str:
    """What `os.stat` found, by its `st_mode`."""
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def check_output(path: str | Path, folder: bool = False, utf8: bool = False) -> None:
    """Raise UserError, before any work, where no file, or folder, of this name can be written.

    Args:
        utf8: it is written by a library that takes no other names.
    """
    path = Path(path)
    if utf8 and str(path).encode("utf-8", "ignore").decode() != str(path):
        raise UserError(f"{path}: its name is not UTF-8, which the files of a model need; give another")
    _check_kind(path)
    if path.is_dir() and not folder:
        raise UserError(f"{path}: is a folder; give the name of a file to write")
    for place in (path, *path.parents) if folder else path.parents:
        if place.exists() and not place.is_dir():
            raise UserError(f"{path}: {place} is a file, not a folder; give another place to write to")


def write_json(path: str | Path, value) -> None:
    with atomic_write(path) as tmp_path:
        # half a character (an unpaired surrogate) is \ud800 in JSON
        tmp_path.write_text(json.dumps(value, ensure_ascii=False), "utf-8", errors="backslashreplace")


def write_table(path: str | Path, rows: list[dict]) -> None:
    """Write rows as a CSV, their keys as its header; what a row lacks is left empty."""
    columns = dict.fromkeys(name for row in rows for name in row)
    with atomic_write(path) as tmp_path:
        write_csv(tmp_path, [[*columns], *([row.get(name, "") for name in columns] for row in rows)])


def write_csv(path: str | Path, rows: Iterable[Iterable]) -> None:
    """Write rows as a CSV in UTF-8; carriage returns in them are quoted, as every reader expects.

    The csv module before Python 3.13 quotes only those line ends that it writes itself: it is let write both,
    and one is taken off again.
    """

    class LineFeeds:
        def write(self, row: str) -> None:
            stream.write(row.removesuffix("\r\n") + "\n")

    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
        csv.writer(LineFeeds(), lineterminator="\r\n").writerows(rows)


def read_json(path: str | Path, digest: str | None = None):
    """The content of a JSON file. Raises UserError where it is missing, no JSON, or has not the SHA-256
    `digest`."""
    require_regular_file(path)
    try:
        content = Path(path).read_bytes()
        if digest and hashlib.sha256(content).hexdigest() != digest:
            raise UserError(f"{path}: damaged, or replaced since; run the script again that wrote it")
        return parse_json(content.decode("utf-8-sig"), path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None


def parse_json(text: str, name: str | Path):
    """The content of JSON text. Raises UserError, with the `name`, where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the former also of a number with thousands of digits
        reason = str(error).partition(";")[0]
        raise UserError(f"{name}: not a JSON file ({reason})") from None


def progress_bar(*args, **options) -> tqdm:
    """tqdm; where the output is no terminal, such as a log file, it writes a line every ten seconds at
    most."""
    return tqdm(*args, mininterval=0.2 if sys.stderr.isatty() else 10, **options)


# --- devices ------------------------------------------------------------------------------------------------


def processes() -> PartialState:
    """Who takes part, under torchrun or accelerate launch: GPUs where there are any, else CPU processes."""
    from accelerate import PartialState

    # the others may wait for long while the main process writes or the slowest one finishes its share
    return PartialState(cpu=pick_device().type != "cuda", timeout=timedelta(hours=12))


def is_main_process() -> bool:
    """Whether this is the process that prints; known before the processes have found each other."""
    return os.environ.get("RANK", "0") == "0"


Device = typing.Literal["auto", "cpu", "cuda", "mps"]  # of a setting `device`
_used: dict[str, Device] = {"device": "auto"}


def use_device(name: Device) -> None:
    """Let `pick_device` and `processes` take this device from now on; `run_script` does so with the setting
    `device`."""
    _used["device"] = name


def pick_device(name: Device | None = None) -> torch.device:
    """The device to compute on.

    Args:
        name: "cuda" is a GPU, of several the one that belongs to this process; "mps" an Apple GPU; "auto" the
            first of cuda, mps and cpu that is there; None what `use_device` said, at first "auto".

    Raises:
        UserError: that device is not there, or fewer GPUs than processes.
    """
    import torch

    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    name = name or _used["device"]
    if name == "auto":
        name = next(device for device, is_there in available.items() if is_there)
    if not available[name]:
        there = ", ".join(device for device, is_there in available.items() if is_there)
        raise UserError(f"--device {name}: PyTorch finds no such device; it has {there}")
    if name != "cuda":
        return torch.device(name)
    index, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if index >= gpus:
        raise UserError(
            f"--device cuda: process {index + 1} finds {gpus} GPUs: start as many processes as there are GPUs"
        )
    return torch.device("cuda", index)


def copy_to_device(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors of one dtype on the CPU -> on the device, in one copy that the host does not wait for."""
    import torch

    if device.type == "cpu":
        return list(tensors)
    joined = torch.cat([tensor.flatten() for tensor in tensors])
    if device.type == "cuda":
        joined = joined.pin_memory()  # from other memory the driver may wait for the device
    parts = joined.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]
