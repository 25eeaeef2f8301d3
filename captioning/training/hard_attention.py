"""Training with hard attention: for each word the decoder looks at one location, a sample of alpha.

After Xu et al. (2015), section 4.1. The samples have no derivative, so the attention learns by REINFORCE
(Williams, 1992). With y a caption, s its sampled locations and b the moving average of log p(y | s), the
gradient of a caption is

    d log p(y | s)  +  lambda_r (log p(y | s) - b) d log p(s)  +  lambda_e d H(alpha)

where H is the entropy, summed over the words. As in the paper, half of the captions look at the expected
value of the locations instead, as soft attention does; they have no second term, and the gradient of the
first reaches their alphas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor

from captioning.decoding.teacher_forcing import PackedCaptions, TokenLogits
from captioning.training.optimization import Run
from models import DecoderWithAttention
from utils import copy_to_device

EXPECTED_SHARE = 0.5  # of the captions: those that look at the expected value
BASELINE_DECAY = 0.9
BASELINE = "train_baseline"  # b after an epoch, as a column of the history


class LocationLoss:
    """The terms of the loss that train hard attention, for `losses.CrossEntropy`.

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
