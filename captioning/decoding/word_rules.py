"""Which words may not come next in a caption: the rules of beam search and sampling alike."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from utils import copy_to_device


class WordRules(NamedTuple):
    """What a caption must not be like; words are indices.

    forbidden: words that it must not have.
    no_repeat_ngram: no sequence of so many words occurs twice in it; 0: any may.
    min_length: words that it has at least, `<end>` not counted.
    unfinished: words after which it must not end. In search and sampling `<end>` cannot follow them, so that
        the model goes on to what is missing; to cut them off afterwards would also take "in" from "in a
        park". Only from a caption that has no end, for the step limit came or no word is left that may
        follow, these words are cut off.
    """

    forbidden: Collection[int] = ()
    no_repeat_ngram: int = 0
    min_length: int = 0
    unfinished: Collection[int] = ()

    def cut(self, words: list[int]) -> list[int]:
        """Unfinished words without those at the end after which something is missing."""
        length = len(words)
        while length and words[length - 1] in self.unfinished:
            length -= 1
        return words[:length]


NO_RULES = WordRules()


class WordMasks:
    """The rules on a device; applying them neither reads from it nor loops over words."""

    def __init__(self, rules: WordRules, end: int, device: torch.device):
        self.rules, self.end = rules, end
        indices = [torch.tensor([*words], dtype=torch.long) for words in (rules.forbidden, rules.unfinished)]
        self.forbidden, self.unfinished = copy_to_device(indices, device)

    def applied(self, log_probs: Tensor, history: Tensor) -> Tensor:
        """What `apply` makes of a copy."""
        if self.rules == NO_RULES:
            return log_probs
        log_probs = log_probs.clone()
        self.apply(log_probs, history)
        return log_probs

    def apply(self, log_probs: Tensor, history: Tensor) -> None:
        """Set what may not come next to -inf, in place.

        Args:
            log_probs: of the next word (N, K, V).
            history: the words so far (N, K, L), `<start>` first.
        """
        log_probs.index_fill_(2, self.forbidden, -torch.inf)
        if history.shape[2] <= self.rules.min_length:  # L - 1 words so far
            log_probs[:, :, self.end] = -torch.inf
        if self.rules.unfinished:
            ends_badly = (history[:, :, -1:] == self.unfinished).any(dim=2)
            log_probs[:, :, self.end].masked_fill_(ends_badly, -torch.inf)
        if self.rules.no_repeat_ngram:
            _mask_repeated(log_probs, history[:, :, 1:], self.rules.no_repeat_ngram)


def _mask_repeated(log_probs: Tensor, words: Tensor, n: int) -> None:
    """Set the words that would complete an n-gram of `words` (N, K, L) a second time to -inf, in place."""
    ngrams = words.shape[2] - n + 1
    if ngrams < 1:
        return
    # (N, K, ngrams): whether the first n - 1 words of an n-gram are the last n - 1 of the caption
    same = torch.ones_like(words[:, :, :ngrams], dtype=torch.bool)
    for i in range(n - 1):
        same &= words[:, :, i : i + ngrams] == words[:, :, ngrams + i : ngrams + i + 1]
    penalties = torch.zeros_like(same, dtype=log_probs.dtype).masked_fill_(same, -torch.inf)
    log_probs.scatter_add_(2, words[:, :, n - 1 :], penalties)
