"""Self-critical training: samples, rewards, the gradient, and the stage of train.py that does it."""

import subprocess
import sys
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT, small_settings

import train
from captioning import self_critical
from captioning.annotations import END, START, UNK
from captioning.averaging import WeightAverage
from captioning.checkpoints import decoder_from, encoder_from, load_checkpoint
from captioning.curves import REWARD
from captioning.engine import Run, epochs_of_patience
from captioning.features import cache_features
from captioning.losses import caption_logits
from captioning.prepared import Prepared
from captioning.self_critical import Reward, SelfCritical, draw_samples, leave_one_out
from datasets import CaptionDataset, Request
from metrics import CiderD, tokenize
from models import DecoderWithAttention, pool_grid
from utils import UserError

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
    """The formula of captioning/self_critical.py, word by word; `samples` without `<start>`."""
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


# --- the stage ----------------------------------------------------------------------------------------------

OPTIONS = {"self_critical_lr": 3e-4, "batch_size": 8, "select_by": "cider"}


@pytest.fixture(scope="module")
def cross_entropy(prepared, tmp_path_factory):
    """Twenty epochs of cross-entropy: captions that are half right."""
    output = tmp_path_factory.mktemp("cross_entropy")
    train.train(small_settings(prepared, output, **OPTIONS, epochs=20))
    return output


def go_on(prepared, source, output, **options):
    """Self-critical training of the best checkpoint in `source`: its settings, and the epochs' rows."""
    settings = {"checkpoint": str(source / "best_checkpoint.pth"), "self_critical_after": 0} | OPTIONS
    first = len(load_checkpoint(source / "best_checkpoint.pth")["history"])
    epochs = options.pop("epochs", 1)
    train.train(small_settings(prepared, output, **settings | options, epochs=first + epochs))
    return load_checkpoint(sorted(output.glob("checkpoint_epoch_*.pth"))[-1])["history"][first:]


def test_it_raises_cider(prepared, cross_entropy, tmp_path, capsys):
    start = load_checkpoint(cross_entropy / "best_checkpoint.pth")["history"][-1]
    rows = go_on(prepared, cross_entropy, tmp_path, epochs=5, dropout=0.0)
    assert max(row["val_cider"] for row in rows) > start["val_cider"] * 1.05
    assert all(row["decoder_lr"] == 3e-4 for row in rows)
    log = capsys.readouterr().out
    assert "training is self-critical" in log and f"reward {rows[0][REWARD]:.3f}" in log
    header = (tmp_path / "history.csv").read_text().splitlines()[0].split(",")
    assert REWARD in header


def test_it_raises_the_reward(prepared, cross_entropy):
    """Of eight images, in forty steps; a mean of ten steps' rewards has a deviation of about 0.03."""
    checkpoint = load_checkpoint(cross_entropy / "best_checkpoint.pth")
    encoder, decoder = encoder_from(checkpoint, ""), decoder_from(checkpoint, "").train()
    file = cache_features(encoder, prepared, "train", torch.device("cpu"))
    dataset, settings = CaptionDataset(prepared, "train", file), train.Settings(decoder_lr=3e-3)
    references = [[tokenize(text) for text in r.captions] for r in Prepared(prepared).records("train")]
    decoder.dropout.p, run, word_map = 0.0, Run.start("no"), checkpoint["word_map"]
    optimizer = train.build_optimizer(encoder, decoder, settings)
    request, rewards = Request(np.arange(8), 0), []
    for step in range(40):
        objective = SelfCritical(encoder, decoder, settings, run, word_map, Reward(references), 12, step)
        objective.start_step(dataset.lengths[request.indices])
        run.backward(objective(request.indices, *dataset[request]))
        run.step(optimizer, 5.0, "value", objective.finish_step())
        rewards.append(objective.report()[REWARD])
    assert sum(rewards[-10:]) > 1.08 * sum(rewards[:10])


def weights_of(file) -> dict[str, torch.Tensor]:
    checkpoint = load_checkpoint(file)
    parts = {"encoder": checkpoint["encoder"], "decoder": checkpoint["decoder"]}
    parts |= {f"unaveraged {name}": state for name, state in checkpoint.get("unaveraged", {}).items()}
    return {f"{part} {name}": tensor for part, state in parts.items() for name, tensor in state.items()}


def assert_same_weights(file, other) -> None:
    ours, theirs = weights_of(file), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("average_weights", [0.0, 0.9])
def test_a_resumed_stage_is_the_uninterrupted_one(prepared, tmp_path, average_weights):
    """Resumed where the stage begins, and within it. With dropout, and the optimizer's state."""
    options = OPTIONS | {"self_critical_after": 2, "average_weights": average_weights}
    train.train(small_settings(prepared, tmp_path / "a", **options, epochs=4))
    train.train(small_settings(prepared, tmp_path / "b", **options | {"self_critical_after": None}, epochs=2))
    for epochs in (3, 4):
        train.train(small_settings(prepared, tmp_path / "b", **options, epochs=epochs, resume=True))
    for epoch in range(1, 5):
        name = f"checkpoint_epoch_{epoch}.pth"
        assert_same_weights(tmp_path / "a" / name, tmp_path / "b" / name)
    history = load_checkpoint(tmp_path / "b" / "checkpoint_epoch_4.pth")["history"]
    assert [REWARD in row for row in history] == [False, False, True, True]


def test_the_stage_begins_with_the_best_weights_and_a_new_adam(prepared, tmp_path, monkeypatch):
    """The best epoch is not the last one of cross-entropy: its rate is far too high."""
    seen = {}

    def look(settings, average, optimizer, rates, history, *rest):
        reward = self_critical.start_self_critical(settings, average, optimizer, rates, history, *rest)
        best = load_checkpoint(tmp_path / "best_checkpoint.pth")
        seen["epoch"], seen["state"] = len(best["history"]), len(optimizer.state)
        for module in (average.decoder, average.trained[1]):
            for name, tensor in module.state_dict().items():
                assert torch.equal(tensor, best["decoder"][name]), name
        return reward

    monkeypatch.setattr(train, "start_self_critical", look)
    scores = iter([0.5, 0.2, 0.3])
    validate = train.validate

    def scored(*arguments):
        found, captions = validate(*arguments)
        return found | {"val_cider": next(scores)}, captions

    monkeypatch.setattr(train, "validate", scored)
    options = OPTIONS | {"self_critical_after": 2, "average_weights": 0.9}
    train.train(small_settings(prepared, tmp_path, **options, epochs=3))
    assert seen == {"epoch": 1, "state": 0}


def test_patience_stops_it_and_says_so(prepared, cross_entropy, tmp_path, capsys):
    """A rate of 0 changes nothing, so that no epoch is better: the best one is the one that was given."""
    rows = go_on(prepared, cross_entropy, tmp_path, epochs=8, patience=2, self_critical_lr=0.0)
    assert len(rows) == 2 and "stopped: no better cider for 2 epochs" in capsys.readouterr().out
    given = cross_entropy / "best_checkpoint.pth"
    assert_same_weights(tmp_path / "best_checkpoint.pth", given)
    assert (tmp_path / "best_checkpoint.pth").read_bytes() == given.read_bytes()
    assert load_checkpoint(tmp_path / "decoder.pth")["history"] == load_checkpoint(given)["history"]


def test_patience_counts_the_stages_epochs_alone():
    history = [{"val_bleu4": value} for value in (0.5, 0.1, 0.1, 0.1)]
    assert epochs_of_patience(history, train.Settings()) == 3
    settings = train.Settings(self_critical_after=4, epochs=9)
    assert epochs_of_patience(history, settings) == 0
    history += [{"val_bleu4": 0.2, REWARD: 1.0}]
    assert epochs_of_patience(history, settings) == 1
    history += [{"val_bleu4": value, REWARD: 1.0} for value in (0.6, 0.1)]
    assert epochs_of_patience(history, settings) == 1


def test_accumulated_batches_are_one_batch_of_twice_the_size(prepared, cross_entropy, tmp_path):
    options = {"dropout": 0.0, "epochs": 2}
    whole = go_on(prepared, cross_entropy, tmp_path / "whole", **options, batch_size=8)
    parts = go_on(prepared, cross_entropy, tmp_path / "parts", **options, batch_size=4, grad_accumulation=2)
    assert_same_curves(whole, parts)


def assert_same_curves(rows, others) -> None:
    for row, other in zip(rows, others, strict=True):
        for name in ("train_loss", REWARD, "val_loss", "val_cider"):
            assert other[name] == pytest.approx(row[name], abs=1e-4), name


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(prepared, cross_entropy, tmp_path):
    whole = go_on(prepared, cross_entropy, tmp_path / "whole", dropout=0.0, epochs=2)
    checkpoint = cross_entropy / "best_checkpoint.pth"
    options = OPTIONS | {"checkpoint": checkpoint, "self_critical_after": 0, "dropout": 0.0, "batch_size": 4}
    settings = small_settings(prepared, tmp_path / "two", **options)
    epochs = len(load_checkpoint(checkpoint)["history"]) + 2
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command.append(str(ROOT / "train.py"))
    for name, value in (asdict(settings) | {"epochs": epochs}).items():
        command += [f"--{name}", str(value)] if value is not None else []
    subprocess.run(command, check=True, capture_output=True)
    history = load_checkpoint(tmp_path / "two" / f"checkpoint_epoch_{epochs}.pth")["history"]
    assert_same_curves(whole, history[-2:])


def test_a_trainable_encoder_learns_too(prepared, cross_entropy, tmp_path):
    rows = go_on(prepared, cross_entropy, tmp_path, fine_tune_encoder=True)
    before = load_checkpoint(cross_entropy / "best_checkpoint.pth")
    after = load_checkpoint(*tmp_path.glob("checkpoint_epoch_*.pth"))
    assert len(rows) == 1
    for part in ("encoder", "decoder"):
        moved = [name for name in after[part] if not torch.equal(after[part][name], before[part][name])]
        assert moved and not any("running" in name for name in moved)


def test_the_plain_decoder_trains_as_the_fused_one(prepared, cross_entropy, tmp_path):
    curves = [go_on(prepared, cross_entropy, tmp_path / str(fused), dropout=0.0, fused=fused)
              for fused in (True, False)]  # fmt: skip
    assert_same_curves(*curves)


def test_settings_that_leave_nothing_to_do_are_refused():
    with pytest.raises(UserError, match="give its --checkpoint"):
        train.Settings(self_critical_after=0)
    with pytest.raises(UserError, match=r"--self_critical_after 20: .* only 3 epochs"):
        train.Settings(self_critical_after=20)
    with pytest.raises(UserError, match="--self_critical_samples is 1"):
        train.Settings(self_critical_samples=1)


def test_an_average_of_the_given_checkpoint_is_where_it_starts(prepared, tmp_path):
    """`--checkpoint` of a training with averaging: from the average, as it was scored."""
    train.train(small_settings(prepared, tmp_path / "a", **OPTIONS, average_weights=0.9))
    rows = go_on(prepared, tmp_path / "a", tmp_path / "b", average_weights=0.9, self_critical_lr=0.0)
    best = load_checkpoint(tmp_path / "a" / "best_checkpoint.pth")
    assert rows[0]["val_cider"] == pytest.approx(best["history"][-1]["val_cider"])
    after = load_checkpoint(sorted((tmp_path / "b").glob("checkpoint_epoch_*.pth"))[-1])
    for name, tensor in best["decoder"].items():
        torch.testing.assert_close(after["unaveraged"]["decoder"][name], tensor, msg=name)


def test_without_averaging_an_average_is_what_goes_on():
    encoder, decoder, averaged = torch.nn.Linear(1, 1), make_decoder(), make_decoder()
    encoder.requires_grad_(False)
    states = [{name: value + shift for name, value in encoder.state_dict().items()} for shift in (1, 2)]
    for parameter in averaged.parameters():
        parameter.data.add_(1)
    checkpoint = {"encoder": states[0], "decoder": averaged.state_dict()}
    checkpoint["unaveraged"] = {"encoder": states[1], "decoder": make_decoder().state_dict()}
    average = WeightAverage(encoder, decoder, decay=0.0)
    average.restart(checkpoint, 5)
    assert average.encoder is encoder and average.decoder is decoder
    assert torch.equal(encoder.weight, states[0]["weight"])
    assert torch.equal(decoder.fc.weight, averaged.fc.weight)
