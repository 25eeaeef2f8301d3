"""A gallery of captioned images as static files: opened from disk, with nothing loaded from elsewhere.

    index.html            the page; its parts are in gallery_page/
    data.js               captions, scores, references, comparison, quality
    attention/000.js      attention maps of 100 images each, loaded when their cards come into view
    images/00000.jpg      thumbnails

Captions and ids are data, never markup: the page sets them as text.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from captioning.data.images import parallel_map, read_image
from captioning.data.prepared import Record
from captioning.files import named_in_errors, remove_unfinished, write_encoded
from captioning.report.scoring import COLUMNS
from metrics import Scores
from utils import UserError, check_output, progress_bar

if TYPE_CHECKING:  # files of captions are shown without torch, which takes seconds to import
    from captioning.captioners.base import Caption

PAGE = Path(__file__).resolve().parent / "gallery_page"
MARK = '<meta name="generator" content="view_captions.py">'
THUMBNAIL = 400  # pixels, the longer side
LARGEST_GRID = 14  # cells a side of an attention map in the page
CHUNK = 100  # images in a file of attention maps


@dataclass
class ShownCaption:
    """A caption as the gallery shows it.

    log_prob, word_log_probs and attention (words, height, width) are None for captions from a file.
    """

    text: str
    words: list[str]
    log_prob: float | None = None
    word_log_probs: list[float] | None = None
    attention: np.ndarray | None = None

    @classmethod
    def of(cls, caption: Caption) -> ShownCaption:
        """From a captioner's caption with details."""
        return cls(
            caption.text, caption.words, caption.log_prob, caption.word_log_probs, caption.attention.numpy()
        )


@dataclass
class ShownModel:
    """A model's captions by image id, and their scores if there are references.

    quality: what `caption_quality` returns and, under "attention", what `attention_summary` returns.
    """

    name: str
    captions: Mapping[str, ShownCaption]
    scores: Scores | None = None
    quality: dict = field(default_factory=dict)


def write_gallery(
    folder: str | Path,
    records: Sequence[Record],
    models: Sequence[ShownModel],
    comparisons: Sequence[dict] = (),
    title: str = "Captions",
) -> tuple[Path, list[str]]:
    """Write a gallery of the images that at least one model has captioned.

    Args:
        folder: created if it is missing; an earlier gallery in it is replaced once the new one is complete.
        comparisons: what `compare_pairs` returned.

    Returns:
        The path of index.html; one line for each image that cannot be shown, with the reason.

    Raises:
        UserError: no image has a caption, or the folder holds another page.
    """
    folder = Path(folder)
    records = [record for record in records if any(record.image_id in model.captions for model in models)]
    if not records:
        raise UserError("no image has a caption: there is nothing to show")
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    tmp_path = folder / f".gallery.{os.getpid()}.partial"
    if tmp_path.is_symlink():
        tmp_path.unlink()
    try:
        with named_in_errors(folder):
            problems = write_files(tmp_path, records, models, comparisons, title)
        clear(folder)
        for file in sorted(tmp_path.rglob("*.*")):  # index.html is among the last
            os.replace(file, folder / file.relative_to(tmp_path))
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
    return folder / "index.html", problems


def write_files(
    folder: Path,
    records: Sequence[Record],
    models: Sequence[ShownModel],
    comparisons: Sequence[dict],
    title: str,
) -> list[str]:
    """Write the gallery's files to a new folder; returns what `write_gallery` does of images."""
    for part in ("images", "attention"):
        (folder / part).mkdir(parents=True)
    sizes, problems = write_thumbnails(folder / "images", records)
    grids = write_attention(folder / "attention", records, models)
    names = [
        name for name in COLUMNS if any(model.scores and name in model.scores.overall for model in models)
    ]
    data = {
        "title": title,
        "scores": [[name, COLUMNS[name]] for name in names],
        "chunk": CHUNK,
        "models": [
            {
                "name": model.name,
                "grid": grid,
                "overall": model.scores and [model.scores.overall.get(name) for name in names],
                "quality": model.quality,
            }
            for model, grid in zip(models, grids)
        ],
        "comparisons": [
            {
                **pair,
                "intervals": [
                    [COLUMNS[name], *interval, interval.more_than_chance]
                    for name, interval in pair["intervals"].items()
                ],
            }
            for pair in comparisons
        ],
        "images": [_image_data(record, size, models, names) for record, size in zip(records, sizes)],
    }
    # ASCII with escapes: nothing in a caption can end the file early or be taken for another encoding
    text = f"window.GALLERY = {json.dumps(data, separators=(',', ':'))};\n"
    (folder / "data.js").write_text(text, encoding="ascii")
    (folder / "index.html").write_text(page(), encoding="utf-8")
    return problems


def page() -> str:
    """The HTML page, with its style and its scripts inlined."""
    html = (PAGE / "page.html").read_text(encoding="utf-8")
    style = (PAGE / "page.css").read_text(encoding="utf-8")
    scripts = [
        (PAGE / name).read_text(encoding="utf-8")
        for name in ("attention.js", "charts.js", "page.js", "numbers.js")
    ]
    return html.replace("/* style */", style).replace("/* scripts */", "\n".join(scripts))


def check_folder(folder: str | Path) -> None:
    """Raise UserError, before any work, if a gallery cannot be written to the folder."""
    check_output(folder, folder=True)
    for part in (Path(folder) / name for name in ("images", "attention")):
        if part.is_symlink():  # what it leads to might be cleared
            raise UserError(f"{part}: a link to another folder; remove it, or give another --output_folder")
    index = Path(folder) / "index.html"
    if index.is_file() and MARK not in index.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise UserError(f"{index}: another page; give an --output_folder of its own for the gallery")


def clear(folder: Path) -> None:
    """Remove an earlier gallery's images, attention maps and quality.json, and nothing else."""
    check_folder(folder)
    (folder / "quality.json").unlink(missing_ok=True)
    for part, pattern in (("images", r"\d{5,}\.jpg"), ("attention", r"\d{3,}\.js")):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for file in (folder / part).iterdir():
            if re.fullmatch(pattern, file.name):
                file.unlink()


def write_thumbnails(
    folder: Path, records: Sequence[Record]
) -> tuple[list[tuple[int, int] | None], list[str]]:
    """Write small JPEGs of the images, named by their numbers.

    Returns:
        Width and height of each, or None if the image cannot be read; one line for each of these.
    """
    problems = []

    def write(item: tuple[int, Record]) -> tuple[int, int] | None:
        number, record = item
        try:
            if record.path is None:
                raise UserError(f"{record.image_id}: no image file")
            image = Image.fromarray(read_image(record.path, longest=THUMBNAIL).transpose(1, 2, 0))
        except UserError as error:
            problems.append(str(error))
            return None
        write_encoded(folder / f"{number:05d}.jpg", partial(image.save, format="JPEG", quality=85))
        return image.size

    results = parallel_map(write, enumerate(records), workers=4)
    return list(progress_bar(results, total=len(records), desc="thumbnails", unit="image")), problems


def write_attention(
    folder: Path, records: Sequence[Record], models: Sequence[ShownModel]
) -> list[tuple[int, int] | None]:
    """Write the files of attention maps.

    A map has a byte per cell, 255 for the word's highest value; all words of a caption are one base64 text.

    Returns:
        Height and width of each model's grid, or None for a model without attention.
    """
    grids: list[tuple[int, int] | None] = [None] * len(models)
    for number, start in enumerate(range(0, len(records), CHUNK)):
        chunk = []
        for record in records[start : start + CHUNK]:
            maps = [_maps(model.captions.get(record.image_id)) for model in models]
            for k, of_model in enumerate(maps):
                if of_model is not None:
                    grids[k] = of_model.shape[1:]
            chunk.append(
                [
                    "" if of_model is None else base64.b64encode(of_model.tobytes()).decode()
                    for of_model in maps
                ]
            )
        if any(any(of_image) for of_image in chunk):
            text = f"window.ATTENTION({number},{json.dumps(chunk, separators=(',', ':'))});\n"
            (folder / f"{number:03d}.js").write_text(text)
    return grids


def _maps(caption: ShownCaption | None) -> np.ndarray | None:
    """A caption's attention as uint8 (words, height, width), 255 for each word's highest value."""
    if caption is None or caption.attention is None or not len(caption.attention):
        return None
    maps = np.asarray(caption.attention, dtype=np.float32)
    if max(maps.shape[1:]) > LARGEST_GRID:
        size = tuple(min(side, LARGEST_GRID) for side in maps.shape[:0:-1])
        images = [Image.fromarray(of_word).resize(size, Image.Resampling.BOX) for of_word in maps]
        maps = np.stack([np.asarray(image) for image in images])
    peaks = maps.max(axis=(1, 2), keepdims=True)
    return (maps / np.where(peaks > 0, peaks, 1) * 255).round().astype(np.uint8)


def _image_data(
    record: Record, size: tuple[int, int] | None, models: Sequence[ShownModel], names: Sequence[str]
) -> dict:
    captions = []
    for model in models:
        caption = model.captions.get(record.image_id)
        if caption is None:
            captions.append(None)
            continue
        scores = model.scores and model.scores.per_image.get(record.image_id)
        captions.append(
            {
                "words": caption.words or caption.text.split(),
                "logProb": _rounded(caption.log_prob),
                "logProbs": caption.word_log_probs and [_rounded(p, 3) for p in caption.word_log_probs],
                "scores": scores and [_rounded(scores.get(name)) for name in names],
            }
        )
    return {"id": record.image_id, "size": size, "references": record.captions, "captions": captions}


def _rounded(value: float | None, digits: int = 4) -> float | None:
    """The rounded value; None for what JSON cannot hold, such as nan."""
    return None if value is None or not np.isfinite(value) else round(float(value), digits)
