"""Captions drawn at random from attention decoders, several for each image, for a whole batch of images.

    sample_captions([decoder], [grid], start, end, seeds=[1, 2], samples=5, temperature=0.8)

Every image has a seed of its own: its samples depend neither on the other images of the batch nor on how
many samples are drawn beside them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from captioning.decoding.beam_search import Hypothesis, next_words, search_states
from captioning.decoding.fused_recurrence import copy_to_device
from captioning.decoding.word_rules import NO_RULES, WordMasks, WordRules
from models import DecoderWithAttention
from utils import UserError


@torch.inference_mode()
def sample_captions(
    decoders: Sequence[DecoderWithAttention],
    grids: Sequence[Tensor],
    start: int,
    end: int,
    seeds: Sequence[int],
    samples: int = 1,
    max_steps: int = 50,
    temperature: float = 1.0,
    top_p: float = 1.0,
    rules: WordRules = NO_RULES,
    keep_alphas: bool = False,
    fused: bool = True,
) -> list[list[Hypothesis]]:
    """`samples` captions of each of N images, in the order in which they were drawn; some may be alike.

    Their `log_probs` are those of the model's own distribution, whatever the temperature, top_p and rules.

    Args:
        decoders, grids, start, end, max_steps, keep_alphas, fused: as in `beam_search_n_best`.
        seeds: one for each image.
        temperature, top_p: as in `draw_words`.
        rules: what captions must not be like.

    Raises:
        UserError: the logits are not numbers.
    """
    device = grids[0].device
    (numbers,) = copy_to_device([uniform_numbers(seeds, samples, max_steps)], device)
    copies = torch.zeros(len(seeds), samples, dtype=torch.long, device=device)
    states, masks = search_states(decoders, grids, fused), WordMasks(rules, end, device)
    for state in states:
        state.reorder(copies)  # an image's only hypothesis, `samples` times
    history = torch.full((len(seeds), samples, 1), start, device=device)
    ended = torch.zeros_like(copies, dtype=torch.bool)
    stuck = ended.clone()  # the rules left no word
    log_probs, alphas = [], []
    for step in range(max_steps):
        own, alpha = next_words(states, history[:, :, -1])
        allowed = own.clone()
        masks.apply(allowed, history)
        stuck = stuck | (allowed.amax(dim=2).isneginf() & ~ended)
        words = draw_words(allowed, numbers[:, :, step], temperature, top_p)
        words = words.masked_fill(ended | stuck, end)
        log_probs.append(own.gather(2, words.unsqueeze(2)).squeeze(2))
        alphas += [alpha] if keep_alphas else []
        history = torch.cat([history, words.unsqueeze(2)], dim=2)
        ended = ended | (words == end)
        if ended.all():  # the one time that a step reads from the device
            break
    maps = torch.stack(alphas, dim=2).cpu() if keep_alphas else None  # (N, S, T, P)
    drawn, log_probs = history[:, :, 1:].tolist(), torch.stack(log_probs, dim=2).cpu()
    if log_probs.isnan().any():
        raise UserError(
            "the decoder's word scores are not numbers: its training went astray, take another checkpoint"
        )
    stuck = stuck.tolist()

    def hypothesis(i: int, k: int) -> Hypothesis:
        words = drawn[i][k]
        finished = end in words and not stuck[i][k]
        words = words[: words.index(end)] if end in words else words
        words = words if finished else rules.cut(words)
        own = log_probs[i, k, : len(words) + finished].tolist()
        return Hypothesis(words, sum(own), maps[i, k, : len(words)] if keep_alphas else None, finished, own)

    return [[hypothesis(i, k) for k in range(samples)] for i in range(len(seeds))]


def image_seed(seed: int, image_id: str) -> int:
    """The seed of an image's samples: the same in every batch, order and process."""
    text = f"{seed} {image_id}".encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")


def uniform_numbers(seeds: Sequence[int], samples: int, steps: int) -> Tensor:
    """Numbers in [0, 1), (N, samples, steps): what an image's seed gives, whatever the other images."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(samples, steps, generator=generator) for generator in generators])


def draw_words(log_probs: Tensor, numbers: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Draw a word from each distribution, by its cumulative sums.

    Args:
        log_probs: (..., V); -inf: never drawn.
        numbers: (...), uniform in [0, 1): each decides a draw.
        temperature: draw from the probabilities to the power of 1 / this.
        top_p: draw from the fewest words whose probabilities sum to at least this (Holtzman et al., 2020).

    Returns:
        Word indices (...).
    """
    probs, order = (log_probs / temperature).softmax(dim=-1), None
    if top_p < 1:
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0.0)
    sums = probs.cumsum(dim=-1)
    # a little below the sum of all, which rounding could otherwise reach
    places = numbers * (1 - 1e-6) * sums[..., -1]
    drawn = torch.searchsorted(sums, places.unsqueeze(-1), right=True).clamp(max=sums.shape[-1] - 1)
    return (drawn if order is None else order.gather(-1, drawn)).squeeze(-1)
