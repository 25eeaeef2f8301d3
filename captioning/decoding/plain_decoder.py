"""The decoder of models.py as it reads, for training and search: what a changed decoder runs on.

The functions have the names and arguments of `fused_decoder`, and use nothing of the decoder but `forward`,
`init_hidden_state` and `step`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from captioning.decoding.fused_decoder import TokenLogits, search_noise
from models import DecoderWithAttention, pool_grid


def caption_logits(
    decoder: DecoderWithAttention,
    grid: Tensor,
    captions: Tensor,
    lengths: Tensor,
    fed: Tensor | None = None,
    noise: Tensor | None = None,
) -> TokenLogits:
    """The logits of all tokens; see `fused_decoder.caption_logits`."""
    copies = pool_grid(grid).repeat_interleave(len(captions) // len(grid), dim=0)
    captions, lengths = captions.to(grid.device), lengths.to(grid.device)
    fed = captions if fed is None else fed.to(grid.device)
    logits, _, steps, alphas, order = decoder(copies, fed, lengths.unsqueeze(1), noise)

    def pack(values: Tensor) -> Tensor:
        return pack_padded_sequence(values, steps, batch_first=True).data

    of_caption = order.unsqueeze(1).expand(-1, logits.shape[1])
    of_step = torch.arange(logits.shape[1], device=grid.device).expand(logits.shape[:2])
    coverage = alphas.sum(dim=1)[order.argsort()]
    places = pack(of_caption), pack(of_step)
    return TokenLogits(pack(logits), pack(captions[order, 1:]), coverage, *places, pack(alphas))


class PlainSearchState:
    """The hypotheses of a search; see `fused_decoder.FusedSearchState`."""

    def __init__(self, decoder: DecoderWithAttention, grid: Tensor):
        self.decoder = decoder
        self.encoder_out = pool_grid(grid).flatten(1, 2)  # (N, P, D)
        self.state = tuple(s.unsqueeze(1) for s in decoder.init_hidden_state(self.encoder_out))  # (N, K, ...)
        self.noise = search_noise(decoder, grid)

    def step(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Feed a word to each hypothesis (N, K): logits (N, K, V), alpha (N, K, P)."""
        copies = self.encoder_out.repeat_interleave(words.shape[1], dim=0)
        state = tuple(s.flatten(0, 1) for s in self.state)
        logits, alpha, state = self.decoder.step(words.flatten(), copies, state, self.noise)
        self.state = tuple(s.unflatten(0, words.shape) for s in state)
        return logits.unflatten(0, words.shape), alpha.unflatten(0, words.shape)

    def reorder(self, parents: Tensor) -> None:
        """Go on from these hypotheses of each image: indices (N, K')."""
        rows = torch.arange(len(parents), device=parents.device).unsqueeze(1)
        self.state = tuple(s[rows, parents] for s in self.state)

    def keep(self, index: Tensor) -> None:
        """Go on with these images only."""
        self.state = tuple(s[index] for s in self.state)
        self.encoder_out = self.encoder_out[index]
