"""Attention models ready to caption, one or an ensemble (as Vinyals et al., 2015); `load` gives others too.

    captioner = Captioner.load("output_models/best_checkpoint.pth")         # an attention model
    captioner = Captioner.load(["seed_1.pth", "seed_2.pth"])                # an ensemble of them
    captioner = Captioner.load("blip_finetuned_model/")                     # pretrained: a folder or a hub id
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

from captioning.captioners.base import BaseCaptioner, Caption
from captioning.data.features import encode_images, weights_digest
from captioning.data.images import read_image, to_array
from captioning.data.prepared import END, PAD, START, UNK
from captioning.data.submissions import ScoredCaption
from captioning.decoding.beam_search import Hypothesis, beam_search_n_best
from captioning.decoding.fast_energies import use_fast_energies
from captioning.decoding.options import UNFINISHED, DecodingOptions, WordRules
from captioning.decoding.sampling import image_seed, sample_captions
from captioning.weights.checkpoints import decoder_from, encoder_from, load_checkpoint
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
        self.word_map = word_map
        self.words = {index: word for word, index in word_map.items()}
        self.decoders = [decoder for _, decoder in members]
        for decoder in self.decoders:
            use_fast_energies(decoder)
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
                hub: BLIP, or another captioner of docs/captioners.md.
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
            from captioning.captioners.loading import load_captioner  # imported here, as it takes seconds

            return load_captioner(sources[0]).to_device()
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

    def search(self, grids: Sequence[Tensor], beam_size: int = 3) -> list[Hypothesis]:
        """The best hypothesis of each image, from what `encode` returns."""
        return [found[0] for found in self.decode(grids, DecodingOptions(beam_size))]

    def decode(
        self,
        grids: Sequence[Tensor],
        options: DecodingOptions,
        ids: Sequence[str] = (),
        keep_alphas: bool = False,
    ) -> list[list[Hypothesis]]:
        """The best hypotheses of each image, or its samples: `options.num_captions` of them.

        Unless the options allow it, `<unk>`, no word to show anybody, is not among their words.

        Args:
            grids: what `encode` returns, on the decoders' device; float16 features are taken too.
            ids: the images' ids, for samples.
            keep_alphas: return attention too.
        """
        grids = [grids[encoder].float() for encoder in self.encoder_of]
        ends = self.word_map[START], self.word_map[END]
        common = {"rules": self._rules(options), "keep_alphas": keep_alphas}
        if options.samples:
            seeds = [image_seed(options.seed, image_id) for image_id in ids]
            drawn = {"temperature": options.temperature or 1.0, "top_p": options.top_p or 1.0} | common
            return sample_captions(self.decoders, grids, *ends, seeds, options.num_captions, **drawn)
        searched = {"length_penalty": options.length_penalty, "n_best": options.num_captions} | common
        return beam_search_n_best(self.decoders, grids, *ends, options.beam_size, **searched)

    def _rules(self, options: DecodingOptions) -> WordRules:
        forbidden = () if options.allow_unk else (PAD, START, UNK)
        unfinished = sorted(UNFINISHED) if options.remove_bad_endings else ()
        return WordRules(
            [self.word_map[word] for word in forbidden],
            options.no_repeat_ngram,
            options.min_length,
            [self.word_map[word] for word in unfinished if word in self.word_map],
        )

    def text(self, hypothesis: Hypothesis) -> str:
        return " ".join(self.words[index] for index in hypothesis.words)

    def prepare(self, path: str | Path) -> Tensor:
        """An image file as `caption_prepared` takes it: uint8 (3, S, S).

        Raises:
            UserError: the file is missing or holds no readable image.
        """
        return torch.from_numpy(read_image(path, self.image_size))

    def decode_prepared(
        self,
        images: Sequence[Tensor],
        options: DecodingOptions,
        ids: Sequence[str] = (),
        with_scores: bool = False,
    ) -> list[list[ScoredCaption]]:
        """N uint8 images (3, S, S) -> the captions of each, always with their log-probabilities."""
        return self.scored(self.decode(self.encode(torch.stack([*images])), options, ids), with_scores)

    def scored(
        self, found: Sequence[Sequence[Hypothesis]], with_words: bool = True
    ) -> list[list[ScoredCaption]]:
        """The captions of what `decode` returned. with_words: with the log-probability of each word."""

        def score(one: Hypothesis) -> ScoredCaption:
            words = [(self.words[index], value) for index, value in zip(one.words, one.log_probs)]
            log_prob, count = sum(one.log_probs), len(one.words)
            return ScoredCaption.of(self.text(one), log_prob, count, words if with_words else None)

        return [[score(one) for one in own] for own in found]

    def prepare_array(self, array: np.ndarray) -> Tensor:
        """uint8 (3, height, width) -> uint8 (3, S, S), as `prepare` does with a file."""
        if array.shape[1:] != (self.image_size, self.image_size):
            array = to_array(Image.fromarray(array.transpose(1, 2, 0)), self.image_size)
        return torch.from_numpy(array)

    def describe_prepared(
        self, images: Sequence[Tensor], options: DecodingOptions, ids: Sequence[str] = ()
    ) -> list[Caption]:
        """N uint8 images (3, S, S) -> their captions, with attention (words, 14, 14) and all of the beam, or
        all samples."""
        if not options.samples:
            options = replace(options, num_captions=options.beam_size)
        captions = []
        for found in self.decode(self.encode(torch.stack([*images])), options, ids, keep_alphas=True):
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


def load_models(
    encoder_path: str | Path, decoder_path: str | Path, word_map_path: str | Path | None = None
) -> tuple[Encoder, DecoderWithAttention, dict[str, int]]:
    """Encoder, decoder and word map of one checkpoint, or of two files, on the best device, in eval mode.

    Raises:
        UserError: a file is missing or damaged, or the files do not belong together.
    """
    decoder_file = load_checkpoint(decoder_path, "decoder", word_map_path=word_map_path)
    encoder_file = decoder_file
    if encoder_path != decoder_path:
        encoder_file = load_checkpoint(encoder_path, "encoder", word_map_path=word_map_path)
    if "encoder" not in encoder_file:
        raise UserError(
            f"{encoder_path}: has no encoder; give a checkpoint, or --encoder_path and --decoder_path"
        )
    encoder, decoder = encoder_from(encoder_file, encoder_path), decoder_from(decoder_file, decoder_path)
    if any(encoder_file[name] != decoder_file[name] for name in ("settings", "word_map", "data", "history")):
        raise UserError(
            f"{encoder_path} and {decoder_path} are of different epochs or trainings; give two of one, or "
            f"--model best_checkpoint.pth"
        )
    encoder_dim = decoder.f_beta.out_features
    if encoder.dim != encoder_dim:
        raise UserError(
            f"{encoder_path} gives {encoder.dim} channels, {decoder_path} takes {encoder_dim}: "
            f"give files of one run"
        )
    device = pick_device()
    return encoder.to(device), decoder.to(device), decoder_file["word_map"]


def _is_checkpoint(path: str | Path) -> bool:
    """A file, or what looks like the name of one; otherwise it is a folder or a hub id."""
    path = Path(path)
    return path.is_file() or path.suffix.lower() in (".pth", ".pt", ".tar", ".ckpt")
