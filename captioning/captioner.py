"""Trained models ready to caption: one, or an ensemble of several (Vinyals et al., 2015, section 4.3.3).

    captioner = Captioner.load(["output_models/best_checkpoint.pth"])
    captioner.caption_prepared(images, beam_size=3)    # uint8 (N, 3, S, S) -> N strings

The members of an ensemble each look at the image with their own encoder and attention; at every step of
one beam search their word distributions are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from captioning.annotations import END, PAD, START, UNK
from captioning.beam_search import Hypothesis, beam_search
from captioning.checkpoints import load_models
from captioning.features import encode_images, weights_digest
from captioning.images import read_image
from models import DecoderWithAttention, Encoder
from utils import UserError


class Captioner:
    """Encoders and decoders with one word map.

    Attributes:
        encoders: the different encoders; members whose encoders have the same weights share one.
        encoder_of: for each member the index of its encoder.
        decoders: one for each member.
        word_map: word -> index.
        image_size: pixels, height and width of the images that all members were trained on.
    """

    def __init__(
        self,
        members: Sequence[tuple[Encoder, DecoderWithAttention]],
        word_map: dict[str, int],
        fused: bool = True,
    ):
        self.fused = fused
        self.word_map = word_map
        self.words = {index: word for word, index in word_map.items()}
        self.decoders = [decoder for _, decoder in members]
        self.encoders: list[Encoder] = []
        self.encoder_of: list[int] = []
        known: dict[str, int] = {}
        for encoder, _ in members:
            digest = weights_digest(encoder) if len(members) > 1 else ""
            if digest not in known:
                known[digest] = len(self.encoders)
                self.encoders.append(encoder)
            self.encoder_of.append(known[digest])
        self.image_size = self.encoders[0].image_size

    @classmethod
    def load(cls, checkpoints: Sequence[str | Path], word_map_path: str | Path | None = None) -> Captioner:
        """The model of a checkpoint, or the ensemble of several.

        Raises:
            UserError: a file is missing or damaged, or the members' word maps or image sizes differ.
        """
        members, first = [], None
        for path in checkpoints:
            encoder, decoder, word_map = load_models(path, path, word_map_path)
            first = first or (word_map, encoder.image_size)
            if word_map != first[0]:
                raise UserError(
                    f"{path}: its word map is not that of {checkpoints[0]}; only models trained on the same "
                    f"prepared data make an ensemble"
                )
            if encoder.image_size != first[1]:
                raise UserError(
                    f"{path}: trained on images of {encoder.image_size} pixels, {checkpoints[0]} on "
                    f"{first[1]}; only models of one image size make an ensemble"
                )
            members.append((encoder, decoder))
        return cls(members, first[0])

    def encode(self, images: Tensor) -> list[Tensor]:
        """uint8 images (N, 3, S, S) -> a grid (N, h, w, D) of each of `encoders`."""
        device = next(self.encoders[0].parameters()).device
        images = images.to(device, non_blocking=True)
        return [encode_images(encoder, images) for encoder in self.encoders]

    def search(
        self,
        grids: Sequence[Tensor],
        beam_size: int,
        length_penalty: float = 0.0,
        keep_alphas: bool = False,
    ) -> list[Hypothesis]:
        """The best hypothesis of each image; `<unk>`, no word to show anybody, is not among its words.

        Args:
            grids: what `encode` returns, on the decoders' device; float16 features are taken too.
            beam_size, length_penalty, keep_alphas: as in `beam_search`.
        """
        grids = [grid.float() for grid in grids]
        return beam_search(
            self.decoders,
            [grids[encoder] for encoder in self.encoder_of],
            self.word_map[START],
            self.word_map[END],
            beam_size,
            forbidden=[self.word_map[word] for word in (PAD, START, UNK)],
            length_penalty=length_penalty,
            keep_alphas=keep_alphas,
            fused=self.fused,
        )

    def text(self, hypothesis: Hypothesis) -> str:
        return " ".join(self.words[index] for index in hypothesis.words)

    def prepare(self, path: str | Path) -> Tensor:
        """An image file as `caption_prepared` takes it: uint8 (3, S, S).

        Raises:
            UserError: the file is missing or holds no readable image.
        """
        return torch.from_numpy(read_image(path, self.image_size))

    def caption_prepared(self, images: Tensor, beam_size: int = 3, length_penalty: float = 0.0) -> list[str]:
        """uint8 images (N, 3, S, S) -> their captions."""
        return [self.text(found) for found in self.search(self.encode(images), beam_size, length_penalty)]
