"""What the attention model minimizes on the ground-truth captions, and what makes it memorize them less.

    objective = CrossEntropy(encoder, decoder, settings, run, word_map)
    objective.start_step(lengths)                           # of all the step's captions
    loss = objective(indices, images, captions, lengths)    # this batch's part of the step's loss

`self_critical.SelfCritical` is used in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor, nn

from captioning.data.features import encode_images
from captioning.data.prepared import UNK
from captioning.decoding.teacher_forcing import PackedCaptions, TokenLogits, token_logits
from captioning.training.optimization import Run
from models import DecoderWithAttention, Encoder, normalize_images
from utils import copy_to_device

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
        history: of the training so far. totals: of the epoch so far, kept up to date.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: DecoderWithAttention,
        settings,
        run: Run,
        word_map: dict[str, int],
        scheduled_sampling: float = 0.0,
        history: Sequence[dict] = (),
        totals: dict[str, float | Tensor] | None = None,
    ):
        self.encoder, self.decoder, self.settings, self.run = encoder, decoder, settings, run
        self.unk, self.scheduled_sampling = word_map[UNK], scheduled_sampling
        self.hard = None
        if settings.attention == "hard":
            from captioning.training.losses import LocationLoss  # most trainings have none

            self.hard = LocationLoss(settings, run, history, totals)

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

    The predictions are drawn from the decoder's distribution when the ground-truth tokens are fed, for all
    steps at once, so that training stays fast (Mihaylova and Martins, 2019). The paper's sequential form
    draws them after the words that were replaced before.
    """
    tokens = token_logits(decoder, grid, captions, lengths)
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


# --- hard attention -----------------------------------------------------------------------------------------

EXPECTED_SHARE = 0.5  # of the captions: those that look at the expected value
BASELINE_DECAY = 0.9
BASELINE = "train_baseline"  # b after an epoch, as a column of the history


class LocationLoss:
    """The terms of the loss that train hard attention (Xu et al., section 4.1), for `CrossEntropy`.

    The sampled locations have no derivative, so the attention learns by REINFORCE (Williams, 1992). With y a
    caption, s its locations and b the moving average of log p(y | s), the gradient of a caption is

        d log p(y | s)  +  lambda_r (log p(y | s) - b) d log p(s)  +  lambda_e d H(alpha)

    where H is the entropy, summed over the words. As in the paper, half of the captions look at the expected
    value of the locations instead, as soft attention does; they have no second term, and the gradient of the
    first reaches their alphas.

    Args:
        settings: of the training: `lambda_r`, `lambda_e`.
        history: of the training so far, from which b goes on.
        totals: of an epoch that was interrupted; its "baseline", if it has one, is b, and is kept up to date.

    Attributes:
        baseline: b, a scalar on the device, in nats per caption; nan before the first step.
    """

    def __init__(
        self,
        settings,
        run: Run,
        history: Sequence[dict] = (),
        totals: dict[str, float | Tensor] | None = None,
    ):
        self.settings, self.run, self.totals = settings, run, {} if totals is None else totals
        earlier = [line[BASELINE] for line in history if BASELINE in line]
        start = self.totals.get("baseline", earlier[-1] if earlier else math.nan)
        self.baseline = torch.full((), start, device=run.device)
        self.step_sums = torch.zeros(2, device=run.device)  # log p(y | s) and count of the sampled captions

    @contextmanager
    def draw_locations(self, decoder: DecoderWithAttention, packing: PackedCaptions) -> Iterator[None]:
        """In this context the decoder looks at sampled locations, or, for some captions, at the expected
        value; `gradient_of_locations` then knows them."""
        is_soft = torch.rand(*packing.decode_lengths.shape, 1) < EXPECTED_SHARE  # (N, G, 1), on the CPU
        in_order, self.is_sampled = copy_to_device(
            [packing.sort(is_soft), ~is_soft.flatten()], self.run.device
        )
        with decoder.attention.sampling(in_order) as samples:
            yield
        self.locations = packing.pack(samples)  # (W, P)

    def gradient_of_locations(self, tokens: TokenLogits) -> Tensor:
        """A scalar, 0, whose gradient is minus the second and third terms of the formula above, summed over
        the captions.

        tokens: of the captions for which the last locations were drawn.
        """
        with torch.no_grad():
            log_probs = -F.cross_entropy(tokens.logits.float(), tokens.targets, reduction="none")  # (W,)
            log_probs = log_probs.new_zeros(len(self.is_sampled)).index_add(0, tokens.captions, log_probs)
            self.step_sums += torch.stack([(log_probs * self.is_sampled).sum(), self.is_sampled.sum()])
            has_term = (
                self.is_sampled & self.baseline.isfinite()
            )  # the first step has nothing to compare with
            advantages = torch.where(has_term, log_probs - self.baseline, 0.0)  # (N * G,)
        log_alphas = tokens.alphas.clamp(min=torch.finfo(tokens.alphas.dtype).tiny).log()  # finite where 0
        reinforce = (advantages[tokens.captions] * (self.locations * log_alphas).sum(dim=1)).sum()
        entropy = -(tokens.alphas * log_alphas).sum()
        terms = self.settings.lambda_r * reinforce + self.settings.lambda_e * entropy
        return terms.detach() - terms

    def update_baseline(self) -> None:
        """b <- 0.9 b + 0.1 mean of log p(y | s) over the step's sampled captions, those of all processes."""
        sums = self.step_sums
        if self.run.state.num_processes > 1:
            sums = reduce(sums, "sum")
        mean = sums[0] / sums[1]  # nan where no caption was sampled
        moved = self.baseline.lerp(mean, 1 - BASELINE_DECAY)
        moved = torch.where(self.baseline.isnan(), mean, moved)
        self.totals["baseline"] = self.baseline = torch.where(mean.isnan(), self.baseline, moved)
        self.step_sums = torch.zeros_like(self.step_sums)

    def report(self) -> dict[str, float]:
        baseline = float(self.baseline)
        return {BASELINE: baseline} if math.isfinite(baseline) else {}
