"""Progress reports during a training: sample captions, the time that remains, curves.png, trackers."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from captioning.training.curves import draw_curves
from captioning.training.loop import Run, best_epoch
from utils import UserError, printable

SAMPLES = 3  # validation images whose captions are printed after every epoch
LONGEST_SAMPLE = 90  # characters


class Monitor:
    """Reports the epochs of a training.

    Args:
        settings: of the training; `log_with` is "none", "tensorboard" or "wandb".
        image_ids: of the validation images.

    Raises:
        UserError: the tracker's package is not installed.
    """

    def __init__(self, run: Run, output: Path, settings, image_ids: list[str]):
        self.run, self.output, self.settings, self.image_ids = run, output, settings, image_ids
        count = len(image_ids)
        self.samples = sorted({count * number // SAMPLES for number in range(SAMPLES)}) if count else []
        self.seconds: list[float] = []  # of this run's epochs
        self.tracker = start_tracker(settings, output) if run.is_main else None

    def report_epoch(self, history: list[dict], captions: dict[int, str], text: str) -> None:
        """Report the last epoch of the history; `text` says how it went, `captions` are by image index."""
        line, run = history[-1], self.run
        run.log(f"epoch {line['epoch']}: {text}")
        for index in self.samples:
            caption = textwrap.shorten(captions[index], LONGEST_SAMPLE, placeholder=" ...")
            run.log(f"    {printable(self.image_ids[index])}: {printable(caption)}")
        self.seconds.append(line["seconds"])
        left = self.settings.epochs - line["epoch"]
        if left:
            seconds = left * sum(self.seconds) / len(self.seconds)
            run.log(f"    {duration(seconds)} left for {left} epoch{'s' if left > 1 else ''}")
        if run.is_main:
            draw_curves(history, best_epoch(history, self.settings.score), self.output / "curves.png")
            if self.tracker:
                self.tracker.log(line, step=line["epoch"])


def duration(seconds: float) -> str:
    """ "2 h 05 min", "3 min", "40 s" """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 90 else f"{minutes} min"


def start_tracker(settings, output: Path) -> Any:
    """Accelerate's tracker for `settings.log_with`, told the settings; None for "none"."""
    if settings.log_with == "none":
        return None
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if settings.log_with not in {str(name) for name in get_available_trackers()}:
        raise UserError(f"--log_with {settings.log_with} needs: pip install {settings.log_with}")
    tracker_class = LOGGER_TYPE_TO_CLASS[settings.log_with]
    where = {"logging_dir": str(output)} if tracker_class.requires_logging_directory else {}
    tracker = tracker_class(output.name or "training", **where)
    if hasattr(tracker, "start"):  # newer ones start here
        tracker.start()
    plain = {name: value if isinstance(value, (int, float, bool)) else str(value)
             for name, value in asdict(settings).items()}  # fmt: skip
    tracker.store_init_configuration(plain)
    return tracker
