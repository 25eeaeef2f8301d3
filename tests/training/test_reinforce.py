"""Self-critical training: samples, rewards, the gradient, where it starts."""

import itertools
from collections import Counter

import pytest
import torch

import train
from captioning.data.prepared import END, START, UNK
from captioning.decoding import sampling
from captioning.decoding.fast_energies import use_fast_energies
from captioning.decoding.sampling import draw_captions
from captioning.decoding.teacher_forcing import token_logits
from captioning.training import reinforce
from captioning.training.optimization import Run, TrainedWeights
from captioning.training.reinforce import Reward, SelfCritical, draw_samples, leave_one_out
from captioning.training.resume import REWARD
from metrics import CiderD
from models import DecoderWithAttention, pool_grid
from tests.reference import TextbookDecoder

WORDS = ["<pad>", "a", "dog", "cat", "runs", "sleeps", "here", UNK, START, END]


WORD_MAP = {word: index for index, word in enumerate(WORDS)}


REFERENCES = [
    [["a", "dog", "runs"], ["a", "dog", "runs", "here"]],
    [["a", "cat", "sleeps", "here"], ["a", "cat", "sleeps"]],
    [["a", "dog", "sleeps"], ["a", "dog"]],
]


LONGEST = 7


def make_decoder(dropout: float = 0.0, fast: bool = True) -> DecoderWithAttention:
    torch.manual_seed(0)
    decoder = DecoderWithAttention(12, 10, 14, len(WORDS), encoder_dim=16, dropout=dropout)
    assert not fast or use_fast_energies(decoder)
    for parameter in decoder.parameters():
        parameter.data.mul_(3)  # attention and words far from uniform
    return decoder


def textbook_of(decoder: DecoderWithAttention) -> TextbookDecoder:
    """The independent implementation with the same weights."""
    textbook = TextbookDecoder(12, 10, 14, len(WORDS), 16)
    textbook.load_state_dict(decoder.state_dict())
    return textbook


def make_objective(decoder, **options) -> SelfCritical:
    settings = train.Settings(**options)
    run = Run.start("no")
    return SelfCritical(None, decoder, settings, run, WORD_MAP, Reward(REFERENCES), LONGEST, epoch=2)


# --- samples ------------------------------------------------------------------------------------------------


def exact_probabilities(textbook, grid, steps: int) -> dict[tuple[int, ...], float]:
    """The probability of each caption of at most so many words, by feeding all of them word by word."""
    pixels = pool_grid(grid).flatten(1, 2)
    probabilities, live = {}, [((), 1.0, textbook.initial_state(pixels))]
    for step in range(steps):
        extended = []
        for words, probability, state in live:
            fed = textbook.embedding(torch.tensor([words[-1] if words else WORD_MAP[START]]))
            logits, *new_state, _ = textbook.step(fed, pixels, *state)
            for word, share in enumerate(logits[0].softmax(dim=0).tolist()):
                caption = (*words, word)
                if word == WORD_MAP[END] or step == steps - 1:
                    probabilities[caption] = probability * share
                else:
                    extended.append((caption, probability * share, new_state))
        live = extended
    return probabilities


@pytest.mark.parametrize("fast", [True, False])
def test_samples_follow_the_models_distribution(fast):
    """Also while the decoder is trained with dropout, which samples do not see."""
    decoder, grid = make_decoder(dropout=0.9, fast=fast).train(), torch.rand(1, 8, 8, 16)
    decoder.fc.bias.data[WORD_MAP[END]] = 1.0  # captions of all lengths
    captions, lengths = draw_samples(decoder, grid, torch.rand(1, 20_000, 3), WORD_MAP[START], WORD_MAP[END])
    assert decoder.training
    found = Counter(tuple(row[1:n].tolist()) for row, n in zip(captions[0], lengths[0].tolist()))
    with torch.no_grad():
        expected = exact_probabilities(textbook_of(decoder), grid, 3)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5) and set(found) <= set(expected)
    assert len({len(caption) for caption in found}) == 3
    # of frequencies, five standard deviations
    for caption, probability in expected.items():
        deviation = (probability * (1 - probability) / 20_000) ** 0.5
        assert abs(found[caption] / 20_000 - probability) < 5 * deviation + 1e-4, caption


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("steps_between_checks", [1, 4, 100])
def test_samples_do_not_depend_on_their_batch(fast, steps_between_checks, monkeypatch):
    """One by one, in a batch that is cut in two, with or without those that have ended: the same."""
    decoder, grid, uniforms = make_decoder(fast=fast), torch.rand(6, 8, 8, 16), torch.rand(6, 5, 12)
    decoder.fc.bias.data[WORD_MAP[END]] = 1.0

    def sample(*, images: slice) -> list[list[int]]:
        captions, lengths = draw_samples(
            decoder, grid[images], uniforms[images], WORD_MAP[START], WORD_MAP[END]
        )
        assert captions.shape[:2] == lengths.shape == (len(grid[images]), 5)
        captions, lengths = captions.flatten(0, 1), lengths.flatten()
        for caption, length in zip(captions, lengths):  # `<end>` last, then padding
            assert caption[0] == WORD_MAP[START] and not caption[length:].any()
            assert WORD_MAP[END] not in caption[: length - 1]
            assert caption[length - 1] == WORD_MAP[END] or length == 13
        return [caption[:length].tolist() for caption, length in zip(captions, lengths)]

    whole = sample(images=slice(6))
    assert len({len(caption) for caption in whole}) > 3
    monkeypatch.setattr(sampling, "STEPS_BETWEEN_CHECKS", steps_between_checks)
    assert sample(images=slice(6)) == whole
    assert sample(images=slice(3)) + sample(images=slice(3, 6)) == whole
    assert [caption for i in range(6) for caption in sample(images=slice(i, i + 1))] == whole


@torch.no_grad()
@pytest.mark.parametrize("fast", [True, False])
def test_log_probabilities_are_those_of_teacher_forcing(fast):
    """Of every word of every sample; after a sample's end they are 0."""
    decoder, grid = make_decoder(dropout=0.5, fast=fast), torch.rand(4, 8, 8, 16)
    start, end, uniforms = WORD_MAP[START], WORD_MAP[END], torch.rand(4, 3, 9)
    captions, lengths = draw_samples(decoder.train(), grid, uniforms, start, end)
    drawn = draw_captions([decoder.eval()], [grid], start, end, uniforms)
    assert len(set(lengths.flatten().tolist())) > 1 and not drawn.is_stuck.any()
    forced = torch.zeros(4, 3, 9)
    for n, k in itertools.product(range(4), range(3)):
        words = captions[n, k, : lengths[n, k]]
        assert drawn.words[n, k, : len(words) - 1].tolist() == words[1:].tolist()
        logits, *_ = textbook_of(decoder)(pool_grid(grid[n : n + 1]), words[None], lengths[n, k : k + 1])
        chosen = logits[0].log_softmax(dim=1).gather(1, words[1:, None])[:, 0]
        forced[n, k, : len(chosen)] = chosen
    torch.testing.assert_close(drawn.log_probs, forced, atol=1e-4, rtol=0)
    tokens = token_logits(decoder, grid, captions, lengths)
    log_probs = tokens.logits.log_softmax(dim=1).gather(1, tokens.targets.unsqueeze(1)).squeeze(1)
    sampled = drawn.log_probs.flatten(0, 1)[tokens.packing.captions, tokens.packing.steps]
    torch.testing.assert_close(sampled, log_probs, atol=1e-4, rtol=0)


def test_random_numbers_are_each_images_own():
    objective = make_objective(make_decoder())
    together = objective._uniforms([2, 0, 1])
    assert together.shape == (3, 5, LONGEST) and together.min() >= 0 and together.max() < 1
    assert torch.equal(objective._uniforms([0]), together[1:2])
    assert not torch.equal(together[0], together[1])
    objective.epoch = 3
    assert not torch.equal(objective._uniforms([0]), together[1:2])


# --- rewards ------------------------------------------------------------------------------------------------


def test_the_reward_is_cider_d_with_end_as_a_word():
    reward = Reward(REFERENCES)
    documents = [[[*words, END] for words in captions] for captions in REFERENCES]
    captions = [["a", "dog", "runs", END], ["a", "dog", "runs"], ["a", "cat", END], [UNK, END], [END]]
    expected = CiderD.from_references(documents).score([documents[0]] * 5, captions)
    assert reward(0, captions) == pytest.approx(expected)
    finished, broken_off, *wrong = expected
    assert finished > broken_off > 0 and not any(wrong)
    # by hand: two documents of one word and `<end>`, which is in both and so has no weight; the bigram counts
    # as the word does, and of n-grams that are not there none
    tiny = Reward([[["dog"]], [["cat"]]])
    assert tiny(0, [["dog", END]]) == pytest.approx([10 * 2 / 4])
    assert tiny(1, [["dog", END]]) == [0]


def test_the_reward_may_have_bleu4():
    from nltk.translate.bleu_score import sentence_bleu

    references = [[[*words, END] for words in captions] for captions in REFERENCES]
    captions = [["a", "dog", "runs", "here", END], ["a", "dog", "runs", END], ["a", "cat", "runs", END]]
    plain, both = Reward(REFERENCES)(0, captions), Reward(REFERENCES, bleu4_weight=2.0)(0, captions)
    assert both[:2] == pytest.approx([value + 2 for value in plain[:2]])  # references themselves
    longer = [*captions[0][:4], "here", END]
    expected = sentence_bleu(references[0], longer)
    assert 0 < expected < 1
    difference = Reward(REFERENCES, 2.0)(0, [longer])[0] - Reward(REFERENCES)(0, [longer])[0]
    assert difference == pytest.approx(2 * expected)


def test_the_reward_does_not_see_capitals():
    captions, lengths = torch.tensor([[[8, 1, 2, 4, 9], [8, 1, 3, 5, 9]]]), torch.tensor([[5, 5]])
    objective = make_objective(make_decoder(), self_critical_samples=2)
    rewards = objective._rewards([0], captions, lengths)
    cased = {word.capitalize() if word.isalpha() else word: index for word, index in WORD_MAP.items()}
    settings, run = objective.settings, objective.run
    other = SelfCritical(None, objective.decoder, settings, run, cased, objective.reward, LONGEST, epoch=2)
    assert other._rewards([0], captions, lengths) == rewards and max(rewards[0]) > 0


def test_the_baseline_is_the_mean_of_the_others():
    rewards = torch.rand(3, 5)
    for image, own in enumerate(rewards):
        for sample, value in enumerate(own):
            others = torch.cat([own[:sample], own[sample + 1 :]])
            assert leave_one_out(rewards)[image, sample] == pytest.approx(
                float(value - others.mean()), abs=1e-6
            )


# --- the loss -----------------------------------------------------------------------------------------------


def plain_reinforce(textbook, grid, samples: list[list[list[int]]], rewards: list[list[float]]):
    """The formula of captioning/training/reinforce.py, word by word; `samples` without `<start>`."""
    total, words = 0.0, 0
    for image, (captions, values) in enumerate(zip(samples, rewards)):
        pixels = pool_grid(grid[image : image + 1]).flatten(1, 2)
        for s, caption in enumerate(captions):
            baseline = sum(values[:s] + values[s + 1 :]) / (len(values) - 1)
            fed, state = WORD_MAP[START], textbook.initial_state(pixels)
            for word in caption:
                logits, *state, _ = textbook.step(textbook.embedding(torch.tensor([fed])), pixels, *state)
                total = total - logits[0].log_softmax(dim=0)[word] * (values[s] - baseline)
                fed, words = word, words + 1
    return total / words


@pytest.mark.parametrize("fast", [True, False])
def test_the_gradient_is_that_of_plain_reinforce(fast, monkeypatch):
    """Loss and gradients, the grid's too, as where the encoder is trained."""
    decoder, indices = make_decoder(fast=fast).train(), [2, 0, 1]
    decoder.fc.bias.data[WORD_MAP[END]] = 0.5
    grid = torch.rand(3, 8, 8, 16).requires_grad_()
    sampled, sample = [], reinforce.draw_samples

    def record(*arguments):
        sampled.append(sample(*arguments))
        return sampled[-1]

    monkeypatch.setattr(reinforce, "draw_samples", record)
    objective = make_objective(decoder, dropout=0.0)
    lengths = torch.full((3, 2), 5)
    objective.start_step(lengths.numpy())
    loss = objective(indices, grid, torch.zeros(3, 2, 6).long(), lengths)
    divisor = objective.finish_step()
    loss = loss / divisor
    loss.backward()
    ours = {name: parameter.grad for name, parameter in decoder.named_parameters()}

    ((captions, lengths),) = sampled
    samples = [
        [caption[1:length] for caption, length in zip(*own)]
        for own in zip(captions.tolist(), lengths.tolist())
    ]
    documents = [[[*words, END] for words in captions] for captions in REFERENCES]
    cider = CiderD.from_references(documents)
    rewards = [
        cider.score([documents[i]] * 5, [[WORDS[word] for word in words] for words in own])
        for i, own in zip(indices, samples)
    ]
    texts = [words for own in samples for words in own]
    assert divisor == sum(map(len, texts)) and objective.report()[REWARD] == pytest.approx(
        sum(map(sum, rewards)) / 15
    )
    assert max(map(max, rewards)) > 0 and len(set(map(len, texts))) > 2
    leaf, textbook = grid.detach().clone().requires_grad_(), textbook_of(decoder)
    expected = plain_reinforce(textbook, leaf, samples, rewards)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, gradient in {name: p.grad for name, p in textbook.named_parameters()}.items():
        # the softmax does not depend on the bias of all energies
        assert gradient.abs().max() > 1e-5 or name == "attention.full_att.bias", name
        torch.testing.assert_close(ours[name], gradient, atol=1e-7, rtol=1e-3, msg=name)
    torch.testing.assert_close(grid.grad, leaf.grad, atol=1e-6, rtol=1e-3)


# --- where the stage starts ---------------------------------------------------------------------------------


def test_without_averaging_an_average_is_what_goes_on():
    encoder, decoder, averaged = torch.nn.Linear(1, 1), make_decoder(), make_decoder()
    encoder.requires_grad_(False)
    states = [{name: value + shift for name, value in encoder.state_dict().items()} for shift in (1, 2)]
    for parameter in averaged.parameters():
        parameter.data.add_(1)
    checkpoint = {"encoder": states[0], "decoder": averaged.state_dict()}
    checkpoint["unaveraged"] = {"encoder": states[1], "decoder": make_decoder().state_dict()}
    weights = TrainedWeights({"encoder": encoder, "decoder": decoder})
    weights.load(checkpoint)
    assert weights.averaged("encoder") is encoder and weights.averaged("decoder") is decoder
    assert torch.equal(encoder.weight, states[0]["weight"])
    assert torch.equal(decoder.fc.weight, averaged.fc.weight)
