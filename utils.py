"""What every script needs: settings from the command line, errors, files, images, devices.

Nothing here knows about captions or models; every other module may import this one.
"""

from __future__ import annotations

import argparse
import csv
import errno
import gc
import hashlib
import inspect
import json
import os
import re
import signal
import sys
import time
import types
import typing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
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


# --- settings -----------------------------------------------------------------------------------------------


# errors of files that the user can mend: permissions, a full disk or quota, a share that is gone, names
OF_THE_USER = {
    "EACCES", "EDQUOT", "EEXIST", "EFBIG", "EHOSTDOWN", "EIO", "EISDIR", "ELOOP", "ENAMETOOLONG",
    "ENODEV", "ENOLCK", "ENOSPC", "ENOTCONN", "ENOTDIR", "ENXIO", "EPERM", "EROFS", "ESTALE",
    "ETIMEDOUT",
}  # fmt: skip
BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def run_script(main: Callable, settings_class: type) -> typing.NoReturn:
    """Run `main(settings)` as a command: the settings come from the command line.

    Exit status: what `main` returns (None is 0); 2 with one line on stderr for wrong input; 130 after Ctrl-C,
    143 after SIGTERM, which are treated alike.
    """
    try:
        with _ended_by_signals():
            settings = parse_settings(settings_class, description=sys.modules[main.__module__].__doc__)
            use_device(getattr(settings, "device", "auto"))
            status = main(settings)
    except UserError as error:
        _report(f"error: {error}")
        status = 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; torch may not have been imported
            raise
        _report("error: the GPU's memory is full: lower --batch_size, or use a smaller encoder")
        status = 2
    except OSError as error:
        if errno.errorcode.get(error.errno) not in OF_THE_USER:
            raise  # not the user's doing: show where it comes from
        _report(f"error: {error.strerror}: {error.filename or 'while writing'}")
        status = 2
    except KeyboardInterrupt as error:
        leave_signals_to_main_process()  # this one is ending already
        if is_main_process():
            kept = str(error) or "finished files are kept, unfinished ones are removed"
            print(f"\ninterrupted: {kept}", file=sys.stderr)
        status = 143 if isinstance(error, Terminated) else 130
    if _leave_processes(failed=status in (2, 130, 143)):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)  # as threads of the process group can abort an ordinary exit
    sys.exit(status or 0)


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
    if sys.platform == "linux":  # elsewhere a worker looks every five seconds, and not while it waits to send
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the block with KeyboardInterrupt or Terminated, even where that exception was
    lost on its way, as in a destructor, or turned into another one, as by a failed import."""
    received: list[KeyboardInterrupt] = []

    def interrupt(number: int, frame: object) -> typing.NoReturn:
        received.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        raise received[-1]

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        yield
    except Exception:
        if not received:
            raise
    if received:
        raise received[0]
    for number in (signal.SIGINT, signal.SIGTERM):  # the rest is only the interpreter's end
        signal.signal(number, signal.SIG_DFL)


def _leave_processes(failed: bool) -> bool:
    """End the connections to the other processes, if there are any; whether there were.

    NCCL's are left when this process has failed, as they might wait for the other processes.
    """
    if "torch" not in sys.modules:
        return False
    from torch import distributed

    started = distributed.is_available() and distributed.is_initialized()
    if started and not (failed and distributed.get_backend() == "nccl"):
        distributed.destroy_process_group()
    return started


def _report(message: str) -> None:
    """Print on stderr, once where several processes fail alike.

    The main process prints at once. The others wait first: the launcher ends them when the main process has
    failed. When it has not, the message is theirs alone and they print it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if not is_main_process():
        time.sleep(10)
    print(printable(message), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """The text with its line breaks, control characters and undecodable bytes escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def parse_settings(settings_class: type, argv: list[str] | None = None, description: str | None = None):
    """An instance of the dataclass `settings_class` with the values of `argv` (default: the command line).

    Every field is an option `--name value`; its type comes from the annotation (str, int, float, bool,
    Literal, each also `| None`; a tuple takes several values, numbers also with commas), its help text from
    the comment at the end of the field's line. A bool may stand alone (`--flag`) or with a value (`--flag
    False`); so may a field whose metadata has `alone`, its value where it stands alone. A tuple whose
    metadata has `positional` takes the plain arguments.

    A class may have `pipeline_steps`, a list of `Step`: then their settings are options too, and those that
    were given are in the instance's `step_values`, by their options' names.

    Raises:
        UserError: for an unknown option, a value of the wrong type or a setting that the class refuses.
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False
    flags = _add_options(parser, settings_class)
    for step in getattr(settings_class, "pipeline_steps", ()):
        group = parser.add_argument_group(step.title)
        _add_options(
            group, step.settings_class, step.prefix, {*settings_class.__dataclass_fields__, *step.decided}
        )
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(field.metadata.get("positional") for field in settings_class.__dataclass_fields__.values()):
        argv = _separate_flags(argv, flags)
    values = vars(parser.parse_intermixed_args(argv))  # plain arguments may stand between the options
    for name, value in values.items():
        if isinstance(value, list):  # a list for each argument
            values[name] = tuple(item for items in value for item in items)
    own = {name: value for name, value in values.items() if name in settings_class.__dataclass_fields__}
    settings = make_settings(settings_class, own)
    if hasattr(settings_class, "pipeline_steps"):
        settings.step_values = {name: value for name, value in values.items() if name not in own}
    return settings


class Step(typing.NamedTuple):
    """A script whose settings another script takes as its own options."""

    title: str
    settings_class: type
    prefix: str  # of the options' names
    decided: frozenset[str]  # settings that the other script decides: no options


def _add_options(
    parser, settings_class: type, prefix: str = "", left_out: set[str] = frozenset()
) -> list[str]:
    """Add an option for each field; those that several steps share are added once. Returns the flags of
    bools."""
    hints, comments, flags = typing.get_type_hints(settings_class), _field_comments(settings_class), []
    for name, field in settings_class.__dataclass_fields__.items():
        option, (kind, optional, choices) = f"--{prefix}{name}", _resolve_type(hints[name])
        if name in left_out or option in parser._option_string_actions:
            continue
        options = {
            "default": argparse.SUPPRESS,  # so that only what is given comes back
            "type": _converter(kind, optional),
            "metavar": kind.__name__.upper(),
            "help": comments.get(name, "").replace("%", "%%"),
        }
        if choices:
            options |= {"choices": choices, "metavar": "|".join(choices)}
        if kind is bool:
            options |= {"nargs": "?", "const": True}
            flags.append(option)
        if typing.get_origin(hints[name]) is tuple:
            options |= {"nargs": "+", "type": _list_converter(kind)}
        if "alone" in field.metadata:
            options |= {"nargs": "?", "const": field.metadata["alone"]}
        if field.metadata.get("positional"):
            parser.add_argument(name, **options | {"nargs": "*", "metavar": name})
            continue
        options["help"] += f" (default: {field.default})"
        parser.add_argument(option, **options)
    return flags


def make_settings(settings_class: type, given: dict[str, object]):
    """Settings with the `given` values and defaults for the rest; `given_names` knows which are which."""
    settings = settings_class(**given)
    settings.__dict__["_given"] = frozenset(given)
    return settings


def given_names(settings) -> frozenset[str]:
    """The settings that were given on the command line; of settings made in Python, those that differ from
    the defaults."""
    defaults = {name: field.default for name, field in settings.__dataclass_fields__.items()}
    differ = (name for name, default in defaults.items() if getattr(settings, name) != default)
    return settings.__dict__.get("_given", frozenset(differ))


def describe_settings(values: dict[str, object]) -> str:
    """`batch_size 8, decoder_lr 1e-05`"""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _separate_flags(argv: list[str], flags: list[str]) -> list[str]:
    """`--flag photo.jpg` -> `--flag=True photo.jpg`: the plain argument is no value of the flag."""
    following = [*argv[1:], "True"]
    return [
        f"{argument}=True" if argument in flags and after.lower() not in BOOLS else argument
        for argument, after in zip(argv, following)
    ]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists the settings")


def _resolve_type(hint) -> tuple[type, bool, tuple]:
    """(type, may it be None, allowed values) of an annotation such as `int`, `str | None`, `Literal["a",
    "b"]`."""
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        optional = True
        (hint,) = [argument for argument in typing.get_args(hint) if argument is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return str, optional, typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], optional, ()
    return hint, optional, ()


def _converter(kind: type, optional: bool) -> Callable[[str], object]:
    def convert(text: str):
        if optional and text.lower() == "none":
            return None
        if kind is bool:
            try:
                return BOOLS[text.lower()]
            except KeyError:
                raise ValueError from None
        return kind(text)

    convert.__name__ = kind.__name__  # argparse names it in its message
    return convert


def _list_converter(kind: type) -> Callable[[str], list]:
    def convert(text: str) -> list:
        return [text] if kind is str else [kind(part) for part in text.split(",")]

    convert.__name__ = kind.__name__
    return convert


def _field_comments(settings_class: type) -> dict[str, str]:
    """The comment at the end of each field's line in the source of the dataclass."""
    try:
        source = inspect.getsource(settings_class)
    except (OSError, TypeError):  # typed into an interpreter
        return {}
    return dict(re.findall(r"^\s+(\w+)\s*:[^#\n]*#\s*(.+)$", source, flags=re.MULTILINE))


LARGEST = {  # of settings; more is a slip, or asks for more memory than there is
    **dict.fromkeys(("emb_dim", "attention_dim", "decoder_dim"), 16384),
    **dict.fromkeys(("batch_size", "val_batch_size", "grad_accumulation"), 65536),
    **dict.fromkeys(("beam_size", "num_beams", "max_new_tokens", "max_length", "max_len"), 1000),
    **dict.fromkeys(("encoder_lr", "decoder_lr", "self_critical_lr", "learning_rate"), 1000),
    **dict.fromkeys(("weight_decay", "alpha_c", "reward_bleu4", "self_critical_samples"), 1000),
    **dict.fromkeys(("lambda_r", "lambda_e"), 1000),
    **{"image_size": 4096, "workers": 256, "captions_per_image": 1000, "seed": 2**32 - 1},
    **dict.fromkeys(("epochs", "self_critical_after", "save_every"), 10**6),
    **{"cached_views": 1000, "length_penalty": 100, "decay": 1, "temperature": 100, "top_p": 1},
    **{"no_repeat_ngram": 50, "min_length": 50, "num_captions": 1000, "diversity": 1000},
}


def check_at_least(settings, smallest: float, *names: str) -> None:
    """Raise UserError unless each named setting is a number of at least `smallest`, and at most that of
    `LARGEST`."""
    for name in names:
        if not getattr(settings, name) >= smallest:  # written so that nan is refused
            raise UserError(f"--{name} is {getattr(settings, name)}: give {smallest} or more")
        _check_at_most(settings, name)


def check_above_zero(settings, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) > 0:
            raise UserError(f"--{name} is {getattr(settings, name)}: give more than 0")
        _check_at_most(settings, name)


def _check_at_most(settings, name: str) -> None:
    value, largest = getattr(settings, name), LARGEST.get(name, float("inf"))
    if value > largest:
        raise UserError(f"--{name} is {value}: give {largest} or less")


def check_share(settings, *names: str) -> None:
    """Raise UserError unless each named setting is 0 or more and less than 1."""
    for name in names:
        if not 0 <= getattr(settings, name) < 1:
            raise UserError(f"--{name} is {getattr(settings, name)}: give 0 or more and less than 1")


# --- files --------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes `path`'s place only when the block ends well.

    A crash or Ctrl-C leaves the old file as it was. Where `path` is a link, the file that it leads to is
    written.

    Raises:
        UserError: `path` is a device or the like. OSError: with `path` as its filename.
    """
    shown, path = path, Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{shown}: is a device or pipe; give the name of a file to write")
    tmp_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp_path
        os.replace(tmp_path, path)
    except OSError as error:
        if error.filename in (None, str(tmp_path)):
            error.filename = str(shown)
        raise
    finally:
        with suppress(OSError):  # its folder may be gone
            tmp_path.unlink(missing_ok=True)


def check_output(path: str | Path, folder: bool = False) -> None:
    """Raise UserError, before any work, where no file, or folder, of this name can be written."""
    path = Path(path)
    if path.is_dir() and not folder:
        raise UserError(f"{path}: is a folder; give the name of a file to write")
    for place in (path, *path.parents) if folder else path.parents:
        if place.exists() and not place.is_dir():
            raise UserError(f"{path}: {place} is a file, not a folder; give another place to write to")


def write_json(path: str | Path, value) -> None:
    with atomic_write(path) as tmp_path:
        tmp_path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_table(path: str | Path, rows: list[dict]) -> None:
    """Write rows as a CSV, their keys as its header; what a row lacks is left empty."""
    with atomic_write(path) as tmp_path, tmp_path.open("w", encoding="utf-8", newline="") as stream:
        columns = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_json(path: str | Path, digest: str | None = None):
    """The content of a JSON file. Raises UserError where it is missing, no JSON, or has not the SHA-256
    `digest`."""
    try:
        content = Path(path).read_bytes()
        if digest and hashlib.sha256(content).hexdigest() != digest:
            raise UserError(f"{path}: damaged, or replaced since; run the script again that wrote it")
        with _no_garbage_collection():
            return json.loads(content.decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A fifth faster for large JSON: there is no garbage among many new lists, but it would be looked for."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def natural_order(name: str) -> list:
    """Sort key by which img2 comes before img10."""
    return [
        (0, int(part), part) if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
        if part
    ]


def parallel_map(function: Callable, items: Iterable, workers: int, ahead: int = 0) -> Iterator:
    """`map(function, items)` on `workers` threads: in order, few results waiting, so that memory stays flat.

    At most `ahead` of them wait, or four for each thread if that is more.

    For work that leaves the interpreter lock, as Pillow's decoding and resizing does.
    """
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > max(4 * workers, ahead, 1):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


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


def on_main_process(work: Callable[[], typing.Any]) -> typing.Any:
    """What `work()` gives in the main process, in every process; an error of the user is raised in all."""
    state = processes()
    result = [None]
    if state.is_main_process:
        try:
            result = [work()]
        except (UserError, OSError) as error:
            if state.num_processes == 1:
                raise
            result = [error]
    if state.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        try:
            broadcast_object_list(result)
        except RuntimeError:
            raise UserError("the main process ended before its work was done") from None
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


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
