"""BLIP: the tiny one learns, is saved, loaded and captions; captions are those of transformers' own loop."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
import transformers
from conftest import assert_one_line, blip_settings, read_history
from PIL import Image

import direct_caption
import train_model
from captioning.captioners import blip
from captioning.captioners.loading import load_captioner
from captioning.data.images import list_images
from captioning.data.submissions import read_submission
from captioning.folders.plan import find_images
from utils import UserError


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """A tiny BLIP, trained on the small demonstration set until captions differ from image to image."""
    output = tmp_path_factory.mktemp("blip") / "model"
    train_model.train(blip_settings(demo, output, epochs=15, captions_per_image=2))
    return output


@pytest.fixture(scope="module")
def captioner(trained):
    return load_captioner(trained)


@pytest.fixture(scope="module")
def pixels(demo, captioner):
    return torch.stack([captioner.prepare(path) for path in list_images(demo / "test" / "test")])


# --- captions -----------------------------------------------------------------------------------------------


def test_it_learns(trained):
    lines = read_history(trained)
    assert lines[-1]["train_loss"] < 0.5 * lines[0]["train_loss"]
    assert max(line["val_cider"] for line in lines) > 0


@pytest.mark.parametrize("prompt", ["", "there are two"])
def test_captions_are_those_of_the_plain_loop(trained, demo, captioner, pixels, prompt):
    """transformers' classes by themselves, an image at a time, against batches of 16, in either order."""
    processor = transformers.AutoProcessor.from_pretrained(trained)
    model = transformers.BlipForConditionalGeneration.from_pretrained(trained)
    plain = []
    for path in list_images(demo / "test" / "test"):
        inputs = processor(Image.open(path).convert("RGB"), prompt or None, return_tensors="pt")
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
    monkeypatch.setattr(blip, "shared_by_beams", lambda model, num_beams: nullcontext({}))
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


def test_bad_images_keep_their_rows(trained, demo, run_main, tmp_path):
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
    result = run_main(
        direct_caption, "--model_path", trained, "--test_folder", folder, "--output_csv", output
    )
    assert result.returncode == 1, result.stderr
    rows = read_submission(output)
    assert [name for name, _ in rows] == ["1_text", "2_cut", "3_grey", "4_cmyk", "5_moving"]
    assert [bool(caption) for _, caption in rows] == [False, False, True, True, True]
    assert result.stderr.count("no caption: ") == 2
    assert "1_text.jpg" in result.stderr and "2_cut.jpg" in result.stderr


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


def test_offline_says_how_to_get_a_model(demo, run_main, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run_main(direct_caption, "--model_path", "nobody/captioner", "--test_folder", demo / "test/test")
    assert_one_line(result, "hf download nobody/captioner")


def test_a_kept_prompt_needs_a_prompt():
    with pytest.raises(UserError, match="--prompt"):
        direct_caption.Settings(conditional=True)
