"""Trained models ready to caption: one, or an ensemble of several (Vinyals et al., 2015, section 4.3.3).

    captioner = Captioner.load("output_models/best_checkpoint.pth")         # an attention model
    captioner = Captioner.load(["seed_1.pth", "seed_2.pth"])                # an ensemble of them
    captioner = Captioner.load("blip_finetuned_model/")                     # BLIP: a folder or a hub id
    captioner.caption(["photo.jpg", "other.png"], beam_size=3)              # two strings

The members of an ensemble each look at the image with their own encoder and attention; at every step of
one beam search their word distributions are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captioning.annotations import END, PAD, START, UNK
from captioning.beam_search import Hypothesis, beam_search_n_best
from captioning.checkpoints import load_models
from captioning.features import encode_images, weights_digest
from captioning.images import read_image, to_array
from captioning.interface import BaseCaptioner, Caption
from models import DecoderWithAttention, Encoder
from utils import UserError, pick_device


class Captioner(BaseCaptioner):
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
    ):
        # False where a decoder was trained with --fused False
        self.fused = all(getattr(decoder, "fused", True) for _, decoder in members)
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
    def load(
        cls, source: str | Path | Sequence[str | Path], word_map_path: str | Path | None = None
    ) -> BaseCaptioner:
        """Any captioner, on the best device and in evaluation mode.

        Args:
            source: a checkpoint of train.py, or a folder with a best_checkpoint.pth: an attention model.
                Several checkpoints: their ensemble. A folder of train_model.py or the id of a model on the
                hub: BLIP, or a captioner with its interface.
            word_map_path: word_map.json, for checkpoints that have none in them.

        Raises:
            UserError: a file is missing or damaged, or the members' word maps or image sizes differ.
        """
        sources = [source] if isinstance(source, (str, Path)) else list(source)
        if not sources:
            raise UserError("no checkpoint given: give the file that train.py wrote, or several")
        sources = [
            Path(path) / "best_checkpoint.pth" if (Path(path) / "best_checkpoint.pth").is_file() else path
            for path in sources
        ]
        pretrained = [path for path in sources if not _is_checkpoint(path)]
        if pretrained and len(sources) > 1:
            raise UserError(f"{pretrained[0]}: no checkpoint of train.py; only these make an ensemble")
        if pretrained:
            from captioning.blip import load_captioner  # imported here, as it takes seconds

            captioner = load_captioner(sources[0])
            captioner.model.to(pick_device())
            return captioner
        return cls._ensemble(sources, word_map_path)

    @classmethod
    def _ensemble(cls, checkpoints: Sequence[str | Path], word_map_path: str | Path | None) -> Captioner:
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
        self, grids: Sequence[Tensor], beam_size: int, length_penalty: float = 0.0, keep_alphas: bool = False
    ) -> list[Hypothesis]:
        """The best hypothesis of each image; arguments as `search_n_best` has them."""
        found = self.search_n_best(grids, beam_size, length_penalty, keep_alphas, n_best=1)
        return [hypotheses[0] for hypotheses in found]

    def search_n_best(
        self,
        grids: Sequence[Tensor],
        beam_size: int,
        length_penalty: float = 0.0,
        keep_alphas: bool = False,
        n_best: int | None = None,
    ) -> list[list[Hypothesis]]:
        """The best hypotheses of each image; `<unk>`, no word to show anybody, is not among their words.

        Args:
            grids: what `encode` returns, on the decoders' device; float16 features are taken too.
            beam_size, length_penalty, keep_alphas: as in `beam_search_n_best`.
            n_best: as there; None: as many as the beam has.
        """
        grids = [grid.float() for grid in grids]
        return beam_search_n_best(
            self.decoders,
            [grids[encoder] for encoder in self.encoder_of],
            self.word_map[START],
            self.word_map[END],
            beam_size,
            forbidden=[self.word_map[word] for word in (PAD, START, UNK)],
            length_penalty=length_penalty,
            keep_alphas=keep_alphas,
            n_best=n_best or beam_size,
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

    def prepare_array(self, array: np.ndarray) -> Tensor:
        """uint8 (3, height, width) -> uint8 (3, S, S), as `prepare` does with a file."""
        if array.shape[1:] != (self.image_size, self.image_size):
            array = to_array(Image.fromarray(array.transpose(1, 2, 0)), self.image_size)
        return torch.from_numpy(array)

    def describe_prepared(
        self, images: Tensor, beam_size: int = 3, length_penalty: float = 0.0
    ) -> list[Caption]:
        """uint8 images (N, 3, S, S) -> their captions, with attention (words, 14, 14) and the n best."""
        captions = []
        grids = self.encode(images)
        for found in self.search_n_best(grids, beam_size, length_penalty, keep_alphas=True):
            n_best = [self._details(hypothesis) for hypothesis in found]
            captions.append(replace(n_best[0], n_best=n_best))
        return captions

    def _details(self, hypothesis: Hypothesis) -> Caption:
        words = [self.words[index] for index in hypothesis.words]
        side = round(hypothesis.alphas.shape[1] ** 0.5)
        return Caption(
            " ".join(words),
            words,
            sum(hypothesis.log_probs),
            hypothesis.log_probs[: len(words)],
            hypothesis.alphas.view(-1, side, side),
        )


def _is_checkpoint(path: str | Path) -> bool:
    """A file, or what looks like the name of one; otherwise it is a folder or a hub id."""
    path = Path(path)
    return path.is_file() or path.suffix.lower() in (".pth", ".pt", ".tar", ".ckpt")
