"""Captions drawn at random from attention decoders, several for each image, for a whole batch of images.

    sample_captions([decoder], [grid], start, end, seeds=[1, 2], samples=5, temperature=0.8)

Every image has a seed of its own: its samples depend neither on the other images of the batch nor on how
many samples are drawn beside them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captioning.decoding.beam_search import Hypothesis, SearchState, next_words, search_states
from captioning.decoding.options import NO_RULES, WordMasks, WordRules
from models import DecoderWithAttention
from utils import UserError, copy_to_device

STEPS_BETWEEN_CHECKS = 4  # of which samples have ended: each check waits for the device


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
) -> list[list[Hypothesis]]:
    """`samples` captions of each of N images, in the order in which they were drawn; some may be alike.

    Their `log_probs` are those of the model's own distribution, whatever the temperature, top_p and rules.

    Args:
        decoders, grids, start, end, max_steps, keep_alphas: as in `beam_search_n_best`.
        seeds: one for each image.
        temperature, top_p: as in `draw_words`.
        rules: what captions must not be like.

    Raises:
        UserError: the logits are not numbers.
    """
    uniforms = uniform_numbers(seeds, samples, max_steps)
    drawn = draw_captions(decoders, grids, start, end, uniforms, temperature, top_p, rules, keep_alphas)
    words, log_probs, stuck = drawn.words.tolist(), drawn.log_probs.cpu(), drawn.is_stuck.tolist()
    if log_probs.isnan().any():
        raise UserError(
            "the decoder's word scores are not numbers: its training went astray, take another checkpoint"
        )
    alphas = drawn.alphas.cpu() if keep_alphas else None

    def hypothesis(i: int, k: int) -> Hypothesis:
        caption = words[i][k]
        finished = end in caption and not stuck[i][k]
        caption = caption[: caption.index(end)] if end in caption else caption
        caption = caption if finished else rules.cut(caption)
        caption_log_probs = log_probs[i, k, : len(caption) + finished].tolist()
        maps = alphas[i, k, : len(caption)] if keep_alphas else None
        return Hypothesis(caption, sum(caption_log_probs), maps, finished, caption_log_probs)

    return [[hypothesis(i, k) for k in range(samples)] for i in range(len(seeds))]


class DrawnCaptions(NamedTuple):
    """S captions of each of N images, of T words at most; on the device."""

    words: Tensor  # (N, S, T) indices, `<end>` from a caption's end on
    log_probs: Tensor  # (N, S, T) of the words and of `<end>`, by the model's own distribution; 0 after it
    is_stuck: Tensor  # (N, S) whether a caption ended because the rules left no word
    alphas: Tensor | None  # (N, S, T, P), where they were asked for


@torch.no_grad()
def draw_captions(
    decoders: Sequence[DecoderWithAttention],
    grids: Sequence[Tensor],
    start: int,
    end: int,
    uniforms: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    rules: WordRules = NO_RULES,
    keep_alphas: bool = False,
) -> DrawnCaptions:
    """Draw captions word by word, all at the same time; those that have ended are dropped now and then.

    Args:
        uniforms: (N, S, T) in [0, 1), on the CPU: the t-th number decides word t, as in `draw_words`.
        others: as in `sample_captions`.
    """
    (images, samples, steps), device = uniforms.shape, grids[0].device
    (uniforms,) = copy_to_device([uniforms], device)
    states, masks = search_states(decoders, grids), WordMasks(rules, end, device)
    count = images * samples
    all_words = torch.full((count, steps), end, device=device)
    all_log_probs = torch.zeros(count, steps, device=device)
    is_stuck = torch.zeros(count, dtype=torch.bool, device=device)
    maps = []
    rows = torch.arange(count, device=device).view(images, samples)  # (n, k) of those still drawn
    ended = torch.zeros_like(rows, dtype=torch.bool)
    history = torch.full((images, 1, 1), start, device=device)  # (n, k, words so far)
    for step in range(steps):
        log_probs, alpha = next_words(states, history[:, :, -1])  # (n, k, V), (n, k, P)
        if step == 0:  # an image's only hypothesis, `samples` times
            history, log_probs, alpha = (v.expand(-1, samples, -1) for v in (history, log_probs, alpha))
            for state in states:
                state.reorder(torch.zeros_like(rows))
        allowed = masks.applied(log_probs, history)
        leaves_none = allowed.amax(dim=2).isneginf() & ~ended
        words = draw_words(allowed, uniforms[:, :, step], temperature, top_p)
        words = words.masked_fill(ended | leaves_none, end)
        chosen = log_probs.gather(2, words.unsqueeze(2)).squeeze(2).masked_fill(ended, 0)
        all_words[rows, step], all_log_probs[rows, step] = words, chosen
        is_stuck[rows] |= leaves_none
        if keep_alphas:
            maps.append(
                alpha.new_zeros(count, alpha.shape[2]).index_copy(0, rows.flatten(), alpha.flatten(0, 1))
            )
        history = torch.cat([history, words.unsqueeze(2)], dim=2)
        ended = ended | (words == end)
        if step % STEPS_BETWEEN_CHECKS == STEPS_BETWEEN_CHECKS - 1:
            picked = _drop_ended(states, ended)
            if picked is None:
                break
            rows, ended, history, uniforms = (v[picked] for v in (rows, ended, history, uniforms))
    shape = images, samples, -1
    alphas = torch.stack(maps, dim=1).view(images, samples, len(maps), -1) if keep_alphas else None
    return DrawnCaptions(
        all_words.view(shape), all_log_probs.view(shape), is_stuck.view(images, samples), alphas
    )


def _drop_ended(states: Sequence[SearchState], ended: Tensor) -> tuple[Tensor, Tensor] | None:
    """Go on with those images, and of each with those samples, that have not `ended` (N, K): their indices
    (n, 1) and (n, k); None where all have."""
    left = (~ended).sum(dim=1).cpu()
    if not left.any():
        return None
    (index,) = copy_to_device([left.nonzero().flatten()], ended.device)
    first = ended[index].int().argsort(dim=1, stable=True)[:, : int(left.max())]  # those that go on
    for state in states:
        if len(index) < len(left):
            state.keep(index)
        state.reorder(first)
    return index.unsqueeze(1), first


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
        log_probs: (..., V), or anything that differs from them by a constant; -inf: never drawn.
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
