"""Caption a folder of images into a submission CSV from one checkpoint, or from an ensemble of several.

    python caption_from_checkpoint.py                                     # output_models/best_checkpoint.pth
    python caption_from_checkpoint.py --checkpoint seed_1.pth seed_2.pth --ensemble_mode

The members of an ensemble look at an image each with its own encoder and attention; at every step of one
beam search their word distributions are averaged.
"""

from __future__ import annotations

import filecmp
from dataclasses import dataclass
from pathlib import Path

from captioning.captioners.attention import Captioner
from captioning.captioners.base import BaseCaptioner
from captioning.command_line import run_script
from captioning.data.images import natural_order
from captioning.decoding.options import DecodingOptions
from captioning.folders.plan import FolderOptions
from captioning.folders.run import caption_folder
from utils import Device, UserError, counted, is_main_process, say

DEFAULT_OUTPUT = "submission.csv"


@dataclass
class Settings(FolderOptions, DecodingOptions):
    """The settings of this script. `--help` also lists those of FolderOptions (captioning/folders/plan.py)
    and DecodingOptions (captioning/decoding/options.py); to change one of these for this script, repeat
    its line here."""

    # the model or models
    checkpoint: tuple[str, ...] = ()  # none: the best one in checkpoint_folder; for an ensemble, all there
    ensemble_mode: bool = False  # average several checkpoints at every step of the search
    checkpoint_folder: str = "output_models"  # where checkpoints are looked for
    word_map: str | None = None  # word_map.json, for a checkpoint that has none
    device: Device = "auto"  # auto: a GPU where there is one
    # what people change most
    test_folder: str = "test/test"  # images to caption
    output_csv: str | None = None  # .csv, .json (COCO) or .jsonl; None: submission.csv, none with sidecars
    batch_size: int = 32  # images searched at a time
    beam_size: int = 3  # hypotheses searched at a time; 1 is greedy
    num_captions: int = 1  # of each image: the best of the beam, no two alike, or so many samples

    def __post_init__(self):
        FolderOptions.of(self, DEFAULT_OUTPUT).check(DecodingOptions.of(self))  # refuses what cannot be
        if len(self.checkpoint) > 1 and not self.ensemble_mode:
            raise UserError("several checkpoints: add --ensemble_mode, or give one")


def main(settings: Settings) -> int:
    files = choose_checkpoints(settings)

    def load() -> BaseCaptioner:
        if is_main_process():
            say(f"{'ensemble of ' if len(files) > 1 else ''}{', '.join(map(str, files))}")
        return Captioner.load(files, settings.word_map)

    failed = caption_folder(
        FolderOptions.of(settings, DEFAULT_OUTPUT),
        load,
        [*files, settings.word_map] if settings.word_map else files,
        DecodingOptions.of(settings),
    )
    return 1 if failed else 0


def choose_checkpoints(settings: Settings) -> list[Path]:
    """The checkpoints given, else the folder's best one or, for an ensemble, all in it that differ."""
    if settings.checkpoint:
        return [Path(file) for file in settings.checkpoint]
    folder = Path(settings.checkpoint_folder)
    if not settings.ensemble_mode:
        return [folder / "best_checkpoint.pth"]
    parts = ("encoder.pth", "decoder.pth")  # of the best checkpoint
    files = [file for file in folder.glob("*.pth*") if file.is_file() and file.name not in parts]
    different: list[Path] = []
    for file in sorted(files, key=lambda file: natural_order(file.name)):
        if not any(filecmp.cmp(file, other, shallow=False) for other in different):
            different.append(file)
    if len(different) < 2:
        raise UserError(
            f"{folder}: {counted(len(different), 'checkpoint')} in it, an ensemble takes two or more; "
            f"give them with --checkpoint"
        )
    return different


if __name__ == "__main__":
    run_script(main, Settings)
