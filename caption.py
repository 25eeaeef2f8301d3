"""Caption one picture, with a figure of where the model looked, or a folder of them into a submission CSV.

python caption.py --img photo.jpg --model output_models/best_checkpoint.pth --beam_size 5
python caption.py --encoder_path output_models/encoder.pth --decoder_path output_models/decoder.pth
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from beam_search import beam_search
from datasets import END, PAD, START, UNK, PictureFinder, read_annotations
from models import DecoderWithAttention, Encoder, decoder_from, encoder_from
from utils import (
    UserError,
    check_at_least,
    list_pictures,
    load_checkpoint,
    parallel_map,
    pick_device,
    progress_bar,
    read_json,
    read_picture,
    run_script,
    written_aside,
)


@dataclass
class Settings:
    img: str | None = None  # one picture to caption; None: a folder
    model: str | None = None  # a checkpoint of train.py; None: encoder_path and decoder_path
    encoder_path: str = "output_models/encoder.pth"  # the best epoch's encoder
    decoder_path: str = "output_models/decoder.pth"  # and decoder
    word_map: str | None = None  # word_map.json; None: the one in the checkpoint
    beam_size: int = 3  # hypotheses searched at a time; 1 is greedy
    figure: str | None = None  # picture mode: file of the figure; None: attention_NAME.png
    show: bool = False  # picture mode: open the figure in a window too
    test_folder: str = "test/test"  # folder mode: pictures to caption
    test_csv: str | None = (
        None  # folder mode: ids and their order; None: test.csv in or up to two folders above, if any
    )
    output_csv: str = "submission.csv"  # folder mode: image_id,caption
    batch_size: int = 32  # folder mode: pictures searched at a time
    workers: int = 4  # folder mode: threads that read pictures
    length_penalty: float = 0.0  # compare captions by log-probability / length ** this

    def __post_init__(self):
        check_at_least(self, 1, "beam_size", "batch_size", "workers")


def main(settings: Settings) -> int:
    encoder_path = settings.model or settings.encoder_path
    decoder_path = settings.model or settings.decoder_path
    if settings.img is None:
        failed = caption_images(
            encoder_path,
            decoder_path,
            settings.word_map,
            settings.test_folder,
            settings.output_csv,
            settings.beam_size,
            test_csv=settings.test_csv,
            batch_size=settings.batch_size,
            workers=settings.workers,
            length_penalty=settings.length_penalty,
        )
        return 1 if failed else 0
    read_picture(settings.img)  # complain before the models are loaded
    encoder, decoder, word_map = load_models(encoder_path, decoder_path, settings.word_map)
    words, alphas = caption_image_beam_search(
        encoder, decoder, settings.img, word_map, settings.beam_size, settings.length_penalty
    )
    print(" ".join(words))
    figure = Path(settings.figure or f"attention_{Path(settings.img).stem}.png")
    visualize_att(settings.img, words, alphas, figure, settings.show)
    print(f"figure: {figure}", file=sys.stderr)
    return 0


def load_models(
    encoder_path: str | Path, decoder_path: str | Path, word_map_path: str | Path | None = None
) -> tuple[Encoder, DecoderWithAttention, dict[str, int]]:
    """Encoder, decoder and word map, ready to caption on the best device.

    Raises:
        UserError: a file is missing or damaged, or the word map does not fit the decoder.
    """
    decoder_file = load_checkpoint(decoder_path, "decoder")
    encoder_file = load_checkpoint(encoder_path, "encoder") if encoder_path != decoder_path else decoder_file
    if "encoder" not in encoder_file:
        raise UserError(
            f"{encoder_path}: has no encoder; give a checkpoint, or --encoder_path and --decoder_path"
        )
    word_map = decoder_file["word_map"]
    if word_map_path is not None:
        word_map = read_json(word_map_path)
        if word_map != decoder_file["word_map"]:
            raise UserError(
                f"{word_map_path}: not the word map that {decoder_path} was trained with "
                f"({len(decoder_file['word_map'])} words); give that one, or leave --word_map out"
            )
    encoder, decoder = encoder_from(encoder_file, encoder_path), decoder_from(decoder_file, decoder_path)
    if encoder.dim != decoder.encoder_dim:
        raise UserError(
            f"{encoder_path} gives {encoder.dim} channels, {decoder_path} takes {decoder.encoder_dim}: "
            f"give files of one run"
        )
    device = pick_device()
    return encoder.to(device), decoder.to(device), word_map


# --- one picture --------------------------------------------------------------------------------------------


def caption_image_beam_search(
    encoder: Encoder,
    decoder: DecoderWithAttention,
    image_path: str | Path,
    word_map: dict[str, int],
    beam_size: int = 3,
    length_penalty: float = 0.0,
) -> tuple[list[str], Tensor]:
    """The caption of a picture file as words, and where each word looked: alphas (words, 14, 14), each
    summing to 1."""
    picture = torch.from_numpy(read_picture(image_path, encoder.image_size)).unsqueeze(0)
    (hypothesis,) = search(encoder, decoder, picture, word_map, beam_size, length_penalty, keep_alphas=True)
    words = {index: word for word, index in word_map.items()}
    side = round(hypothesis.alphas.shape[1] ** 0.5)
    return [words[index] for index in hypothesis.words], hypothesis.alphas.view(-1, side, side)


def search(
    encoder: Encoder,
    decoder: DecoderWithAttention,
    pictures: Tensor,
    word_map: dict[str, int],
    beam_size: int,
    length_penalty: float = 0.0,
    keep_alphas: bool = False,
) -> list:
    """Encode uint8 pictures (N, 3, S, S) and search their captions; `<unk>` is no word to show anybody."""
    grid = encoder.encode(pictures.to(next(encoder.parameters()).device))
    return beam_search(
        [decoder], [grid], word_map[START], word_map[END], beam_size,
        forbidden=[word_map[word] for word in (PAD, START, UNK)],
        length_penalty=length_penalty, keep_alphas=keep_alphas,
    )  # fmt: skip


def visualize_att(
    image_path: str | Path, words: Sequence[str], alphas: Tensor, figure: str | Path, show: bool = False
) -> None:
    """Write a figure of the picture and, for each word, the picture under its attention map.

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
    picture = read_picture(image_path).transpose(1, 2, 0)  # (height, width, 3)
    height, width = picture.shape[:2]
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
        axis.imshow(picture, extent=(0, width, height, 0))
        axis.set_title(title, fontsize=12)
    for axis, alpha in zip(axes.flat[1:], alphas.cpu().numpy()):
        smooth = pyramid_expand(alpha, upscale=16, sigma=8)
        # one scale for each word: the brightest place is where it looked most
        axis.imshow(smooth, extent=(0, width, height, 0), cmap="gray", alpha=0.75, vmin=0, vmax=smooth.max())
    with written_aside(figure) as aside:
        sheet.savefig(aside, format=extension, dpi=110)
    if show:
        plt.show()
    plt.close(sheet)


# --- a folder -----------------------------------------------------------------------------------------------


def caption_images(
    encoder_path: str | Path,
    decoder_path: str | Path,
    word_map_path: str | Path | None = None,
    test_folder: str | Path = "test/test",
    output_csv: str | Path = "submission.csv",
    beam_size: int = 3,
    test_csv: str | Path | None = None,
    batch_size: int = 32,
    workers: int = 4,
    length_penalty: float = 0.0,
) -> list[str]:
    """Caption the pictures of a folder into a CSV `image_id,caption`.

    With a test.csv its ids are the rows, in its order and as they are written there; otherwise every picture
    of the folder, in natural order, by its name without extension.

    Returns:
        What was wrong with the pictures that could not be read, one line each; their captions are empty.

    Raises:
        UserError: wrong input, or not one readable picture.
    """
    rows = find_pictures(test_folder, test_csv)
    encoder, decoder, word_map = load_models(encoder_path, decoder_path, word_map_path)
    words = {index: word for word, index in word_map.items()}
    captions, failed = {}, []

    def read(row: tuple[str, str | None]) -> tuple[str, np.ndarray | None, str]:
        image_id, path = row
        try:
            if path is None:
                raise UserError(f"{image_id}: no picture file of this name in {test_folder}")
            return image_id, read_picture(path, encoder.image_size), ""
        except UserError as error:
            return image_id, None, str(error)

    batch: list[tuple[str, np.ndarray]] = []

    def caption_batch() -> None:
        pictures = torch.from_numpy(np.stack([pixels for _, pixels in batch]))
        found = search(encoder, decoder, pictures, word_map, beam_size, length_penalty)
        for (image_id, _), hypothesis in zip(batch, found):
            captions[image_id] = " ".join(words[index] for index in hypothesis.words)
        batch.clear()

    for image_id, pixels, problem in progress_bar(
        parallel_map(read, rows, workers), total=len(rows), desc="captioning", unit="picture"
    ):
        if pixels is None:
            print(f"no caption: {problem}", file=sys.stderr)
            failed.append(problem)
            captions[image_id] = ""
            continue
        batch.append((image_id, pixels))
        if len(batch) == batch_size:
            caption_batch()
    if batch:
        caption_batch()
    if len(failed) == len(rows):
        raise UserError(f"{test_folder}: not one readable picture among {len(rows)}")
    write_submission(output_csv, [(image_id, captions[image_id]) for image_id, _ in rows])
    print(
        f"{len(rows) - len(failed)} pictures captioned in {output_csv}"
        + (f", {len(failed)} left empty" if failed else "")
    )
    return failed


def find_pictures(test_folder: str | Path, test_csv: str | Path | None) -> list[tuple[str, str | None]]:
    """(id, path or None) of each picture to caption."""
    folder = Path(test_folder)
    finder = PictureFinder(folder)
    if test_csv is not None:
        return [(p.image_id, p.path) for p in read_annotations(test_csv, folder)]
    resolved = folder.resolve()
    for parent in (resolved, resolved.parent, resolved.parent.parent):
        if (parent / "test.csv").is_file():
            ids = [picture.image_id for picture in read_annotations(parent / "test.csv")]
            if any(finder(image_id) for image_id in ids):  # otherwise it is about other pictures
                return [(image_id, finder(image_id)) for image_id in ids]
    paths = list_pictures(folder)
    stems = Counter(path.stem for path in paths)
    return [(path.stem if stems[path.stem] == 1 else path.name, str(path)) for path in paths]


def write_submission(path: str | Path, rows: Sequence[tuple[str, str]]) -> None:
    """Write (id, caption) rows as a CSV with the header image_id,caption."""
    with written_aside(path) as aside, aside.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("image_id", "caption"))
        writer.writerows(rows)


if __name__ == "__main__":
    run_script(main, Settings)
