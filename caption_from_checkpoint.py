"""Caption a folder of images into a submission CSV from one checkpoint, or from an ensemble of several.

    python caption_from_checkpoint.py                                     # output_models/best_checkpoint.pth
    python caption_from_checkpoint.py --checkpoint seed_1.pth seed_2.pth --ensemble_mode

The members of an ensemble look at an image each with its own encoder and attention; at every step of one
beam search their word distributions are averaged.
"""

from __future__ import annotations

import captioning.interrupts  # noqa: F401  before what takes seconds

import filecmp
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from captioning.captioners.attention import Captioner
from captioning.command_line import run_script
from captioning.decoding.options import DecodingOptions
from captioning.folders.plan import FolderOptions
from captioning.folders.run import caption_folder
from utils import Device, UserError, is_main_process, natural_order

DEFAULT_OUTPUT = "submission.csv"


@dataclass
class Settings:
    checkpoint: tuple[str, ...] = ()  # none: the best one in checkpoint_folder; for an ensemble, all there
    ensemble_mode: bool = False  # average several checkpoints at every step of the search
    checkpoint_folder: str = "output_models"  # where checkpoints are looked for
    word_map: str | None = None  # word_map.json, for a checkpoint that has none
    test_folder: str = "test/test"  # images to caption
    test_csv: str | None = None  # ids and their order; None: test.csv in or up to two folders above, if any
    recursive: bool = False  # caption the images in its subfolders too
    output_csv: str | None = None  # .csv, .json (COCO) or .jsonl; None: submission.csv, none with sidecars
    escape_formulas: bool = False  # in a CSV: ' before what spreadsheets would take for a formula
    sidecars: bool = False  # write each caption beside its image: photo.txt for photo.jpg
    sidecar_extension: str = ".txt"  # file extension of the sidecars
    existing: Literal["skip", "overwrite", "append", "prepend"] = "skip"  # where a sidecar exists already
    prefix: str = ""  # words before each caption in a sidecar; {name}, {folder}: the image's
    suffix: str = ""  # words after each caption in a sidecar
    beam_size: int = 3  # hypotheses searched at a time; 1 is greedy
    length_penalty: float = 0.0  # compare captions by log-probability / length ** this
    no_repeat_ngram: int = 0  # no sequence of so many words occurs twice in a caption; 0: any may
    min_length: int = 0  # words of a caption, at least
    remove_bad_endings: bool = False  # no caption ends in "a", "of", "and" or the like
    allow_unk: bool = False  # captions may have <unk>, as the 2018 tutorial's
    num_captions: int = 1  # of each image: the best of the beam, or so many samples
    temperature: float | None = None  # draw samples, from the probabilities to the power of 1 / this
    top_p: float | None = None  # draw samples, from the likeliest words, of which this share is made up
    seed: int = 123  # of the samples
    with_scores: bool = False  # log-probabilities too, in columns log_prob and log_prob_per_word
    batch_size: int = 32  # images searched at a time
    device: Device = "auto"  # auto: a GPU where there is one
    workers: int = 4  # threads that read images

    def __post_init__(self):
        FolderOptions.of(self, DEFAULT_OUTPUT).check(DecodingOptions.of(self))  # refuses what cannot be
        if len(self.checkpoint) > 1 and not self.ensemble_mode:
            raise UserError("several checkpoints: add --ensemble_mode, or give one")


def main(settings: Settings) -> int:
    files = choose_checkpoints(settings)
    if is_main_process():
        print(f"{'ensemble of ' if len(files) > 1 else ''}{', '.join(map(str, files))}")
    failed = caption_folder(
        FolderOptions.of(settings, DEFAULT_OUTPUT),
        lambda: Captioner.load(files, settings.word_map),
        [*files, settings.word_map] if settings.word_map else files,
        DecodingOptions.of(settings),
    )
    return 1 if failed else 0


def choose_checkpoints(settings: Settings) -> list[Path]:
    """The files given, or those of the folder; of files with the same content one."""
    if settings.checkpoint:
        return [Path(file) for file in settings.checkpoint]
    folder = Path(settings.checkpoint_folder)
    if not settings.ensemble_mode:
        return [folder / "best_checkpoint.pth"]
    parts = ("encoder.pth", "decoder.pth")  # of the best checkpoint
    files = [file for file in folder.glob("*.pth*") if file.is_file() and file.name not in parts]
    chosen: list[Path] = []
    for file in sorted(files, key=lambda file: natural_order(file.name)):
        if not any(filecmp.cmp(file, other, shallow=False) for other in chosen):
            chosen.append(file)
    if len(chosen) < 2:
        raise UserError(
            f"{folder}: {len(chosen)} checkpoints in it, an ensemble takes two or more; "
            f"give them with --checkpoint"
        )
    return chosen


if __name__ == "__main__":
    run_script(main, Settings)
