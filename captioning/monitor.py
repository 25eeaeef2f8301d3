"""Progress reports during a training: sample captions, the time that remains, curves.png, trackers."""

from __future__ import annotations

import math
import textwrap
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from captioning.engine import REWARD, Run, best_epoch
from captioning.files import write_encoded
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
            draw_curves(history, self.settings.score, self.output / "curves.png")
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


def draw_curves(history: list[dict], score: str, file: Path) -> None:
    """Write losses, scores and learning rate over the epochs as a PNG; the best epoch is marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.4), layout="constrained")
    losses, bleu, cider, rates = figure.subplots(1, 4)
    epochs = [line["epoch"] for line in history]
    best = epochs[best_epoch(history, score)]

    def plot(axis, name: str, label: str, style: str = "-") -> None:
        if name in history[-1]:
            values = [line.get(name, math.nan) for line in history]
            axis.plot(epochs, values, style, label=label, marker="." if len(epochs) < 40 else None)

    plot(losses, "train_loss", "training")
    plot(losses, "val_loss", "validation")
    plot(bleu, "val_bleu4", "BLEU-4")
    plot(cider, "val_cider", "CIDEr")
    plot(cider, REWARD, "reward in training")
    for name in ("decoder_lr", "learning_rate"):
        plot(rates, name, name, style="C2-")
    titles = ("loss", "validation BLEU-4", "validation CIDEr", "learning rate")
    for axis, title in zip((losses, bleu, cider, rates), titles):
        axis.axvline(best, color="0.6", linestyle=":", label=f"best: epoch {best}")
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    write_encoded(file, partial(figure.savefig, format="png", dpi=110))
