"""A step of the optimizer: processes and precision, gradients, learning rate, averaged weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from captioning.files import named_in_errors, open_to_append
from captioning.training.resume import TrainingSettings
from utils import Messages, is_main_process, pick_device, printable, processes, say

# --- processes and precision --------------------------------------------------------------------------------


@dataclass
class Run:
    """Where a training runs: its processes, this process's device, its precision, its log."""

    state: PartialState
    device: torch.device
    mixed_precision: str  # what is used, whatever was asked for
    autocast_dtype: torch.dtype | None
    scaler: torch.amp.GradScaler
    log_file: Path | None = None  # what is logged is appended here too
    unwritten: list[str] = field(default_factory=list)  # logged before there was a file
    lost_worker: int | None = None  # the signal that killed a process which loads batches; 0: none did

    @classmethod
    def start(cls, mixed_precision: str) -> Run:
        """mixed_precision: "no", "bf16" or "fp16"; the latter two on CUDA alone."""
        device = pick_device()
        if device.type != "cuda" and mixed_precision != "no":
            if is_main_process():
                say("mixed precision is for CUDA; training in float32")
            mixed_precision = "no"
        dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
        scaler = torch.amp.GradScaler(device.type, enabled=mixed_precision == "fp16")
        return cls(processes(), device, mixed_precision, dtype, scaler)

    @property
    def is_main(self) -> bool:
        return self.state.is_main_process

    def describe(self) -> str:
        return f"{self.state.num_processes} x {self.device.type}"

    def lose_worker(self, number: int) -> None:
        """A process that loads batches was killed by this signal, or ended by itself, 0."""
        self.lost_worker = number

    def log(self, text: str) -> None:
        """Print, and append to the log's file, once for all processes."""
        if not self.is_main:
            return
        say(text)
        self.unwritten.append(printable(text))
        if self.log_file:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            with named_in_errors(self.log_file), open_to_append(self.log_file) as stream:
                stream.writelines(f"{line}\n" for line in self.unwritten)
            self.unwritten.clear()

    def log_many(self, kind: str, texts: Sequence[str]) -> None:
        """Append messages of one kind to the log, before the next line that is logged; print a few."""
        if not self.is_main:
            return
        messages = Messages(kind)
        for text in texts:
            messages.add(text)
        messages.finish("; train.log lists all")
        self.unwritten += [printable(f"{kind}: {text}") for text in texts]

    def log_to(self, file: Path) -> None:
        """From the next line on, append the log to this file, with what was logged before."""
        self.log_file = file

    def autocast(self) -> AbstractContextManager:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients; the losses of a step, over all its batches and processes, add up."""
        self.scaler.scale(loss).backward()

    def reduce_gradients(self, optimizer: torch.optim.Optimizer, divisor: float = 1.0) -> None:
        """Add up the processes' gradients, and divide them by `divisor`.

        By hand and not by DistributedDataParallel: that averages the gradients of the parameters that were
        trainable when it was made. Here losses are parts of a sum, whose divisor may be known only after the
        last backward pass, and the encoder is unfrozen on the way.
        """
        parameters = with_gradients(optimizer)
        if self.state.num_processes > 1:
            sum_gradients(parameters)
        self.scaler.unscale_(optimizer)
        if divisor != 1:
            torch._foreach_div_([parameter.grad for parameter in parameters], divisor)

    def clip_gradients(self, optimizer: torch.optim.Optimizer, limit: float, by: str) -> None:
        """limit: largest value of a gradient, or largest norm of all together: `by` "value" or "norm"."""
        if by == "norm":
            torch.nn.utils.clip_grad_norm_(with_gradients(optimizer), limit)
        else:
            torch.nn.utils.clip_grad_value_(with_gradients(optimizer), limit)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the weights, but where fp16's gradients overflowed, and forget the gradients."""
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def sum(self, values: Tensor) -> Tensor:
        """The processes' values added up."""
        return values if self.state.num_processes == 1 else reduce(values.to(self.device), "sum")

    def gather(self, items: dict[int, object]) -> dict[int, object]:
        """The processes' dictionaries joined."""
        if self.state.num_processes == 1:
            return items
        return {key: value for part in gather_object([items]) for key, value in part.items()}


def with_gradients(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


BUCKET = 2**23  # gradients that are added up at once


def sum_gradients(parameters: list[nn.Parameter]) -> None:
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


# --- learning rate and weights ------------------------------------------------------------------------------


class LearningRate:
    """Learning-rate schedule of an optimizer's groups; their rates at construction are the base rates.

    train.py takes plateau and train_model.py cosine, unless `--lr_schedule` says otherwise.

    plateau: times `decay` after every `decay_after` epochs without a better score.
    cosine: rises over the first `warmup` share of the `total_steps`, then falls to 0 along a half cosine
    (Loshchilov and Hutter, 2017, without restarts).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: TrainingSettings, total_steps: int):
        self.optimizer, self.kind, self.total_steps = optimizer, settings.lr_schedule, total_steps
        self.warmup_steps = round(settings.warmup * total_steps)
        self.decay_after, self.decay = settings.decay_after, settings.decay
        self.base = [group["lr"] for group in optimizer.param_groups]
        self.steps, self.decays, self.constant = 0, [0] * len(self.base), None
        self.names = settings.rate_names  # the settings that the rates come from
        self._apply()

    def hold(self, rate: float, name: str) -> None:
        """From now on this rate, the setting `name`, for all groups."""
        self.constant, self.names = rate, (name,)
        self._apply()

    def after_step(self) -> None:
        self.steps += 1
        if self.kind == "cosine":
            self._apply()

    def before_epoch(self, epochs_since_improvement: int) -> None:
        if (
            self.kind == "plateau"
            and epochs_since_improvement
            and epochs_since_improvement % self.decay_after == 0
        ):
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


class TrainedWeights:
    """The weights of models that are trained and, with a `decay`, their exponential moving averages.

    average = decay * average + (1 - decay) * weights, after every step. In the first steps the decay is
    lower, (1 + steps) / (10 + steps), so that the average soon forgets the random weights that it began with.
    The function is torch's; its AveragedModel would let the host wait for the GPU after every step.

    Args:
        models: by the names under which a checkpoint has their weights.
        decay: in [0, 1); 0: no averages.
    """

    def __init__(self, models: dict[str, nn.Module], decay: float = 0.0):
        self.models, self.decay = models, decay
        self.from_start = [name for name, model in models.items() if decay and is_trained(model)]
        self.averages = {name: copy.deepcopy(models[name]) for name in self.from_start}

    def averaged(self, name: str) -> nn.Module:
        """The model with the averaged weights; itself where it has no average."""
        return self.averages.get(name, self.models[name])

    def update(self, steps: int) -> None:
        """Take in the weights after the `steps`th step; those that are frozen do not change."""
        if not self.decay:
            return
        average_weights = get_ema_multi_avg_fn(min(self.decay, (1 + steps) / (10 + steps)))
        for name, model in self.models.items():
            if is_trained(model):
                if name not in self.averages:  # it was frozen until now
                    self.averages[name] = copy.deepcopy(model)
                pairs = zip(self.averages[name].parameters(), model.parameters())
                averages, weights = zip(*((old, new) for old, new in pairs if new.requires_grad))
                average_weights(averages, weights, None)

    def states(self) -> dict[str, dict]:
        """The weights as a checkpoint has them: the averages and, of each model that has one, in "unaveraged"
        those that are trained."""
        states = {name: self.averaged(name).state_dict() for name in self.models}
        if self.decay:
            states["unaveraged"] = {name: self.models[name].state_dict() for name in self.averages}
        return states

    def load(self, checkpoint: dict) -> None:
        """Load `states`; without a decay, or where there are no others, the averages are trained on."""
        unaveraged = checkpoint.get("unaveraged", {}) if self.decay else {}
        for name, model in self.models.items():
            model.load_state_dict(unaveraged.get(name, checkpoint[name]))
        with_average = [name for name in self.models if name in unaveraged or name in self.from_start]
        self.averages = {name: copy.deepcopy(self.models[name]) for name in with_average}
        for name, average in self.averages.items():
            average.load_state_dict(checkpoint[name])


def is_trained(model: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in model.parameters())
