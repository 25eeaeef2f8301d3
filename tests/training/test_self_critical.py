"""Self-critical training: samples, rewards, the gradient, where it starts."""

from collections import Counter

import pytest
import torch

import train
from captioning.data.prepared import END, START, UNK
from captioning.training import self_critical
from captioning.training.losses import caption_logits
from captioning.training.optimization import Run, TrainedWeights
from captioning.training.resume import REWARD
from captioning.training.self_critical import Reward, SelfCritical, draw_samples, leave_one_out
from metrics import CiderD
from models import DecoderWithAttention, pool_grid

WORDS = ["<pad>", "a", "dog", "cat", "runs", "sleeps", "here", UNK, START, END]


WORD_MAP = {word: index for index, word in enumerate(WORDS)}


REFERENCES = [
    [["a", "dog", "runs"], ["a", "dog", "runs", "here"]],
    [["a", "cat", "sleeps", "here"], ["a", "cat", "sleeps"]],
    [["a", "dog", "sleeps"], ["a", "dog"]],
]


LONGEST = 7


def make_decoder(vocabulary: int = len(WORDS), **options) -> DecoderWithAttention:
    torch.manual_seed(0)
    decoder = DecoderWithAttention(12, 10, 14, vocabulary, encoder_dim=16, **{"dropout": 0.0} | options)
    for parameter in decoder.parameters():
        parameter.data.mul_(3)  # attention and words far from uniform
    return decoder


def make_objective(decoder, **options) -> SelfCritical:
    settings = train.Settings(**options)
    run = Run.start("no")
    return SelfCritical(None, decoder, settings, run, WORD_MAP, Reward(REFERENCES), LONGEST, epoch=2)


# --- samples ------------------------------------------------------------------------------------------------


def exact_probabilities(decoder, grid, steps: int) -> dict[tuple[int, ...], float]:
    """The probability of each caption of at most so many words, by feeding all of them word by word."""
    pixels = pool_grid(grid).flatten(1, 2)
    probabilities, live = {}, [((), 1.0, decoder.init_hidden_state(pixels))]
    for step in range(steps):
        extended = []
        for words, probability, state in live:
            fed = torch.tensor([words[-1] if words else WORD_MAP[START]])
            logits, _, new_state = decoder.step(fed, pixels, state)
            for word, share in enumerate(logits[0].softmax(dim=0).tolist()):
                caption = (*words, word)
                if word == WORD_MAP[END] or step == steps - 1:
                    probabilities[caption] = probability * share
                else:
                    extended.append((caption, probability * share, new_state))
        live = extended
    return probabilities


@pytest.mark.parametrize("fused", [True, False])
def test_samples_follow_the_models_distribution(fused):
    """Also while the decoder is trained with dropout, which samples do not see."""
    decoder, grid = make_decoder(dropout=0.9).train(), torch.rand(1, 8, 8, 16)
    decoder.fc.bias.data[WORD_MAP[END]] = 1.0  # captions of all lengths
    captions, lengths = draw_samples(
        decoder, grid, torch.rand(1, 20_000, 3), WORD_MAP[START], WORD_MAP[END], fused
    )
    assert decoder.training
    found = Counter(tuple(row[1:n].tolist()) for row, n in zip(captions, lengths.tolist()))
    with torch.no_grad():
        expected = exact_probabilities(decoder.eval(), grid, 3)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5) and set(found) <= set(expected)
    assert len({len(caption) for caption in found}) == 3
    # of frequencies, five standard deviations
    for caption, probability in expected.items():
        deviation = (probability * (1 - probability) / 20_000) ** 0.5
        assert abs(found[caption] / 20_000 - probability) < 5 * deviation + 1e-4, caption


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("steps_between_checks", [1, 4, 100])
def test_samples_do_not_depend_on_their_batch(fused, steps_between_checks, monkeypatch):
    """One by one, in a batch that is cut in two, with or without those that have ended: the same."""
    decoder, grid, uniforms = make_decoder(), torch.rand(6, 8, 8, 16), torch.rand(6, 5, 12)
    decoder.fc.bias.data[WORD_MAP[END]] = 1.0

    def sample(*, images: slice) -> list[list[int]]:
        captions, lengths = draw_samples(
            decoder, grid[images], uniforms[images], WORD_MAP[START], WORD_MAP[END], fused
        )
        for caption, length in zip(captions, lengths):  # `<end>` last, then padding
            assert caption[0] == WORD_MAP[START] and not caption[length:].any()
            assert WORD_MAP[END] not in caption[: length - 1]
            assert caption[length - 1] == WORD_MAP[END] or length == 13
        return [caption[:length].tolist() for caption, length in zip(captions, lengths)]

    whole = sample(images=slice(6))
    assert len({len(caption) for caption in whole}) > 3
    monkeypatch.setattr(self_critical, "STEPS_BETWEEN_CHECKS", steps_between_checks)
    assert sample(images=slice(6)) == whole
    assert sample(images=slice(3)) + sample(images=slice(3, 6)) == whole
    assert [caption for i in range(6) for caption in sample(images=slice(i, i + 1))] == whole


@pytest.mark.parametrize("fused", [True, False])
def test_log_probabilities_are_those_of_teacher_forcing(fused, monkeypatch):
    decoder, grid = make_decoder(dropout=0.5).train(), torch.rand(4, 8, 8, 16)
    draw_words, seen = self_critical.draw_words, []

    def record(logits, uniforms):
        words = draw_words(logits, uniforms)
        log_probs = logits.log_softmax(dim=2).expand(*words.shape, -1)
        seen.append(log_probs.gather(2, words.unsqueeze(2)).flatten())
        return words

    monkeypatch.setattr(self_critical, "draw_words", record)
    monkeypatch.setattr(self_critical, "STEPS_BETWEEN_CHECKS", 100)  # every sample to the last step
    captions, lengths = draw_samples(
        decoder, grid, torch.rand(4, 3, 9), WORD_MAP[START], WORD_MAP[END], fused
    )
    decoder.eval()
    found = caption_logits(fused)(decoder, grid, captions, lengths)
    log_probs = found.logits.log_softmax(dim=1).gather(1, found.targets.unsqueeze(1)).squeeze(1)
    sampled = torch.stack(seen, dim=1)[found.captions, found.steps]
    assert len(sampled) == int((lengths - 1).sum()) and len(set(lengths.tolist())) > 1
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


def test_the_baseline_is_the_mean_of_the_others():
    rewards = torch.rand(3, 5)
    for image, own in enumerate(rewards):
        for sample, value in enumerate(own):
            others = torch.cat([own[:sample], own[sample + 1 :]])
            assert leave_one_out(rewards)[image, sample] == pytest.approx(
                float(value - others.mean()), abs=1e-6
            )


# --- the loss -----------------------------------------------------------------------------------------------


def reinforce(decoder, grid, samples: list[list[list[int]]], rewards: list[list[float]]):
    """The formula of captioning/training/self_critical.py, word by word; `samples` without `<start>`."""
    total, words = 0.0, 0
    for image, (captions, values) in enumerate(zip(samples, rewards)):
        pixels = pool_grid(grid[image : image + 1]).flatten(1, 2)
        for s, caption in enumerate(captions):
            baseline = sum(values[:s] + values[s + 1 :]) / (len(values) - 1)
            fed, state = WORD_MAP[START], decoder.init_hidden_state(pixels)
            for word in caption:
                logits, _, state = decoder.step(torch.tensor([fed]), pixels, state)
                total = total - logits[0].log_softmax(dim=0)[word] * (values[s] - baseline)
                fed, words = word, words + 1
    return total / words


@pytest.mark.parametrize("fused", [True, False])
def test_the_gradient_is_that_of_plain_reinforce(fused, monkeypatch):
    """Loss and gradients, the grid's too, as where the encoder is trained."""
    decoder, indices = make_decoder().train(), [2, 0, 1]
    decoder.fc.bias.data[WORD_MAP[END]] = 0.5
    grid = torch.rand(3, 8, 8, 16).requires_grad_()
    sampled, sample = [], self_critical.draw_samples

    def record(*arguments):
        sampled.append(sample(*arguments))
        return sampled[-1]

    monkeypatch.setattr(self_critical, "draw_samples", record)
    objective = make_objective(decoder, dropout=0.0, fused=fused)
    lengths = torch.full((3, 2), 5)
    objective.start_step(lengths.numpy())
    loss = objective(indices, grid, torch.zeros(3, 2, 6).long(), lengths)
    divisor = objective.finish_step()
    loss = loss / divisor
    loss.backward()
    named = dict(decoder.named_parameters())
    ours = {name: parameter.grad for name, parameter in named.items()} | {"grid": grid.grad}

    ((captions, lengths),) = sampled
    texts = [caption[1:length] for caption, length in zip(captions.tolist(), lengths.tolist())]
    samples = [texts[start : start + 5] for start in range(0, 15, 5)]
    documents = [[[*words, END] for words in captions] for captions in REFERENCES]
    cider = CiderD.from_references(documents)
    rewards = [
        cider.score([documents[i]] * 5, [[WORDS[word] for word in words] for words in own])
        for i, own in zip(indices, samples)
    ]
    assert divisor == sum(map(len, texts)) and objective.report()[REWARD] == pytest.approx(
        sum(map(sum, rewards)) / 15
    )
    assert max(map(max, rewards)) > 0 and len(set(map(len, texts))) > 2
    decoder.zero_grad()
    leaf = grid.detach().clone().requires_grad_()
    expected = reinforce(decoder, leaf, samples, rewards)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, gradient in {name: p.grad for name, p in named.items()}.items():
        if name != "attention.full_att.bias":  # the softmax does not depend on it
            assert gradient.abs().max() > 1e-5, name
            torch.testing.assert_close(ours[name], gradient, atol=1e-7, rtol=1e-3, msg=name)
    torch.testing.assert_close(ours["grid"], leaf.grad, atol=1e-6, rtol=1e-3)


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
