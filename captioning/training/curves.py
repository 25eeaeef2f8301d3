"""curves.png: how a training has gone, epoch by epoch."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from captioning.files import write_encoded

REWARD = "train_reward"  # column of the epochs of self-critical training


def draw_curves(history: list[dict], best: int, file: Path) -> None:
    """Write losses, scores and learning rate over the epochs as a PNG; the epoch with the index `best` is
    marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.4), layout="constrained")
    losses, bleu, cider, rates = figure.subplots(1, 4)
    epochs = [line["epoch"] for line in history]
    best = epochs[best]

    def plot(axis, name: str, label: str, style: str = "-") -> None:
        if name in history[-1]:
            values = [line.get(name, math.nan) for line in history]
            if name == "val_bleu4":  # without a match it is not quite 0
                values = [0.0 if value < 1e-6 else value for value in values]
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
