"""Captioner.load and .caption: one way for attention models, ensembles and BLIP."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import captioning
from captioning import Captioner
from captioning.data.images import list_images
from captioning.data.prepared import END, START
from utils import UserError


@pytest.fixture(scope="module", params=["attention", "ensemble", "BLIP"])
def captioner(request, models, blip_folder):
    sources = {
        "attention": models / "best_checkpoint.pth",
        "ensemble": [models / "best_checkpoint.pth", models / "checkpoint_epoch_2.pth"],
        "BLIP": blip_folder,
    }
    return Captioner.load(sources[request.param])


@pytest.fixture(scope="module")
def paths(demo):
    return list_images(demo / "test" / "test")


def test_the_package_loads_its_captioner_on_first_use():
    code = "import sys, captioning; assert 'torch' not in sys.modules; captioning.Captioner.load"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' in sys.modules"], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="has no attribute 'Captoner'"):
        captioning.Captoner  # noqa: B018


def test_all_forms_of_an_image_have_the_same_caption(captioner, paths):
    path = paths[0]
    image = Image.open(path)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms = [str(path), path, image, array, tensor]
    assert {captioner.caption(form) for form in forms} == {captioner.caption(str(path))}
    assert captioner.caption(forms) == [captioner.caption(path)] * len(forms)
    assert captioner.caption([path]) == [captioner.caption(path)]
    assert captioner.caption([]) == []


def test_images_of_any_size_and_mode(captioner):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((1, 1, 3), (40, 300, 3), (70, 64, 3))]
    images += [Image.new("L", (30, 20)), Image.new("RGBA", (30, 20)), Image.new("P", (5, 5))]
    assert all(isinstance(text, str) for text in captioner.caption(images, beam_size=1))


@pytest.mark.parametrize("beam_size", [1, 3])
def test_details(captioner, paths, beam_size):
    texts = captioner.caption(paths, beam_size=beam_size, batch_size=5)
    found = captioner.caption(paths, beam_size=beam_size, details=True)
    assert [caption.text for caption in found] == texts
    for caption in found:
        assert 1 <= len(caption.n_best) <= beam_size and caption.n_best[0].text == caption.text
        assert len({other.text for other in caption.n_best}) == len(caption.n_best)
        for other in caption.n_best:
            # a tokenizer may put words and marks closer together
            assert other.text.replace(" ", "") == "".join(other.words)
            assert len(other.words) == len(other.word_log_probs) == len(other.attention)
            assert sum(other.word_log_probs) >= other.log_prob - 1e-4  # the end's is missing
            sums = other.attention.sum(dim=(1, 2))
            torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)
    assert max(len(caption.n_best[-1].words) for caption in found) > 1


def test_the_n_best_are_sorted(models, paths):
    for caption in Captioner.load(models).caption(paths, beam_size=4, details=True):
        log_probs = [other.log_prob for other in caption.n_best]
        assert log_probs == sorted(log_probs, reverse=True) and len(log_probs) == 4


@torch.no_grad()
def test_log_probabilities_and_attention_of_an_attention_model_are_those_of_teacher_forcing(models, paths):
    captioner = Captioner.load(models / "best_checkpoint.pth")
    for path, caption in zip(paths, captioner.caption(paths, beam_size=1, details=True)):
        assert caption.words
        grid = captioner.encode(captioner.prepare(path).unsqueeze(0))[0][0].permute(2, 0, 1)
        encoding = torch.nn.functional.adaptive_avg_pool2d(grid, 14).permute(1, 2, 0).unsqueeze(0)
        ids = torch.tensor([[captioner.word_map[word] for word in (START, *caption.words, END)]])
        logits, _, _, alphas, _ = captioner.decoders[0](encoding, ids, torch.tensor([[ids.shape[1]]]))
        forced = logits[0].log_softmax(dim=1).gather(1, ids[0, 1:, None]).flatten()
        assert caption.word_log_probs == pytest.approx(forced[: len(caption.words)].tolist(), abs=1e-4)
        maps = alphas[0, : len(caption.words)].view(-1, 14, 14)
        torch.testing.assert_close(caption.attention, maps, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_log_probabilities_of_blip_are_those_of_its_steps(blip_folder, paths):
    """Of each step of the search by itself, with the whole model, a token at a time."""
    captioner = Captioner.load(blip_folder)
    model = captioner.model
    for path in paths[:4]:
        caption = captioner.caption(path, beam_size=1, details=True)
        pixels = captioner.prepare(path).unsqueeze(0)
        ids = model.generate(pixel_values=pixels, max_new_tokens=30, do_sample=False)
        total, pieces = 0.0, []
        for step in range(1, ids.shape[1]):
            logits = model(pixel_values=pixels, input_ids=ids[:, :step]).logits[0, -1]
            log_prob = logits.log_softmax(dim=0)[ids[0, step]].item()
            total += log_prob
            piece = captioner.tokenizer.convert_ids_to_tokens(int(ids[0, step]))
            if piece.startswith("##") and pieces:
                pieces[-1] += log_prob
            elif not piece.startswith("["):
                pieces.append(log_prob)
        assert caption.log_prob == pytest.approx(total, abs=1e-4)
        assert caption.word_log_probs == pytest.approx(pieces, abs=1e-4)
        assert caption.attention.shape[1:] == (8, 8)


def test_pieces_of_a_word_are_joined(blip_folder, paths):
    captioner = Captioner.load(blip_folder)
    tokenizer = captioner.tokenizer
    ids = [tokenizer.bos_token_id, *tokenizer("a redred circle", add_special_tokens=False)["input_ids"]]
    states = captioner.model.vision_model(pixel_values=captioner.prepare(paths[0]).unsqueeze(0))[0].detach()
    with torch.no_grad():
        caption = captioner._details([*ids, captioner.model.config.text_config.sep_token_id], states)
    assert caption.words == ["a", "redred", "circle"] and len(ids) > 4
    assert len(caption.attention) == len(caption.word_log_probs) == 3
    assert caption.attention.sum(dim=(1, 2)).tolist() == pytest.approx([1] * 3, abs=1e-5)


@pytest.mark.parametrize(
    "image, parts",
    [
        (np.zeros((4, 4, 3)), ["float64", 'astype("uint8")']),
        (torch.zeros(3, 4, 4), ["float32", "byte()"]),
        (torch.zeros(3, 4, 4, dtype=torch.bfloat16), ["float32", "byte()"]),
        (np.zeros((3, 4, 5), np.uint8), ["(3, 4, 5)", "transpose(1, 2, 0)"]),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), ["(4, 5, 3)", "permute(2, 0, 1)"]),
        (np.zeros((2, 4, 4, 3), np.uint8), ["list(images)"]),
        (np.zeros((4, 4), np.uint8), ["PIL image"]),
        (np.zeros((0, 4, 3), np.uint8), ["no pixels"]),
        (3, ["int", "a path"]),
        (None, ["NoneType"]),
        ("photo.jpg", ["photo.jpg: no such image"]),
        (["photo.jpg"], ["photo.jpg: no such image"]),
    ],
)
def test_what_is_no_image_is_refused_with_the_mend(models, image, parts):
    captioner = Captioner.load(models)
    with pytest.raises(UserError) as error:
        captioner.caption(image)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "source, part",
    [
        ("nowhere.pth", "no such checkpoint"),
        ([], "no checkpoint given"),
        ("no folder!", "no such folder"),
        (["a.pth", "org/model"], "org/model: no checkpoint"),
    ],
)
def test_what_is_no_captioner_is_refused(source, part):
    with pytest.raises(UserError, match=part):
        Captioner.load(source)


def test_the_examples_of_the_documentation_run(models, blip_folder, demo, tmp_path, monkeypatch, capsys):
    """docs/python.md, in a folder as it supposes it."""
    for name, target in (("output_models", models), ("blip_finetuned_model", blip_folder), ("demo", demo)):
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(examples) >= 7
    exec(compile("\n".join(examples), "docs/python.md", "exec"), {})
    assert (tmp_path / "attention.png").is_file() and (tmp_path / "submission.csv").is_file()
    assert "the second and the first may be chance" in capsys.readouterr().out
