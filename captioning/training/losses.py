"""Cross-entropy on the ground-truth captions, which the attention model minimizes, and its regularization.

    objective = CrossEntropy(encoder, decoder, settings, run, word_map)
    objective.start_step(lengths)                           # of all the step's captions
    loss = objective(indices, images, captions, lengths)    # this batch's part of the step's loss
    divisor = objective.finish_step()                       # of the step's gradients

`reinforce.SelfCritical` is used in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioning.data.features import encode_images
from captioning.data.prepared import UNK
from captioning.decoding.teacher_forcing import token_logits
from captioning.training.optimization import Run
from models import DecoderWithAttention, Encoder, normalize_images

if TYPE_CHECKING:
    from captioning.training.reinforce import LocationLoss

SAMPLING_STEPS = 5  # in which the probability of scheduled sampling rises to its value


def encode(encoder: Encoder, images: Tensor, device: torch.device) -> Tensor:
    """Images of a batch, uint8 (N, 3, S, S), or their features (N, h, w, D), as the decoder's grid
    (N, h, w, D)."""
    images = images.to(device, non_blocking=True)
    if images.dtype != torch.uint8:
        return images.float()
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in encoder.parameters()):
        return encoder.grid(normalize_images(images))
    return encode_images(encoder, images).clone()  # an inference tensor itself may not take part in training


def coverage_penalty(coverage: Tensor) -> Tensor:
    """The doubly stochastic penalty (Xu et al., equation 14), summed over the captions.

    It is averaged over the 196 pixels where the paper sums, so alpha_c = 196 lambda.

    Args:
        coverage: (captions, P), the alphas summed over each caption's tokens.
    """
    return ((1 - coverage) ** 2).mean(dim=1).sum()


class CrossEntropy:
    """Cross-entropy of the ground-truth tokens with the doubly stochastic penalty, as training minimizes it.

    Args:
        settings: of the training: `alpha_c`, and the probabilities `label_smoothing` (Szegedy et
            al., 2016, section 7), `feature_dropout`, `word_dropout` (Bowman et al., 2016, section 3).
        scheduled_sampling: probability with which a fed token is one that the model predicted.
        hard: what trains hard attention beside the cross-entropy; None: attention is soft.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: DecoderWithAttention,
        settings,
        run: Run,
        word_map: dict[str, int],
        scheduled_sampling: float = 0.0,
        hard: LocationLoss | None = None,
    ):
        self.encoder, self.decoder, self.settings, self.run = encoder, decoder, settings, run
        self.unk, self.scheduled_sampling, self.hard = word_map[UNK], scheduled_sampling, hard

    def start_step(self, lengths: np.ndarray) -> None:
        """lengths: of all the step's captions, over all micro-batches and processes, so that every token has
        the same weight."""
        self.tokens, self.captions = int((lengths - 1).sum()), lengths.size

    def __call__(self, indices: Sequence[int], images: Tensor, captions: Tensor, lengths: Tensor) -> Tensor:
        """This batch's part of the step's loss.

        Args:
            indices: of the images. images: see `encode`.
            captions: (N, G, L). lengths: (N, G), `<start>` and `<end>` counted.
        """
        settings = self.settings
        grid = drop_channels(encode(self.encoder, images, self.run.device), settings.feature_dropout)
        fed = self._fed(grid, captions, lengths)
        draw_locations = partial(self.hard.draw_locations, self.decoder) if self.hard else None
        tokens = token_logits(self.decoder, grid, captions, lengths, fed, draw_locations)
        cross_entropy = F.cross_entropy(
            tokens.logits, tokens.targets, reduction="sum", label_smoothing=settings.label_smoothing
        )
        penalty = coverage_penalty(tokens.coverage())
        if self.hard:
            cross_entropy = cross_entropy + self.hard.gradient_of_locations(tokens)
        return cross_entropy / self.tokens + settings.alpha_c * penalty / self.captions

    def finish_step(self) -> float:
        """What the step's gradients are still to be divided by."""
        if self.hard:
            self.hard.update_baseline()
        return 1.0

    def report(self) -> dict[str, float]:
        """What the progress bar and the history show of the epoch so far, beside the loss."""
        return self.hard.report() if self.hard else {}

    def _fed(self, grid: Tensor, captions: Tensor, lengths: Tensor) -> Tensor | None:
        """The words to feed (N, G, L), where they are not the ground-truth tokens."""
        fed = None
        if self.scheduled_sampling:
            fed = sample_inputs(self.decoder, grid, captions, lengths, self.scheduled_sampling)
        if self.settings.word_dropout:
            fed = captions if fed is None else fed
            dropped = torch.rand(fed.shape) < self.settings.word_dropout
            dropped[:, :, 0] = False  # <start>
            fed = fed.masked_fill(dropped, self.unk)
        return fed


@torch.no_grad()
def sample_inputs(
    decoder: DecoderWithAttention,
    grid: Tensor,
    captions: Tensor,
    lengths: Tensor,
    probability: float,
) -> Tensor:
    """Scheduled sampling (Bengio et al., 2015): captions (N, G, L) in which every word but the first is
    replaced, with `probability`, by one that the decoder predicts in its place.

    All predictions are drawn in one pass in which the ground-truth tokens are fed (Mihaylova and Martins,
    2019). The paper's sequential form draws each one after the words that were replaced before.
    """
    tokens = token_logits(decoder, grid, captions, lengths)
    torch.clear_autocast_cache()  # or, before torch 2.11, the loss gets its 16-bit weights without gradients
    drawn = torch.multinomial(tokens.logits.float().softmax(dim=1), 1).flatten().cpu()
    fed = captions.flatten(0, 1).clone()
    replaced = torch.rand(len(drawn)) < probability
    packing = tokens.packing
    fed[packing.captions[replaced], packing.steps[replaced] + 1] = drawn[replaced]
    return fed.view(captions.shape)


def sampling_probability(largest: float, epoch: int, epochs: int) -> float:
    """The probability of scheduled sampling in an epoch, counted from 1: it rises from 0 to `largest` in five
    equal steps over the first half of the epochs."""
    return largest * min(SAMPLING_STEPS, 2 * SAMPLING_STEPS * (epoch - 1) // epochs) / SAMPLING_STEPS


def drop_channels(grid: Tensor, probability: float) -> Tensor:
    """Dropout of whole channels of each image's grid (N, h, w, D) (Tompson et al., 2015, section 3.2)."""
    if not probability:
        return grid
    return grid * F.dropout(torch.ones_like(grid[:, :1, :1]), probability)


def drop_embeddings(decoder: DecoderWithAttention, probability: float) -> None:
    """From now on drop values of the word vectors while the decoder is trained."""

    def dropped(module: nn.Module, _, vectors: Tensor) -> Tensor:
        return F.dropout(vectors, probability, module.training)

    if probability:
        decoder.embedding.register_forward_hook(dropped)
