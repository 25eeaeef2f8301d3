"""The loop of both trainings: epochs, resuming, saving, signals, patience, reports; without model or loss.

    with training.stopping_on_signals():
        for epoch in training.epochs():  # those that are left, until patience ends
            for step in epoch.steps(loader):  # those that are left
                for indices, batch in step.batches:  # grad_accumulation of them
                    run.backward(loss)
                run.step(optimizer)
                epoch.record(loss)
            epoch.finish(scores, captions)  # history, checkpoint, report

Between two steps the learning rate and the averaged weights follow, and `last.pth` is written where it is
time, or where a signal ends the run. On the CPU a training that goes on from there ends with the same
numbers, bit for bit, as one that was not interrupted. For that, all random numbers come from torch's default
generators, or from generators seeded by `seed`, the epoch and the step or image.
"""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from captioning.training.monitor import Monitor, begin_outputs, describe_training, save_epoch
from captioning.training.optimization import LearningRate, Run, TrainedWeights
from captioning.training.resume import (
    Resumed,
    StopSignals,
    TrainingSettings,
    best_epoch,
    ending,
    epochs_of_patience,
    epochs_since_improvement,
    random_states,
    set_random_states,
)
from captioning.weights.checkpoints import LAST, check_room, load_optimizer, save_checkpoint
from datasets import BatchSampler, describe_death
from utils import Terminated, UserError, progress_bar

# what the processes agree on after a step: nothing, 0; SAVE; the number of the signal that ends the run; or
# LOST_WORKER and the number of the signal that killed a process which loads batches
SAVE, LOST_WORKER = 1, 100


class Training:
    """The state of a training, of which checkpoints are made, and its epochs.

    Args:
        models: by the names under which a checkpoint has their weights.
        about: what a checkpoint has beside the state: a word map, what the data are.
        resumed: what the training goes on from, if anything.
        data: plain values by which the training data are recognized in mid-epoch.
        average: decay of the moving average of the weights; 0: none.

    Attributes:
        history: a row of numbers for each complete epoch.
        epoch: the one that runs.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        run: Run,
        models: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        sampler: BatchSampler,
        about: dict[str, object],
        resumed: Resumed | None = None,
        data: object = None,
        average: float = 0.0,
    ):
        self.settings, self.run, self.optimizer, self.sampler = settings, run, optimizer, sampler
        self.about, self.resumed, self.data, self.output = about, resumed, data, Path(settings.output_folder)
        self.history: list[dict] = list(resumed.history) if resumed else []
        self.schedule = LearningRate(optimizer, settings, len(sampler.steps) * settings.scheduled_epochs)
        self.weights = TrainedWeights(models, average)
        if resumed:
            self._restore(resumed)
        self.monitor = Monitor(settings, run.log, run.is_main)
        self.first_epoch, self.epoch = len(self.history) + 1, None
        self.signals, self.outputs_begun = StopSignals(), False
        self.save_interval = 60 * settings.save_every or math.inf  # seconds
        self.after_steps: dict | None = None  # content of `last.pth`, while the epoch is validated and saved
        self.group = None
        if run.state.num_processes > 1:  # on the CPU: asking the others must not wait for the GPU
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=12))

    def epochs(self) -> Iterator[Epoch]:
        """The epochs that are left, until `patience` of them bring no better score."""
        settings, interrupted = self.settings, self.resumed.mid_epoch if self.resumed else None
        while len(self.history) < settings.epochs:
            without_better = epochs_of_patience(self.history, settings)
            if 0 < settings.patience <= without_better:
                self.begin_outputs()  # where it has come to that before the resume
                self.run.log(f"stopped: no better {settings.select_by} for {without_better} epochs")
                break
            self._stop_without_workers()
            if not interrupted:
                self.schedule.before_epoch(epochs_since_improvement(self.history, settings.score))
            self.epoch = Epoch(self, len(self.history) + 1, interrupted)
            interrupted = None
            yield self.epoch

    def report_best(self) -> dict:
        """Log and return the best epoch's row of the history."""
        best = self.history[best_epoch(self.history, self.settings.score)]
        self.run.log(
            f"best: epoch {best['epoch']} with validation BLEU-4 {best['val_bleu4']:.4f}, "
            f"CIDEr {best['val_cider']:.4f}; written to {self.output}/"
        )
        return best

    def checkpoint(self) -> dict:
        """What a checkpoint of the last complete epoch has, with the weights as they are."""
        return {
            "settings": asdict(self.settings),
            "defaults": self.settings.defaults(),
            **self.about,
            "history": list(self.history),
            **self.weights.states(),
            "optimizer": self.optimizer.state_dict(),
            "rates": self.schedule.state_dict(),
            "scaler": self.run.scaler.state_dict(),
        }

    def _restore(self, resumed: Resumed) -> None:
        """Take the state from a checkpoint; one from elsewhere has weights alone."""
        content, names = resumed.checkpoint, self.settings.rate_names
        self.weights.load(content)
        has_optimizer = {"optimizer", "rates"} <= content.keys()
        if has_optimizer:
            load_optimizer(self.optimizer, content["optimizer"], resumed.source)
            if len(content["rates"]["decays"]) != len(names):
                raise UserError(f"{resumed.source}: its learning rates are damaged")
            changed = [group for group, name in enumerate(names) if name in resumed.changed]
            self.schedule.load_state_dict(content["rates"], restart=changed)
            if content.get("scaler") and self.run.scaler.is_enabled():
                self.run.scaler.load_state_dict(content["scaler"])
        self.run.log(
            f"going on {resumed.describe_place()}; {resumed.differences}; Adam's state "
            f"{'kept' if has_optimizer else 'starts anew'}; learning rates now {self.schedule.describe()}"
        )

    def begin_outputs(self) -> None:
        """Before the first step: look for room, make the output folder this run's, begin its log."""
        if not self.outputs_begun:
            if self.run.is_main:
                epochs, keep = self.settings.epochs - len(self.history), self.settings.keep_checkpoints
                check_room(self.output, self.optimizer, epochs, keep, self.run.log)
                begin_outputs(self.settings, self.resumed)
            self.run.log_to(self.output / "train.log")
            self.save_time, self.outputs_begun = time.monotonic() + self.save_interval, True

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the run such that it can go on: during the steps, after the current one;
        while the epoch is validated and saved, at once, with the state after its last step. A second signal
        ends it without saving."""
        with self.signals.caught():
            try:
                try:
                    yield
                except RuntimeError:  # so collectives fail when another process has left, as it got a signal
                    if self.group:
                        time.sleep(1)  # this one gets it too
                        if self.signals.number:
                            raise ending(self.signals.number) from None
                    raise
            except KeyboardInterrupt as interrupt:
                if self.after_steps is None:
                    raise
                number = signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT
                self.signals.delay(number)
                complete = (self.output / f"checkpoint_epoch_{self.epoch.number}.pth").is_file()
                problem = None if complete else self._write(self.after_steps)
                raise ending(number, self._how_to_go_on(problem, complete)) from None

    def save_or_stop(self) -> None:
        """Between two steps, in all processes: write `last.pth` where it is time, and end the run where a
        signal came, or a process that loads batches was killed."""
        request = self.signals.number
        if not request and self.run.is_main and time.monotonic() >= self.save_time:
            request = SAVE
        request = self._agree(request)
        if request:
            problem = self._write(self.mid_epoch_state())
            if request >= LOST_WORKER:
                raise self._loss_of_worker(request, self._how_to_go_on(problem))
            if request != SAVE:
                raise ending(request, self._how_to_go_on(problem))
            if problem:
                self.run.log(f"epoch {self.epoch.number} is {problem}; the training goes on")

    def _stop_without_workers(self) -> None:
        """Between two epochs, in all processes: end the run where a process that loads batches was killed in
        the validation, the rest of which was read without it."""
        request = self._agree(0)
        if request >= LOST_WORKER:
            raise self._loss_of_worker(request, self._how_to_go_on(None, complete=True))

    def _agree(self, request: int) -> int:
        """What all processes do: the largest of their requests."""
        if self.run.lost_worker is not None:
            request = LOST_WORKER + self.run.lost_worker
        if self.group:
            requests = torch.tensor(request)
            torch.distributed.all_reduce(requests, torch.distributed.ReduceOp.MAX, self.group)
            request = int(requests)
        return request

    @staticmethod
    def _loss_of_worker(request: int, how_to_go_on: str) -> UserError:
        return UserError(f"{describe_death(request - LOST_WORKER)}; {how_to_go_on}")

    def mid_epoch_state(self) -> dict:
        """The content of `last.pth`, in the main process; the others give their share."""
        progress = self.epoch.state() | {"data": self.data}
        return self.checkpoint() | {"progress": progress} if self.run.is_main else {}

    def _write(self, state: dict) -> str | None:
        """Write `last.pth`, in the main process; return what went wrong, if anything did."""
        problem = None
        if self.run.is_main:
            try:
                save_checkpoint(self.output / LAST, state)
            except OSError as error:
                problem = f"not saved in {error.filename} ({error.strerror})"
        self.save_time = time.monotonic() + self.save_interval
        return problem

    def _how_to_go_on(self, problem: str | None, complete: bool = False) -> str:
        epoch, state = self.epoch, problem or f"complete in {self.output}/"
        if not (problem or complete):
            state = f"saved after {epoch.steps_done} of its {epoch.total_steps} steps in {self.output / LAST}"
        return f"epoch {epoch.number} is {state}; go on with --resume (run_pipeline.py goes on by itself)"


class Step(NamedTuple):
    """The batches of one update of the weights."""

    indices: np.ndarray  # of all its images, over all micro-batches and processes
    batches: Iterator[tuple[np.ndarray, object]]  # this process's: indices of the images, what was loaded


class Epoch:
    """An epoch, and what it has come to so far, which `last.pth` keeps.

    Attributes:
        number: from 1.
        is_resumed: it was interrupted, and goes on.
        sampler: of its batches, those that are left.
        totals: what an objective adds up over this process's batches, by name.
    """

    def __init__(self, training: Training, number: int, saved: dict | None = None):
        """saved: the `state` of the interrupted epoch."""
        self.training, self.number, self.is_resumed = training, number, saved is not None
        self.sampler = training.sampler
        self.total_steps, self.steps_done, self.captions = len(self.sampler.steps), 0, 0
        self.loss = torch.zeros((), device=training.run.device)  # summed over this process's batches
        self.totals: dict[str, float | Tensor] = {}
        self.row: dict[str, float] = {"epoch": number}  # of the history, as far as it is known
        self.start_time, self.earlier_seconds, self.random_states = time.monotonic(), 0.0, None
        if saved:
            if saved["total_steps"] != self.total_steps or saved["steps"] > self.total_steps:
                raise UserError(
                    f"{training.output / LAST}: from an epoch of {saved['total_steps']} steps, but there "
                    f"are {self.total_steps}; give --checkpoint and an epoch's file"
                )
            share = saved["processes"][training.run.state.process_index]
            self.loss += share["loss"]
            self.totals, self.random_states = dict(share["totals"]), share["random"]
            self.steps_done, self.captions = saved["steps"], saved["captions"]
            self.row, self.earlier_seconds = self.row | saved["line"], saved["seconds"]
        self.sampler.start_epoch(number, self.steps_done)

    def state(self) -> dict:
        """What the epoch goes on from; every process gives its share."""
        run = self.training.run
        totals = {name: float(value) for name, value in self.totals.items() if math.isfinite(value)}
        share = {"loss": float(self.loss), "totals": totals, "random": random_states(run.device)}
        shares = run.gather({run.state.process_index: share})
        return {
            "epoch": self.number, "steps": self.steps_done, "total_steps": self.total_steps,
            "captions": self.captions, "seconds": self.seconds(), "line": dict(self.row),
            "processes": [shares[rank] for rank in range(len(shares))],
        }  # fmt: skip

    def seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.start_time

    def note(self, **numbers: float) -> None:
        """Numbers at the epoch's beginning, for its row of the history."""
        self.row = self.row | {name: self.row.get(name, value) for name, value in numbers.items()}

    def steps(self, batches: Iterable, report: Callable[[], dict[str, float]] = dict) -> Iterator[Step]:
        """The steps that are left. Before the first one, torch's generators get the epoch's seed, or the
        states that they had; between two, the rates and averages follow, and `Training.save_or_stop` acts.

        Args:
            batches: what is loaded for each of the sampler's requests that are left.
            report: further numbers on the epoch so far, for the progress bar and the history.

        Raises:
            UserError: the loss is no longer a number.
        """
        training, run, sampler = self.training, self.training.run, self.sampler
        training.begin_outputs()
        # order and dropout of an epoch do not depend on a resume; dropout differs between processes
        torch.manual_seed(training.settings.seed + self.number + 1000 * run.state.process_index)
        if self.random_states:
            set_random_states(self.random_states, run.device)
        self.start_time = time.monotonic()
        training.signals.delay()
        loaded = ((request.indices, batch) for request, batch in zip(sampler, batches))
        bar = {"desc": f"epoch {self.number}", "unit": "step", "disable": not run.is_main}
        left = sampler.steps[self.steps_done :]
        steps = progress_bar(left, initial=self.steps_done, total=self.total_steps, **bar)
        for indices in steps:
            yield Step(indices, itertools.islice(loaded, sampler.accumulation_steps))
            training.schedule.after_step()
            training.weights.update(training.schedule.steps)
            self.steps_done += 1
            if self.steps_done % 10 == 0:  # seldom: reading the loss waits for the device
                steps.set_postfix_str(describe_training(self._numbers(report)))
            training.save_or_stop()
        self.row |= self._numbers(report)
        if training.group or training.signals.number or training.run.lost_worker is not None:  # since then
            training.save_or_stop()
        training.after_steps = training.mid_epoch_state()
        training.signals.release()

    def record(self, loss: Tensor, captions: int = 0) -> None:
        """Add this process's part of a step's loss, and how many captions all processes trained on."""
        self.loss += loss
        self.captions += captions

    def _numbers(self, report: Callable[[], dict[str, float]]) -> dict[str, float]:
        loss = float(self.training.run.sum(self.loss)) / self.steps_done
        if not math.isfinite(loss):
            remedy = " or ".join(f"--{name}" for name in dict.fromkeys(self.training.schedule.names))
            raise UserError(f"the loss is no longer a number in epoch {self.number}: lower {remedy}")
        rate = {"captions_per_second": self.captions / self.seconds()} if self.captions else {}
        return {"train_loss": loss} | rate | report()

    def finish(self, scores: dict[str, float], captions: dict[str, str]) -> None:
        """Add the epoch to the history, write its checkpoint and report it.

        Args:
            scores: on the validation images. captions: of them, by their ids.
        """
        training = self.training
        self.row |= scores | {"seconds": self.seconds()}
        training.history.append(self.row)
        if training.run.is_main:
            save_epoch(training.settings, training.checkpoint())
        training.monitor.report_epoch(training.history, captions)
        training.after_steps = None
