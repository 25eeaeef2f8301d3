"""The batched search against a plain one that follows the published rule to the letter."""

import pytest
import torch

from captioning.decoding.beam_search import beam_search, beam_search_n_best
from captioning.decoding.fast_energies import use_fast_energies
from captioning.decoding.word_rules import WordRules
from models import DecoderWithAttention, pool_grid
from tests.reference import TextbookDecoder
from utils import UserError

START, END, VOCABULARY = 38, 39, 40


def make_decoder(seed: int = 0, fast: bool = True) -> DecoderWithAttention:
    torch.manual_seed(seed)
    decoder = DecoderWithAttention(16, 16, 24, VOCABULARY, encoder_dim=32).eval()
    assert not fast or use_fast_energies(decoder)
    for parameter in decoder.parameters():
        parameter.data.mul_(4)
    decoder.fc.bias.data[END] = 0.5  # captions of various lengths, some never ending
    return decoder


def plain_beam_search(
    decoder, encoding, beam_size, max_steps, length_penalty=0.0, allowed=lambda words, word: True
):
    """encoding (196, D) -> (words, score), with no tensors across hypotheses."""
    encoding = encoding.unsqueeze(0)
    live = [([], 0.0, *decoder.initial_state(encoding))]
    ended = []
    for _ in range(max_steps):
        continuations = []
        for words, score, h, c in live:
            word = decoder.embedding(torch.tensor([words[-1] if words else START]))
            logits, h2, c2, _ = decoder.step(word, encoding, h, c)
            log_probs = logits[0].log_softmax(dim=0)
            continuations += [
                ([*words, w], score + log_probs[w].item(), h2, c2)
                for w in range(VOCABULARY)
                if allowed(words, w)
            ]
        continuations.sort(key=lambda continuation: -continuation[1])
        best = continuations[: beam_size - len(ended)]
        ended += [continuation for continuation in best if continuation[0][-1] == END]
        live = [continuation for continuation in best if continuation[0][-1] != END]
        if not live:
            break
    if ended:
        words, score, _, _ = max(ended, key=lambda e: e[1] / len(e[0]) ** length_penalty)
        return words[:-1], score / len(words) ** length_penalty
    return live[0][0], live[0][1] / max_steps**length_penalty


@torch.no_grad()
@pytest.mark.parametrize("beam_size", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("length_penalty", [0.0, 0.7])
@pytest.mark.parametrize("fast", [True, False])
def test_equals_plain_search(beam_size, length_penalty, fast):
    decoder, encoding = make_decoder(fast=fast), torch.rand(12, 14, 14, 32) * 3
    options = {"max_steps": 15, "length_penalty": length_penalty}
    found = beam_search([decoder], [encoding], START, END, beam_size, **options)
    textbook = TextbookDecoder(16, 16, 24, VOCABULARY, 32)
    textbook.load_state_dict(decoder.state_dict())
    for image, hypothesis in zip(encoding, found):
        words, score = plain_beam_search(textbook, image.flatten(0, 1), beam_size, 15, length_penalty)
        assert hypothesis.words == words
        assert hypothesis.score == pytest.approx(score, abs=1e-4)
    if beam_size == 1:
        lengths = {len(hypothesis.words) for hypothesis in found}
        assert len(lengths) > 1  # the images are not all alike


@pytest.mark.parametrize("beam_size", [1, 3, 5])
def test_batches_of_1_and_32_give_the_same_captions(beam_size):
    decoder, grid = make_decoder(), torch.rand(32, 8, 8, 32) * 3
    together = beam_search([decoder], [grid], START, END, beam_size, max_steps=20)
    alone = [beam_search([decoder], [g.unsqueeze(0)], START, END, beam_size, max_steps=20)[0] for g in grid]
    assert [hypothesis.words for hypothesis in together] == [hypothesis.words for hypothesis in alone]
    backwards = beam_search([decoder], [grid.flip(0)], START, END, beam_size, max_steps=20)
    assert [h.words for h in backwards[::-1]] == [h.words for h in together]


def test_alphas_are_those_of_the_words():
    decoder, grid = make_decoder(), torch.rand(6, 8, 8, 32) * 3
    found = beam_search([decoder], [grid], START, END, beam_size=4, max_steps=12, keep_alphas=True)
    for image, hypothesis in zip(grid, found):
        caption = torch.tensor([[START, *hypothesis.words, END]])
        _, _, _, alphas, _ = decoder(
            pool_grid(image.unsqueeze(0)), caption, torch.tensor([[caption.shape[1]]])
        )
        torch.testing.assert_close(
            hypothesis.alphas, alphas[0, : len(hypothesis.words)], atol=1e-5, rtol=1e-4
        )


def test_the_same_member_twice_changes_nothing():
    decoder, grid = make_decoder(), torch.rand(6, 8, 8, 32) * 3
    single = beam_search([decoder], [grid], START, END, max_steps=12)
    double = beam_search([decoder, decoder], [grid, grid], START, END, max_steps=12)
    assert [h.words for h in double] == [h.words for h in single]


def test_members_are_averaged_in_probability():
    members, grid = [make_decoder(1), make_decoder(2)], torch.rand(1, 8, 8, 32)
    (found,) = beam_search(members, [grid, grid], START, END, beam_size=1, max_steps=1)
    first_scores = [
        member(pool_grid(grid), torch.tensor([[START, 0]]), torch.tensor([[2]]))[0][0, 0].softmax(dim=0)
        for member in members
    ]
    mean = torch.stack(first_scores).mean(dim=0)
    assert found.score == pytest.approx(mean.max().log().item(), abs=1e-5)


def test_unfinished_captions_are_returned():
    decoder, grid = make_decoder(), torch.rand(3, 8, 8, 32)
    decoder.fc.bias.data[END] = -1e4
    found = beam_search([decoder], [grid], START, END, beam_size=3, max_steps=7, keep_alphas=True)
    assert all(len(h.words) == 7 and not h.finished and h.alphas.shape == (7, 196) for h in found)


def test_forbidden_words_do_not_occur():
    decoder, grid = make_decoder(), torch.rand(8, 8, 8, 32) * 3
    free = beam_search([decoder], [grid], START, END, max_steps=12)
    used = {word for hypothesis in free for word in hypothesis.words}
    bound = beam_search([decoder], [grid], START, END, max_steps=12, rules=WordRules(used))
    assert used.isdisjoint(word for hypothesis in bound for word in hypothesis.words)


def test_a_beam_wider_than_the_vocabulary():
    decoder, grid = make_decoder(), torch.rand(2, 8, 8, 32)
    assert len(beam_search([decoder], [grid], START, END, beam_size=60, max_steps=3)) == 2


def test_scores_that_are_no_numbers():
    decoder, grid = make_decoder(), torch.rand(2, 8, 8, 32)
    decoder.fc.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not numbers"):
        beam_search([decoder], [grid], START, END)


@pytest.mark.parametrize("length_penalty", [0.0, 0.7])
def test_the_n_best_are_distinct_and_sorted_and_the_first_is_the_best(length_penalty):
    decoder, grid = make_decoder(), torch.rand(12, 8, 8, 32) * 3
    options = {"beam_size": 5, "max_steps": 15, "length_penalty": length_penalty}
    single = beam_search([decoder], [grid], START, END, **options)
    several = beam_search_n_best([decoder], [grid], START, END, **options, n_best=5)
    for best, found in zip(single, several):
        assert found[0].words == best.words and found[0].score == pytest.approx(best.score, abs=1e-4)
        assert len(found) == 5 == len({tuple(h.words) for h in found})
        assert [(h.finished, h.score) for h in found] == sorted(
            ((h.finished, h.score) for h in found), reverse=True
        )
    fewer = beam_search_n_best([decoder], [grid], START, END, **options, n_best=2)
    assert [[h.words for h in found] for found in fewer] == [[h.words for h in f[:2]] for f in several]


@torch.no_grad()
def test_log_probabilities_are_those_of_teacher_forcing():
    decoder, grid = make_decoder(), torch.rand(6, 14, 14, 32) * 3
    several = beam_search_n_best([decoder], [grid], START, END, beam_size=4, max_steps=12, n_best=4)
    lengths = set()
    for image, found in zip(grid, several):
        for h in found:
            caption = torch.tensor([[START, *h.words, END]])
            logits, *_ = decoder(pool_grid(image.unsqueeze(0)), caption, torch.tensor([[caption.shape[1]]]))
            forced = logits[0].log_softmax(dim=1).gather(1, caption[0, 1:].unsqueeze(1)).flatten().tolist()
            assert h.log_probs == pytest.approx(forced[: len(h.words) + h.finished], abs=1e-4)
            assert sum(h.log_probs) == pytest.approx(h.score, abs=1e-4)
            lengths.add((len(h.words), h.finished))
    assert len(lengths) > 2
