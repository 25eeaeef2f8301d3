"""Losses of samples by REINFORCE (Williams, 1992): self-critical training, hard attention's locations.

A sample's reward, less a baseline, multiplies the gradient of its log-probability. `SelfCritical` samples
captions, and rewards them by CIDEr-D; `LocationLoss` samples where hard attention looks, and rewards that by
the caption's log-probability.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor

from captioning.data.prepared import END, START
from captioning.decoding.sampling import draw_captions
from captioning.decoding.teacher_forcing import PackedCaptions, TokenLogits, token_logits
from captioning.training.losses import drop_channels, encode
from captioning.training.optimization import Run
from captioning.training.resume import REWARD
from metrics import CiderD
from metrics.ngrams import bleu_counts, named_bleu
from models import DecoderWithAttention, Encoder
from utils import copy_to_device


class Reward:
    """The reward of captions, given as lists of words that include `<end>` if the caption is finished.

    CIDEr-D with the document frequencies of these references, plus `bleu4_weight` times BLEU-4 in [0, 1].

    Args:
        references: for each training image its reference captions, each a list of words without `<end>`.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[str]]], bleu4_weight: float = 0.0):
        self.references = [[(*words, END) for words in captions] for captions in references]
        self.cider, self.bleu4_weight = CiderD.from_references(self.references), bleu4_weight

    def __call__(self, index: int, captions: Sequence[Sequence[str]]) -> list[float]:
        """The rewards of captions of the image with this index; a finished one ends with `<end>`."""
        references = self.references[index]
        rewards = self.cider.score([references] * len(captions), captions)
        if self.bleu4_weight:
            bleu4 = [named_bleu(bleu_counts(references, words))["Bleu_4"] for words in captions]
            rewards = [reward + self.bleu4_weight * bleu for reward, bleu in zip(rewards, bleu4)]
        return rewards


class SelfCritical:
    """Self-critical training (Rennie et al., 2017), in the place of `losses.CrossEntropy`, in the form of Luo
    (2020, "A Better Variant of Self-Critical Sequence Training"): of each image several captions are sampled,
    and the baseline of each one's reward is the mean reward of the others. There is no greedy pass. With S
    samples of an image, reward r_s and words w_st,

        loss = - sum over s, t of  log p(w_st) (r_s - mean of the other r)  /  number of words

    `<end>` is a word of the samples and of the references, so that captions which break off lose reward.

    Args:
        settings: of the training: `self_critical_samples`, at least 2; `feature_dropout`, `seed`.
        reward: of the training images.
        longest: words of a sample at most, `<end>` included.
        epoch: the random numbers of an image's samples depend on the seed, the epoch and the image alone, not
            on batches or processes.
        totals: of this process's samples in the epoch so far, kept up to date: "rewards" summed, "samples"
            counted.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: DecoderWithAttention,
        settings,
        run: Run,
        word_map: dict[str, int],
        reward: Reward,
        longest: int,
        epoch: int,
        totals: dict[str, float] | None = None,
    ):
        self.encoder, self.decoder, self.settings, self.run = encoder, decoder, settings, run
        self.word_map, self.reward, self.longest, self.epoch = word_map, reward, longest, epoch
        self.words = {index: word.lower() for word, index in word_map.items()}  # as the references are
        self.totals = {} if totals is None else totals
        self.totals |= {"rewards": 0.0, "samples": 0} | self.totals

    def start_step(self, lengths: np.ndarray) -> None:
        """lengths: of the ground-truth captions of all the step's images."""
        self.step_words, self.captions = 0, len(lengths) * self.settings.self_critical_samples

    def __call__(self, indices: Sequence[int], images: Tensor, *_: Tensor) -> Tensor:
        """This batch's part of the step's loss, not yet divided by the number of words."""
        settings = self.settings
        grid = drop_channels(encode(self.encoder, images, self.run.device), settings.feature_dropout)
        uniforms = self._uniforms(indices)
        start, end = self.word_map[START], self.word_map[END]
        captions, lengths = draw_samples(self.decoder, grid.detach(), uniforms, start, end)
        rewards = torch.tensor(self._rewards(indices, captions, lengths))  # (N, S)
        self.totals["rewards"] += float(rewards.sum())
        self.totals["samples"] += rewards.numel()
        self.step_words += int((lengths - 1).sum())
        advantages = leave_one_out(rewards).flatten().to(grid.device)
        tokens = token_logits(self.decoder, grid, captions, lengths)
        log_probs = tokens.logits.float().log_softmax(dim=1).gather(1, tokens.targets.unsqueeze(1)).squeeze(1)
        return -(log_probs * advantages[tokens.captions]).sum()

    def finish_step(self) -> float:
        """The number of words of the step's samples, over all processes."""
        return float(self.run.sum(torch.tensor(self.step_words)))

    def report(self) -> dict[str, float]:
        """The mean reward of all processes' samples in the epoch so far."""
        totals = torch.tensor([self.totals["rewards"], self.totals["samples"]], dtype=torch.float64)
        rewards, samples = self.run.sum(totals).tolist()
        return {REWARD: rewards / samples}

    def _uniforms(self, indices: Sequence[int]) -> Tensor:
        """Random numbers in [0, 1) (N, S, longest), each image's its own."""
        shape = self.settings.self_critical_samples, self.longest
        seeds = [[self.settings.seed, self.epoch, int(index)] for index in indices]
        return torch.from_numpy(
            np.stack([np.random.default_rng(seed).random(shape, np.float32) for seed in seeds])
        )

    def _rewards(self, indices: Sequence[int], captions: Tensor, lengths: Tensor) -> list[list[float]]:
        def words(caption: list[int], length: int) -> list[str]:
            return [self.words[index] for index in caption[1:length]]

        return [
            self.reward(int(index), [words(*sample) for sample in zip(*samples)])
            for index, *samples in zip(indices, captions.tolist(), lengths.tolist())
        ]


def leave_one_out(rewards: Tensor) -> Tensor:
    """Advantages (N, S): each reward less the mean of the image's others."""
    count = rewards.shape[1]
    return (rewards - rewards.mean(dim=1, keepdim=True)) * count / (count - 1)


def draw_samples(
    decoder: DecoderWithAttention, grid: Tensor, uniforms: Tensor, start: int, end: int
) -> tuple[Tensor, Tensor]:
    """Draw S captions of each of N images from the decoder's distribution, without dropout.

    Args:
        grid: (N, h, w, D).
        uniforms: (N, S, T) in [0, 1), as in `draw_captions`. T is the largest number of words, `<end>`
            included.

    Returns:
        captions (N, S, L) with `<start>` and `<end>`, padded with 0; lengths (N, S), both counted. Both on
        the CPU.
    """
    training = decoder.training
    words = draw_captions([decoder.eval()], [grid], start, end, uniforms).words.cpu()  # (N, S, T)
    torch.clear_autocast_cache()  # or, before torch 2.11, the loss gets its 16-bit weights without gradients
    decoder.train(training)
    ended = (words == end).cumsum(dim=2)
    lengths = (ended == 0).sum(dim=2) + 1 + (ended[:, :, -1] > 0)
    captions = F.pad(words, (1, 0), value=start)
    captions = captions * (torch.arange(captions.shape[2]) < lengths.unsqueeze(2))
    return captions[:, :, : int(lengths.max())], lengths


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
