"""Fine-tuning of BLIP, with the tiny one: its loss, its epochs, resuming, several processes."""

import json
import random
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TWO_PROCESSES, as_arguments, blip_settings, read_history

import train_model
from captioning.captioners.blip import tiny_captioner
from captioning.captioners.loading import load_captioner
from captioning.data.prepared import Record
from captioning.training.blip_data import draw_captions, encode_captions, pad_captions
from captioning.training.optimization import Run
from utils import UserError

CAPTIONS = ["a red circle on grass", "two blue squares on gravel", "a large star above a small circle"]


def a_batch(captioner) -> tuple[torch.Tensor, list[list[int]]]:
    ids = captioner.tokenizer(["a red circle on grass", "two small black stars lie on the gravel"])[
        "input_ids"
    ]
    return torch.randn(2, 3, 64, 64), [[captioner.model.config.text_config.bos_token_id, *i[1:]] for i in ids]


def test_loss_is_transformers_own_without_padding():
    """Against the model's own forward pass, and against cross-entropy with label smoothing written out."""
    captioner = tiny_captioner([*CAPTIONS, "two small black stars lie on the gravel"])
    captioner.model.text_decoder.label_smoothing = 0.1
    images, captions = a_batch(captioner)
    words = pad_captions(captions, captioner.tokenizer.pad_token_id)
    loss = train_model.CaptionLoss(captioner.model)(images, **words)
    own = captioner.model(pixel_values=images, **words)
    torch.testing.assert_close(loss, own.loss)

    losses = []
    for logits, caption in zip(own.logits, captions):
        log_p = logits[: len(caption) - 1].log_softmax(dim=-1)
        of_targets = log_p[range(len(log_p)), caption[1:]]
        losses += (-0.9 * of_targets - 0.1 * log_p.mean(dim=-1)).tolist()
    assert loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)

    longer = {name: F.pad(t, (0, 5), value=-100 if name == "labels" else 0) for name, t in words.items()}
    torch.testing.assert_close(train_model.CaptionLoss(captioner.model)(images, **longer), loss)


def test_an_image_is_encoded_once_for_its_captions():
    captioner = tiny_captioner([*CAPTIONS, "two small black stars lie on the gravel"])
    images, captions = a_batch(captioner)
    words = pad_captions(captions, captioner.tokenizer.pad_token_id)
    loss = train_model.CaptionLoss(captioner.model)
    torch.testing.assert_close(loss(images[:1], **words), loss(images[[0, 0]], **words))


def test_captions_that_are_cut_are_counted(capsys):
    """Cut as transformers cut them; a line says how many, and names the setting."""
    long = "two small black stars lie on the gravel"
    captioner = tiny_captioner([*CAPTIONS, long])
    records = [
        Record(f"img{number}", None, texts, [text.split() for text in texts])
        for number, texts in enumerate((CAPTIONS, [long, CAPTIONS[0]]))
    ]
    lengths = [[len(text.split()) + 2 for text in record.captions] for record in records]
    assert [[*map(len, texts)] for texts in encode_captions(captioner, records, 40)] == lengths
    assert not capsys.readouterr().out
    encoded = encode_captions(captioner, records, 8)
    said = "2 of 5 captions have more than 8 tokens, up to 10, and are cut; --max_length takes longer ones\n"
    assert capsys.readouterr().out == said
    for record, texts in zip(records, encoded):
        own = captioner.tokenizer(record.captions, truncation=True, max_length=8)["input_ids"]
        assert [ids[1:] for ids in texts] == [ids[1:] for ids in own]


def test_every_epoch_draws_captions_anew():
    captions = [[[9, image, number] for number in range(5)] for image in range(21)]
    first, second = (draw_captions(captions, 2, f"123 {epoch}") for epoch in (1, 2))
    for drawn in (first, second):
        for image, own in enumerate(drawn):
            assert all(caption in captions[image] for caption in own) and own[0] != own[1]
    assert first != second and first == draw_captions(captions, 2, "123 1")
    assert len(draw_captions([[[1], [2]]], 3, "")[0]) == 3


def test_accumulated_passes_are_one_large_batch(demo, tmp_path):
    whole = train_model.train(blip_settings(demo, tmp_path / "whole", learning_rate=1e-4))
    parts = train_model.train(
        blip_settings(demo, tmp_path / "parts", batch_size=2, grad_accumulation=4, learning_rate=1e-4)
    )
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-4)


@pytest.mark.slow
def test_two_processes_are_one_large_batch(demo, tmp_path):
    one = train_model.train(blip_settings(demo, tmp_path / "one", learning_rate=1e-4))
    settings = blip_settings(demo, tmp_path / "two", batch_size=4, learning_rate=1e-4)
    result = subprocess.run(
        [*TWO_PROCESSES, str(ROOT / "train_model.py"), *as_arguments(settings)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 2: loss") == 1
    for ours, theirs in zip(read_history(tmp_path / "one"), read_history(tmp_path / "two"), strict=True):
        assert theirs["train_loss"] == pytest.approx(ours["train_loss"], abs=1e-4)
    assert {line["epoch"] for line in read_history(tmp_path / "two")} == {1.0, one["epoch"], 2.0}


def test_a_resumed_run_ends_as_an_uninterrupted_one(demo, tmp_path, monkeypatch):
    settings = blip_settings(demo, tmp_path / "whole", epochs=3)
    train_model.train(settings)
    train_one_epoch = train_model.train_one_epoch

    def interrupted(*arguments):
        if arguments[0].number == 2:
            raise KeyboardInterrupt
        return train_one_epoch(*arguments)

    cut = replace(settings, output_folder=str(tmp_path / "cut"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_model, "train_one_epoch", interrupted)
        train_model.train(cut)
    assert load_captioner(tmp_path / "cut")  # the first epoch's model is complete
    random.seed(5)
    torch.manual_seed(5)
    train_model.train(replace(cut, resume=True))
    for ours, theirs in zip(read_history(tmp_path / "whole"), read_history(tmp_path / "cut"), strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    names = [[file.name for file in sorted((tmp_path / run).iterdir())] for run in ("whole", "cut")]
    assert names[0] == names[1] and "checkpoint_epoch_3.pth" in names[0]
    states = [
        torch.load(tmp_path / run / "checkpoint_epoch_3.pth", weights_only=True) for run in ("whole", "cut")
    ]
    for name, tensor in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][name], tensor, rtol=0, atol=0)
    with pytest.raises(UserError, match="raise --epochs"):
        train_model.train(replace(cut, resume=True))
    with pytest.raises(UserError, match="no checkpoint"):
        train_model.train(replace(cut, resume=True, output_folder=str(tmp_path / "new")))


def test_an_earlier_model_is_moved_aside(demo, tmp_path):
    output = tmp_path / "model"
    train_model.train(blip_settings(demo, output, epochs=1))
    earlier = (output / "model.safetensors").read_bytes()
    (output / "notes.txt").write_text("mine")
    train_model.train(blip_settings(demo, output, epochs=1, seed=9, base_model=str(output)))
    assert (output / "earlier_1" / "model.safetensors").read_bytes() == earlier
    assert (output / "model.safetensors").read_bytes() != earlier
    assert (output / "notes.txt").is_file()
    assert load_captioner(output) and load_captioner(output / "earlier_1")


def test_frozen_vision_trains_on_features_kept_on_disk(demo, tmp_path):
    base = tmp_path / "base"
    train_model.train(blip_settings(demo, base, epochs=1))
    frozen = blip_settings(demo, tmp_path / "model", base_model=str(base), freeze_vision=True)
    cached = train_model.train(frozen)
    file = tmp_path / "model_features.hdf5"
    made = file.stat().st_mtime_ns
    before, after = load_captioner(base).model, load_captioner(tmp_path / "model").model
    torch.testing.assert_close(
        dict(before.vision_model.state_dict()), dict(after.vision_model.state_dict()), rtol=0, atol=0
    )
    old = before.text_decoder.state_dict()
    assert any(not torch.equal(tensor, old[name]) for name, tensor in after.text_decoder.state_dict().items())
    again = train_model.train(frozen)
    assert file.stat().st_mtime_ns == made
    assert again["train_loss"] == cached["train_loss"]
    anew = train_model.train(replace(frozen, cache_features=False))
    assert anew["train_loss"] == pytest.approx(cached["train_loss"], abs=2e-3)  # float16 on the disk


def test_gradient_checkpointing_changes_memory_alone(demo, tmp_path):
    results = [
        train_model.train(blip_settings(demo, tmp_path / str(on), epochs=1, gradient_checkpointing=on))
        for on in (False, True)
    ]
    assert results[0]["train_loss"] == pytest.approx(results[1]["train_loss"], abs=1e-5)


def test_splits_of_the_file_are_kept_and_bad_images_left_out(demo, tmp_path, capsys):
    """Karpathy's layout names its splits; a missing and a damaged image are named."""
    folder = tmp_path / "images"
    shutil.copytree(demo / "train" / "train", folder)
    names = sorted(path.name for path in folder.iterdir())
    (folder / names[0]).write_bytes(b"no image")
    (folder / names[1]).unlink()
    splits = ["train"] * 10 + ["val"] * 2 + ["test"] * 2
    sentence = {"tokens": ["A", "red", "star"], "raw": "A red star."}
    images = [
        {"filename": name, "split": split, "sentences": [sentence]} for name, split in zip(names, splits)
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images}))
    settings = blip_settings(
        demo, tmp_path / "model", epochs=1,
        annotations=str(tmp_path / "dataset.json"), image_folder=str(folder),
    )  # fmt: skip
    train_model.train(settings)
    printed = capsys.readouterr()
    assert "8 images to train on, 2 to validate on" in printed.out
    for text in (printed.err, (tmp_path / "model" / "train.log").read_text()):
        assert text.count("skipped: ") == 2 and names[0] in text and names[1] in text


def test_the_log_has_all_messages_and_the_terminal_the_first(tmp_path, capsys):
    run = Run.start("no")
    run.log_many("skipped", [f"image{number}: missing" for number in range(1000)])
    run.log_to(tmp_path / "train.log")
    run.log("epoch 1")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:5] == [f"skipped: image{number}: missing" for number in range(5)]
    assert lines[5:] == ["skipped: ... and 995 more; train.log lists all"]
    logged = run.log_file.read_text().splitlines()
    assert logged == [*(f"skipped: image{number}: missing" for number in range(1000)), "epoch 1"]
