"""What a training shows and keeps: scores, the log's lines, curves.png, trackers; its output folder."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from captioning.files import write_encoded
from captioning.training.resume import (
    REWARD,
    Resumed,
    TrainingSettings,
    best_epoch,
    epochs_since_improvement,
    is_earlier,
)
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
from utils import UserError, is_main_process, say, write_table

SAMPLES = 3  # validation images whose captions are printed after every epoch
LONGEST_SAMPLE = 90  # characters


def caption_scores(references: list[list[list[str]]], captions: dict[int, str]) -> dict[str, float]:
    """{"val_bleu4", "val_cider"} of captions by index; references are tokenized, several of each image."""
    hypotheses = [tokenize(captions[index]) for index in range(len(references))]
    cider = CiderD.from_references(references).score(references, hypotheses)
    scores = {"val_bleu4": bleu4(references, hypotheses), "val_cider": math.fsum(cider) / len(cider)}
    # less is no match: CIDEr of captions many times as long as the references leaves 1e-100 and the like
    return {name: score if score > 1e-6 else 0.0 for name, score in scores.items()}


# --- reports ------------------------------------------------------------------------------------------------


def describe_training(row: dict[str, float]) -> str:
    """What the steps of an epoch came to, in words."""
    reward = f", reward {row[REWARD]:.3f}" if REWARD in row else ""
    rate = f", {row['captions_per_second']:.0f} captions/s" if "captions_per_second" in row else ""
    return f"loss {row['train_loss']:.3f}{reward}{rate}"


def describe_epoch(row: dict[str, float]) -> str:
    """An epoch's row of the history in words."""
    loss = f"loss {row['val_loss']:.3f}, top-5 {row['val_top5']:.1%}, " if "val_loss" in row else ""
    scores = f"BLEU-4 {row['val_bleu4']:.4f}, CIDEr {row['val_cider']:.4f}"
    return f"{describe_training(row)}; validation {loss}{scores}"


class Monitor:
    """Reports the epochs of a training: logs, and in the main process draws curves.png and tells a tracker.

    Raises:
        UserError: the tracker's package is not installed.
    """

    def __init__(self, settings: TrainingSettings, log: Callable[[str], None], is_main: bool):
        self.settings, self.log, self.is_main = settings, log, is_main
        self.output = Path(settings.output_folder)
        self.seconds: list[float] = []  # of this run's epochs
        self.tracker = start_tracker(settings, self.output) if is_main else None

    def report_epoch(self, history: list[dict], captions: dict[str, str]) -> None:
        """Report the last epoch of the history; `captions` are of the validation images, by their ids."""
        row, shown = history[-1], list(captions.items())
        self.log(f"epoch {row['epoch']}: {describe_epoch(row)}")
        indices = {len(shown) * number // SAMPLES for number in range(SAMPLES)} if shown else ()
        for image_id, caption in [shown[index] for index in sorted(indices)]:
            caption = textwrap.shorten(caption, LONGEST_SAMPLE, placeholder=" ...")
            self.log(f"    {image_id}: {caption}")
        self.seconds.append(row["seconds"])
        left = self.settings.epochs - row["epoch"]
        if left:
            seconds = left * sum(self.seconds) / len(self.seconds)
            self.log(f"    {duration(seconds)} left for {left} epoch{'s' if left > 1 else ''}")
        if self.is_main:
            draw_curves(history, best_epoch(history, self.settings.score), self.output / "curves.png")
            if self.tracker:
                self.tracker.log(row, step=row["epoch"])


def duration(seconds: float) -> str:
    """ "2 h 05 min", "3 min", "40 s" """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 90 else f"{minutes} min"


def draw_curves(history: list[dict], best: int, file: Path) -> None:
    """Write losses, scores and learning rate over the epochs as a PNG; the epoch with the index `best` is
    marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.4), layout="constrained")
    losses, bleu, cider, rates = figure.subplots(1, 4)
    epochs = [row["epoch"] for row in history]
    best = epochs[best]

    def plot(axis, name: str, label: str, style: str = "-") -> None:
        if name in history[-1]:
            values = [row.get(name, math.nan) for row in history]
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


def start_tracker(settings: TrainingSettings, output: Path) -> Any:
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


# --- the output folder --------------------------------------------------------------------------------------


def begin_outputs(settings: TrainingSettings, resumed: Resumed | None) -> None:
    """Leave in the output folder what belongs to the run that begins, and move the rest to earlier_N.

    A run that goes on from another folder's checkpoint begins with the best files of that run, as it may not
    find a better epoch.
    """
    output, source = Path(settings.output_folder), resumed.source if resumed else None
    if source is None or source.resolve().parent != output.resolve():
        archive_previous_run(output, *settings.output_files)
        wanted = resumed.history[: best_epoch(resumed.history, settings.score) + 1] if resumed else []
        for file in (source, source.parent / "best_checkpoint.pth") if wanted else ():
            if "decoder" in resumed.checkpoint and peek(file).get("history") == wanted:
                write_best(file, read_checkpoint(file), output)
                break
        return
    epochs = len(resumed.history)
    abandoned = epoch_checkpoints(output, after=epochs)
    if source.name != LAST:
        remove_superseded_state(output)
        abandoned += output.glob(LAST)
    if abandoned:
        say(f"what {output}/ had after epoch {epochs} is now in {archive(output, abandoned)}/")
    repair_outputs(output)


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
                say(f"{output}: {', '.join(stale)} written again from {source.name}")
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


def save_epoch(settings: TrainingSettings, checkpoint: dict) -> None:
    """Write the epoch's checkpoint, the best files where it is the best so far, and history.csv; remove the
    state within it and the checkpoints that do not stay."""
    output, history = Path(settings.output_folder), checkpoint["history"]
    file = output / f"checkpoint_epoch_{len(history)}.pth"
    save_checkpoint(file, checkpoint)
    if "decoder" in checkpoint and epochs_since_improvement(history, settings.score) == 0:
        write_best(file, checkpoint)
    write_table(output / "history.csv", history)
    (output / LAST).unlink(missing_ok=True)
    for older in superfluous_checkpoints(output, settings.keep_checkpoints):
        older.unlink()


def superfluous_checkpoints(output: Path, keep_checkpoints: int) -> list[Path]:
    """keep_checkpoints: how many epochs' files stay; 0: all."""
    return epoch_checkpoints(output)[:-keep_checkpoints] if keep_checkpoints else []
