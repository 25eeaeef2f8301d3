"""Caption images, with a figure each of where the model looked, or a folder of them into a file of captions.

    python caption.py photo.jpg other.jpg --model output_models/best_checkpoint.pth --beam_size 5
    python caption.py --test_folder photos                  # output_models/ -> submission.csv
    python caption.py --test_folder photos --sidecars       # photo.jpg -> photo.txt

docs/folders.md has more on folders.
"""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from captioning.captioners.attention import Captioner, load_models
from captioning.command_line import run_script
from captioning.data.images import check_image
from captioning.decoding.options import DecodingOptions
from captioning.folders.plan import FolderOptions
from captioning.folders.run import caption_folder
from captioning.report.figures import caption_files, draw_attention
from models import DecoderWithAttention, Encoder
from utils import Device, UserError

DEFAULT_OUTPUT = "submission.csv"


@dataclass
class Settings(FolderOptions, DecodingOptions):
    """The settings of this script. `--help` also lists those of FolderOptions (captioning/folders/plan.py)
    and DecodingOptions (captioning/decoding/options.py); to change one of these for this script, repeat
    its line here."""

    # what to caption
    images: tuple[str, ...] = field(default=(), metadata={"positional": True})  # image files; none: a folder
    img: str | None = None  # one image file; the same as giving it without --img
    test_folder: str = "test/test"  # images to caption
    output_csv: str | None = None  # .csv, .json (COCO) or .jsonl; None: submission.csv, none with sidecars
    # the model
    model: str | None = None  # a checkpoint of train.py; None: encoder_path and decoder_path
    encoder_path: str = "output_models/encoder.pth"  # the best epoch's encoder
    decoder_path: str = "output_models/decoder.pth"  # the best epoch's decoder
    word_map: str | None = None  # word_map.json; None: the one in the checkpoint
    device: Device = "auto"  # auto: a GPU where there is one
    batch_size: int = 32  # images searched at a time
    # captions and figures
    beam_size: int = 3  # hypotheses searched at a time; 1 is greedy
    num_captions: int = 1  # of each image: the best of the beam, no two alike, or so many samples
    figure: str | None = None  # the figure of a single image; None: attention_NAME.png
    show: bool = False  # open the figures too

    def __post_init__(self):
        FolderOptions.of(self, DEFAULT_OUTPUT).check(DecodingOptions.of(self))  # refuses what cannot be
        if self.img is not None:
            self.images = (*self.images, self.img)
        if self.figure and len(self.images) != 1:
            raise UserError("--figure names the figure of one image: give one image")


def main(settings: Settings) -> int:
    encoder_path = settings.model or settings.encoder_path
    decoder_path = settings.model or settings.decoder_path
    if not settings.images:
        failed = caption_images(
            encoder_path,
            decoder_path,
            settings.word_map,
            **asdict(DecodingOptions.of(settings)),
            **asdict(FolderOptions.of(settings, DEFAULT_OUTPUT)),
        )
        return 1 if failed else 0
    for image in settings.images:
        check_image(image)  # complain before the models are loaded
    encoder, decoder, word_map = load_models(encoder_path, decoder_path, settings.word_map)
    captioner = Captioner([(encoder, decoder)], word_map)
    options = DecodingOptions.of(settings)
    for figure in caption_files(captioner, settings.images, options, settings.figure, settings.with_scores):
        if settings.show:
            open_file(figure)
    return 0


# --- one image --------------------------------------------------------------------------------------------


def caption_image_beam_search(
    encoder: Encoder,
    decoder: DecoderWithAttention,
    image_path: str | Path,
    word_map: dict[str, int],
    beam_size: int = 3,
    **decoding,
) -> tuple[list[str], Tensor]:
    """Caption an image file.

    Args:
        decoding: more of `DecodingOptions`, such as no_repeat_ngram=3.

    Returns:
        The caption's words, and for each word where the model looked: (words, 14, 14), each map summing to 1.
    """
    captioner = Captioner([(encoder, decoder)], word_map)
    caption = captioner.caption(image_path, beam_size, details=True, **decoding)
    return caption.words, caption.attention


def visualize_att(
    image_path: str | Path, words: Sequence[str], alphas: Tensor, figure: str | Path, show: bool = False
) -> None:
    """Write a figure of the image and, for each word, the image under its attention map.

    Args:
        alphas: (words, 14, 14).
        figure: file to write; its extension is the format (png, pdf, ...).
        show: open it too, in what the system opens such files with.
    """
    draw_attention(figure, image_path, words, alphas, " ".join(words))
    if show:
        open_file(figure)


def open_file(path: str | Path) -> None:
    webbrowser.open(Path(path).resolve().as_uri())


# --- a folder -----------------------------------------------------------------------------------------------


def caption_images(
    encoder_path: str | Path,
    decoder_path: str | Path,
    word_map_path: str | Path | None = None,
    test_folder: str | Path = "test/test",
    output_csv: str | Path | None = DEFAULT_OUTPUT,
    beam_size: int = 3,
    **options,
) -> list[str]:
    """Caption the images of a folder into a CSV `image_id,caption`, a .json or a .jsonl file.

    Where there is a test.csv, its ids are the rows, in its order and as they are written there. Otherwise
    every image of the folder has a row, in natural order, under its file name without extension.

    Args:
        options: more of `FolderOptions`, such as batch_size, recursive or sidecars, and of `DecodingOptions`,
            such as num_captions.

    Returns:
        One line for each image that could not be read, with the reason; its caption is empty.

    Raises:
        UserError: wrong input, or not one readable image.
    """

    def load() -> Captioner:
        encoder, decoder, word_map = load_models(encoder_path, decoder_path, word_map_path)
        return Captioner([(encoder, decoder)], word_map)

    files = [file for file in (encoder_path, decoder_path, word_map_path) if file is not None]
    decoding = DecodingOptions.taken_from(options, beam_size=beam_size)
    folder = FolderOptions(test_folder, output_csv=output_csv, **options)
    return caption_folder(folder, load, files, decoding)


if __name__ == "__main__":
    run_script(main, Settings)
