"""Fine-tuning of every family of captioners, with and without adapters."""

import csv
import json
import shutil

import pytest
import torch
from conftest import assert_one_line, read_history
from PIL import Image
from safetensors.torch import load_file
from tiny_families import BUILDERS, save_tiny

import direct_caption
import run_pipeline
import train_model
from captioning.captioners.loading import load_captioner
from captioning.captioners.model_inputs import NO_LABEL

CAPTIONS = ["a red circle on grass", "two blue squares on gravel", "a large star above a small circle",
            "a small star on gravel", "two stars on grass"]  # fmt: skip
QUICK = ("git", "llava", "blip-2 with T5")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten images of noise, of unequal sizes, with captions."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    torch.manual_seed(1)
    with (folder / "train.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("image_id", "caption"))
        for number in range(10):
            pixels = torch.randint(0, 256, (90 - 6 * number, 30 + 7 * number, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / "images" / f"{number}.png")
            writer.writerow((number, CAPTIONS[number % len(CAPTIONS)]))
    return folder


def settings(data, base, output, **options) -> train_model.Settings:
    few = {"epochs": 4, "patience": 0, "workers": 1, "batch_size": 4, "captions_per_image": 1}
    few |= {
        "learning_rate": 1e-2,
        "val_fraction": 0.2,
        "label_smoothing": 0.0,
        "augment": False,
        "lora_rank": 2,
    }
    names = {"annotations": str(data / "train.csv"), "image_folder": str(data / "images")}
    names |= {"base_model": str(base), "output_folder": str(output)}
    return train_model.Settings(**names | few | options)


def captions_of(folder, data) -> list[str]:
    captioner = load_captioner(folder)
    captioner.max_new_tokens = 8
    return captioner.caption([str(data / "images" / f"{number}.png") for number in range(4)], beam_size=1)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize(
    "family",
    [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in BUILDERS],
)
def test_every_family_is_trained(family, lora, data, tmp_path):
    base, output = save_tiny(family, tmp_path / "base", 2.0), tmp_path / "model"
    before = load_file(base / "model.safetensors")
    train_model.train(settings(data, base, output, lora=lora, merge=lora))
    losses = [line["train_loss"] for line in read_history(output)]
    assert losses[-1] < losses[0]
    found = captions_of(output, data)
    if lora:
        assert not (output / "model.safetensors").exists()
        assert captions_of(output / "merged", data) == found
        assert all(
            torch.equal(value, before[name]) for name, value in load_file(base / "model.safetensors").items()
        )


def test_an_adapter_is_small_and_resumes(data, tmp_path, run_main):
    """Under 5 % of its base; an interrupted training ends with the numbers of one that was not."""
    base = save_tiny("llava", tmp_path / "base", 2.0)
    small = {"lora": True, "lora_targets": ("q_proj", "v_proj"), "lora_rank": 1, "lr_schedule": "plateau"}
    train_model.train(settings(data, base, tmp_path / "whole", epochs=2, **small))
    adapter, weights = (tmp_path / "whole" / "adapter_model.safetensors"), base / "model.safetensors"
    count = [sum(t.numel() for t in load_file(file).values()) for file in (adapter, weights)]
    assert count[0] < 0.05 * count[1]
    train_model.train(settings(data, base, tmp_path / "parts", epochs=1, **small))
    train_model.train(settings(data, base, tmp_path / "parts", epochs=2, resume=True, **small))
    checkpoints = (tmp_path / name / "checkpoint_epoch_2.pth" for name in ("whole", "parts"))
    first, second = (torch.load(file, weights_only=True)["model"] for file in checkpoints)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    image = data / "images" / "0.png"
    options = ["--checks", "none", "--max_new_tokens", 4, "--num_beams", 1]
    result = run_main(direct_caption, image, "--model_path", tmp_path / "whole", *options)
    assert result.returncode == 0, result.stderr
    config = tmp_path / "parts" / "adapter_config.json"
    content, weights = json.loads(config.read_text()), tmp_path / "parts" / adapter.name
    single = (direct_caption, image, "--model_path", config.parent)
    weights.write_bytes(weights.read_bytes()[:200])
    assert_one_line(run_main(*single), "not an adapter of")
    for change in ({"peft_type": "XLORA"}, {"megatron_config": {"a": 1}}, {"base_model_name_or_path": None}):
        config.write_text(json.dumps(content | change))
        assert_one_line(run_main(*single), "adapter_config.json")
    shutil.move(base, tmp_path / "elsewhere")
    assert_one_line(run_main(direct_caption, image, "--model_path", tmp_path / "whole"), str(base))


@pytest.mark.parametrize("family", ["llava", "smolvlm", "paligemma", "git", "florence2", "qwen2_5_vl"])
def test_the_loss_is_on_the_caption_alone(family, data, tmp_path):
    captioner = load_captioner(save_tiny(family, tmp_path / "base"))
    prepared = captioner.prepare(data / "images" / "0.png")
    tokens = captioner.encode_caption("a red circle on grass", 40)
    assert tokens[-1] in captioner.end_tokens() and tokens[-1] not in tokens[1:-1]
    assert captioner.tokenizer.decode(tokens, skip_special_tokens=True).strip() == "a red circle on grass"
    inputs = captioner.training_inputs(prepared, tokens)
    labels = inputs["labels"][0]
    assert labels[labels != NO_LABEL].tolist() == tokens
    if family not in ("git", "florence2"):
        start = prepared["input_ids"].shape[1]
        assert torch.equal(inputs["input_ids"][:, :start], prepared["input_ids"])
        assert inputs["input_ids"][0, start:].tolist() == tokens == labels[start:].tolist()
    assert captioner.encode_caption("a red circle on grass", 2)[:2] == tokens[:2]
    assert len(captioner.encode_caption("a red circle on grass", 2)) == 3


@pytest.mark.slow
def test_a_chat_model_learns_ten_images_by_heart(data, tmp_path, run_main):
    base, output = save_tiny("llava", tmp_path / "base", 1.0), tmp_path / "model"
    train_model.train(settings(data, base, output, epochs=80, learning_rate=4e-3, val_fraction=0.0))
    captioner = load_captioner(output)
    paths = [str(data / "images" / f"{number}.png") for number in range(10)]
    assert captioner.caption(paths, beam_size=1) == [CAPTIONS[number % len(CAPTIONS)] for number in range(10)]


def test_the_pipeline_takes_any_base(data, tmp_path, run_main, monkeypatch):
    base = save_tiny("llava", tmp_path / "base", 2.0)
    monkeypatch.chdir(tmp_path)
    command = [run_pipeline, "--model", "blip", "--blip_base", base, "--blip_lora", "--blip_epochs", 1]
    command += ["--annotations", data / "train.csv", "--image_folder", data / "images"]
    command += ["--test_folder", data / "images", "--blip_checks", "none", "--blip_max_new_tokens", 4]
    result = run_main(*command, "--blip_batch_size", 4, "--workers", 1, "--blip_num_beams", 1)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "blip_finetuned_model" / "adapter_model.safetensors").is_file()
    assert len((tmp_path / "blip_submission.csv").read_text().splitlines()) == 11
    again = run_main(*command, "--blip_batch_size", 4, "--workers", 1, "--blip_num_beams", 1)
    assert again.returncode == 0 and "blip_submission.csv is up to date" in again.stdout


def test_what_cannot_be_trained_is_refused(data, tmp_path, run_main, monkeypatch):
    base = save_tiny("llava", tmp_path / "base")
    command = [train_model, "--annotations", data / "train.csv", "--image_folder", data / "images"]
    command += ["--base_model", base, "--output_folder", tmp_path / "out"]
    assert_one_line(run_main(*command, "--merge"), "for --lora")
    assert_one_line(run_main(*command, "--lora", "--lora_targets", "nothing"), "--lora_targets nothing")
    assert_one_line(run_main(*command, "--augment"), "--augment is for BLIP")
    assert_one_line(run_main(*command, "--prompt", "<image> what"), "--prompt: has <image>")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    assert_one_line(run_main(*command, "--lora"), "pip install -r requirements-captioners.txt")
