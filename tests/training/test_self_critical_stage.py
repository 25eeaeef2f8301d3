"""The self-critical stage of train.py: what it reaches, how it goes on, when it ends."""

import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, TWO_PROCESSES, as_arguments, small_settings

import train
from captioning.data.features import cache_features
from captioning.data.prepared import Prepared
from captioning.training.optimization import Run
from captioning.training.reinforce import Reward, SelfCritical
from captioning.training.resume import REWARD, epochs_of_patience
from captioning.weights.checkpoints import decoder_from, encoder_from, load_checkpoint
from datasets import CaptionDataset, Request
from metrics import tokenize
from utils import UserError

OPTIONS = {"self_critical_lr": 3e-4, "batch_size": 8, "select_by": "cider"}


@pytest.fixture(scope="module")
def cross_entropy(prepared, tmp_path_factory):
    """Seventeen epochs of cross-entropy: captions that are half right."""
    output = tmp_path_factory.mktemp("cross_entropy")
    learning = {"decoder_lr": 8e-3, "dropout": 0.2, "batch_size": 4}
    train.train(small_settings(prepared, output, **OPTIONS | learning, epochs=17))
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
    rows = go_on(prepared, cross_entropy, tmp_path, epochs=5, dropout=0.0, self_critical_lr=1e-3)
    assert max(row["val_cider"] for row in rows) > start["val_cider"] * 1.05
    assert all(row["decoder_lr"] == 1e-3 for row in rows)
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
        run.reduce_gradients(optimizer, objective.finish_step())
        run.clip_gradients(optimizer, 5.0, "value")
        run.step(optimizer)
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


@pytest.mark.slow
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

    start_self_critical = train.start_self_critical

    def look(training, *rest):
        objective = start_self_critical(training, *rest)
        best = load_checkpoint(tmp_path / "best_checkpoint.pth")
        seen["epoch"], seen["state"] = len(best["history"]), len(training.optimizer.state)
        for module in (training.weights.averaged("decoder"), training.weights.models["decoder"]):
            for name, tensor in module.state_dict().items():
                assert torch.equal(tensor, best["decoder"][name]), name
        return objective

    monkeypatch.setattr(train, "start_self_critical", look)
    scores = iter([0.5, 0.2, 0.3])
    evaluate = train.evaluate

    def scored(*arguments):
        measured, captions = evaluate(*arguments)
        return measured | {"val_cider": next(scores)}, captions

    monkeypatch.setattr(train, "evaluate", scored)
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
    history = [{"val_cider": value} for value in (0.5, 0.1, 0.1, 0.1)]
    assert epochs_of_patience(history, train.Settings()) == 3
    settings = train.Settings(self_critical_after=4, epochs=9)
    assert epochs_of_patience(history, settings) == 0
    history += [{"val_cider": 0.2, REWARD: 1.0}]
    assert epochs_of_patience(history, settings) == 1
    history += [{"val_cider": value, REWARD: 1.0} for value in (0.6, 0.1)]
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
    epochs = len(load_checkpoint(checkpoint)["history"]) + 2
    settings = small_settings(prepared, tmp_path / "two", **options | {"epochs": epochs})
    command = [*TWO_PROCESSES, str(ROOT / "train.py"), *as_arguments(settings)]
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


def test_the_plain_energies_train_as_the_fast_ones(prepared, cross_entropy, tmp_path, monkeypatch):
    fast = go_on(prepared, cross_entropy, tmp_path / "fast", dropout=0.0)
    for module in ("train", "captioning.captioners.attention"):
        monkeypatch.setattr(f"{module}.use_fast_energies", lambda decoder: True)
    assert_same_curves(fast, go_on(prepared, cross_entropy, tmp_path / "plain", dropout=0.0))


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
