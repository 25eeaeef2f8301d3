"""A script as a command: settings from the command line, what they may be, and how the command ends."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import inspect
import io
import os
import re
import signal
import sys
import threading
import time
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from utils import (
    Terminated,
    UserError,
    drop_unread_output,
    is_main_process,
    leave_signals_to_main_process,
    tell,
    use_device,
)

# errors of files that the user can mend: permissions, a full disk or quota, names, what was removed meanwhile
OF_THE_USER = {
    "EACCES", "EDQUOT", "EEXIST", "EFBIG", "EHOSTDOWN", "EIO", "EISDIR", "ELOOP", "ENAMETOOLONG",
    "ENODEV", "ENOENT", "ENOLCK", "ENOSPC", "ENOTCONN", "ENOTDIR", "ENXIO", "EPERM", "EROFS", "ESTALE",
    "ETIMEDOUT",
}  # fmt: skip
# how torch, the loader of shared libraries, threads and the system say so
MEMORY_IS_FULL = (
    "can't allocate memory", "not enough memory", "Cannot allocate memory", "failed to map segment",
    "can't start new thread", "bad_alloc", "Unable to allocate",
)  # fmt: skip


def run_script(main: Callable, settings_class: type[AnySettings]) -> typing.NoReturn:
    """Run `main(settings)` as a command: the settings come from the command line.

    Exit status: what `main` returns (None is 0); 2 with one line on stderr for wrong input, and where the
    machine fails, as with full memory or a killed worker process; 130 after Ctrl-C, 143 after SIGTERM, which
    are treated alike; 141, without a line, where the output is read no more, as by `head`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or file that lacks a caption's letters
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _run(main, settings_class)
    except BrokenPipeError:
        if not drop_unread_output():
            raise
        status = 141
    if _leave_processes(failed=status in (2, 130, 141, 143)):
        os._exit(status)  # as threads of the process group can abort an ordinary exit
    sys.exit(status)


def _run(main: Callable, settings_class: type[AnySettings]) -> int:
    """The exit status."""
    try:
        with _ended_by_signals():
            settings = parse_settings(settings_class, description=sys.modules[main.__module__].__doc__)
            use_device(getattr(settings, "device", "auto"))
            return main(settings) or 0
    except (UserError, MemoryError, RuntimeError, OSError, ImportError) as error:
        message = str(error) if isinstance(error, UserError) else _explain(error)
        if message is None:
            raise  # not the user's doing: show where it comes from
        _report(f"error: {message}")
        return 2
    except KeyboardInterrupt as error:
        leave_signals_to_main_process()  # this one is ending already
        if is_main_process():
            kept = str(error) or "finished files are kept, unfinished ones are removed"
            tell()  # below the progress bar
            tell(f"interrupted: {kept}")
        return 143 if isinstance(error, Terminated) else 130


def _explain(error: Exception) -> str | None:
    """What an error says to the user, where it is of the machine and not of the program."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's; torch may not have been imported
        return "the GPU's memory is full: lower --batch_size, or use a smaller encoder"
    if isinstance(error, MemoryError) or any(words in str(error) for words in MEMORY_IS_FULL):
        return "this machine's memory is full: lower --batch_size or --workers, or end other programs"
    if "oo many open files" in str(error):
        return "too many files are open at once: lower --workers, or raise the limit (ulimit -n)"
    if isinstance(error, BlockingIOError):
        return "this machine starts no more processes: lower --workers, or end other programs"
    if isinstance(error, OSError) and errno.errorcode.get(error.errno) in OF_THE_USER:
        return f"{error.strerror}: {error.filename or 'while writing'}"
    return None


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the block with KeyboardInterrupt or Terminated, even where that exception is
    turned into another one on its way, as by a failed import. Where it cannot be raised at all, as in a
    destructor, the signal comes again a little later."""
    received: list[KeyboardInterrupt] = []
    report_unraisable = sys.unraisablehook

    def interrupt(number: int, frame: object) -> typing.NoReturn:
        received.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        raise received[-1]

    def send_again(unraisable: object) -> None:
        if unraisable.exc_value not in received:
            report_unraisable(unraisable)
            return
        number = signal.SIGTERM if isinstance(unraisable.exc_value, Terminated) else signal.SIGINT
        threading.Timer(0.05, signal.raise_signal, [number]).start()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    sys.unraisablehook = send_again
    try:
        yield
    except Exception:
        if not received:
            raise
    finally:
        sys.unraisablehook = report_unraisable
    if received:
        raise received[0]
    for number in (signal.SIGINT, signal.SIGTERM):  # the rest is only the interpreter's end
        signal.signal(number, signal.SIG_DFL)


def _leave_processes(failed: bool) -> bool:
    """End NCCL's connections to other processes; returns whether there were other processes.

    After a failure they are left alone, as ending them might wait for the other processes. Gloo's always are:
    they end with this process, while its destructor can wait for ever for a thread that waits for Python.
    """
    if "torch" not in sys.modules:
        return False
    from torch import distributed

    started = distributed.is_available() and distributed.is_initialized()
    if started and not failed and distributed.get_backend() == "nccl":
        distributed.destroy_process_group()
    return started


def _report(message: str) -> None:
    """Print on stderr, and only once if several processes fail alike.

    The main process prints at once. The others wait first: if the main process has failed too, the launcher
    ends them; if it has not, the message is theirs alone and they print it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if not is_main_process():
        time.sleep(10)
    tell(message)


# --- settings -----------------------------------------------------------------------------------------------


class AnySettings(typing.Protocol):
    """An instance of a script's `Settings`, which is a dataclass."""

    __dataclass_fields__: typing.ClassVar[dict[str, dataclasses.Field]]


BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def parse_settings(
    settings_class: type[AnySettings], argv: list[str] | None = None, description: str | None = None
) -> AnySettings:
    """An instance of the dataclass `settings_class` with the values of `argv` (default: the command line).

    Every field, also an inherited one, is an option `--name value`; its type comes from the annotation (str,
    int, float, bool, Literal, each also `| None`; a tuple takes several values, numbers also with commas),
    its help text and heading from the comments (`read_field_comments`). A bool may stand alone (`--flag`) or
    with a value (`--flag False`); so may a field whose metadata has `alone`, its value where it stands alone.
    A tuple whose metadata has `positional` takes the plain arguments.

    A class may have `pipeline_steps`, a list of `Step`: then their settings are options too, and those that
    were given are in the instance's `step_values`, by their options' names.

    Raises:
        UserError: for an unknown option, a value of the wrong type or a setting that the class refuses.
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False
    flags = _add_options(parser, settings_class)
    for step in getattr(settings_class, "pipeline_steps", ()):
        decided = {*settings_class.__dataclass_fields__, *step.decided}
        _add_options(parser, step.settings_class, step.prefix, decided, step.title)
    argv = list(sys.argv[1:] if argv is None else argv)
    for argument in argv:
        if re.fullmatch(r"--\w+=--", argument):  # argparse takes the value for the end of the options
            raise UserError(f"{argument}: no value is called --; {parser.prog} --help lists the settings")
    fields = settings_class.__dataclass_fields__
    positional = [name for name in fields if fields[name].metadata.get("positional")]
    if positional:
        argv = _separate_flags(argv, flags)
    parser.usage = " ".join(["%(prog)s", *(f"[{name} ...]" for name in positional), "[--setting value ...]"])
    values = vars(parser.parse_intermixed_args(argv))  # plain arguments may stand between the options
    for name, value in values.items():
        if isinstance(value, list):  # a list for each argument
            values[name] = tuple(item for items in value for item in items)
    settings = make_settings(settings_class, {name: values[name] for name in values if name in fields})
    if hasattr(settings_class, "pipeline_steps"):
        settings.step_values = {name: values[name] for name in values if name not in fields}
    return settings


class Step(typing.NamedTuple):
    """A script whose settings another script takes as its own options."""

    title: str
    settings_class: type
    prefix: str  # of the options' names
    decided: frozenset[str]  # settings that the other script decides: no options


def _add_options(
    parser: argparse.ArgumentParser,
    settings_class: type,
    prefix: str = "",
    left_out: set[str] = frozenset(),
    title: str = "",
) -> list[str]:
    """Add an option for each field that has none yet.

    title: put all of them into one group of this title; otherwise each heading of the fields has a group.

    Returns:
        The options that are flags.
    """
    hints, comments = typing.get_type_hints(settings_class), read_field_comments(settings_class)
    groups: dict[str, argparse._ArgumentGroup] = {}
    flags = []
    for name in sorted(settings_class.__dataclass_fields__, key=[*comments].index):
        field = settings_class.__dataclass_fields__[name]
        option, (kind, optional, choices) = f"--{prefix}{name}", _resolve_type(hints[name])
        several = typing.get_origin(hints[name]) is tuple
        if name in left_out or option in parser._option_string_actions:
            continue
        options = {
            "default": argparse.SUPPRESS,  # so that only what is given comes back
            "type": _converter(kind, optional, several),
            "metavar": kind.__name__.upper(),
            "help": comments[name].text.replace("%", "%%"),
        }
        if choices:
            options |= {"choices": choices, "metavar": "|".join(choices)}
        if kind is bool:
            options |= {"nargs": "?", "const": True}
            flags.append(option)
        if several:
            options |= {"nargs": "+"}
        if "alone" in field.metadata:
            options |= {"nargs": "?", "const": field.metadata["alone"]}
        if field.metadata.get("positional"):
            parser.add_argument(name, **options | {"nargs": "*", "metavar": name})
            continue
        options["help"] += f" (default: {field.default})"
        heading = title or comments[name].heading
        if heading and heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        groups.get(heading, parser).add_argument(option, **options)
    return flags


def make_settings(settings_class: type[AnySettings], given: dict[str, object]) -> AnySettings:
    """Settings with the `given` values, and defaults for the rest; `given_names` tells them apart."""
    settings = settings_class(**given)
    settings._given = frozenset(given)
    return settings


def given_names(settings: AnySettings) -> frozenset[str]:
    """The names of the settings that were given on the command line; if the settings were made in Python, of
    those that differ from the defaults."""
    defaults = {name: field.default for name, field in settings.__dataclass_fields__.items()}
    differ = (name for name, default in defaults.items() if getattr(settings, name) != default)
    return getattr(settings, "_given", frozenset(differ))


def describe_settings(values: dict[str, object]) -> str:
    """`batch_size 8, decoder_lr 1e-05`"""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _separate_flags(argv: list[str], flags: list[str]) -> list[str]:
    """Turn `--flag photo.jpg` into `--flag=True photo.jpg`, so that the file is not the flag's value."""
    following = [*argv[1:], "True"]
    return [
        f"{argument}=True" if argument in flags and after.lower() not in BOOLS else argument
        for argument, after in zip(argv, following)
    ]


class _Parser(argparse.ArgumentParser):
    def exit(self, *arguments) -> typing.NoReturn:
        sys.stdout.flush()  # what --help has printed, while a closed pipe is still noticed
        super().exit(*arguments)

    def error(self, message: str) -> typing.NoReturn:
        unknown = re.findall(r"--\w+", message) if message.startswith("unrecognized") else []
        found = [difflib.get_close_matches(word, self._option_string_actions, 1) for word in unknown]
        meant = " ".join(name for names in found for name in names)
        question = f"; did you mean {meant}?" if meant else ""
        message = re.sub(r"\S{80,}", lambda word: f"{word[0][:60]}...", message)
        raise UserError(f"{message}{question}; {self.prog} --help lists the settings")


def _resolve_type(hint) -> tuple[type, bool, tuple]:
    """(type, may it be None, allowed values) of an annotation such as `int`, `str | None`, `Literal["a",
    "b"]`; `str | Path` is a str."""
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        optional = type(None) in typing.get_args(hint)
        (hint,) = [argument for argument in typing.get_args(hint) if argument not in (type(None), Path)]
    if typing.get_origin(hint) is typing.Literal:
        return str, optional, typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], optional, ()
    return hint, optional, ()


def _converter(kind: type, optional: bool, several: bool) -> Callable[[str], object]:
    def convert(text: str):
        if several:
            return [text] if kind is str else [kind(part) for part in text.split(",")]
        if optional and text.lower() == "none":
            return None
        if kind is bool and text.lower() not in BOOLS:
            raise ValueError
        return BOOLS[text.lower()] if kind is bool else kind(text)

    convert.__name__ = kind.__name__  # argparse names it in its message
    return convert


class FieldComment(typing.NamedTuple):
    """What the source says of a setting."""

    heading: str  # the comment line above it and its neighbours; "": none
    text: str  # the comment at the end of its line


def read_field_comments(settings_class: type) -> dict[str, FieldComment]:
    """The comments of all fields by name: first the class's own fields, then those that it inherits.

    Inherited fields have the first line of the base class's docstring as their heading. A field that the
    class repeats, to give it another default, counts as the class's own.
    """
    comments: dict[str, FieldComment] = {}
    for owner in settings_class.__mro__:
        if "__dataclass_fields__" not in vars(owner):
            continue
        inherited = owner is not settings_class
        heading = inspect.getdoc(owner).partition("\n")[0].rstrip(".") if inherited else ""
        for line in _class_lines(owner):
            if comment := re.match(r" {4}# (.+)$", line):
                heading = comment[1]
            elif field := re.match(r" {4}(\w+)\s*:[^#]*#\s*(.+)$", line):
                comments.setdefault(field[1], FieldComment(heading, field[2]))
    for name in settings_class.__dataclass_fields__:
        comments.setdefault(name, FieldComment("", ""))
    return comments


def _class_lines(settings_class: type) -> list[str]:
    """The lines of a dataclass's source up to its first method."""
    try:
        source = inspect.getsource(settings_class)
    except (OSError, TypeError):  # typed into an interpreter
        return []
    return re.split(r"^    (?:@|def )", source, maxsplit=1, flags=re.MULTILINE)[0].splitlines()


# --- what settings may be -----------------------------------------------------------------------------------


LARGEST = {  # of settings; more is a slip, or asks for more memory than there is
    **dict.fromkeys(("emb_dim", "attention_dim", "decoder_dim"), 16384),
    **dict.fromkeys(("batch_size", "val_batch_size", "grad_accumulation"), 65536),
    **dict.fromkeys(("beam_size", "num_beams", "max_new_tokens", "max_length", "max_len"), 1000),
    **dict.fromkeys(("encoder_lr", "decoder_lr", "self_critical_lr", "learning_rate"), 1000),
    **dict.fromkeys(("weight_decay", "alpha_c", "reward_bleu4", "self_critical_samples"), 1000),
    **dict.fromkeys(("lambda_r", "lambda_e", "lora_rank", "lora_alpha", "diversity"), 1000),
    **{"image_size": 4096, "workers": 256, "captions_per_image": 1000, "seed": 2**32 - 1},
    **dict.fromkeys(("epochs", "self_critical_after", "save_every"), 10**6),
    **{"max_pixels": 2**28, "cached_views": 1000, "length_penalty": 100, "decay": 1, "temperature": 100},
    **{"top_p": 1, "no_repeat_ngram": 50, "min_length": 50, "num_captions": 1000, "retries": 100},
}


def check_at_least(settings: AnySettings, smallest: float, *names: str) -> None:
    """Raise UserError unless each named setting is a number of at least `smallest`, and at most that of
    `LARGEST`."""
    for name in names:
        value, largest = getattr(settings, name), LARGEST.get(name, float("inf"))
        if not value >= smallest:  # written so that nan is refused
            raise UserError(f"--{name} is {value}: give {smallest} or more")
        if value > largest:
            raise UserError(f"--{name} is {value}: give {largest} or less")


def check_above_zero(settings: AnySettings, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) > 0:
            raise UserError(f"--{name} is {getattr(settings, name)}: give more than 0")
    check_at_least(settings, 0, *names)


def allow_single(settings: AnySettings, *names: str) -> None:
    """Take a text for settings that hold several: `Settings(annotations="train.csv")` in Python."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, (str, os.PathLike)):
            setattr(settings, name, (str(value),))


def check_different_files(settings: AnySettings, outputs: Sequence[str], inputs: Sequence[str] = ()) -> None:
    """Raise UserError where two settings would write one file or folder, or one would write what another
    reads. Settings may be None, or hold several names."""
    owners: dict[str, str] = {}
    for setting in (*inputs, *outputs):
        names = getattr(settings, setting) or ()
        for name in (names,) if isinstance(names, (str, os.PathLike)) else names:
            place = os.path.realpath(name)
            other = owners.get(place, setting)
            if other != setting and setting in outputs:
                raise UserError(f"--{setting} and --{other} are both {name}: give another name to write to")
            owners[place] = setting


def check_share(settings: AnySettings, *names: str) -> None:
    """Raise UserError unless each named setting is 0 or more and less than 1."""
    for name in names:
        if not 0 <= getattr(settings, name) < 1:
            raise UserError(f"--{name} is {getattr(settings, name)}: give 0 or more and less than 1")
