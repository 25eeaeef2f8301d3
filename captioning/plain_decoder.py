"""The decoder of models.py as it reads, for training and search: what a changed decoder runs on.

The functions have the names and arguments of `fused_decoder`, and use nothing of the decoder but `forward`,
`init_hidden_state` and `step`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from models import DecoderWithAttention, pool_grid


def caption_logits(
    decoder: DecoderWithAttention, grid: Tensor, captions: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of all tokens; see `fused_decoder.caption_logits`."""
    copies = pool_grid(grid).repeat_interleave(len(captions) // len(grid), dim=0)
    captions, lengths = captions.to(grid.device), lengths.to(grid.device)
    logits, captions, steps, alphas, order = decoder(copies, captions, lengths.unsqueeze(1))
    logits = pack_padded_sequence(logits, steps, batch_first=True).data
    targets = pack_padded_sequence(captions[:, 1:], steps, batch_first=True).data
    return logits, targets, alphas.sum(dim=1)[order.argsort()]


class PlainSearchState:
    """The hypotheses of a search; see `fused_decoder.FusedSearchState`."""

    def __init__(self, decoder: DecoderWithAttention, grid: Tensor):
        self.decoder = decoder
        self.encoder_out = pool_grid(grid).flatten(1, 2)  # (N, P, D)
        self.state = tuple(s.unsqueeze(1) for s in decoder.init_hidden_state(self.encoder_out))  # (N, K, ...)

    def step(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Feed a word to each hypothesis (N, K): logits (N, K, V), alpha (N, K, P)."""
        copies = self.encoder_out.repeat_interleave(words.shape[1], dim=0)
        state = tuple(s.flatten(0, 1) for s in self.state)
        logits, alpha, state = self.decoder.step(words.flatten(), copies, state)
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
