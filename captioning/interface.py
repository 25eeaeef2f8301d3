"""What every captioner takes and gives: images in any form, captions as text or with all their details.

captioner = Captioner.load("output_models/best_checkpoint.pth")
captioner.caption("photo.jpg")                             # "a dog runs on grass"
captioner.caption([image, array], details=True)            # two objects of the class Caption
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captioning.images import to_array
from utils import UserError, parallel_map, progress_bar


@dataclass
class Caption:
    """A caption of an image with what the model can say about it.

    text: the caption. words: its words, without `<start>` and `<end>`.
    log_prob: natural logarithm of the caption's probability, that of its end included.
    word_log_probs: one for each word; with that of the end they sum to `log_prob`.
    attention: (words, height, width), where the model looked for each word: rows of the grid from top to
        bottom, each map of sum 1. 14 x 14 for an attention model, the vision model's own grid for BLIP.
    n_best: the captions of the beam, this one first, by descending score; their own `n_best` are empty.
    """

    text: str
    words: list[str]
    log_prob: float
    word_log_probs: list[float]
    attention: Tensor = field(repr=False)
    n_best: list[Caption] = field(default_factory=list, repr=False)


class BaseCaptioner(ABC):
    """A model that captions images, attention model or BLIP."""

    @abstractmethod
    def prepare(self, path: str | Path) -> Tensor:
        """An image file as the model takes it. Raises UserError where it holds no readable image."""

    @abstractmethod
    def prepare_array(self, array: np.ndarray) -> Tensor:
        """RGB values, uint8 (3, height, width), as the model takes them."""

    @abstractmethod
    def caption_prepared(self, images: Tensor, beam_size: int = 3) -> list[str]:
        """Prepared images, stacked -> their captions."""

    @abstractmethod
    def describe_prepared(self, images: Tensor, beam_size: int = 3) -> list[Caption]:
        """Prepared images, stacked -> their captions with details."""

    def caption(
        self, images: Any, beam_size: int = 3, details: bool = False, batch_size: int = 16
    ) -> str | Caption | list[str] | list[Caption]:
        """Caption one image or several.

        Args:
            images: a file's path, a PIL image, a uint8 array (height, width, 3), a uint8 tensor (3, height,
                width), each RGB and of any size, or a list of these.
            beam_size: hypotheses searched at a time; 1 is greedy.
            details: give each caption as a `Caption` rather than as text.
            batch_size: images that go through the model at a time.

        Returns:
            The caption of the image; for a list, also for a list of one, the list of its images' captions.

        Raises:
            UserError: something that is no such image, or a file that cannot be read.
        """
        several = isinstance(images, (list, tuple))
        if beam_size < 1 or batch_size < 1:
            raise UserError(f"beam_size {beam_size}, batch_size {batch_size}: give numbers of at least 1")
        run = self.describe_prepared if details else self.caption_prepared
        images, found = (images if several else [images]), []
        for start in range(0, len(images), batch_size):
            prepared = [self._prepare_any(image) for image in images[start : start + batch_size]]
            found += run(torch.stack(prepared), beam_size)
        return found if several else found[0]

    def _prepare_any(self, image: Any) -> Tensor:
        if isinstance(image, (str, Path)):
            return self.prepare(image)
        if isinstance(image, Image.Image):
            return self.prepare_array(to_array(image))
        return self.prepare_array(checked_array(image))


def describe_files(
    captioner: BaseCaptioner, paths: Mapping[str, str | Path], beam_size: int = 3, batch_size: int = 16
) -> tuple[dict[str, Caption], list[str]]:
    """The captions, with details, of image files by image id, and a progress bar; a thread reads ahead.

    Returns:
        {image id: caption} of the images that can be read; what is wrong with the others, a line each.
    """
    problems: list[str] = []

    def read(item: tuple[str, str | Path]) -> tuple[str, Tensor | None]:
        image_id, path = item
        try:
            return image_id, captioner.prepare(path)
        except UserError as error:
            problems.append(str(error))
            return image_id, None

    captions: dict[str, Caption] = {}
    batch: list[tuple[str, Tensor]] = []

    def describe() -> None:
        if batch:
            ids, images = zip(*batch)
            captions.update(zip(ids, captioner.describe_prepared(torch.stack(images), beam_size)))
            batch.clear()

    images = parallel_map(read, paths.items(), workers=2, ahead=batch_size)
    for image_id, image in progress_bar(images, total=len(paths), desc="captioning", unit="image"):
        if image is not None:
            batch.append((image_id, image))
        if len(batch) == batch_size:
            describe()
    describe()
    return captions, problems


def checked_array(image: Any) -> np.ndarray:
    """A uint8 array (height, width, 3) or tensor (3, height, width) as an array (3, height, width).

    Raises:
        UserError: anything else, with how to mend it.
    """
    if isinstance(image, Tensor):
        name, layout, order = "a tensor", "(3, height, width)", (0, 1, 2)
        turn, scale = "image.permute(2, 0, 1)", "image.mul(255).round().byte()"
        image = image.detach().cpu().numpy() if image.dtype != torch.bfloat16 else image.float().numpy()
    elif isinstance(image, np.ndarray):
        name, layout, order = "an array", "(height, width, 3)", (2, 0, 1)
        turn, scale = "image.transpose(1, 2, 0)", '(image * 255).round().astype("uint8")'
    else:
        raise UserError(
            f"an image of type {type(image).__name__}: give a path, a PIL image, a uint8 array (height, "
            f"width, 3), a uint8 tensor (3, height, width) or a list of them"
        )
    if image.ndim == 4:
        raise UserError(f"{name} of shape {image.shape}: for several images give a list, list(images)")
    if 0 in image.shape:
        raise UserError(f"{name} of shape {image.shape}: has no pixels; give another image")
    if image.ndim != 3 or image.transpose(order).shape[0] != 3:
        swapped = image.ndim == 3 and 3 in (image.shape[0], image.shape[-1])
        advice = turn if swapped else "a PIL image (Image.fromarray), which may be grey or transparent"
        raise UserError(f"{name} of shape {image.shape}: RGB is {layout}; give {advice}")
    if image.dtype != np.uint8:
        raise UserError(
            f"{name} of {image.dtype}: values are taken as uint8 in [0, 255]; if they are in [0, 1], give "
            f"{scale}"
        )
    return np.ascontiguousarray(image.transpose(order))


def stack_maps(maps: Sequence[Tensor], height: int, width: int) -> Tensor:
    """Maps (height * width,) of each word -> (words, height, width), also of no words."""
    return torch.stack([*maps]).view(-1, height, width) if len(maps) else torch.zeros(0, height, width)
