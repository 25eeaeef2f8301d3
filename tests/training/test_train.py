"""Training that learns, resumes and writes what the next steps read."""

import csv
import json
import subprocess

import pytest
import torch
from conftest import ROOT, TWO_PROCESSES, as_arguments, small_settings

import train
from caption import caption_images
from captioning.data.annotations import read_annotations
from captioning.training.monitor import caption_scores
from captioning.training.resume import best_epoch, epochs_since_improvement
from captioning.weights.checkpoints import decoder_from, encoder_from, load_checkpoint
from metrics import bleu4, tokenize
from utils import UserError


@pytest.mark.slow
def test_a_model_overfits_twenty_images(demo, tmp_path):
    """Real images, real ImageNet features: what it has learned by heart it says by itself."""
    import create_input_files

    with (demo / "train.csv").open() as stream:
        rows = list(csv.reader(stream))[: 1 + 20 * 5]
    one_caption = [rows[0], *rows[1::5]]
    with (tmp_path / "train.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(one_caption)
    create_input_files.create_input_files(
        create_input_files.Settings(
            str(tmp_path / "train.csv"), str(demo / "train" / "train"), output_folder=str(tmp_path / "data"),
            val_fraction=0.05, captions_per_image=1, min_word_freq=1,
            image_size=128,
        )
    )  # fmt: skip
    settings = small_settings(
        tmp_path / "data",
        tmp_path / "models",
        epochs=60,
        dropout=0.0,
        batch_size=5,
        emb_dim=64,
        decoder_dim=128,
    )
    train.train(settings)
    last = sorted(
        (tmp_path / "models").glob("checkpoint_epoch_*.pth"), key=lambda path: path.stat().st_mtime
    )[-1]
    (tmp_path / "ids.csv").write_text(
        "\n".join(["image_id", *dict.fromkeys(row[0] for row in one_caption[1:])])
    )
    caption_images(
        last, last, None, demo / "train" / "train", tmp_path / "out.csv", test_csv=tmp_path / "ids.csv"
    )
    captions = {p.image_id: p.tokens[0] for p in read_annotations(tmp_path / "out.csv") if p.tokens}
    held_out = json.loads((tmp_path / "data" / "val_image_paths.json").read_text())
    truth = {
        p.image_id: p.tokens for p in read_annotations(tmp_path / "train.csv", demo / "train" / "train")
        if p.path not in held_out
    }  # fmt: skip
    assert bleu4(list(truth.values()), [captions.get(name, []) for name in truth]) > 0.9


def test_checkpoints_are_complete_and_load_without_running_code(prepared, tmp_path):
    train.train(small_settings(prepared, tmp_path))
    for name, parts in (
        ("best_checkpoint", {"encoder", "decoder"}),
        ("encoder", {"encoder"}),
        ("decoder", {"decoder"}),
    ):
        checkpoint = torch.load(tmp_path / f"{name}.pth", weights_only=True)
        assert parts <= checkpoint.keys() and checkpoint["settings"]["encoder_name"] == "efficientnet_lite0"
        assert checkpoint["word_map"] == json.loads((prepared / "word_map.json").read_text())
    assert not encoder_from(checkpoint | torch.load(tmp_path / "encoder.pth"), "x").training
    assert not decoder_from(checkpoint, "x").training
    with (tmp_path / "history.csv").open() as stream:
        history = list(csv.DictReader(stream))
    assert [line["epoch"] for line in history] == ["1", "2"]
    assert float(history[1]["train_loss"]) < float(history[0]["train_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("fine_tune", [False, True])
def test_a_resumed_training_is_the_uninterrupted_one(prepared, tmp_path, fine_tune):
    options = {"fine_tune_encoder": fine_tune, "encoder_name": "resnet18", "encoder_weights": "none"}
    train.train(small_settings(prepared, tmp_path / "a", **options))
    train.train(small_settings(prepared, tmp_path / "b", **options, epochs=1))
    first = str(tmp_path / "b" / "checkpoint_epoch_1.pth")
    train.train(small_settings(prepared, tmp_path / "b", **options, checkpoint=first))
    a, b = (load_checkpoint(tmp_path / name / "checkpoint_epoch_2.pth") for name in "ab")
    for part in ("encoder", "decoder"):
        for name, tensor in a[part].items():
            torch.testing.assert_close(b[part][name], tensor, msg=name)
    with pytest.raises(UserError, match="raise --epochs"):
        train.train(small_settings(prepared, tmp_path / "b", **options, epochs=1, checkpoint=first))


def test_the_encoder_is_opened_after_the_decoder_has_learned(prepared, tmp_path):
    options = {"encoder_name": "resnet18", "encoder_weights": "none", "fine_tune_encoder": True}
    options |= {"fine_tune_after": 1, "augment": True}
    train.train(small_settings(prepared, tmp_path / "a", **options, workers=2))
    torch.manual_seed(123)
    start = train.build_models(small_settings(prepared, tmp_path, **options), {"a": 0})[1].state_dict()
    one, two = (load_checkpoint(tmp_path / "a" / f"checkpoint_epoch_{n}.pth") for n in (1, 2))
    assert all(torch.equal(one["encoder"][name], value) for name, value in start.items())
    assert not all(torch.equal(two["encoder"][name], value) for name, value in start.items())
    assert len(two["optimizer"]["state"]) > len(one["optimizer"]["state"])
    train.train(small_settings(prepared, tmp_path / "b", **options, epochs=1))
    first = str(tmp_path / "b" / "checkpoint_epoch_1.pth")
    train.train(small_settings(prepared, tmp_path / "b", **options, checkpoint=first))
    resumed = load_checkpoint(tmp_path / "b" / "checkpoint_epoch_2.pth")
    for part in ("encoder", "decoder"):
        for name, tensor in two[part].items():
            torch.testing.assert_close(resumed[part][name], tensor, msg=name)
    with pytest.raises(UserError, match="--fine_tune_encoder"):
        train.Settings(augment=True)


@pytest.mark.slow
@pytest.mark.parametrize("fine_tune", [False, True])
def test_two_processes_or_two_parts_are_one_batch_of_twice_the_size(prepared, tmp_path, fine_tune):
    options = {"dropout": 0.0, "epochs": 2, "fine_tune_encoder": fine_tune}
    options |= {"encoder_name": "resnet18", "encoder_weights": "none", "encoder_lr": 1e-5}
    settings = small_settings(prepared, tmp_path / "two", **options, batch_size=4)
    command = [*TWO_PROCESSES, str(ROOT / "train.py"), *as_arguments(settings)]
    subprocess.run(command, check=True, capture_output=True)
    train.train(small_settings(prepared, tmp_path / "one", **options, batch_size=8))
    train.train(small_settings(prepared, tmp_path / "parts", **options, batch_size=4, grad_accumulation=2))
    histories = []
    for name in ("one", "two", "parts"):
        with (tmp_path / name / "history.csv").open() as stream:
            lines = list(csv.DictReader(stream))
        histories.append([float(line[key]) for line in lines for key in line if key[:3] in ("tra", "val")])
    assert len(histories[0]) == 10
    for other in histories[1:]:
        assert other == pytest.approx(histories[0], abs=1e-4)


def test_cached_features_change_nothing_but_the_speed(prepared, tmp_path):
    for cached in (True, False):
        train.train(
            small_settings(prepared, tmp_path / str(cached), cache_features=cached, dropout=0.0, epochs=1)
        )
    losses = [
        load_checkpoint(tmp_path / str(c) / "checkpoint_epoch_1.pth")["history"][0] for c in (True, False)
    ]
    for name in ("train_loss", "val_loss"):
        assert losses[0][name] == pytest.approx(losses[1][name], rel=1e-2)  # float16 on disk


def test_a_frozen_encoder_does_not_move_and_an_open_one_does(prepared, tmp_path):
    options = {"encoder_name": "resnet18", "encoder_weights": "none", "epochs": 1, "cache_features": False}
    before = train.build_models(
        small_settings(prepared, tmp_path, **options), {"a": 0}, None
    )  # same seed below
    for fine_tune in (False, True):
        output = tmp_path / str(fine_tune)
        torch.manual_seed(0)
        train.train(small_settings(prepared, output, **options, fine_tune_encoder=fine_tune, seed=0))
        after = load_checkpoint(output / "encoder.pth", "encoder")["encoder"]
        torch.manual_seed(0)
        before = train.build_models(small_settings(prepared, tmp_path, **options), {"a": 0})[1].state_dict()
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        if fine_tune:
            assert moved and all(name.split(".")[1] in "567" for name in moved)
            assert not any("running" in name for name in moved)
        else:
            assert not moved


def test_an_earlier_run_is_archive_previous_run(prepared, tmp_path):
    options = {"encoder_name": "resnet18", "encoder_weights": "none"}
    train.train(small_settings(prepared, tmp_path, **options))
    content = (tmp_path / "decoder.pth").read_bytes()
    train.train(small_settings(prepared, tmp_path, **options, epochs=1, seed=5))
    assert (tmp_path / "earlier_1" / "decoder.pth").read_bytes() == content
    assert not (tmp_path / "checkpoint_epoch_2.pth").exists()


def test_word_vectors_from_a_file(prepared, tmp_path):
    word_map = json.loads((prepared / "word_map.json").read_text())
    vectors = {word: [index / 100.0] * 7 for word, index in word_map.items()}
    lines = [" ".join([word, *map(str, values)]) for word, values in vectors.items()]
    (tmp_path / "vectors.txt").write_text("\n".join(lines))
    options = {
        "encoder_name": "resnet18",
        "encoder_weights": "none",
        "embeddings": str(tmp_path / "vectors.txt"),
    }
    train.train(small_settings(prepared, tmp_path / "out", **options, fine_tune_embeddings=False, epochs=1))
    checkpoint = load_checkpoint(tmp_path / "out" / "decoder.pth", "decoder")
    assert checkpoint["settings"]["emb_dim"] == 7
    torch.testing.assert_close(
        checkpoint["decoder"]["embedding.weight"], torch.tensor(list(vectors.values()))
    )


def test_captions_without_a_match_score_0():
    """And not 5e-155, as NLTK has it."""
    references = [[["a", "dog", "runs", "here"]], [["a", "cat", "sleeps", "there"]]]
    assert caption_scores(references, {0: "one two", 1: ""}) == {"val_bleu4": 0.0, "val_cider": 0.0}
    scores = caption_scores(references, {0: "a dog runs home", 1: "the cat"})
    assert scores["val_bleu4"] == 0.0 and scores["val_cider"] > 0.1
    assert caption_scores(references, {0: "a dog runs here", 1: "a cat sleeps"})["val_bleu4"] > 0.5


def test_epoch_bookkeeping():
    history = [{"val_bleu4": value} for value in (0.1, 0.3, 0.2, 0.3)]
    assert best_epoch(history, "val_bleu4") == 1 and epochs_since_improvement(history, "val_bleu4") == 2
    assert epochs_since_improvement([], "val_cider") == 0
    assert best_epoch([{"val_cider": 0.0}] * 3, "val_cider") == 2, "patience does not count"
    for line, value in zip(history, (0.1, 0.2, 0.5, 0.3)):
        line["val_cider"] = value
    assert best_epoch(history, "val_cider") == 2
    assert tokenize("A dog.") == ["a", "dog"]
