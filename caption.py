"""Caption one image, with a figure of where the model looked, or a folder of them into a submission CSV.

python caption.py --img photo.jpg --model output_models/best_checkpoint.pth --beam_size 5
python caption.py --encoder_path output_models/encoder.pth --decoder_path output_models/decoder.pth
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import torch
from torch import Tensor

from captioning.captioner import Captioner
from captioning.checkpoints import load_models
from captioning.folder_plan import FolderOptions
from captioning.folders import caption_folder
from captioning.images import read_image
from models import DecoderWithAttention, Encoder
from utils import UserError, atomic_write, check_at_least, run_script

DEFAULT_OUTPUT = "submission.csv"


@dataclass
class Settings:
    img: str | None = None  # one image to caption; None: a folder
    model: str | None = None  # a checkpoint of train.py; None: encoder_path and decoder_path
    encoder_path: str = "output_models/encoder.pth"  # the best epoch's encoder
    decoder_path: str = "output_models/decoder.pth"  # and decoder
    word_map: str | None = None  # word_map.json; None: the one in the checkpoint
    beam_size: int = 3  # hypotheses searched at a time; 1 is greedy
    figure: str | None = None  # image mode: file of the figure; None: attention_NAME.png
    show: bool = False  # image mode: open the figure in a window too
    test_folder: str = "test/test"  # folder mode: images to caption
    test_csv: str | None = None  # ids and their order; None: test.csv in or up to two folders above, if any
    recursive: bool = False  # caption the images in its subfolders too
    output_csv: str | None = None  # .csv, .json (COCO) or .jsonl; None: submission.csv, none with sidecars
    sidecars: bool = False  # write each caption beside its image: photo.txt for photo.jpg
    sidecar_extension: str = ".txt"  # of the sidecars
    existing: Literal["skip", "overwrite", "append", "prepend"] = (
        "skip"  # what to do where a sidecar is there
    )
    prefix: str = ""  # words before each caption in a sidecar; {name}, {folder}: the image's
    suffix: str = ""  # words behind it
    batch_size: int = 32  # folder mode: images searched at a time
    workers: int = 4  # folder mode: threads that read images
    length_penalty: float = 0.0  # compare captions by log-probability / length ** this

    def __post_init__(self):
        check_at_least(self, 1, "beam_size")
        FolderOptions.of(self, DEFAULT_OUTPUT)  # refuses what cannot be


def main(settings: Settings) -> int:
    encoder_path = settings.model or settings.encoder_path
    decoder_path = settings.model or settings.decoder_path
    if settings.img is None:
        failed = caption_images(
            encoder_path,
            decoder_path,
            settings.word_map,
            beam_size=settings.beam_size,
            length_penalty=settings.length_penalty,
            **asdict(FolderOptions.of(settings, DEFAULT_OUTPUT)),
        )
        return 1 if failed else 0
    read_image(settings.img)  # complain before the models are loaded
    encoder, decoder, word_map = load_models(encoder_path, decoder_path, settings.word_map)
    words, alphas = caption_image_beam_search(
        encoder, decoder, settings.img, word_map, settings.beam_size, settings.length_penalty
    )
    print(" ".join(words))
    figure = Path(settings.figure or f"attention_{Path(settings.img).stem}.png")
    visualize_att(settings.img, words, alphas, figure, settings.show)
    print(f"figure: {figure}", file=sys.stderr)
    return 0


# --- one image --------------------------------------------------------------------------------------------


def caption_image_beam_search(
    encoder: Encoder,
    decoder: DecoderWithAttention,
    image_path: str | Path,
    word_map: dict[str, int],
    beam_size: int = 3,
    length_penalty: float = 0.0,
) -> tuple[list[str], Tensor]:
    """The caption of an image file as words, and where each word looked: alphas (words, 14, 14), each
    summing to 1."""
    captioner = Captioner([(encoder, decoder)], word_map)
    image = torch.from_numpy(read_image(image_path, encoder.image_size)).unsqueeze(0)
    (found,) = captioner.search(captioner.encode(image), beam_size, length_penalty, keep_alphas=True)
    side = round(found.alphas.shape[1] ** 0.5)
    return [captioner.words[index] for index in found.words], found.alphas.view(-1, side, side)


def visualize_att(
    image_path: str | Path, words: Sequence[str], alphas: Tensor, figure: str | Path, show: bool = False
) -> None:
    """Write a figure of the image and, for each word, the image under its attention map.

    Args:
        alphas: (words, 14, 14).
        figure: file to write; its extension is the format (png, pdf, ...).
        show: open it in a window too, where there is a screen.
    """
    if not show:
        matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from skimage.transform import pyramid_expand

    figure = Path(figure)
    formats = plt.gcf().canvas.get_supported_filetypes()
    plt.close()
    extension = figure.suffix.lstrip(".").lower()
    if extension not in formats:
        raise UserError(f"{figure}: no format for figures; give a name that ends in .png or .pdf")
    image = read_image(image_path).transpose(1, 2, 0)  # (height, width, 3)
    height, width = image.shape[:2]
    columns = min(len(words) + 1, 6)
    rows = -(-(len(words) + 1) // columns)
    panel = 2.4  # inches, the longer side
    across, down = panel * min(width / height, 1), panel * min(height / width, 1)
    sheet, axes = plt.subplots(
        rows, columns, figsize=(columns * across, rows * (down + 0.35)), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, title in zip(axes.flat, [" ", *words]):
        axis.imshow(image, extent=(0, width, height, 0))
        axis.set_title(title, fontsize=12)
    for axis, alpha in zip(axes.flat[1:], alphas.cpu().numpy()):
        smooth = pyramid_expand(alpha, upscale=16, sigma=8)
        # one scale for each word: the brightest place is where it looked most
        axis.imshow(smooth, extent=(0, width, height, 0), cmap="gray", alpha=0.75, vmin=0, vmax=smooth.max())
    with atomic_write(figure) as tmp_path:
        sheet.savefig(tmp_path, format=extension, dpi=110)
    if show:
        plt.show()
    plt.close(sheet)


# --- a folder -----------------------------------------------------------------------------------------------


def caption_images(
    encoder_path: str | Path,
    decoder_path: str | Path,
    word_map_path: str | Path | None = None,
    test_folder: str | Path = "test/test",
    output_csv: str | Path | None = DEFAULT_OUTPUT,
    beam_size: int = 3,
    length_penalty: float = 0.0,
    **options,
) -> list[str]:
    """Caption the images of a folder into a CSV `image_id,caption`, a .json or a .jsonl file.

    With a test.csv its ids are the rows, in its order and as they are written there; otherwise every image
    of the folder, in natural order, by its name without extension.

    Args:
        options: further ones of `FolderOptions`, such as batch_size, recursive or sidecars.

    Returns:
        What was wrong with the images that could not be read, one line each; their captions are empty.

    Raises:
        UserError: wrong input, or not one readable image.
    """

    def load() -> Captioner:
        encoder, decoder, word_map = load_models(encoder_path, decoder_path, word_map_path)
        return Captioner([(encoder, decoder)], word_map)

    files = [file for file in (encoder_path, decoder_path, word_map_path) if file is not None]
    folder = FolderOptions(test_folder, output_csv=output_csv, **options)
    return caption_folder(folder, load, files, {"beam_size": beam_size, "length_penalty": length_penalty})


if __name__ == "__main__":
    run_script(main, Settings)
