"""Resuming a training: which settings hold, what comes from the checkpoint, whether it is the same run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from captioning.command_line import describe_settings, given_names
from captioning.training.loop import LearningRate, Run, epochs_of_patience, is_earlier, start_outputs
from captioning.weights.checkpoints import (
    HISTORY,
    LAST,
    PROGRESS,
    check_content,
    check_room,
    epoch_checkpoints,
    peek,
    read_checkpoint,
)
from utils import UserError, processes

# these are of each run, whatever the checkpoint says
OF_THIS_RUN = {"data_folder", "annotations", "image_folder", "output_folder", "resume", "checkpoint"}
OF_THIS_RUN |= {
    "id_column",
    "caption_column",
    "device",
    "log_with",
    "workers",
    "cache_features",
    "mixed_precision",
    "keep_checkpoints",
    "val_batch_size",
    "save_every",
}
# changed, these let an interrupted epoch go on where it was
IN_MID_EPOCH = {"epochs", "patience", "select_by", "decoder_lr", "encoder_lr", "learning_rate"}
IN_MID_EPOCH |= {"decay", "decay_after", "grad_clip", "grad_clip_by", "weight_decay"}


@dataclass
class Resumed:
    """A checkpoint that a training goes on from."""

    checkpoint: dict
    source: Path
    changed: dict[str, str]  # settings with another value than the checkpoint's: "8 (was 16)"
    # one line for the log: what this run changes, and what it takes from the checkpoint instead of its
    # defaults
    differences: str
    unused: str = ""  # a newer state that cannot be gone on from, and why

    @property
    def history(self) -> list[dict]:
        return self.checkpoint["history"]

    @property
    def progress(self) -> dict | None:
        """Of a state within an epoch: how far the epoch has come; see captioning/training/interruption.py."""
        return self.checkpoint.get("progress")

    @classmethod
    def find(
        cls, settings, read: Callable[[Path], dict], fixed: Iterable[str], data: object = None
    ) -> tuple[Any, Resumed | None]:
        """The settings of the run, and what it goes on from, if it does: the file `settings.checkpoint`, or
        with `settings.resume` the newest state in the output folder. That is `last.pth`, where it is whole
        and within the epoch after the newest complete one, and where what this run changes leaves the
        epoch's batches as they were; else the newest epoch's checkpoint.

        Args:
            read: a checkpoint's content, checked.
            fixed: settings that cannot change, such as the sizes of the model.
            data: plain values by which the training data are recognized.

        Raises:
            UserError: both settings are given; there is nothing to go on from; what `merge` raises.
        """
        if settings.resume and settings.checkpoint:
            raise UserError("--resume and --checkpoint are two ways to say where to go on: give one")
        if settings.checkpoint:
            return cls._go_on(settings, read, Path(settings.checkpoint), fixed, data)
        if not settings.resume:
            return settings, None
        files, last = epoch_checkpoints(settings.output_folder), Path(settings.output_folder) / LAST
        newest, unused = newest_history(files), ""
        if last.is_file() and not is_earlier(peek(last).get("history"), newest):  # else its epoch is complete
            try:
                merged, resumed = cls._go_on(settings, read, last, fixed, data)
                if resumed.progress is None or resumed.history != newest:
                    raise UserError(f"{last}: not of the epoch after the newest in its folder; remove it")
                return merged, resumed
            except UserError as error:
                if not files:
                    raise
                unused = str(error).partition(";")[0]
        if not files:
            raise UserError(
                f"{settings.output_folder}: no checkpoint_epoch_N.pth or {LAST} in it; start without --resume"
            )
        merged, resumed = cls._go_on(settings, read, files[-1], fixed, data)
        return merged, replace(resumed, unused=unused)

    @classmethod
    def _go_on(
        cls, settings, read: Callable[[Path], dict], source: Path, fixed: Iterable[str], data: object
    ) -> tuple[Any, Resumed]:
        """`merge`, and where the source is within an epoch, UserError if that cannot go on."""
        checkpoint = read(source)
        check_content(source, checkpoint, {"progress?": PROGRESS})
        merged, resumed = cls.merge(settings, checkpoint, source, fixed)
        progress = resumed.progress
        if progress is None:
            return merged, resumed
        obstacles = [f"{name} {text}" for name, text in resumed.changed.items() if name not in IN_MID_EPOCH]
        count, earlier = processes().num_processes, len(progress["processes"])
        if count != earlier:
            obstacles.append(f"processes {count} (was {earlier})")
        if progress.get("data") != data:
            obstacles.append("other training data")
        if progress["epoch"] != len(resumed.history) + 1:
            obstacles.append(f"a history of {len(resumed.history)} epochs")
        if obstacles:
            raise UserError(
                f"{source}: in the middle of epoch {progress['epoch']}, which cannot go on with "
                f"{', '.join(obstacles)}; leave that out, go on from an epoch's checkpoint, or train anew"
            )
        return merged, resumed

    @classmethod
    def merge(cls, settings, checkpoint: dict, source: Path, fixed: Iterable[str]) -> tuple[Any, Resumed]:
        """The settings of the run that goes on, and what it goes on from.

        Settings given on the command line apply. All others come from the checkpoint, except those in
        OF_THIS_RUN, and `epochs`, for which the larger value is used.

        Args:
            settings: of this run.
            fixed: settings that cannot change, such as the sizes of the model.

        Raises:
            UserError: a fixed setting was given another value, or there is no epoch left.
        """
        given, values, changed, kept = given_names(settings), {}, {}, {}
        for name in settings.__dataclass_fields__:
            ours = getattr(settings, name)
            theirs = checkpoint["settings"].get(name, ours)
            if name in OF_THIS_RUN or ours == theirs:
                continue
            if name in given and name in fixed:
                raise UserError(
                    f"--{name} {ours}: {source} was trained with {theirs}; leave it out, or train anew"
                )
            if name in given or (name == "epochs" and ours > theirs):
                changed[name] = f"{ours} (was {theirs})"
            else:
                values[name] = theirs
                kept[name] = f"{theirs} (not {ours})"
        settings, history = replace(settings, **values), checkpoint["history"]
        if len(history) >= settings.epochs:
            raise UserError(f"{source} has its {len(history)} epochs: raise --epochs to go on")
        parts = ["changed: " + describe_settings(changed)] if changed else []
        parts += ["from the checkpoint: " + describe_settings(kept)] if kept else []
        differences = "; ".join(parts) or "the settings are the checkpoint's"
        return settings, cls(checkpoint, source, changed, differences)

    def restore(
        self,
        optimizer: torch.optim.Optimizer,
        rates: LearningRate,
        run: Run,
        modules: Sequence[nn.Module],
        rate_names: Sequence[str],
    ) -> str:
        """Take optimizer, rates and scaler from the checkpoint; return a line on what is in force.

        Args:
            modules: whose parameters the optimizer's groups hold, one module per group.
            rate_names: the setting of each group's rate; one that was changed begins without decays.
        """
        states = self.checkpoint
        if "optimizers" in states:
            states = states | merge_optimizers(states["optimizers"], optimizer, modules)
        kept = "optimizer" in states
        if kept:
            options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            try:
                optimizer.load_state_dict(states["optimizer"])
            except ValueError:  # of the first release, which left out what was frozen
                kept = False
            except (KeyError, TypeError, AttributeError, IndexError, RuntimeError):
                raise UserError(
                    f"{self.source}: its optimizer's state is damaged; go on from another"
                ) from None
            for group, ours in zip(optimizer.param_groups, options):
                group.update(ours)  # the weight decay is a setting; the rates follow below
            self._check_averages(optimizer)
            if len(states.get("rates", {}).get("decays", rates.decays)) != len(rates.decays):
                raise UserError(f"{self.source}: its learning rates are damaged")
            restarted = [number for number, name in enumerate(rate_names) if name in self.changed]
            earlier = {"steps": states.get("schedule", {}).get("last_epoch", 0), "decays": rates.decays}
            rates.load_state_dict(states.get("rates", earlier), restarted)
            if states.get("scaler") and run.scaler.is_enabled():
                run.scaler.load_state_dict(states["scaler"])
        where, progress = f"after epoch {len(self.history)} of {self.source}", self.progress
        if progress:
            steps = f"{progress['steps']} of its {progress['total_steps']} steps"
            where = f"in epoch {progress['epoch']} after {steps}, from {self.source}"
        if self.unused:
            where += f" (not from {self.unused})"
        return (
            f"going on {where}; {self.differences}; Adam's state "
            f"{'kept' if kept else 'starts anew'}; learning rates now {rates.describe()}"
        )

    def _check_averages(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter, state in optimizer.state.items():
            averages = [state.get(name) for name in ("exp_avg", "exp_avg_sq")]
            shapes = [getattr(average, "shape", None) for average in averages]
            if shapes != [parameter.shape] * 2 or not all(bool(a.isfinite().all()) for a in averages):
                raise UserError(f"{self.source}: its optimizer's state is damaged")


def begin_outputs(
    run: Run,
    output: Path,
    settings,
    optimizer: torch.optim.Optimizer,
    resumed: Resumed | None,
    patterns: Sequence[str],
) -> None:
    """Look whether there is room for what the run will write, `start_outputs`, and begin its log.

    Raises:
        UserError: there is not enough for one epoch.
    """
    done, source = (len(resumed.history), resumed.source) if resumed else (0, None)
    if run.is_main:
        check_room(output, optimizer, settings.epochs - done, settings.keep_checkpoints, run.log)
        start_outputs(output, source, done, patterns)
    run.log_file = output / "train.log"  # set only now: archiving would move it


def merge_optimizers(
    earlier: dict[str, dict], optimizer: torch.optim.Optimizer, modules: Sequence[nn.Module]
) -> dict:
    """The states of the first release's two optimizers, "decoder" and "encoder", which held what was
    trainable then, as those of one optimizer with a group per module; {} where they do not fit."""
    state, decays, offset = {}, [], 0
    for name, module, group in zip(("decoder", "encoder"), modules, optimizer.param_groups):
        trainable = [i for i, parameter in enumerate(module.parameters()) if parameter.requires_grad]
        ours = earlier.get(name, {"param_groups": [{"params": [], "lr": group["lr"]}]})["param_groups"][0]
        decays.append(round(math.log(ours["lr"] / group["lr"], 0.8)) if ours["params"] else 0)
        if ours["params"] and len(ours["params"]) == len(trainable):
            state |= {offset + trainable[i]: values for i, values in earlier[name]["state"].items()}
        offset += len(list(module.parameters()))
    if not state:
        return {}
    merged = {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    return {"optimizer": merged, "rates": {"steps": 0, "decays": decays}}


def newest_history(files: Sequence[Path]) -> list[dict] | None:
    """The history in the last of these checkpoints; none yet without any."""
    return peek(files[-1]).get("history") if files else []


def find_same_run(settings, data: object) -> tuple[Path, list[dict]] | None:
    """The newest state in the output folder and its history, where it was trained on these data with these
    settings; their number of epochs, and what is of each run, may differ."""
    files = epoch_checkpoints(settings.output_folder)
    newest = newest_history(files)
    for file in (Path(settings.output_folder) / LAST, *files[-1:]):
        try:
            checkpoint = read_checkpoint(file)
            check_content(file, checkpoint, {"settings": dict, "history": HISTORY})
            earlier, history = checkpoint["settings"], checkpoint["history"]
            same = checkpoint["data"] == data and history == newest
        except (KeyError, ValueError, UserError):  # no file, or none of ours
            continue
        for name, value in asdict(settings).items():
            if name not in {*OF_THIS_RUN, "epochs"}:
                same = same and earlier.get(name, value) == value
        if same:
            return file, history
    return None


def is_complete(settings, history: list[dict]) -> bool:
    waited = epochs_of_patience(history, settings)
    return len(history) >= settings.epochs or 0 < settings.patience <= waited
