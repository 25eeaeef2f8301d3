"""Resuming a training: the settings that both trainings share, which of them hold, and where a run goes on.

That is after an epoch, with its `checkpoint_epoch_N.pth`, or within one, with `last.pth`: a checkpoint with
one more key, `progress`, the mid-epoch state. `loop.py` writes both.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

from captioning.command_line import (
    check_above_zero,
    check_at_least,
    check_share,
    describe_settings,
    given_names,
)
from captioning.weights.checkpoints import LAST, PROGRESS, check_content, epoch_checkpoints, peek
from utils import Device, Terminated, UserError, processes

# --- settings -----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class TrainingSettings:
    """Settings of both trainings.

    Those that differ between the two, or are often changed, stand at the top of train.py and train_model.py.

    Attributes:
        fixed: settings that cannot change when a training is resumed.
        rate_names: of each group of the optimizer, the setting of its learning rate.
        output_files: patterns of the files that a training writes to its folder.
    """

    grad_accumulation: int = 1  # batches per step: big steps on a small GPU
    decay_after: int = 8  # plateau: the rates fall after every this many epochs without a better score
    decay: float = 0.8  # plateau: factor by which they fall
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # 16-bit autocast, on CUDA
    select_by: Literal["bleu4", "cider"] = "cider"  # score by which the best epoch is chosen
    resume: bool = False  # go on from the newest state in output_folder
    checkpoint: str | None = None  # or go on from this file
    log_with: Literal["none", "tensorboard", "wandb"] = "none"  # also report every epoch there
    save_every: float = 10  # minutes between saves of last.pth, for --resume; 0: saved on Ctrl-C and SIGTERM
    device: Device = "auto"  # auto: a GPU where there is one

    if TYPE_CHECKING:  # in both scripts, each with its own default
        output_folder: str
        epochs: int
        lr_schedule: Literal["plateau", "cosine"]
        warmup: float
        patience: int
        keep_checkpoints: int
        seed: int

    fixed = rate_names = output_files = ()

    def __post_init__(self):
        check_at_least(self, 1, "epochs", "batch_size", "grad_accumulation", "decay_after")
        check_at_least(self, 0, "patience", "weight_decay", "keep_checkpoints", "save_every", "seed")
        check_above_zero(self, "grad_clip", "decay")
        check_share(self, "warmup", "label_smoothing")

    def defaults(self) -> dict[str, object]:
        """The settings of a run for which none was given."""
        return {field.name: field.default for field in fields(self)}

    @property
    def score(self) -> str:
        """The column of the history by which the best epoch is chosen."""
        return f"val_{self.select_by}"

    @property
    def scheduled_epochs(self) -> int:
        """The epochs over which the learning rate's schedule runs."""
        return self.epochs

    @property
    def has_self_critical_stage(self) -> bool:
        return False


SettingsType = TypeVar("SettingsType", bound=TrainingSettings)

# these are of each run, whatever the checkpoint says
OF_THIS_RUN = {"data_folder", "annotations", "image_folder", "id_column", "caption_column", "output_folder",
               "resume", "checkpoint", "device", "log_with", "workers", "cache_features", "mixed_precision",
               "keep_checkpoints", "val_batch_size", "save_every"}  # fmt: skip
# changed, these let an interrupted epoch go on where it was
IN_MID_EPOCH = {"epochs", "patience", "select_by", "decoder_lr", "encoder_lr", "learning_rate", "decay",
                "decay_after", "grad_clip", "grad_clip_by", "weight_decay"}  # fmt: skip


def differing_settings(settings: TrainingSettings, earlier: Mapping[str, object]) -> dict[str, object]:
    """Of the settings that now have another value than `earlier`, and are not of each run, that value."""
    names = [field.name for field in fields(settings) if field.name not in OF_THIS_RUN]
    ours = {name: getattr(settings, name) for name in names if name in earlier}
    return {name: earlier[name] for name, value in ours.items() if value != earlier[name]}


def merge_settings(
    settings: SettingsType, checkpoint: dict, source: Path
) -> tuple[SettingsType, dict[str, str], str]:
    """The settings of a run that goes on from the checkpoint in the file `source`.

    Those that were given on the command line hold, and those whose default is another one than when the
    checkpoint was written: it was edited. All others are the checkpoint's, but for those that are of each
    run, and for `epochs`, of which the larger holds.

    Returns:
        The settings; what they change, by name: "8 (was 16)"; a line on this and on what they keep.

    Raises:
        UserError: a fixed setting would change, or there is no epoch left.
    """
    defaults, earlier_defaults = settings.defaults(), checkpoint.get("defaults", {})
    from_user = given_names(settings)
    edited = {name for name, value in defaults.items() if earlier_defaults.get(name, value) != value}
    edited, from_user = edited - from_user, edited | from_user
    kept, changed, from_checkpoint = {}, {}, {}
    for name, theirs in differing_settings(settings, checkpoint["settings"]).items():
        ours = getattr(settings, name)
        if name in settings.fixed and name in from_user:
            setting, remedy = (name, "edit it back") if name in edited else (f"--{name}", "leave it out")
            raise UserError(f"{setting} {ours}: {source} was trained with {theirs}; {remedy}, or train anew")
        if name in from_user or (name == "epochs" and ours > theirs):
            changed[name] = f"{ours} (was {theirs}{'; edited' if name in edited else ''})"
        else:
            kept[name], from_checkpoint[name] = theirs, f"{theirs} (not {ours})"
    settings, epochs = replace(settings, **kept), len(checkpoint["history"])
    if epochs >= settings.epochs:
        raise UserError(f"{source} has its {epochs} epochs: raise --epochs to go on")
    parts = [f"changed: {describe_settings(changed)}"] if changed else []
    parts += [f"from the checkpoint: {describe_settings(from_checkpoint)}"] if kept else []
    return settings, changed, "; ".join(parts) or "the settings are the checkpoint's"


# --- the history --------------------------------------------------------------------------------------------

REWARD = "train_reward"  # column of the epochs of self-critical training


def best_epoch(history: list[dict], score: str) -> int:
    """Index of the first epoch with the highest `score` ("val_cider"); where all are 0, of the last."""
    if not any(row[score] for row in history):
        return len(history) - 1
    return max(range(len(history)), key=lambda index: history[index][score])


def epochs_since_improvement(history: list[dict], score: str) -> int:
    return len(history) - 1 - best_epoch(history, score) if history else 0


def epochs_of_patience(history: list[dict], settings: TrainingSettings) -> int:
    """Epochs without a better score that count against `patience`; where a self-critical stage follows or has
    begun, those of that stage alone."""
    epochs = epochs_since_improvement(history, settings.score)
    if settings.has_self_critical_stage:
        return min(epochs, sum(REWARD in row for row in history))
    return epochs


def is_complete(settings: TrainingSettings, history: list[dict]) -> bool:
    return len(history) >= settings.epochs or 0 < settings.patience <= epochs_of_patience(history, settings)


def is_earlier(history: object, other: object) -> bool:
    """Whether one history is of the same run as another one, some epochs before."""
    if not isinstance(history, list) or not isinstance(other, list):
        return False
    return len(history) < len(other) and other[: len(history)] == history


def newest_history(files: Sequence[Path]) -> list[dict] | None:
    """The history in the last of these checkpoints; none yet without any."""
    return peek(files[-1]).get("history") if files else []


# --- where a run goes on ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that a training goes on from.

    Attributes:
        changed: settings with another value than the checkpoint's: "8 (was 16)".
        differences: a line on these, and on what comes from the checkpoint in place of this run's defaults.
        refused: a newer state that this run cannot go on from, and why.
    """

    checkpoint: dict
    source: Path
    changed: dict[str, str]
    differences: str
    refused: str = ""

    @property
    def history(self) -> list[dict]:
        return self.checkpoint["history"]

    @property
    def mid_epoch(self) -> dict | None:
        """How far an interrupted epoch had come; see `loop.Epoch.state`."""
        return self.checkpoint.get("progress")

    def describe_place(self) -> str:
        place, state = f"after epoch {len(self.history)} of {self.source}", self.mid_epoch
        if state:
            steps = f"{state['steps']} of its {state['total_steps']} steps"
            place = f"in epoch {state['epoch']} after {steps}, from {self.source}"
        return f"{place} (not from {self.refused})" if self.refused else place


def find_resumable(
    settings: SettingsType, read: Callable[[Path], dict], data: object = None
) -> tuple[SettingsType, Resumed | None]:
    """The settings of the run, and what it goes on from, if it does: the file `settings.checkpoint`, or with
    `settings.resume` the newest state in the output folder. That is `last.pth`, where it is whole and within
    the epoch after the newest complete one, and where what this run changes leaves the epoch's batches as
    they were; else the newest epoch's checkpoint.

    Args:
        read: a checkpoint's content, checked.
        data: plain values by which the training data are recognized in mid-epoch.

    Raises:
        UserError: both settings are given; there is nothing to go on from; what `merge_settings` raises.
    """
    if settings.resume and settings.checkpoint:
        raise UserError("--resume and --checkpoint are two ways to say where to go on: give one")
    if settings.checkpoint:
        return _resume_from(Path(settings.checkpoint), settings, read, data)
    if not settings.resume:
        return settings, None
    files, last = epoch_checkpoints(settings.output_folder), Path(settings.output_folder) / LAST
    newest, refused = newest_history(files), ""
    if last.is_file() and not is_earlier(peek(last).get("history"), newest):  # else its epoch is complete
        try:
            merged, resumed = _resume_from(last, settings, read, data)
            if resumed.mid_epoch is None or resumed.history != newest:
                raise UserError(f"{last}: not of the epoch after the newest in its folder; remove it")
            return merged, resumed
        except UserError as error:
            if not files:
                raise
            refused = str(error).partition(";")[0]
    if not files:
        raise UserError(
            f"{settings.output_folder}: no checkpoint_epoch_N.pth or {LAST} in it; start without --resume"
        )
    merged, resumed = _resume_from(files[-1], settings, read, data)
    return merged, replace(resumed, refused=refused)


def _resume_from(
    source: Path, settings: SettingsType, read: Callable[[Path], dict], data: object
) -> tuple[SettingsType, Resumed]:
    """Raises UserError also where the source is within an epoch that cannot go on."""
    checkpoint = read(source)
    check_content(source, checkpoint, {"progress?": PROGRESS, "defaults?": dict})
    settings, changed, differences = merge_settings(settings, checkpoint, source)
    resumed = Resumed(checkpoint, source, changed, differences)
    state = resumed.mid_epoch
    if state is None:
        return settings, resumed
    obstacles = [f"{name} {text}" for name, text in changed.items() if name not in IN_MID_EPOCH]
    count, earlier_count = processes().num_processes, len(state["processes"])
    if count != earlier_count:
        obstacles.append(f"processes {count} (was {earlier_count})")
    if state.get("data") != data:
        obstacles.append("other training data")
    if state["epoch"] != len(resumed.history) + 1:
        obstacles.append(f"a history of {len(resumed.history)} epochs")
    if obstacles:
        raise UserError(
            f"{source}: in the middle of epoch {state['epoch']}, which cannot go on with "
            f"{', '.join(obstacles)}; leave that out, go on from an epoch's checkpoint, or train anew"
        )
    return settings, resumed


# --- in mid-epoch -------------------------------------------------------------------------------------------


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's default generators, of the CPU and of the device, by the device's type."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Go on from `random_states`; a device that they have none of stays as it was seeded."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])


SAME_SIGNAL = 2.0  # seconds: torchrun passes on a Ctrl-C that its processes get from the terminal too


class StopSignals:
    """SIGTERM and Ctrl-C: while they are delayed the first one is noted, and a second one ends the run; else
    they end it at once.

    Attributes:
        number: of the signal that was noted; 0: none came.
    """

    def __init__(self):
        self.number, self.time, self.are_delayed = 0, 0.0, False
        self.earlier_handlers: dict[int, object] = {}

    def delay(self, number: int = 0) -> None:
        """From now on until `release`. number: of one that has come already."""
        self.are_delayed, self.number, self.time = True, self.number or number, time.monotonic()

    def release(self) -> None:
        """End the run if one has come."""
        self.are_delayed = False
        if self.number:
            raise ending(self.number)

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Within the block; other threads than the main one get no signals."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.earlier_handlers[number] = signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in self.earlier_handlers.items():
                if handler is not None:  # it was Python's
                    signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if not self.are_delayed:
            if callable(self.earlier_handlers[number]):
                self.earlier_handlers[number](number, frame)
            raise ending(number)
        if not self.number:
            self.number, self.time = int(number), time.monotonic()
        elif time.monotonic() > self.time + SAME_SIGNAL:
            raise ending(number)


def ending(number: int, message: str = "") -> KeyboardInterrupt:
    """The exception that ends the run after a signal."""
    return (Terminated if number == signal.SIGTERM else KeyboardInterrupt)(message)
