"""Figures for papers and slides: where a model looked, and the images that it captioned worst."""

from __future__ import annotations

import itertools
import math
import textwrap
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from captioning.data.images import read_image
from captioning.data.submissions import ScoredCaption
from captioning.decoding.options import DecodingOptions
from captioning.files import write_encoded
from utils import UserError, counted, printable, say, tell

if TYPE_CHECKING:  # files of captions are drawn without torch, which takes seconds to import
    from torch import Tensor

    from captioning.captioners.base import BaseCaptioner

PANEL = 2.4  # inches, the longer side of an image
DPI = 110  # dots per inch of a figure
SHOWN = 640  # pixels that are read of an image's longer side: more than the largest panel has dots


def check_figure(file: str | Path) -> str:
    """The format that a figure's file name asks for. Raises UserError if matplotlib cannot write it."""
    import matplotlib.backends.backend_agg as agg

    extension = Path(file).suffix.lstrip(".").lower()
    if extension not in agg.FigureCanvasAgg.get_supported_filetypes():
        raise UserError(f"{file}: no format for figures; give a name that ends in .png or .pdf")
    return extension


def save_figure(figure, file: str | Path) -> None:
    """Write a matplotlib figure; the file's extension is the format."""
    extension = check_figure(file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_encoded(file, partial(figure.savefig, format=extension, dpi=DPI))
    messages = dict.fromkeys(str(warning.message) for warning in caught)
    missing = [message for message in messages if "missing from" in message]  # one for each character
    if missing:
        tell(
            f"{file}: its font lacks {counted(len(missing), 'character')} of its text, drawn as boxes; the "
            f"setting font.family in a file matplotlibrc names another font"
        )
    for message in messages:
        if message not in missing:
            tell(message)


def enlarge(attention: np.ndarray, width: int = 224, height: int = 224) -> np.ndarray:
    """Enlarge an attention map (h, w) to (height, width): bicubic interpolation, without negative values."""
    image = Image.fromarray(np.asarray(attention, dtype=np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).clip(min=0)


def draw_attention(
    file: str | Path, image: Any, words: Sequence[str], attention: np.ndarray | Tensor, title: str = ""
) -> None:
    """Draw an image, and for each word the image under the word's attention map.

    Each map has its own scale, from 0 to its maximum: the image is brightest where the model looked most.

    Args:
        image: a path, a PIL image, an array or a tensor, as `BaseCaptioner.caption` takes it.
        attention: (words, h, w).

    Raises:
        UserError: the image cannot be read, or the file's extension is no format for figures.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    from captioning.captioners.base import as_array  # here, as it imports torch

    check_figure(file)
    pixels = as_array(image, longest=SHOWN).transpose(1, 2, 0)
    height, width = pixels.shape[:2]
    columns = min(len(words) + 1, 6)
    rows = math.ceil((len(words) + 1) / columns)
    across, down = PANEL * min(width / height, 1), PANEL * min(height / width, 1)
    bar = 0.8 if len(words) else 0  # inches, for the colour bar
    size = (max(columns * across, 3) + bar, rows * (down + 0.35))
    title = "\n".join(textwrap.fill(printable(line), round(10 * size[0])) for line in title.split("\n"))
    lines = title.count("\n") + 1 if title else 0
    figure = Figure(figsize=(size[0], size[1] + 0.25 * lines), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, word in zip(axes.flat, ["", *words]):
        axis.imshow(pixels, extent=(0, width, height, 0))
        axis.set_title(printable(word), fontsize=12, parse_math=False)
    maps = attention if isinstance(attention, np.ndarray) else attention.cpu().numpy()
    for axis, weights in zip(axes.flat[1:], maps):
        smooth = enlarge(weights)
        axis.imshow(smooth, extent=(0, width, height, 0), cmap="gray", alpha=0.75, vmin=0, vmax=smooth.max())
    if len(words):
        scale = ScalarMappable(cmap="gray")
        scale.set_clim(0, 1)
        figure.colorbar(scale, ax=axes, label="attention / the word's maximum", aspect=12 * rows)
    figure.suptitle(title, fontsize=12, parse_math=False)
    save_figure(figure, file)


def caption_files(
    captioner: BaseCaptioner,
    images: Sequence[str],
    options: DecodingOptions,
    figure: str | None = None,
    with_scores: bool = False,
) -> list[str]:
    """Print the captions of each image file, and draw where the model looked for the first of them.

    Args:
        figure: name of the figure, if there is a single image; otherwise they are attention_NAME.png.
        with_scores: print log-probabilities too.

    Returns:
        The figures' names.
    """
    figures = [figure] if figure else figure_names(images)
    for image, file in zip(images, figures):
        prepared = captioner.prepare(image)
        (best,) = captioner.describe_prepared([prepared], options, [Path(image).stem])
        for caption in best.n_best[: options.num_captions]:
            scored = ScoredCaption.of(caption.text, caption.log_prob, len(caption.words))
            say(caption_line(scored, with_scores, "" if len(images) == 1 else image))
        title = f"{best.text}\nlog-probability {best.log_prob:.2f}"
        draw_attention(file, image, best.words, best.attention, title)
        tell(f"figure: {file}")
    return figures


def caption_line(caption: ScoredCaption, with_scores: bool, image: str = "") -> str:
    """`photo.jpg: a dog  (log-probability -3.10, -1.03 per word)`"""
    line = f"{image}: {caption.text}" if image else caption.text
    if with_scores:
        line += f"  (log-probability {caption.log_prob:.2f}, {caption.log_prob_per_word:.2f} per word)"
    return line


def figure_names(images: Sequence[str | Path]) -> list[str]:
    """attention_NAME.png for each image; if several images have one name, the later ones get a number."""
    names: list[str] = []
    for image in images:
        numbers = itertools.chain([""], (f"_{number}" for number in itertools.count(2)))
        candidates = (f"attention_{Path(image).stem}{number}.png" for number in numbers)
        names.append(next(name for name in candidates if name not in names))
    return names


def draw_maps(file: str | Path, maps: dict[str, np.ndarray]) -> None:
    """Draw mean attention maps (h, w) under their names, all on one scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PANEL * len(maps) + 0.8, PANEL + 0.4), layout="constrained")
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    largest = max(float(np.max(values)) for values in maps.values())
    for axis, (name, values) in zip(axes, maps.items()):
        mapped = axis.imshow(values, cmap="magma", vmin=0, vmax=largest)
        axis.set_title(printable(name), fontsize=12, parse_math=False)
        axis.axis("off")
    figure.colorbar(mapped, ax=list(axes), label="mean attention")
    save_figure(figure, file)


def draw_captions(file: str | Path, rows: Sequence[tuple[str, str, str, Sequence[str]]]) -> None:
    """Draw images with their captions and references, two side by side.

    Args:
        rows: (path, heading, caption, references) of each image.
    """
    from matplotlib.figure import Figure

    check_figure(file)
    down = math.ceil(len(rows) / 2)
    figure = Figure(figsize=(13, 2.9 * down), layout="constrained")
    axes = figure.subplots(down, 4, squeeze=False, width_ratios=[1, 1.5] * 2)
    for axis in axes.flat:
        axis.axis("off")
    for i, (path, heading, caption, references) in enumerate(rows):
        image_axis, beside = axes[i // 2, 2 * (i % 2) : 2 * (i % 2) + 2]
        try:
            image_axis.imshow(read_image(path, longest=SHOWN).transpose(1, 2, 0))
        except UserError as error:
            tell(f"drawn without image: {error}")
        lines = textwrap.wrap(printable(caption), 34) or ["(no caption)"]
        written = {"va": "top", "transform": beside.transAxes, "parse_math": False}
        beside.text(0, 1.0, printable(heading), fontsize=9, color="dimgray", **written)
        beside.text(0, 0.9, "\n".join(lines), fontsize=12, weight="bold", **written)
        texts = [line for text in references[:5] for line in textwrap.wrap(printable(text), 46)[:2]]
        beside.text(0, 0.84 - 0.1 * len(lines), "\n".join(texts), fontsize=9, **written)
    save_figure(figure, file)
