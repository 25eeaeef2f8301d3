"""Beam search over one attention decoder, or several at once, for a whole batch of images.

The rule, as in the published Show, Attend and Tell programs: hypotheses are ranked by summed
log-probability; one that ends is set aside and its image's beam narrows by one; when the beam is used up the
best ended one wins; where none ended within the step limit, the best unfinished one does. With a length
penalty p the sums are divided by length ** p, `<end>` counted. `sampling.py` draws captions at random
instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captioning.decoding.options import NO_RULES, WordMasks, WordRules
from captioning.decoding.teacher_forcing import encoder_out_of
from models import ENCODED_SIZE, DecoderWithAttention
from utils import UserError, copy_to_device


class Hypothesis(NamedTuple):
    words: list[int]  # without <start> and <end>
    score: float  # summed log-probability, that of <end> included; divided where length is normalized
    alphas: Tensor | None  # (number of words, 196), where they were asked for
    finished: bool  # False: the step limit came before <end>, or the rules left no word
    log_probs: list[float]  # natural logarithm, of each word and, where finished, of <end>


def beam_search(
    decoders: Sequence[DecoderWithAttention],
    grids: Sequence[Tensor],
    start: int,
    end: int,
    beam_size: int = 3,
    **options,
) -> list[Hypothesis]:
    """The best caption of each of N images; arguments and errors are those of `beam_search_n_best`."""
    return [found[0] for found in beam_search_n_best(decoders, grids, start, end, beam_size, **options)]


@torch.inference_mode()
def beam_search_n_best(
    decoders: Sequence[DecoderWithAttention],
    grids: Sequence[Tensor],
    start: int,
    end: int,
    beam_size: int = 3,
    max_steps: int = 50,
    rules: WordRules = NO_RULES,
    length_penalty: float = 0.0,
    keep_alphas: bool = False,
    n_best: int = 1,
) -> list[list[Hypothesis]]:
    """The best captions of each of N images: up to `n_best`, no two alike, by descending score.

    Finished captions come before unfinished ones, which the step limit cut or which have no permitted next
    word. An image's captions do not depend on the others in the batch, nor the best one on
    `n_best`. One beam is greedy decoding.

    Args:
        decoders: in eval mode, with one word map. Of several, the word distributions are averaged at every
            step.
        grids: for each decoder the images as its own encoder sees them, (N, h, w, D).
        start, end: indices of `<start>` and `<end>`.
        beam_size: hypotheses an image, at least 1.
        max_steps: steps of the search, at least 1; a caption that has not ended by then has that many words.
        rules: what captions must not be like.
        length_penalty: scores are divided by length ** this (`normalized_score`), `<end>` counted as a word;
            0 is the plain sum.
        keep_alphas: return attention too (of several decoders, the mean).
        n_best: captions for each image; there are never more than `beam_size`.

    Raises:
        UserError: the logits are not numbers.
    """
    images, device = len(grids[0]), grids[0].device
    best = BestCaptions(images, n_best, length_penalty)
    beams = _Beams(search_states(decoders, grids), images, start, beam_size, keep_alphas, device)
    masks = WordMasks(rules, end, device)
    for step in range(1, max_steps + 1):
        _take_step(step, beams, masks, best)
        if not beams.image:
            break
    for row in range(len(beams.image)):  # the step limit came
        best.add_unfinished(beams, row, rules)
    if [] in best.found:
        raise UserError(
            "the decoder's word scores are not numbers: its training went astray, take another checkpoint"
        )
    return best.found


def _take_step(step: int, beams: _Beams, masks: WordMasks, best: BestCaptions) -> None:
    """Lengthen the live hypotheses by a word, note those that end, and go on with the images that have others
    which may still win."""
    log_probs, alphas = next_words(beams.states, beams.device_words[:, :, -1])  # (n, K, V), (n, K, P)
    vocabulary = log_probs.shape[2]
    masks.apply(log_probs, beams.device_words)
    totals = (beams.device_scores.unsqueeze(2) + log_probs).flatten(1)  # (n, K * V)
    scores, chosen = _to_host(*totals.topk(min(beams.size, totals.shape[1]), dim=1))  # descending
    scores = scores.masked_fill(torch.arange(scores.shape[1]) >= beams.room.unsqueeze(1), -torch.inf)
    parents, words = chosen // vocabulary, chosen % vocabulary
    ended = (words == masks.end) & scores.isfinite()
    for i, k in ended.nonzero().tolist():  # few: at most beam_size an image over the whole search
        best.add_ended(beams, i, int(parents[i, k]), float(scores[i, k]), step)
    for i in (scores.isneginf().all(dim=1) & (beams.room > 0)).nonzero().flatten().tolist():
        best.add_unfinished(beams, i, masks.rules)  # the rules leave no word
    beams.follow(parents, words, scores.masked_fill(ended, -torch.inf), ended.sum(dim=1), alphas)
    leading = zip(beams.image, beams.scores[:, 0].tolist())
    beams.keep([row for row, (image, lead) in enumerate(leading) if best.may_change(image, lead)])


class BestCaptions:
    """The best captions of each image so far, up to `n_best`, by descending score: `found`."""

    def __init__(self, images: int, n_best: int, length_penalty: float):
        self.n_best, self.length_penalty = n_best, length_penalty
        self.found: list[list[Hypothesis]] = [[] for _ in range(images)]

    def add_ended(self, beams: _Beams, row: int, parent: int, total: float, length: int) -> None:
        """Take in a hypothesis that ends, if it is good enough. total: its summed log-probability."""
        image, score = beams.image[row], normalized_score(total, length, self.length_penalty)
        if score > self._score_to_beat(image):
            ended = beams.hypothesis(row, parent, score, total)
            self.found[image] = sorted([*self.found[image], ended], key=lambda h: -h.score)[: self.n_best]

    def add_unfinished(self, beams: _Beams, row: int, rules: WordRules) -> None:
        """Fill up an image's captions with its live hypotheses."""
        found = self.found[beams.image[row]]
        ended_ones = [one.words for one in found]
        unfinished = beams.unfinished(row, rules, self.length_penalty)
        found += [one for one in unfinished if one.words not in ended_ones]
        del found[self.n_best :]

    def may_change(self, image: int, leading: float) -> bool:
        """Whether live hypotheses, of which the best has this score, may still win: sums only fall, so that
        without a length penalty one that trails the ended ones never does."""
        return leading > (-math.inf if self.length_penalty else self._score_to_beat(image))

    def _score_to_beat(self, image: int) -> float:
        found = self.found[image]
        return found[-1].score if len(found) == self.n_best else -math.inf


class SearchState:
    """A decoder with the hypotheses of a search: N images, K hypotheses each; one at first.

    grid: (N, h, w, encoder_dim), the images as the decoder's encoder sees them.
    """

    def __init__(self, decoder: DecoderWithAttention, grid: Tensor):
        self.decoder = decoder
        self.encoder_out = encoder_out_of(grid)  # (N, P, encoder_dim)
        self.att1 = decoder.attention.encoder_att(self.encoder_out)
        self.state = decoder.init_hidden_state(self.encoder_out)  # (N, 1, ...) each

    def step(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Feed a word to each hypothesis (N, K): logits (N, K, V), alpha (N, K, P)."""
        embeddings = self.decoder.embedding(words)
        hidden, alpha, self.state = self.decoder.step(embeddings, self.encoder_out, self.att1, self.state)
        return self.decoder.logits(hidden), alpha

    def reorder(self, parents: Tensor) -> None:
        """Go on from these hypotheses of each image: indices (N, K')."""
        self.state = tuple(_pick(values, parents) for values in self.state)

    def keep(self, index: Tensor) -> None:
        """Go on with these images only."""
        self.state = tuple(values[index] for values in self.state)
        self.encoder_out, self.att1 = self.encoder_out[index], self.att1[index]


def search_states(decoders: Sequence[DecoderWithAttention], grids: Sequence[Tensor]) -> list[SearchState]:
    """The state of each decoder before its first word, one hypothesis for each image."""
    return [SearchState(decoder, grid) for decoder, grid in zip(decoders, grids)]


def next_words(states: Sequence[SearchState], words: Tensor) -> tuple[Tensor, Tensor]:
    """Feed a word to each hypothesis (N, K): log-probabilities of the next ones (N, K, V), alphas (N, K, P);
    of several decoders, of the mean of their distributions, and the mean alphas."""
    log_probs, alphas = [], []
    for state in states:
        logits, alpha = state.step(words)
        log_probs.append(logits.float().log_softmax(dim=2))
        alphas.append(alpha)
    if len(log_probs) == 1:
        return log_probs[0], alphas[0]
    mean = torch.stack(log_probs).logsumexp(dim=0) - math.log(len(log_probs))
    return mean, torch.stack(alphas).mean(dim=0)


def normalized_score(total: float, length: int, length_penalty: float) -> float:
    """The score by which hypotheses are compared, from the summed log-probability of `length` words, `<end>`
    included."""
    return total / length**length_penalty


class _Beams:
    """The live hypotheses of the images still searched: n images, K hypotheses each, best first.

    What decides the search is on the CPU, so that a step reads from the device once; the decoders' states,
    the alphas, and copies of the scores and words are on the device.
    """

    def __init__(
        self,
        states: Sequence[SearchState],
        images: int,
        start: int,
        beam_size: int,
        keep_alphas: bool,
        device: torch.device,
    ):
        self.states, self.size = states, beam_size  # one state of each decoder
        self.image = list(range(images))  # index in the batch
        self.room = torch.full((images,), beam_size)  # hypotheses that may still live
        self.scores = torch.zeros(images, 1)  # -inf: no hypothesis
        self.parents = torch.zeros(images, 1, dtype=torch.long)  # (n, K) places before the last step
        self.words = torch.full((images, 1, 1), start)  # (n, K, length + 1)
        self.totals = torch.zeros(images, 1, 1)  # (n, K, length + 1) scores after each word
        self.device = device
        self.alphas: list[Tensor] | None = [] if keep_alphas else None  # (n, K, P) of each step
        self.device_scores = torch.zeros(images, 1, device=device)
        self.device_words = torch.full((images, 1, 1), start, device=device)

    def follow(self, parents: Tensor, words: Tensor, scores: Tensor, ended: Tensor, alphas: Tensor) -> None:
        """Take the chosen continuations (n, K), live ones first, in as many columns as any image needs."""
        self.room = self.room - ended
        width = max(int(self.room.max()), 1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        self.scores, order = scores[:, :width], order[:, :width]
        self.parents, words = parents.gather(1, order), words.gather(1, order)
        self.words = torch.cat([_pick(self.words, self.parents), words.unsqueeze(2)], dim=2)
        self.totals = torch.cat([_pick(self.totals, self.parents), self.scores.unsqueeze(2)], dim=2)
        if self.alphas is not None:
            self.alphas.append(alphas)

    def keep(self, rows: list[int]) -> None:
        """Go on with these images only, on the device too."""
        some_end = len(rows) < len(self.image)
        self.image = [self.image[row] for row in rows]
        if not rows:
            return
        index = torch.tensor(rows)
        self.room, self.scores, self.parents = self.room[index], self.scores[index], self.parents[index]
        self.words, self.totals = self.words[index], self.totals[index]
        index, parents, self.device_words = copy_to_device([index, self.parents, self.words], self.device)
        (self.device_scores,) = copy_to_device([self.scores], self.device)
        for state in self.states:
            if some_end:
                state.keep(index)
            state.reorder(parents)
        if self.alphas is not None:
            self.alphas = [_pick(kept[index], parents) for kept in self.alphas]

    def hypothesis(self, row: int, column: int, score: float, ended: float | None = None) -> Hypothesis:
        """ended: the summed log-probability with that of <end>; None: unfinished."""
        alphas = None
        if self.alphas is not None:
            alphas = [kept[row, column] for kept in self.alphas]
            alphas = torch.stack(alphas).cpu() if alphas else torch.zeros(0, ENCODED_SIZE**2)
        totals = self.totals[row, column].tolist() + ([] if ended is None else [ended])
        log_probs = [after - before for before, after in itertools.pairwise(totals)]
        return Hypothesis(self.words[row, column, 1:].tolist(), score, alphas, ended is not None, log_probs)

    def unfinished(self, row: int, rules: WordRules, length_penalty: float) -> list[Hypothesis]:
        """The live hypotheses of an image by descending score, no two alike; the score is that of all words,
        also of those that are cut off."""
        found: dict[tuple[int, ...], Hypothesis] = {}
        for column, total in enumerate(self.scores[row].tolist()):
            if math.isfinite(total):
                whole = self.hypothesis(row, column, total)
                words = rules.cut(whole.words)
                score = normalized_score(total, max(len(whole.words), 1), length_penalty)
                alphas = None if whole.alphas is None else whole.alphas[: len(words)]
                cut = Hypothesis(words, score, alphas, False, whole.log_probs[: len(words)])
                found.setdefault(tuple(words), cut)
        return list(found.values())


def _to_host(scores: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """float32 and int64 of one shape, on the CPU; the device is waited for once."""
    if scores.device.type == "cpu":
        return scores, chosen
    joined = torch.stack([scores.view(torch.int32), chosen.int()]).cpu()  # the bits of both
    return joined[0].view(torch.float32), joined[1].long()


def _pick(values: Tensor, parents: Tensor) -> Tensor:
    """values (n, K, ...) at parents (n, K') -> (n, K', ...)."""
    return values[torch.arange(len(parents), device=parents.device).unsqueeze(1), parents]
