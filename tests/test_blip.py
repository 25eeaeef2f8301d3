"""BLIP: the tiny one learns, is saved, loaded and captions; captions are those of transformers' own loop."""

import csv
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, assert_one_line
from PIL import Image

import datasets
import direct_caption
import train_model
from captioning import blip
from captioning.annotations import read_annotations
from captioning.blip import load_captioner
from captioning.images import list_images
from captioning.submissions import find_images, read_submission
from captioning.tiny_blip import tiny_captioner
from datasets import BlipDataset, pad_captions
from utils import UserError

CAPTIONS = ["a red circle on grass", "two blue squares on gravel", "a large star above a small circle"]


def settings_for(demo, output, **options) -> train_model.Settings:
    names = {"annotations": str(demo / "train.csv"), "image_folder": str(demo / "train" / "train")}
    names |= {"base_model": "tiny", "output_folder": str(output)}
    few = {"epochs": 2, "early_stopping": 0, "workers": 2, "batch_size": 8, "captions_per_image": 1}
    return train_model.Settings(**names | few | options)


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """A tiny BLIP that the real script trained on the small demonstration set until its words are clear."""
    output = tmp_path_factory.mktemp("blip") / "model"
    command = [sys.executable, str(ROOT / "train_model.py"), "--base_model", "tiny", "--epochs", "25"]
    command += ["--annotations", str(demo / "train.csv"), "--image_folder", str(demo / "train" / "train")]
    command += ["--output_folder", str(output), "--early_stopping", "0", "--batch_size", "8"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def captioner(trained):
    return load_captioner(trained)


@pytest.fixture(scope="module")
def pixels(demo, captioner):
    return torch.stack([captioner.prepare(path) for path in list_images(demo / "test" / "test")])


def history(output) -> list[dict]:
    with (output / "history.csv").open() as stream:
        return [{name: float(value) for name, value in line.items()} for line in csv.DictReader(stream)]


# --- captions -----------------------------------------------------------------------------------------------


def test_the_script_learns(trained):
    lines = history(trained)
    assert lines[-1]["train_loss"] < 0.5 * lines[0]["train_loss"]
    assert max(line["val_cider"] for line in lines) > 0


@pytest.mark.parametrize("prompt", ["", "there are two"])
def test_captions_are_those_of_the_plain_loop(trained, demo, captioner, pixels, prompt):
    """transformers' classes by themselves, an image at a time, against batches of 16, in either order."""
    processor = transformers.AutoProcessor.from_pretrained(trained)
    model = transformers.BlipForConditionalGeneration.from_pretrained(trained)
    plain = []
    for path in list_images(demo / "test" / "test"):
        inputs = processor(Image.open(path).convert("RGB"), *[prompt] * bool(prompt), return_tensors="pt")
        found = model.generate(**inputs, num_beams=3, max_new_tokens=30)
        plain.append(processor.decode(found[0], skip_special_tokens=True))
    assert len(set(plain)) > 1
    for size in (1, 5, 16):
        batches = pixels.split(size)
        assert [
            text for batch in batches for text in captioner.caption_prepared(batch, 3, 30, prompt, True)
        ] == plain
    assert captioner.caption_prepared(pixels.flip(0), 3, 30, prompt, True) == plain[::-1]
    cut = captioner.caption_prepared(pixels, 3, 30, prompt)
    assert [f"{prompt} {text}".strip() for text in cut] == plain


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("prompt", ["", "there are two"])
def test_beams_share_the_keys_and_values_of_their_image(captioner, pixels, monkeypatch, num_beams, prompt):
    assert blip.CACHE_CAN_BE_SHARED, "the installed transformers keeps its keys elsewhere: adapt blip.py"
    attention = [layer.crossattention.self for layer in captioner.model.text_decoder.bert.encoder.layer]
    linears = [linear for module in attention for linear in (module.key, module.value)]
    rows = []

    def captions() -> list[str]:
        rows.clear()
        return captioner.caption_prepared(pixels, num_beams, 12, prompt)

    hooks = [
        linear.register_forward_hook(lambda module, inputs, out: rows.append(len(out))) for linear in linears
    ]
    shared = captions()
    assert rows == [len(pixels)] * len(linears)  # once in a search, whatever the number of steps
    monkeypatch.setattr(blip, "CACHE_CAN_BE_SHARED", False)
    ordinary = captions()
    for hook in hooks:
        hook.remove()
    assert rows == [len(pixels) * num_beams] * len(linears)
    assert shared == ordinary and len(set(shared)) > 1


def test_a_model_is_as_it_was_after_a_search_that_failed(captioner, pixels):
    with pytest.raises(RuntimeError):
        captioner.caption_prepared(pixels[:, :1], 3)  # grey; the model takes three channels
    layer = captioner.model.text_decoder.bert.encoder.layer[0]
    assert not layer.crossattention._forward_pre_hooks and not layer.crossattention._forward_hooks


def test_a_new_process_gives_the_same_captions(trained, demo, captioner, pixels, run_script, tmp_path):
    output = tmp_path / "out.csv"
    options = ["--test_folder", demo / "test" / "test", "--output_csv", output, "--batch_size", 5]
    result = run_script("direct_caption.py", "--model_path", f"{trained}/", *options)
    assert result.returncode == 0, result.stderr
    ids = [image_id for image_id, _ in find_images(demo / "test" / "test")]
    assert read_submission(output) == list(zip(ids, captioner.caption_prepared(pixels), strict=True))


def test_bad_images_keep_their_rows(trained, demo, run_script, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    path = next(iter((demo / "test" / "test").iterdir()))
    image = Image.open(path)
    (folder / "1_text.jpg").write_text("no image")
    (folder / "2_cut.jpg").write_bytes(path.read_bytes()[:2000])
    image.convert("L").save(folder / "3_grey.png")
    image.convert("CMYK").save(folder / "4_cmyk.jpg")
    image.save(folder / "5_moving.gif", save_all=True, append_images=[image.rotate(90)])
    output = tmp_path / "out.csv"
    result = run_script(
        "direct_caption.py", "--model_path", trained, "--test_folder", folder, "--output_csv", output
    )
    assert result.returncode == 1, result.stderr
    rows = read_submission(output)
    assert [name for name, _ in rows] == ["1_text", "2_cut", "3_grey", "4_cmyk", "5_moving"]
    assert [bool(caption) for _, caption in rows] == [False, False, True, True, True]
    assert result.stderr.count("no caption: ") == 2
    assert "1_text.jpg" in result.stderr and "2_cut.jpg" in result.stderr


def tiny_vit_gpt2(folder, gpt2):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = transformers.ViTConfig(**sizes, image_size=32, patch_size=16)
    text = transformers.GPT2Config(
        vocab_size=len(gpt2), n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=1.0
    )
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    both.decoder_start_token_id = both.eos_token_id = both.pad_token_id = 0
    transformers.VisionEncoderDecoderModel(config=both).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    gpt2.save_pretrained(folder)


def tiny_git(folder, gpt2):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = tiny_captioner(CAPTIONS).tokenizer
    start, end, pad = bert.cls_token_id, bert.sep_token_id, bert.pad_token_id
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    ids = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": pad, "vocab_size": len(bert)}
    config = transformers.GitConfig(vision_config=vision, **ids, **sizes, initializer_range=1.0)
    transformers.GitForCausalLM(config).save_pretrained(folder)
    square = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square).save_pretrained(folder)
    bert.save_pretrained(folder)


def tiny_blip2(folder, gpt2):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**sizes, "intermediate_size": 64, "image_size": 32, "patch_size": 16, "initializer_range": 0.2}
    former = {**sizes, "intermediate_size": 64, "encoder_hidden_size": 32, "vocab_size": len(gpt2)}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "vocab_size": len(gpt2) + 1}
    text = {**sizes, **ids, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    config = transformers.Blip2Config(
        vision_config=vision, qformer_config=former, num_query_tokens=4, image_token_index=len(gpt2),
        text_config=text | {"model_type": "opt", "init_std": 1.0},
    )  # fmt: skip
    transformers.Blip2ForConditionalGeneration(config).save_pretrained(folder)
    transformers.BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    gpt2.save_pretrained(folder)


@pytest.mark.parametrize("build", [tiny_git, tiny_vit_gpt2, tiny_blip2])
def test_other_captioners_work_by_their_path(build, demo, tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator(CAPTIONS, 300, special_tokens=["<|endoftext|>"], show_progress=False)
    build(tmp_path, transformers.GPT2TokenizerFast(tokenizer_object=pieces._tokenizer))
    other = load_captioner(tmp_path)
    assert other.model.config.model_type != "blip"
    paths = list_images(demo / "test" / "test")[:4]
    together = other.caption_prepared(torch.stack([other.prepare(path) for path in paths]), 2, 8)
    plain = []
    for path in paths:
        inputs = other.image_processor(Image.open(path).convert("RGB"), return_tensors="pt")
        found = other.model.generate(**inputs, num_beams=2, max_new_tokens=8)
        plain.append(other.tokenizer.decode(found[0], skip_special_tokens=True).strip())
    assert together == plain
    output, folder = tmp_path / "out.csv", demo / "test" / "test"
    with pytest.raises(UserError, match="--prompt is for BLIP"):
        direct_caption.caption_images(tmp_path, folder, output, prompt="a photo of")


# --- what is refused ----------------------------------------------------------------------------------------


def test_wrong_models_get_one_line(trained, tmp_path):
    def refused(path, message):
        with pytest.raises(UserError, match=message) as caught:
            load_captioner(path)
        assert "\n" not in str(caught.value)

    refused(tmp_path, "no config.json")
    refused(tmp_path / "nowhere", "no such folder")
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", "captions no images")
    shutil.copytree(trained, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(tmp_path / "cut", "not a complete captioning model")
    weights.unlink()
    refused(tmp_path / "cut", "not a complete captioning model")
    config = json.loads((trained / "config.json").read_text())
    shutil.copytree(trained, tmp_path / "vqa")
    (tmp_path / "vqa" / "config.json").write_text(json.dumps(config | {"architectures": ["BlipForVqa"]}))
    refused(tmp_path / "vqa", "BlipForVqa")


def test_offline_says_how_to_get_a_model(demo, run_script, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    result = run_script("direct_caption.py", "--test_folder", demo / "test" / "test")
    assert_one_line(result, blip.HUB_MODEL, "hf download")


def test_a_kept_prompt_needs_a_prompt():
    with pytest.raises(UserError, match="--prompt"):
        direct_caption.Settings(conditional=True)


# --- the images of a training -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(demo):
    return read_annotations(demo / "train.csv", demo / "train" / "train")[:6]


def test_images_are_prepared_as_for_captioning(captioner, records, monkeypatch):
    """Kept or read anew, as uint8 and resized: the numbers are those of `prepare`."""
    truth = torch.stack([captioner.prepare(record.path) for record in records])
    for room, kept in ((datasets.KEPT_BYTES, 6), (2 * 3 * 64 * 64 + 1, 2), (0, 0)):
        monkeypatch.setattr(datasets, "KEPT_BYTES", room)
        dataset = BlipDataset(captioner, records, workers=2)
        for _ in range(2):
            found = torch.cat([*dataset.batches([[0, 1, 2, 3], [4, 5]])])
            assert torch.equal(found, truth) and found.dtype == torch.float32
        assert len(dataset.kept) == kept
        assert all(image.dtype == torch.uint8 for image in dataset.kept.values())


def test_augmentation_depends_on_seed_and_image_alone(captioner, records):
    dataset = BlipDataset(captioner, records, workers=3)
    (together,) = dataset.batches([[0, 1, 2, 3, 4, 5]], "1")
    order = torch.get_rng_state()
    alone = torch.cat([*dataset.batches([[index] for index in (5, 4, 3, 2, 1, 0)], "1")]).flip(0)
    assert torch.equal(together, alone)
    (another,) = dataset.batches([[0, 1, 2, 3, 4, 5]], "2")
    assert (together != another).flatten(1).any(dim=1).all()
    assert torch.equal(torch.get_rng_state(), order)
    for record, may_flip in zip(records, dataset.may_flip, strict=True):
        assert may_flip == (not {"left", "right"} & {word for tokens in record.tokens for word in tokens})
    assert 0 < sum(dataset.may_flip) < len(records)


# --- training -----------------------------------------------------------------------------------------------


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
    for scores, caption in zip(own.logits, captions):
        log_p = scores[: len(caption) - 1].log_softmax(dim=-1)
        true = log_p[range(len(log_p)), caption[1:]]
        losses += (-0.9 * true - 0.1 * log_p.mean(dim=-1)).tolist()
    assert loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)

    longer = {name: F.pad(t, (0, 5), value=-100 if name == "labels" else 0) for name, t in words.items()}
    torch.testing.assert_close(train_model.CaptionLoss(captioner.model)(images, **longer), loss)


def test_a_image_is_encoded_once_for_its_captions():
    captioner = tiny_captioner([*CAPTIONS, "two small black stars lie on the gravel"])
    images, captions = a_batch(captioner)
    words = pad_captions(captions, captioner.tokenizer.pad_token_id)
    loss = train_model.CaptionLoss(captioner.model)
    torch.testing.assert_close(loss(images[:1], **words), loss(images[[0, 0]], **words))


def test_every_epoch_draws_anew(demo, tmp_path):
    captions = [[[9, image, number] for number in range(5)] for image in range(21)]
    settings = settings_for(demo, tmp_path, batch_size=2, grad_accumulation=2)
    epochs = []
    for epoch in (1, 2):
        plans = [train_model.plan_epoch(captions, settings, 2, rank, epoch) for rank in (0, 1)]
        seen = [one for plan in plans for step in plan for one in step if one.weight]
        assert sorted(index for one in seen for index in one.images) == list(range(21))
        assert all(caption[1] == i for one in seen for i, caption in zip(one.images, one.captions))
        for steps in zip(*plans):
            assert sum(one.weight for step in steps for one in step) == pytest.approx(1)
        epochs.append({caption[1]: caption[2] for one in seen for caption in one.captions})
    assert epochs[0] != epochs[1]


def test_accumulated_passes_are_one_large_batch(demo, tmp_path):
    whole = train_model.train(settings_for(demo, tmp_path / "whole", learning_rate=1e-4))
    parts = train_model.train(
        settings_for(demo, tmp_path / "parts", batch_size=2, grad_accumulation=4, learning_rate=1e-4)
    )
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-4)


def test_two_processes_are_one_large_batch(demo, tmp_path):
    one = train_model.train(settings_for(demo, tmp_path / "one", learning_rate=1e-4))
    settings = settings_for(demo, tmp_path / "two", batch_size=4, learning_rate=1e-4)
    options = [f"--{name}={value}" for name, value in vars(settings).items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(ROOT / "train_model.py"), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 2: loss") == 1
    for ours, theirs in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        assert theirs["train_loss"] == pytest.approx(ours["train_loss"], abs=1e-4)
    assert {line["epoch"] for line in history(tmp_path / "two")} == {1.0, one["epoch"], 2.0}


def test_a_resumed_run_ends_as_an_uninterrupted_one(demo, tmp_path, monkeypatch):
    settings = settings_for(demo, tmp_path / "whole", epochs=3)
    train_model.train(settings)
    train_one_epoch = train_model.train_one_epoch

    def interrupted(*arguments):
        if arguments[-1] == 2:
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
    for ours, theirs in zip(history(tmp_path / "whole"), history(tmp_path / "cut"), strict=True):
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
    train_model.train(settings_for(demo, output, epochs=1))
    earlier = (output / "model.safetensors").read_bytes()
    (output / "notes.txt").write_text("mine")
    train_model.train(settings_for(demo, output, epochs=1, seed=9, base_model=str(output)))
    assert (output / "earlier_1" / "model.safetensors").read_bytes() == earlier
    assert (output / "model.safetensors").read_bytes() != earlier
    assert (output / "notes.txt").is_file()
    assert load_captioner(output) and load_captioner(output / "earlier_1")


def test_frozen_vision_trains_on_features_kept_on_disk(demo, tmp_path):
    base = tmp_path / "base"
    train_model.train(settings_for(demo, base, epochs=1))
    frozen = settings_for(demo, tmp_path / "model", base_model=str(base), freeze_vision=True)
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
        train_model.train(settings_for(demo, tmp_path / str(on), epochs=1, gradient_checkpointing=on))
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
    settings = settings_for(
        demo, tmp_path / "model", epochs=1,
        annotations=str(tmp_path / "dataset.json"), image_folder=str(folder),
    )  # fmt: skip
    train_model.train(settings)
    printed = capsys.readouterr().out
    assert "8 images to train on, 2 to validate on" in printed
    assert printed.count("skipped: ") == 2 and names[0] in printed and names[1] in printed
