"""Damaged, mixed and hostile checkpoints; the best files after a kill."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import small_settings

import train
from captioning.captioners.attention import load_models
from captioning.training.monitor import repair_outputs
from captioning.training.resume import best_epoch
from captioning.weights import checkpoints
from captioning.weights.checkpoints import (
    BEST_FILES,
    decoder_from,
    epoch_checkpoints,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from utils import UserError


@pytest.fixture
def folder(models, tmp_path) -> Path:
    shutil.copytree(models, tmp_path / "models")
    return tmp_path / "models"


def histories(folder: Path) -> list[int]:
    return [len(torch.load(folder / name, weights_only=True)["history"]) for name in BEST_FILES]


def best_of(folder: Path) -> int:
    checkpoint = load_checkpoint(epoch_checkpoints(folder)[-1])
    return best_epoch(checkpoint["history"], f"val_{checkpoint['settings']['select_by']}") + 1


def test_a_flipped_bit_is_noticed(folder):
    content = (folder / "decoder.pth").read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        place = rng.randrange(len(content))
        flipped = content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
        (folder / "decoder.pth").write_bytes(flipped)
        try:
            checkpoint = load_checkpoint(folder / "decoder.pth", "decoder")
        except UserError as error:
            assert "\n" not in str(error)
            continue
        truth = load_checkpoint(folder / "best_checkpoint.pth")  # a bit of the zip's padding
        assert all(
            torch.equal(tensor, truth["decoder"][name]) for name, tensor in checkpoint["decoder"].items()
        )


def test_two_files_of_different_epochs_or_runs_are_refused(folder, prepared, tmp_path):
    load_models(folder / "encoder.pth", folder / "decoder.pth")
    other = 1 if best_of(folder) != 1 else 2
    with pytest.raises(UserError, match="of different epochs or trainings"):
        load_models(folder / "encoder.pth", folder / f"checkpoint_epoch_{other}.pth")


@pytest.mark.parametrize("written", [0, 1, 2])
def test_the_best_files_are_repaired_after_a_kill_between_them(folder, written):
    best, last = best_of(folder), len(epoch_checkpoints(folder))
    older = 1 if best != 1 else 2
    checkpoint = load_checkpoint(folder / f"checkpoint_epoch_{older}.pth")
    for name in BEST_FILES[written:]:  # as they were before the best epoch
        part = name.removesuffix(".pth")
        keys = ("settings", "word_map", "data", "history", part)
        own = {key: checkpoint[key] for key in keys if key in checkpoint}
        save_checkpoint(folder / name, own if part in checkpoint else checkpoint)
    lines = (folder / "history.csv").read_text().splitlines(keepends=True)
    (folder / "history.csv").write_text("".join(lines[:-1]))
    repair_outputs(folder)
    assert histories(folder) == [best] * 3
    assert len((folder / "history.csv").read_text().splitlines()) == last + 1
    load_models(folder / "encoder.pth", folder / "decoder.pth")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    repair_outputs(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_missing_best_files_are_written_again_where_their_epoch_is_gone(folder):
    best = best_of(folder)
    for file in epoch_checkpoints(folder)[:-1]:
        file.unlink()
    (folder / "encoder.pth").unlink()
    (folder / "decoder.pth").write_bytes(b"cut")
    repair_outputs(folder)
    assert histories(folder) == [best] * 3


def test_checkpoints_that_do_not_stay_are_removed_after_a_kill(folder):
    files = epoch_checkpoints(folder)
    newest = read_checkpoint(files[-1])
    newest["settings"]["keep_checkpoints"] = 2
    save_checkpoint(files[-1], newest)
    content = files[-1].read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    files[-1].write_bytes(flipped)
    repair_outputs(folder)
    assert epoch_checkpoints(folder) == files  # the newest is damaged: the others are needed
    files[-1].write_bytes(content)
    repair_outputs(folder)
    assert epoch_checkpoints(folder) == files[-2:]


DAMAGES = {
    "no list": lambda c: [],
    "no history": lambda c: c | {"history": None},
    "history of text": lambda c: c | {"history": ["a"]},
    "history without epochs": lambda c: c | {"history": [{"val_bleu4": 1.0}]},
    "history of lists": lambda c: c | {"history": [{"epoch": 1, "val_bleu4": [1]}]},
    "dropout 5": lambda c: c | {"settings": c["settings"] | {"dropout": 5}},
    "dropout nan": lambda c: c | {"settings": c["settings"] | {"dropout": float("nan")}},
    "dropout text": lambda c: c | {"settings": c["settings"] | {"dropout": "a"}},
    "emb_dim 10 ** 6": lambda c: c | {"settings": c["settings"] | {"emb_dim": 10**6}},
    "emb_dim 0": lambda c: c | {"settings": c["settings"] | {"emb_dim": 0}},
    "emb_dim 16000": lambda c: c | {"settings": c["settings"] | {"emb_dim": 16000}},
    "decoder_dim 16000": lambda c: c | {"settings": c["settings"] | {"decoder_dim": 16000}},
    "encoder of another name": lambda c: c | {"settings": c["settings"] | {"encoder_name": "resnet18"}},
    "encoder of no name": lambda c: c | {"settings": c["settings"] | {"encoder_name": ["a"]}},
    "image_size 10 ** 6": lambda c: c | {"data": {"settings": {"image_size": 10**6}}},
    "image_size text": lambda c: c | {"data": {"settings": {"image_size": "1"}}},
    "no data": lambda c: c | {"data": {}},
    "word map without <start>": lambda c: c | {"word_map": {
        w.replace("<start>", "s"): i for w, i in c["word_map"].items()}},
    "word map of text": lambda c: c | {"word_map": {w: "a" for w in c["word_map"]}},
    "doubled word map": lambda c: c | {"word_map": {w: min(i, 4) for w, i in c["word_map"].items()}},
    "nan": lambda c: c | {"decoder": {n: t * float("nan") for n, t in c["decoder"].items()}},
    "inf in the encoder": lambda c: c | {"encoder": {
        n: t / 0 if t.is_floating_point() else t for n, t in c["encoder"].items()}},
    "lists as weights": lambda c: c | {"decoder": {n: [1.0] for n in c["decoder"]}},
    "other shapes": lambda c: c | {"decoder": {n: t.flatten()[:1] for n, t in c["decoder"].items()}},
    "a weight less": lambda c: c | {"decoder": dict(list(c["decoder"].items())[1:])},
    "a weight more": lambda c: c | {"decoder": c["decoder"] | {"x": torch.zeros(1)}},
    "no weights": lambda c: c | {"decoder": {}, "encoder": {}},
}  # fmt: skip
RESUME = {
    "optimizer text": lambda c: c | {"optimizer": "a"},
    "optimizer of lists": lambda c: c | {"optimizer": c["optimizer"] | {"state": {0: [1]}}},
    "optimizer of other shapes": lambda c: c | {"optimizer": c["optimizer"] | {"state": {
        0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}}}},
    "optimizer of nan": lambda c: c | {"optimizer": c["optimizer"] | {"state": {
        i: {n: t * float("nan") for n, t in s.items()} for i, s in c["optimizer"]["state"].items()}}},
    "rate nan": lambda c: c | {"optimizer": c["optimizer"] | {"param_groups": [
        g | {"lr": float("nan")} for g in c["optimizer"]["param_groups"]]}},
    "rates text": lambda c: c | {"rates": "a"},
    "rates short": lambda c: c | {"rates": {"steps": 1, "decays": []}},
    "rates negative": lambda c: c | {"rates": {"steps": -1, "decays": [0, 0]}},
    "scaler list": lambda c: c | {"scaler": []},
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints_are_refused(name, models, tmp_path):
    checkpoint = load_checkpoint(models / "best_checkpoint.pth", "encoder", "decoder")
    save_checkpoint(tmp_path / "c.pth", DAMAGES[name](checkpoint))
    with pytest.raises(UserError, match=r"c\.pth") as error:
        load_models(tmp_path / "c.pth", tmp_path / "c.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", RESUME)
def test_damaged_states_are_not_gone_on_from(name, prepared, models, tmp_path):
    checkpoint = load_checkpoint(models / "checkpoint_epoch_1.pth", "encoder", "decoder")
    save_checkpoint(tmp_path / "c.pth", RESUME[name](checkpoint))
    settings = train.Settings(
        str(prepared), str(tmp_path / "out"), checkpoint=str(tmp_path / "c.pth"), epochs=2, workers=0
    )
    with pytest.raises(UserError, match=r"c\.pth"):
        train.train(settings)


def test_two_trainings_in_one_folder_are_refused(prepared, tmp_path):
    from test_files import HOLD, start_python

    holder = start_python(HOLD, tmp_path, "writing", 60)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another run is at work"):
        train.train(small_settings(prepared, tmp_path))
    holder.kill()


def test_the_weights_that_differ_are_named(models, monkeypatch):
    """As docs/change_the_model.md promises: after a change of models.py, of an old checkpoint."""
    checkpoint = load_checkpoint(models / "best_checkpoint.pth", "decoder")

    class Changed(checkpoints.DecoderWithAttention):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.second_layer = torch.nn.LSTMCell(4, 4)
            self.init_c = torch.nn.Linear(self.init_c.in_features, 7)
            del self.attention.full_att

    monkeypatch.setattr(checkpoints, "DecoderWithAttention", Changed)
    with pytest.raises(UserError) as error:
        decoder_from(checkpoint, "old.pth")
    text = str(error.value)
    assert "\n" not in text and "lacks second_layer.weight_ih" in text and "train it anew" in text
    assert "has attention.full_att.weight" in text and "and 2 more" in text
    decoder = dict(checkpoint["decoder"]) | {"fc.bias": torch.zeros(3)}
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"it has fc\.bias of \(3,\) in place of \(\d+,\)"):
        decoder_from(checkpoint | {"decoder": decoder}, "old.pth")
