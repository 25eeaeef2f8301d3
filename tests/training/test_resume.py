"""What a training that goes on keeps of its checkpoint, and what it takes from the command line."""

import math
import shutil
from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch
from conftest import read_history, small_settings

import run_pipeline
import train
import train_model
from captioning.command_line import make_settings
from captioning.data.prepared import read_prepared
from captioning.training.loop import Training
from captioning.training.optimization import LearningRate, Run
from captioning.training.resume import Resumed, is_complete
from captioning.weights.checkpoints import archive_previous_run, load_checkpoint
from datasets import BatchSampler
from utils import UserError


@pytest.fixture(scope="module")
def first(prepared, tmp_path_factory):
    """One epoch with settings that are not the defaults: frozen word embeddings among them."""
    output = tmp_path_factory.mktemp("first")
    options = {"epochs": 1, "fine_tune_embeddings": False, "batch_size": 4, "dropout": 0.3, "seed": 5}
    train.train(small_settings(prepared, output, **options))
    return output


def go_on(prepared, first, output, settings_class=train.Settings, **given) -> dict:
    """Resume as from the command line, with these settings given; return the last checkpoint."""
    checkpoint = str(first / "checkpoint_epoch_1.pth")
    names = {"data_folder": str(prepared), "output_folder": str(output), "checkpoint": checkpoint}
    train.train(make_settings(settings_class, names | given))
    return load_checkpoint(output / "checkpoint_epoch_2.pth")


def test_what_was_not_given_is_the_checkpoints(prepared, first, tmp_path, capsys):
    earlier = load_checkpoint(first / "checkpoint_epoch_1.pth")
    later = go_on(prepared, first, tmp_path, epochs=2)
    for name in ("fine_tune_embeddings", "batch_size", "dropout", "seed", "decoder_lr", "emb_dim", "alpha_c"):
        assert later["settings"][name] == earlier["settings"][name], name
    before, after = (part["decoder"]["embedding.weight"] for part in (earlier, later))
    assert torch.equal(before, after)
    assert not torch.equal(earlier["decoder"]["fc.weight"], later["decoder"]["fc.weight"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("going on")]
    assert "after epoch 1" in line and "batch_size 4 (not 16)" in line and "Adam's state kept" in line


def test_what_was_given_holds_and_is_recorded(prepared, first, tmp_path, capsys):
    later = go_on(prepared, first, tmp_path, epochs=2, decoder_lr=1e-6, dropout=0.0)
    assert later["settings"]["decoder_lr"] == 1e-6 and later["settings"]["dropout"] == 0.0
    assert later["history"][-1]["decoder_lr"] == 1e-6
    before = load_checkpoint(first / "checkpoint_epoch_1.pth")["decoder"]["fc.weight"]
    assert (later["decoder"]["fc.weight"] - before).abs().max() < 1e-4  # Adam steps by about the rate
    assert "decoder_lr 1e-06 (was 0.004)" in capsys.readouterr().out


@dataclass
class Edited(train.Settings):
    """As where somebody has edited the top of train.py since."""

    dropout: float = 0.1
    batch_size: int = 4  # that which was given in the first run
    decoder_lr: float = 1e-6
    epochs: int = 2
    workers: int = 0


def test_what_was_edited_holds_too(prepared, first, tmp_path, capsys):
    later = go_on(prepared, first, tmp_path, Edited)
    assert later["settings"]["dropout"] == 0.1 and later["history"][-1]["decoder_lr"] == 1e-6
    assert later["defaults"]["dropout"] == 0.1 and len(later["history"]) == 2
    assert later["settings"]["seed"] == 5 and later["settings"]["emb_dim"] == 32, "not edited"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("going on")]
    changes = [
        "epochs 2 (was 1; edited)",
        "decoder_lr 1e-06 (was 0.004; edited)",
        "dropout 0.1 (was 0.3; edited)",
    ]
    assert f"; changed: {', '.join(changes)}; from the checkpoint: " in line, line
    assert "batch_size" not in line and "seed 5 (not 123)" in line


def test_what_is_given_is_more_than_an_edit(prepared, first, tmp_path, capsys):
    later = go_on(prepared, first, tmp_path, Edited, dropout=0.3, decoder_lr=1e-5)
    assert later["settings"]["dropout"] == 0.3 and later["settings"]["decoder_lr"] == 1e-5
    assert "decoder_lr 1e-05 (was 0.004)" in capsys.readouterr().out


def test_of_a_checkpoint_without_defaults_nothing_is_known_as_edited(prepared, first, tmp_path):
    """Those of before they were kept."""
    checkpoint = torch.load(first / "checkpoint_epoch_1.pth", weights_only=True)
    del checkpoint["defaults"]
    (tmp_path / "old").mkdir()
    torch.save(checkpoint, tmp_path / "old" / "checkpoint_epoch_1.pth")
    later = go_on(prepared, tmp_path / "old", tmp_path / "new", Edited)
    assert later["settings"]["dropout"] == 0.3 and later["settings"]["decoder_lr"] == 4e-3


def test_an_edited_size_is_refused(prepared, first, tmp_path):
    @dataclass
    class Wider(train.Settings):
        emb_dim: int = 64

    with pytest.raises(UserError, match=r"^emb_dim 64: .* was trained with 32; edit it back, or train anew"):
        go_on(prepared, first, tmp_path, Wider, epochs=2)
    assert not list(tmp_path.iterdir())


def test_the_defaults_of_blip_are_those_of_its_base_model():
    tiny, pretrained = train_model.Settings(base_model="tiny"), train_model.Settings()
    assert tiny.defaults()["epochs"] == 50 and pretrained.defaults()["epochs"] == 3
    assert pretrained.defaults() == asdict(pretrained)


def test_a_models_sizes_cannot_change(prepared, first, tmp_path):
    with pytest.raises(UserError, match=r"--emb_dim 99: .* was trained with 32"):
        go_on(prepared, first, tmp_path, epochs=2, emb_dim=99)
    assert not list(tmp_path.iterdir())


def test_resume_takes_the_last_checkpoint_and_names_what_is_missing(prepared, first, tmp_path):
    with pytest.raises(UserError, match="start without --resume"):
        train.train(small_settings(prepared, tmp_path, resume=True))
    with pytest.raises(UserError, match="give one"):
        train.train(small_settings(prepared, tmp_path, resume=True, checkpoint="a.pth"))
    with pytest.raises(UserError, match="raise --epochs"):
        train.train(make_settings(train.Settings, {"output_folder": str(first), "data_folder": str(prepared),
                                                   "resume": True, "epochs": 1}))  # fmt: skip


# --- in run_pipeline.py -------------------------------------------------------------------------------------

FIRST = {"fine_tune_embeddings": False, "batch_size": 4, "dropout": 0.3, "seed": 5}
DECISIONS = {  # what is wanted now, beside the first run: what is done
    "the same": ({}, "up to date"),
    "more epochs": ({"epochs": 3}, "goes on"),
    "of this run": ({"workers": 1, "save_every": 5.0}, "up to date"),
    "another dropout": ({"dropout": 0.1}, "anew, and not on from .*: dropout 0.1 (was 0.3)"),
    "more epochs of another dropout": ({"epochs": 3, "dropout": 0.1}, "goes on"),
    "another size": ({"epochs": 3, "emb_dim": 64, "seed": 6}, "anew, .*: emb_dim 64 (was 32)"),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_the_pipeline_goes_on_or_says_why_not(name, prepared, first, tmp_path, capsys):
    changes, expected = DECISIONS[name]
    shutil.copytree(first, tmp_path / "run")
    record = read_prepared(prepared)
    data = {"settings": record["settings"], "inputs": record["inputs"]}
    wanted, runs = small_settings(prepared, tmp_path / "run", **FIRST | {"epochs": 1} | changes), []

    def train_with(data: object) -> str:
        runs.clear()
        announce = run_pipeline.announce_steps(4)
        run_pipeline.run_training(
            "training",
            runs.append,
            wanted,
            lambda c: run_pipeline.is_same_training_data(c["data"], data),
            "data -> models",
            announce,
        )
        return capsys.readouterr().out

    printed = train_with(data)
    if expected == "up to date":
        assert "is up to date, skipped" in printed and not runs
    elif expected == "goes on":
        assert "going on after" in printed and [settings.resume for settings in runs] == [True]
    else:
        start, end = expected.split(".*")
        assert start in printed and end in printed and [settings.resume for settings in runs] == [False]
        assert "seed" not in printed.partition("anew")[2], "with it alone the training could go on"
    assert "training data (others)" in train_with(data | {"settings": {}}) and not runs[0].resume
    (tmp_path / "run" / "checkpoint_epoch_1.pth").write_bytes(b"damaged")
    assert "anew" not in train_with(data) and not runs[0].resume


def test_the_pipeline_keeps_what_was_changed_on_the_way(prepared, first, tmp_path):
    shutil.copytree(first, tmp_path / "run")
    wanted = small_settings(prepared, tmp_path / "run", **FIRST | {"epochs": 2, "dropout": 0.1})
    record = read_prepared(prepared)
    data = {"settings": record["settings"], "inputs": record["inputs"]}
    for _ in range(2):  # the second time there is nothing to do
        run_pipeline.run_training(
            "a",
            train.train,
            wanted,
            lambda c: run_pipeline.is_same_training_data(c["data"], data),
            "b",
            run_pipeline.announce_steps(4),
        )
    later = load_checkpoint(tmp_path / "run" / "checkpoint_epoch_2.pth")
    assert later["settings"]["dropout"] == 0.1 and not (tmp_path / "run" / "earlier_1").exists()


def test_a_training_is_complete_by_its_epochs_or_its_patience(prepared, tmp_path):
    history = [{"val_cider": value} for value in (0.2, 0.1, 0.1)]
    assert is_complete(small_settings(prepared, tmp_path, epochs=3), history)
    assert not is_complete(small_settings(prepared, tmp_path, epochs=4), history)
    assert is_complete(small_settings(prepared, tmp_path, epochs=4, patience=2), history)


# --- rates, reports, folders --------------------------------------------------------------------------------


def test_learning_rates():
    class Plan:
        lr_schedule, warmup, decay_after, decay, rate_names = "cosine", 0.2, 8, 0.8, ("rate",)

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 1.0}])
    rates, seen = LearningRate(optimizer, Plan, 20), []
    for _ in range(20):
        seen.append(optimizer.param_groups[0]["lr"])
        rates.after_step()
    assert seen[:5] == [0, 0.25, 0.5, 0.75, 1]
    for step in range(4, 20):
        assert seen[step] == pytest.approx(0.5 * (1 + math.cos(math.pi * (step - 4) / 16)))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)
    Plan.lr_schedule = "plateau"
    optimizer.param_groups[0]["lr"] = 1.0
    rates = LearningRate(optimizer, Plan, 20)
    for waited in (0, 1, 7, 8, 9, 16):
        rates.before_epoch(waited)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.64)


def test_curves_samples_and_log(prepared, tmp_path, capsys):
    from PIL import Image

    train.train(small_settings(prepared, tmp_path))
    printed = capsys.readouterr().out
    assert (tmp_path / "train.log").read_text() == printed
    assert printed.count("    train_") == 6 and "left for 1 epoch" in printed  # three samples in each epoch
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.size > (800, 300) and np.ptp(np.asarray(curves)) > 100
    assert len(read_history(tmp_path)) == 2
    train.train(small_settings(prepared, tmp_path, epochs=3, resume=True))
    assert (tmp_path / "train.log").read_text() == printed + capsys.readouterr().out


def test_gradients_are_clipped_by_value_or_by_norm(prepared, tmp_path):
    moved = {}
    for by in ("value", "norm"):
        options = {"grad_clip": 1e-12, "grad_clip_by": by, "epochs": 1, "decoder_lr": 0.1}
        train.train(small_settings(prepared, tmp_path / by, **options))
        moved[by] = (
            load_checkpoint(tmp_path / by / "decoder.pth", "decoder")["decoder"]["fc.bias"].abs().max()
        )
    # far below Adam's epsilon of 1e-8 there are no steps to speak of; a norm leaves each gradient even less
    assert moved["norm"] < moved["value"] < 1e-3


def test_a_tracker_that_is_not_installed_is_named(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(UserError, match="pip install wandb"):
        train.train(small_settings(prepared, tmp_path, log_with="wandb"))


def test_earlier_runs_are_numbered_on(tmp_path):
    for expected in ("earlier_1", "earlier_2"):
        (tmp_path / "a.pth").touch()
        archive_previous_run(tmp_path, "*.pth")
        assert (tmp_path / expected / "a.pth").is_file()
    (tmp_path / "earlier_1" / "a.pth").unlink()
    (tmp_path / "earlier_1").rmdir()
    (tmp_path / "a.pth").touch()
    archive_previous_run(tmp_path, "*.pth")
    assert (tmp_path / "earlier_3" / "a.pth").is_file()


@pytest.mark.parametrize("changed, expected", [((), [2, 1]), (("decoder_lr",), [0, 1])])
def test_a_rate_that_was_not_changed_keeps_its_decays(tmp_path, changed, expected):
    models = {"one": torch.nn.Linear(2, 1), "other": torch.nn.Linear(1, 1)}
    settings, sampler, run = train.Settings(output_folder=str(tmp_path)), BatchSampler(8, 2), Run.start("no")
    optimizer = torch.optim.Adam([{"params": list(m.parameters()), "lr": 0.1} for m in models.values()])
    state = Training(settings, run, models, optimizer, sampler, {}).checkpoint()
    state["rates"] = {"steps": 0, "decays": [2, 1]}
    resumed = Resumed(state, tmp_path / "checkpoint.pth", dict.fromkeys(changed, ""), "")
    Training(settings, run, models, optimizer, sampler, {}, resumed)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.1 * 0.8**decays for decays in expected])


def test_going_back_moves_the_abandoned_epochs_away(prepared, tmp_path):
    """Otherwise --resume would go on from an epoch of the abandoned branch."""
    train.train(small_settings(prepared, tmp_path, epochs=3))
    first = str(tmp_path / "checkpoint_epoch_1.pth")
    train.train(small_settings(prepared, tmp_path, epochs=2, seed=7, checkpoint=first))
    names = {file.name for file in tmp_path.glob("checkpoint_epoch_*.pth")}
    assert names == {"checkpoint_epoch_1.pth", "checkpoint_epoch_2.pth"}
    moved = {file.name for file in (tmp_path / "earlier_1").iterdir()}
    assert moved == {"checkpoint_epoch_2.pth", "checkpoint_epoch_3.pth"}
    best = load_checkpoint(tmp_path / "best_checkpoint.pth")
    assert len(best["history"]) <= 2 and len(read_history(tmp_path)) == 2
    assert load_checkpoint(tmp_path / "checkpoint_epoch_2.pth")["settings"]["seed"] == 7


def test_a_refused_resume_changes_no_file(prepared, first, tmp_path):
    shutil.copytree(first, tmp_path / "run")
    before = {file: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()}
    names = {"data_folder": str(prepared), "output_folder": str(tmp_path / "run"), "resume": True}
    with pytest.raises(UserError, match="--decoder_dim 100"):
        train.train(make_settings(train.Settings, names | {"decoder_dim": 100, "epochs": 5}))
    assert {file: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()} == before
