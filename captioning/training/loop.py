"""What both trainings share: processes and precision, gradients, the learning rate, the best epoch, resuming.

Nothing here knows a model. A training step reads in the script; here are its parts:

    this batch's part of the step's loss -> run.backward(loss)
    gradients of all processes           -> run.step(optimizer, grad_clip, grad_clip_by)
    learning rate                        -> LearningRate, by plateau or cosine
    end of an epoch                      -> save_epoch
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor

from captioning.files import named_in_errors
from captioning.training.curves import REWARD, draw_curves
from captioning.weights.checkpoints import (
    BEST_FILES,
    LAST,
    archive,
    archive_previous_run,
    epoch_checkpoints,
    peek,
    read_checkpoint,
    save_checkpoint,
    write_best,
)
from metrics import CiderD, bleu4, tokenize
from utils import (
    Messages,
    UserError,
    is_main_process,
    pick_device,
    printable,
    processes,
    write_table,
)

# --- processes and precision --------------------------------------------------------------------------------


@dataclass
class Run:
    """Where a training runs: its processes, this process's device, its precision."""

    state: PartialState
    device: torch.device
    mixed_precision: str  # what is used, whatever was asked for
    autocast_dtype: torch.dtype | None
    scaler: torch.amp.GradScaler
    log_file: Path | None = None  # what is logged is appended here too
    waiting: list[str] = field(default_factory=list)  # logged before there was a file
    busy: BusyWatch = field(default_factory=lambda: BusyWatch())

    @classmethod
    def start(cls, mixed_precision: str) -> Run:
        """mixed_precision: "no", "bf16" or "fp16"; the latter two on CUDA alone."""
        device = pick_device()
        if device.type != "cuda" and mixed_precision != "no":
            processes().print("mixed precision is for CUDA; training in float32")
            mixed_precision = "no"
        dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
        scaler = torch.amp.GradScaler(device.type, enabled=mixed_precision == "fp16")
        return cls(processes(), device, mixed_precision, dtype, scaler)

    @property
    def is_main(self) -> bool:
        return self.state.is_main_process

    def log(self, text: str) -> None:
        """Print, and append to `log_file`, once for all processes."""
        if not self.is_main:
            return
        print(text, flush=True)
        self.waiting.append(text)
        if self.log_file:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            with named_in_errors(self.log_file), self.log_file.open("a", encoding="utf-8") as stream:
                stream.writelines(f"{line}\n" for line in self.waiting)
            self.waiting.clear()

    def log_many(self, kind: str, texts: Sequence[str]) -> None:
        """Append messages of one kind to `log_file`, before the next line that is logged; print a few."""
        if not self.is_main:
            return
        messages = Messages(kind)
        for text in texts:
            messages.add(text)
        messages.finish("; train.log lists all")
        self.waiting += [printable(f"{kind}: {text}") for text in texts]

    def patience_ends(self, waited: int, settings) -> bool:
        """Whether so many epochs without a better score are as many as `settings.patience`; if so, say it."""
        ends = bool(settings.patience) and waited >= settings.patience
        if ends:
            self.log(f"stopped: no better {settings.select_by} for {waited} epochs")
        return ends

    def describe(self) -> str:
        return f"{self.state.num_processes} x {self.device.type}"

    def autocast(self) -> AbstractContextManager:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients; the losses of a step, over all its batches and processes, add up."""
        with self.busy:
            self.scaler.scale(loss).backward()
        if self.device.type == "cpu" and self.busy.is_new():
            self.log(
                f"the machine is busy: a step takes {self.busy.slowdown():.0f} times its CPU time; with "
                f"OMP_NUM_THREADS=1 in front of the command, threads do not wait for each other"
            )

    def step(
        self, optimizer: torch.optim.Optimizer, grad_clip: float, grad_clip_by: str, divisor: float = 1.0
    ) -> None:
        """Add up the processes' gradients, divide them by `divisor`, clip them, update the weights, forget
        the gradients.

        grad_clip: largest value of a gradient, or largest norm of all together, as `grad_clip_by` says
            ("value" or "norm").
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.state.num_processes > 1:
            sum_gradients(parameters)
        self.scaler.unscale_(optimizer)
        if divisor != 1:
            torch._foreach_div_([parameter.grad for parameter in parameters], divisor)
        if grad_clip_by == "norm":
            torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
        else:
            torch.nn.utils.clip_grad_value_(parameters, grad_clip)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def mean_loss(self, total: Tensor, steps: int, epoch: int, remedy: str) -> float:
        """Mean loss per step: `total` is this process's share of the summed losses; the processes' shares are
        added.

        Raises:
            UserError: it is not a number; `remedy` says what to do.
        """
        total = reduce(total.clone(), "sum") if self.state.num_processes > 1 else total
        mean = float(total) / steps
        if not math.isfinite(mean):
            raise UserError(f"the loss is no longer a number in epoch {epoch}: {remedy}")
        return mean

    def states(self, optimizer: torch.optim.Optimizer, rates: LearningRate) -> dict[str, dict]:
        """What `Resumed.restore` needs of a checkpoint."""
        return {
            "optimizer": optimizer.state_dict(),
            "rates": rates.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def gather(self, items: dict[int, object]) -> dict[int, object]:
        """The processes' dictionaries joined."""
        if self.state.num_processes == 1:
            return items
        return {key: value for part in gather_object([items]) for key, value in part.items()}


class BusyWatch:
    """Detects that too many threads compete for the cores: the backward pass takes far more time than CPU
    time."""

    def __init__(self):
        self.wall = self.cpu = 0.0  # seconds inside the `with` blocks: passed, and worked by this thread
        self.is_told = torch.get_num_threads() == 1

    def __enter__(self) -> None:
        self.began = time.perf_counter(), time.thread_time()

    def __exit__(self, *_) -> None:
        self.wall += time.perf_counter() - self.began[0]
        self.cpu += time.thread_time() - self.began[1]

    def slowdown(self) -> float:
        return self.wall / max(self.cpu, 1e-9)

    def is_new(self) -> bool:
        """True once, when over five seconds or more the work took three times its CPU time."""
        if self.is_told or self.wall < 5 or self.slowdown() < 3:
            return False
        self.is_told = True
        return True


BUCKET = 2**23  # gradients that are added up at once


def sum_gradients(parameters: list[Tensor]) -> None:
    """Add up the processes' gradients in place, a bucket of parameters at a time."""
    bucket: list[Tensor] = []
    for number, parameter in enumerate(parameters, start=1):
        bucket.append(parameter.grad)
        sizes = [gradient.numel() for gradient in bucket]
        if sum(sizes) >= BUCKET or number == len(parameters):
            summed = reduce(torch.cat([gradient.flatten() for gradient in bucket]), "sum")
            for gradient, values in zip(bucket, summed.split(sizes)):
                gradient.copy_(values.view_as(gradient))
            bucket = []


# --- learning rate ------------------------------------------------------------------------------------------


class LearningRate:
    """Learning-rate schedule of an optimizer's groups; their rates at construction are the base rates.

    plateau: times `decay` after every `decay_after` epochs without a better score.
    cosine: rises over the first `warmup` share of the steps, then falls to 0 along a half cosine (Loshchilov
    and Hutter, 2017, without restarts).

    Args:
        settings: of the training: `lr_schedule` ("plateau" or "cosine"), `warmup`, `decay_after`, `decay`.
        total_steps: of the whole training.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings, total_steps: int):
        self.optimizer, self.kind, self.total_steps = optimizer, settings.lr_schedule, total_steps
        self.warmup_steps = round(settings.warmup * total_steps)
        self.decay_after, self.decay = settings.decay_after, settings.decay
        self.base = [group["lr"] for group in optimizer.param_groups]
        self.steps, self.decays, self.constant = 0, [0] * len(self.base), None
        self._apply()

    def hold(self, rate: float | None) -> None:
        """From now on this rate for all groups; None: the schedule."""
        self.constant = rate
        self._apply()

    def after_step(self) -> None:
        self.steps += 1
        if self.kind == "cosine":
            self._apply()

    def before_epoch(self, epochs_since_improvement: int) -> None:
        waited = epochs_since_improvement
        if self.kind == "plateau" and waited and waited % self.decay_after == 0:
            self.decays = [count + 1 for count in self.decays]
            self._apply()

    def describe(self) -> str:
        return " and ".join(f"{group['lr']:.2g}" for group in self.optimizer.param_groups)

    def state_dict(self) -> dict:
        return {"steps": self.steps, "decays": self.decays}

    def load_state_dict(self, state: dict, restart: Iterable[int] = ()) -> None:
        """Go on; the groups in `restart` got another base rate, so that they begin without decays."""
        self.steps, self.decays = state["steps"], list(state["decays"])
        for group in restart:
            self.decays[group] = 0
        self._apply()

    def _apply(self) -> None:
        factor = 1.0
        if self.kind == "cosine":
            after = self.steps - self.warmup_steps
            if after < 0:
                factor = self.steps / self.warmup_steps
            else:
                share = after / max(1, self.total_steps - self.warmup_steps)
                factor = max(0.0, 0.5 * (1 + math.cos(math.pi * share)))
        for group, base, decays in zip(self.optimizer.param_groups, self.base, self.decays):
            group["lr"] = base * factor * self.decay**decays if self.constant is None else self.constant


# --- history ------------------------------------------------------------------------------------------------


def best_epoch(history: list[dict], score: str) -> int:
    """Index of the first epoch with the highest `score` ("val_cider"); where all are 0, of the last."""
    if not any(line[score] > 1e-6 for line in history):  # without a match, BLEU-4 is not quite 0
        return len(history) - 1
    return max(range(len(history)), key=lambda index: history[index][score])


def epochs_since_improvement(history: list[dict], score: str) -> int:
    return len(history) - 1 - best_epoch(history, score) if history else 0


def epochs_of_patience(history: list[dict], settings) -> int:
    """Epochs without a better score that count against `patience`; where a self-critical stage follows or has
    begun, those of that stage alone."""
    waited = epochs_since_improvement(history, settings.score)
    if getattr(settings, "self_critical_after", None) is None:
        return waited
    return min(waited, sum(REWARD in line for line in history))


def caption_scores(references: list[list[list[str]]], captions: dict[int, str]) -> dict[str, float]:
    """{"val_bleu4", "val_cider"} of captions by index; references are tokenized, several of each image."""
    hypotheses = [tokenize(captions[index]) for index in range(len(references))]
    cider = CiderD.from_references(references).score(references, hypotheses)
    return {"val_bleu4": bleu4(references, hypotheses), "val_cider": math.fsum(cider) / len(cider)}


def report_best(run: Run, history: list[dict], score: str, output: Path) -> dict:
    """Log and return the best epoch's row of the history."""
    best = history[best_epoch(history, score)]
    run.log(
        f"best: epoch {best['epoch']} with validation BLEU-4 {best['val_bleu4']:.4f}, "
        f"CIDEr {best['val_cider']:.4f}; written to {output}/"
    )
    return best


def start_outputs(output: Path, source: Path | None, epochs: int, patterns: Sequence[str]) -> None:
    """Leave in the output folder what belongs to the run that begins, and move the rest to earlier_N.

    Args:
        source: the checkpoint that the run goes on from, if any. epochs: that it has.
        patterns: of a run's files.
    """
    if source is None or source.resolve().parent != output.resolve():
        archive_previous_run(output, *patterns)
        return
    abandoned = epoch_checkpoints(output, after=epochs)
    if source.name != LAST:
        remove_superseded_state(output)
        abandoned += output.glob(LAST)
    if abandoned:
        print(f"what {output}/ had after epoch {epochs} is now in {archive(output, abandoned)}/")
    repair_outputs(output)


def copy_best(source: Path, history: list[dict], score: str, output: Path) -> None:
    """Give the output folder of a run that goes on from the checkpoint `source` of another folder the best
    epoch so far, which is that checkpoint or stands beside it: the run may not find a better one."""
    if not history or source.resolve().parent == output.resolve():
        return
    wanted = history[: best_epoch(history, score) + 1]
    for file in (source, source.parent / "best_checkpoint.pth"):
        if peek(file).get("history") == wanted:
            output.mkdir(parents=True, exist_ok=True)
            write_best(file, read_checkpoint(file), output)
            return


def repair_outputs(output: Path) -> None:
    """Make a folder's best files, history.csv and curves.png those of its newest checkpoint, and remove the
    checkpoints before it that do not stay, where a training was killed while it did so."""
    remove_superseded_state(output)
    files = epoch_checkpoints(output)
    if not files or not is_main_process():
        return
    try:
        newest = peek(files[-1])
        history, score = newest["history"], f"val_{newest['settings']['select_by']}"
        best = best_epoch(history, score)
        file = output / f"checkpoint_epoch_{best + 1}.pth"
        wanted = history[: best + 1]
        stale = [name for name in BEST_FILES if peek(output / name).get("history") != wanted]
        if "decoder" in newest and stale:
            source = file if file.is_file() else output / "best_checkpoint.pth"
            checkpoint = read_checkpoint(source)
            if checkpoint["history"] == wanted:
                write_best(source, checkpoint)
                print(f"{output}: {', '.join(stale)} written again from {source.name}")
        table = output / "history.csv"
        if not table.is_file() or table.read_bytes().count(b"\n") != len(history) + 1:
            write_table(table, history)
        curves = output / "curves.png"
        if not curves.is_file() or curves.stat().st_mtime < table.stat().st_mtime:
            draw_curves(history, best, curves)
        superfluous = superfluous_checkpoints(output, newest["settings"]["keep_checkpoints"])
        if superfluous and read_checkpoint(files[-1]):  # whole
            for older in superfluous:
                older.unlink()
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, UserError):
        return  # not ours, or damaged: whoever reads it says so


def remove_superseded_state(output: Path) -> None:
    """Remove the state within an epoch that is now complete, where a training was killed between the two."""
    files = epoch_checkpoints(output)
    if files and (output / LAST).is_file() and is_main_process():
        history, earlier = (peek(file).get("history") for file in (files[-1], output / LAST))
        if is_earlier(earlier, history):
            (output / LAST).unlink()


def is_earlier(history: object, other: object) -> bool:
    """Whether one history is of the same run as another one, some epochs before."""
    if not isinstance(history, list) or not isinstance(other, list):
        return False
    return len(history) < len(other) and other[: len(history)] == history


def save_epoch(
    output: Path,
    checkpoint: dict,
    score: str,
    write_best: Callable[[Path, dict], None],
    keep_checkpoints: int,
) -> None:
    """Write the epoch's checkpoint and history.csv, and remove the state within it; where it is the best so
    far, call `write_best(file, checkpoint)`.

    keep_checkpoints: how many epochs' files stay; 0: all.
    """
    history = checkpoint["history"]
    file = output / f"checkpoint_epoch_{len(history)}.pth"
    save_checkpoint(file, checkpoint)
    if epochs_since_improvement(history, score) == 0:
        write_best(file, checkpoint)
    write_table(output / "history.csv", history)
    (output / LAST).unlink(missing_ok=True)
    for older in superfluous_checkpoints(output, keep_checkpoints):
        older.unlink()


def superfluous_checkpoints(output: Path, keep_checkpoints: int) -> list[Path]:
    return epoch_checkpoints(output)[:-keep_checkpoints] if keep_checkpoints else []
