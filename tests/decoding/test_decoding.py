"""Rules for captions in searches, samples, and the log-probabilities of both."""

import math

import numpy as np
import pytest
import torch
from test_beam_search import END, START, VOCABULARY, make_decoder, plain_beam_search

from captioning.decoding.beam_search import beam_search, beam_search_n_best
from captioning.decoding.options import WordMasks, WordRules
from captioning.decoding.sampling import draw_words, image_seed, sample_captions, uniform_numbers
from captioning.decoding.teacher_forcing import token_logits
from tests.reference import TextbookDecoder
from utils import UserError

UNFINISHED_WORDS = tuple(range(0, 20))
RULES = {
    "ngrams": WordRules(no_repeat_ngram=2),
    "length": WordRules(min_length=6),
    "endings": WordRules(min_length=2, unfinished=UNFINISHED_WORDS),
    "all": WordRules((3, 4), 3, 4, UNFINISHED_WORDS),
}


def talkative_decoder(seed: int = 0, fast: bool = True):
    """One that repeats itself and ends late."""
    decoder = make_decoder(seed, fast)
    decoder.fc.bias.data[END] = -1
    return decoder


def has_repeated(words, n: int) -> bool:
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(ngrams)) < len(ngrams)


def may_follow(rules: WordRules, words: list[int], word: int) -> bool:
    """The rules, one hypothesis and word at a time."""
    if word == END:
        return len(words) >= rules.min_length and not (words and words[-1] in rules.unfinished)
    n, longer = rules.no_repeat_ngram, [*words, word]
    ngrams = [longer[i : i + n] for i in range(len(longer) - n + 1)]
    return word not in rules.forbidden and not (n and ngrams and ngrams[-1] in ngrams[:-1])


# --- rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_masks_are_the_rules_word_by_word(rules):
    histories = torch.randint(0, 5, (6, 4, 9))
    for length in range(1, 10):
        history = histories[:, :, :length].clone()
        history[:, :, 0] = START
        log_probs = torch.randn(6, 4, VOCABULARY)
        masked = log_probs.clone()
        WordMasks(rules, END, torch.device("cpu")).apply(masked, history)
        for i, k, word in np.ndindex(6, 4, VOCABULARY):
            allowed = may_follow(rules, history[i, k, 1:].tolist(), word)
            assert masked[i, k, word] == (log_probs[i, k, word] if allowed else -math.inf)


@torch.no_grad()
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_search_with_rules_equals_the_plain_search_with_them(rules, beam_size):
    decoder, encoding = make_decoder(), torch.rand(8, 14, 14, 32) * 3
    decoder.fc.bias.data[END] = 1.0 if rules.min_length else 0.5
    found = beam_search([decoder], [encoding], START, END, beam_size, max_steps=12, rules=rules)
    textbook = TextbookDecoder(16, 16, 24, VOCABULARY, 32)
    textbook.load_state_dict(decoder.state_dict())
    free = beam_search([decoder], [encoding], START, END, beam_size, max_steps=12)
    assert [h.words for h in found] != [h.words for h in free]
    for image, hypothesis in zip(encoding, found):
        words, score = plain_beam_search(
            textbook, image.flatten(0, 1), beam_size, 12,
            allowed=lambda words, word: may_follow(rules, words, word),
        )  # fmt: skip
        if hypothesis.finished:
            assert hypothesis.words == words and hypothesis.score == pytest.approx(score, abs=1e-4)
        else:
            assert hypothesis.words == rules.cut(words)


def test_no_trigram_occurs_twice_in_a_thousand_captions():
    decoder, grid = talkative_decoder(), torch.rand(1000, 4, 4, 32) * 3
    free = beam_search([decoder], [grid], START, END, beam_size=3, max_steps=16)
    assert sum(has_repeated(h.words, 3) for h in free) > 100
    bound = beam_search([decoder], [grid], START, END, beam_size=3, max_steps=16, rules=WordRules((), 3))
    assert not any(has_repeated(h.words, 3) for h in bound)
    drawn = sample_captions(
        [decoder], [grid], START, END, range(1000), max_steps=16, temperature=0.3, rules=WordRules((), 3)
    )
    assert not any(has_repeated(h.words, 3) for (h,) in drawn)


@pytest.mark.parametrize("max_steps", [4, 15])
def test_captions_do_not_end_badly_even_at_the_step_limit(max_steps):
    decoder, grid = talkative_decoder(), torch.rand(20, 8, 8, 32) * 3
    options = {"beam_size": 3, "max_steps": max_steps, "n_best": 3, "keep_alphas": True}
    free = beam_search_n_best([decoder], [grid], START, END, **options)
    assert any(h.words[-1] in UNFINISHED_WORDS for found in free for h in found)
    bound = beam_search_n_best([decoder], [grid], START, END, **options, rules=RULES["endings"])
    cut = 0
    for found in bound:
        assert len({tuple(h.words) for h in found}) == len(found)
        assert [(h.finished, h.score) for h in found] == sorted(
            ((h.finished, h.score) for h in found), reverse=True
        )
        for h in found:
            assert not h.words or h.words[-1] not in UNFINISHED_WORDS
            assert len(h.alphas) == len(h.words) == len(h.log_probs) - h.finished
            cut += not h.finished and len(h.words) < max_steps
    assert cut > 0 or max_steps > 4


def test_a_caption_ends_where_the_rules_leave_no_word():
    decoder, grid = make_decoder(), torch.rand(3, 8, 8, 32)
    rules = WordRules(range(5, START + 1), no_repeat_ngram=1, min_length=30)  # five words, each once
    for beam_size in (1, 3):
        found = beam_search([decoder], [grid], START, END, beam_size, rules=rules)
        assert all(sorted(h.words) == [0, 1, 2, 3, 4] and not h.finished for h in found)
    drawn = sample_captions([decoder], [grid], START, END, [1, 2, 3], samples=2, rules=rules)
    assert all(
        sorted(h.words) == [0, 1, 2, 3, 4] and len(h.log_probs) == 5 and not h.finished
        for own in drawn for h in own
    )  # fmt: skip
    nothing = WordRules(range(VOCABULARY), min_length=1)
    assert [h.words for h in beam_search([decoder], [grid], START, END, rules=nothing)] == [[]] * 3


# --- log-probabilities --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("sampled", [False, True])
def test_log_probabilities_are_those_of_teacher_forcing(members, sampled):
    decoders = [make_decoder(seed) for seed in range(members)]
    for decoder in decoders:
        decoder.fc.bias.data[END] = 0.5
    grid = torch.rand(6, 8, 8, 32) * 3
    common = {"max_steps": 12, "rules": RULES["all"]}
    if sampled:
        drawn = {"samples": 4, "temperature": 0.7, "top_p": 0.9}
        found = sample_captions(decoders, [grid] * members, START, END, range(6), **drawn, **common)
    else:
        found = beam_search_n_best(decoders, [grid] * members, START, END, 4, n_best=4, **common)
    lengths = set()
    for image, own in zip(grid, found):
        assert 1 < len(own) <= 4  # what is cut may be alike
        for h in own:
            tokens = torch.tensor([[[START, *h.words, END]]])
            length = torch.tensor([[tokens.shape[2]]])
            logits = [token_logits(d, image.unsqueeze(0), tokens, length).logits for d in decoders]
            mean = torch.stack([own.softmax(dim=1) for own in logits]).mean(dim=0).log()
            forced = mean.gather(1, tokens[0, 0, 1:].unsqueeze(1)).flatten().tolist()
            assert h.log_probs == pytest.approx(forced[: len(h.words) + h.finished], abs=1e-4)
            if h.finished:
                assert h.score == pytest.approx(sum(h.log_probs), abs=1e-4)
            lengths.add(len(h.words))
    assert len(lengths) > 1


# --- samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.7)])
def test_words_are_drawn_with_their_probabilities(temperature, top_p):
    log_probs = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0]).log()
    expected = (log_probs / temperature).softmax(dim=0)
    if top_p < 1:
        expected = torch.tensor([4 / 7, 3 / 7, 0.0, 0.0, 0.0])
    numbers = torch.arange(10_000) / 10_000
    words = draw_words(log_probs.expand(10_000, 5), numbers, temperature, top_p)
    shares = torch.bincount(words, minlength=5) / 10_000
    torch.testing.assert_close(shares, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("constant", [-500.0, 0.0, 500.0])
def test_words_that_are_left_are_drawn_however_improbable_they_were(constant):
    """As where the rules forbid the only probable one."""
    log_probs = torch.tensor([-torch.inf, -200.0, -200.0, -300.0, -torch.inf]) + constant
    assert draw_words(log_probs.expand(4, 5), torch.tensor([0.0, 0.4, 0.6, 0.99])).tolist() == [1, 1, 2, 2]


def test_the_end_of_the_range_draws_a_word_that_may_be_drawn():
    log_probs = torch.full((3, 50_000), -torch.inf)
    log_probs[:, :9] = math.log(1 / 9)
    assert draw_words(log_probs, torch.tensor([0.0, 0.5, 1 - 2**-24])).tolist() == [0, 4, 8]
    assert draw_words(log_probs, torch.tensor([0.0, 0.5, 1 - 2**-24]), top_p=1e-9).tolist() == [0] * 3


@pytest.mark.parametrize("fast", [True, False])
def test_samples_depend_on_nothing_but_the_image_and_its_seed(fast):
    decoder, grid = talkative_decoder(fast=fast), torch.rand(8, 8, 8, 32) * 3

    def sample(grid, seeds, samples=3):
        found = sample_captions([decoder], [grid], START, END, seeds, samples, max_steps=15)
        return [[h.words for h in own] for own in found]

    together = sample(grid, range(8))
    assert [sample(grid[i : i + 1], [i])[0] for i in range(8)] == together
    assert sample(grid.flip(0), range(7, -1, -1)) == together[::-1]
    assert [own[:3] for own in sample(grid, range(8), samples=5)] == together
    assert sample(grid, range(1, 9)) != together
    assert sum(len({tuple(words) for words in own}) for own in together) > 16
    twice = sample_captions([decoder] * 2, [grid] * 2, START, END, range(8), 3, max_steps=15)
    assert [[h.words for h in own] for own in twice] == together
    greedy = beam_search([decoder], [grid], START, END, 1, max_steps=15)
    cold = sample_captions([decoder], [grid], START, END, range(8), max_steps=15, temperature=1e-4)
    assert [own[0].words for own in cold] == [h.words for h in greedy]


def test_attention_of_samples():
    decoder, grid = talkative_decoder(), torch.rand(2, 8, 8, 32)
    found = sample_captions([decoder], [grid], START, END, [1, 2], 3, max_steps=9, keep_alphas=True)
    for own in found:
        for h in own:
            assert h.alphas.shape == (len(h.words), 196)
            torch.testing.assert_close(h.alphas.sum(dim=1), torch.ones(len(h.words)), atol=1e-5, rtol=0)


def test_seeds_and_numbers():
    assert image_seed(1, "a") != image_seed(2, "a") != image_seed(2, "b")
    assert image_seed(123, "test_0001") == image_seed(123, "test_0001") < 2**63
    assert torch.equal(uniform_numbers([5, 6], 2, 50)[1], uniform_numbers([6], 9, 50)[0, :2])


def test_samples_of_a_decoder_whose_logits_are_no_numbers():
    decoder = make_decoder()
    decoder.fc.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not numbers"):
        sample_captions([decoder], [torch.rand(2, 8, 8, 32)], START, END, [1, 2])
