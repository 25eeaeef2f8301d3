"""Saving and resuming in mid-epoch: `last.pth`, written every few minutes and when a signal ends the run.

    saver = Saver(run, output, minutes, checkpoint, resumed)
    for epoch in ...:
        progress = saver.start_epoch(epoch, len(steps), seed)  # its beginning, or where it was interrupted
        with saver.training():                # a signal waits for the end of its step
            for step in saver.steps_left(steps):
                ...                           # train; add to progress.loss and progress.steps
                saver.after_step()
        with saver.finishing():               # a signal ends the run at once
            ...                               # validate, write the epoch's checkpoint

`last.pth` is an epoch's checkpoint with one more key, `progress`. On the CPU a training that goes on from it
ends with the same numbers, bit for bit, as one that was not interrupted. For that, all random numbers come
from torch's default generators, or from generators seeded by `seed`, the epoch and the step or image.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from captioning.training.loop import Run
from captioning.training.resume import Resumed
from captioning.weights.checkpoints import LAST, save_checkpoint
from utils import Terminated, UserError, progress_bar

SAVE = 1  # what the processes agree on after a step: this, or the number of the signal that ends the run
SAME_SIGNAL = 2.0  # seconds: torchrun passes on a Ctrl-C that its processes get from the terminal too


@dataclass
class Progress:
    """How far an epoch has come."""

    epoch: int
    total_steps: int
    loss: Tensor  # (), summed over this process's batches
    totals: dict[str, float | Tensor] = field(default_factory=dict)  # what else is summed over them, by name
    steps: int = 0  # done
    captions: int = 0  # trained on, by all processes
    line: dict[str, float] = field(default_factory=dict)  # of the history, as far as it is known
    earlier_seconds: float = 0.0  # that the epoch took before an interruption
    began: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.began


class Saver:
    """Saves the state of a training within an epoch, and ends the training when a signal comes.

    Args:
        minutes: between two saves; 0: only a signal saves.
        checkpoint: gives what a checkpoint of the last complete epoch would have, with the weights as they
            are; called in the main process.
        resumed: what the training goes on from, if anything.
        data: plain values by which the training data are recognized; other data are not gone on with in
            mid-epoch.
    """

    def __init__(
        self,
        run: Run,
        output: Path,
        minutes: float,
        checkpoint: Callable[[], dict],
        resumed: Resumed | None = None,
        data: object = None,
    ):
        self.run, self.output, self.checkpoint, self.data = run, output, checkpoint, data
        self.interval = 60 * minutes or math.inf
        self.due = time.monotonic() + self.interval
        self.unfinished = resumed.progress if resumed else None  # of the epoch that the run goes on in
        self.progress: Progress | None = None
        self.signal, self.came_at = 0, 0.0  # the first signal that came during the steps, and when
        self.group = None
        if run.state.num_processes > 1:  # on the CPU: asking the others must not wait for the GPU
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=12))

    @property
    def goes_on(self) -> bool:
        """Whether the next epoch is one that was interrupted."""
        return self.unfinished is not None

    def start_epoch(self, epoch: int, total_steps: int, seed: int) -> Progress:
        """Seed torch's generators, or set them, and the rest, to where the epoch was interrupted.

        Raises:
            UserError: the interrupted epoch had another number of steps.
        """
        torch.manual_seed(seed)
        self.progress = Progress(epoch, total_steps, torch.zeros((), device=self.run.device))
        saved, self.unfinished = self.unfinished, None
        if saved:
            if saved["total_steps"] != total_steps or saved["steps"] > total_steps:
                raise UserError(
                    f"{self.output / LAST}: from an epoch of {saved['total_steps']} steps, but there are "
                    f"{total_steps}; give --checkpoint and an epoch's file"
                )
            own = saved["processes"][self.run.state.process_index]
            self.progress.loss += own["loss"]
            self.progress.totals = dict(own["totals"])
            self.progress.steps, self.progress.captions = saved["steps"], saved["captions"]
            self.progress.line, self.progress.earlier_seconds = dict(saved["line"]), saved["seconds"]
            set_random_states(own["random"], self.run.device)
        return self.progress

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around the steps of an epoch: a signal is noted, and `after_step` acts on it; a second one ends the
        run without saving."""
        with note_signals(self._note):
            try:
                yield
            except RuntimeError:  # so collectives fail when another process has left
                self._wait_for_signal()
                if self.signal and self.group:
                    raise ending(self.signal, "") from None
                raise

    def steps_left(self, steps: Sequence) -> tqdm:
        """A progress bar of the epoch's steps that are not done yet."""
        done, hidden = self.progress.steps, not self.run.is_main
        bar = {"desc": f"epoch {self.progress.epoch}", "unit": "step", "disable": hidden}
        return progress_bar(steps[done:], initial=done, total=len(steps), **bar)

    def after_step(self) -> None:
        """Save where it is time, and end the run where a signal came; for all processes, between steps."""
        request = self.signal
        if not request and self.run.is_main and time.monotonic() >= self.due:
            request = SAVE
        if self.group:
            requests = torch.tensor(request)
            torch.distributed.all_reduce(requests, torch.distributed.ReduceOp.MAX, self.group)
            request = int(requests)
        if request:
            problem = self._write(self._state())
            if request != SAVE:
                raise ending(request, self._how_to_go_on(problem))
            if problem:
                self.run.log(f"epoch {self.progress.epoch} is {problem}; the training goes on")

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """From the last step of an epoch to its checkpoint: a signal ends the run at once, and what is saved
        is the state after the last step."""
        with note_signals(self._note):  # waiting for the other processes, too
            if self.group or self.signal:  # one may have come since
                self.after_step()
            state = self._state()
            if self.signal:
                raise ending(self.signal, self._how_to_go_on(self._write(state)))
        try:
            try:
                yield
            except RuntimeError:
                self._wait_for_signal()
                raise
        except KeyboardInterrupt as interrupt:
            self._note(signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)
            with note_signals(self._note):
                complete = (self.output / f"checkpoint_epoch_{self.progress.epoch}.pth").is_file()
                problem = None if complete else self._write(state)
                raise ending(self.signal, self._how_to_go_on(problem, complete)) from None

    def _note(self, number: int, _frame: object = None) -> None:
        """Handle a signal."""
        if self.signal and time.monotonic() > self.came_at + SAME_SIGNAL:
            raise ending(number, "")
        if not self.signal:
            self.signal, self.came_at = int(number), time.monotonic()

    def _wait_for_signal(self) -> None:
        """Where another process has left as it got a signal, this one gets it too."""
        if self.group:
            time.sleep(1)

    def _state(self) -> dict:
        """The content of last.pth, in the main process; the others give their share."""
        progress, rank = self.progress, self.run.state.process_index
        totals = {name: float(value) for name, value in progress.totals.items() if math.isfinite(value)}
        own = {"loss": float(progress.loss), "totals": totals}
        shares = self.run.gather({rank: own | {"random": random_states(self.run.device)}})
        if not self.run.is_main:
            return {}
        position = {
            "epoch": progress.epoch,
            "steps": progress.steps,
            "total_steps": progress.total_steps,
            "captions": progress.captions,
            "seconds": progress.seconds(),
            "line": dict(progress.line),
            "processes": [shares[rank] for rank in range(len(shares))],
            "data": self.data,
        }
        return self.checkpoint() | {"progress": position}

    def _write(self, state: dict) -> str | None:
        """Write last.pth, in the main process; return what went wrong, if anything did."""
        problem = None
        if self.run.is_main:
            try:
                save_checkpoint(self.output / LAST, state)
            except OSError as error:
                problem = f"not saved in {error.filename} ({error.strerror})"
        self.due = time.monotonic() + self.interval
        return problem

    def _how_to_go_on(self, problem: str | None, complete: bool = False) -> str:
        progress = self.progress
        saved = f"saved after {progress.steps} of its {progress.total_steps} steps in {self.output / LAST}"
        if problem or complete:
            saved = problem or f"complete in {self.output}/"
        return f"epoch {progress.epoch} is {saved}; go on with --resume (run_pipeline.py goes on by itself)"


def ending(number: int, message: str) -> KeyboardInterrupt:
    """The exception that ends the run after a signal."""
    return (Terminated if number == signal.SIGTERM else KeyboardInterrupt)(message)


@contextmanager
def note_signals(handler: Callable) -> Iterator[None]:
    """Call `handler(number, frame)` for SIGTERM and Ctrl-C; other threads than the main one cannot."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in earlier.items():
            if previous is not None:  # it was Python's
                signal.signal(number, previous)


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
