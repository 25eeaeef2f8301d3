"""What every captioner takes and gives: images in any form, captions as text or with all their details.

captioner = Captioner.load("output_models/best_checkpoint.pth")
captioner.caption("photo.jpg")                             # "a dog runs on grass"
captioner.caption([image, array], details=True)            # two objects of the class Caption
captioner.caption("photo.jpg", num_captions=3)             # three captions
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

from captioning.data.images import parallel_map, read_image, to_array
from captioning.data.submissions import ScoredCaption
from captioning.decoding.options import DecodingOptions
from utils import UserError, progress_bar


@dataclass
class Caption:
    """A caption of an image with what the model can say about it.

    text: the caption. words: its words, without `<start>` and `<end>`.
    log_prob: natural logarithm of the caption's probability, that of its end included.
    word_log_probs: one for each word; with that of the end they sum to `log_prob`.
    attention: (words, height, width), where the model looked for each word: rows of the grid from top to
        bottom, each map of sum 1. 14 x 14 for an attention model, the vision model's own grid for BLIP.
    n_best: the captions of the beam, this one first, by descending score; or the samples, in the order in
        which they were drawn. Their own `n_best` are empty.
    """

    text: str
    words: list[str]
    log_prob: float
    word_log_probs: list[float]
    attention: Tensor = field(repr=False)
    n_best: list[Caption] = field(default_factory=list, repr=False)


class BaseCaptioner(ABC):
    """A model that captions images: an attention model, BLIP, or another one of transformers."""

    @abstractmethod
    def prepare(self, path: str | Path) -> Any:
        """An image file as the model takes it, by any thread: a tensor, of one size for all images, or the
        inputs of a batch of one. Raises UserError where it holds no readable image."""

    @abstractmethod
    def prepare_array(self, array: np.ndarray) -> Any:
        """RGB values, uint8 (3, height, width), as the model takes them."""

    @abstractmethod
    def decode_prepared(
        self,
        images: Sequence[Any],
        options: DecodingOptions,
        ids: Sequence[str] = (),
        with_scores: bool = False,
    ) -> list[list[ScoredCaption] | UserError]:
        """What `prepare` gave of each image -> the captions of each: `options.num_captions`, or fewer where
        the beam has no more that differ; where no caption is fit to be shown, the reason.

        Args:
            ids: the images' ids, for samples.
            with_scores: log-probabilities are needed.
        """

    @abstractmethod
    def describe_prepared(
        self, images: Sequence[Any], options: DecodingOptions, ids: Sequence[str] = ()
    ) -> list[Caption]:
        """Prepared images -> their captions with details; arguments as in `decode_prepared`."""

    def caption_prepared(self, images: Sequence[Any], beam_size: int = 3) -> list[str]:
        """Prepared images -> their captions."""
        return [found[0].text for found in self.decode_prepared(images, DecodingOptions(beam_size))]

    def caption(
        self, images: Any, beam_size: int = 3, details: bool = False, batch_size: int = 16, **decoding
    ) -> str | Caption | list[str] | list[Caption] | list[list[str]]:
        """Caption one image or several.

        Args:
            images: a file's path, a PIL image, a uint8 array (height, width, 3), a uint8 tensor (3, height,
                width), each RGB and of any size, or a list of these.
            beam_size: hypotheses searched at a time; 1 is greedy.
            details: give each caption as a `Caption` rather than as text.
            batch_size: images that go through the model at a time.
            decoding: further ones of `DecodingOptions`, such as no_repeat_ngram=3, or temperature=1.0 for
                samples; these depend on the seed and on the image's place in the list.

        Returns:
            The caption of the image; with num_captions above 1 the list of its captions (with `details`,
            these are in `n_best`). For a list, also for a list of one, the list of these.

        Raises:
            UserError: something that is no such image, a file that cannot be read, a value that cannot be; no
                caption of an image keeps to the captioner's checks.
        """
        options = DecodingOptions(beam_size, **decoding)
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: give 1 or more")
        several = isinstance(images, (list, tuple))
        images, found = (images if several else [images]), []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            prepared = [self._prepare_any(image) for image in batch]
            ids = [str(start + number) for number in range(len(batch))]
            if details:
                found += self.describe_prepared(prepared, options, ids)
                continue
            decoded = self.decode_prepared(prepared, options, ids)
            rejected = next((own for own in decoded if isinstance(own, UserError)), None)
            if rejected:
                raise rejected
            texts = [[one.text for one in own] for own in decoded]
            found += texts if options.num_captions > 1 else [own[0] for own in texts]
        return found if several else found[0]

    def _prepare_any(self, image: Any) -> Any:
        return self.prepare(image) if isinstance(image, (str, Path)) else self.prepare_array(as_array(image))


def describe_files(
    captioner: BaseCaptioner,
    paths: Mapping[str, str | Path],
    options: DecodingOptions,
    batch_size: int = 16,
) -> tuple[dict[str, Caption], list[str]]:
    """The captions, with details, of image files by image id, and a progress bar; a thread reads ahead.

    Returns:
        {image id: caption} of the images that can be read; what is wrong with the others, a line each.
    """
    problems: list[str] = []

    def read(item: tuple[str, str | Path]) -> tuple[str, Any]:
        image_id, path = item
        try:
            return image_id, captioner.prepare(path)
        except UserError as error:
            problems.append(str(error))
            return image_id, None

    captions: dict[str, Caption] = {}
    batch: list[tuple[str, Any]] = []

    def describe() -> None:
        if batch:
            ids, images = zip(*batch)
            captions.update(zip(ids, captioner.describe_prepared(images, options, ids)))
            batch.clear()

    images = parallel_map(read, paths.items(), workers=2, ahead=batch_size)
    for image_id, image in progress_bar(images, total=len(paths), desc="captioning", unit="image"):
        if image is not None:
            batch.append((image_id, image))
        if len(batch) == batch_size:
            describe()
    describe()
    return captions, problems


def as_array(image: Any, longest: int | None = None) -> np.ndarray:
    """An image in any form that `BaseCaptioner.caption` takes, as RGB values, uint8 (3, height, width).

    Args:
        longest: make it smaller, such that no side is longer.

    Raises:
        UserError: something that is no such image, or a file that cannot be read.
    """
    if isinstance(image, (str, Path)):
        return read_image(image, longest=longest)
    if not isinstance(image, Image.Image):
        image = Image.fromarray(checked_array(image).transpose(1, 2, 0))
    return to_array(image, longest=longest)


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
