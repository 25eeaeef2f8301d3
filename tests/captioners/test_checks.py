"""What comes out of a model is checked: the rules, what happens to a caption that breaks one."""

import json
import threading
from pathlib import Path

import pytest
from conftest import SHARED, assert_one_line
from PIL import Image
from tiny_families import save_tiny

import direct_caption
from captioning.captioners.loading import load_captioner
from captioning.captioners.vision_language import VisionLanguageCaptioner
from captioning.data.submissions import ScoredCaption, read_submission
from captioning.decoding.options import CHECKS, check_names, find_fault
from captioning.folders.journal import Journal
from utils import UserError

GOLDEN = SHARED / "golden" / "captions_a.json"
FAULTY = {
    "refusal": [
        "I'm sorry, but I can't help with that.", "I\u2019m sorry, I can\u2019t assist.",
        "I cannot describe people.",
        "Sorry, I am unable to see it.", "As an AI language model, I have no eyes.",
        "I'm unable to view images.",
        "Unfortunately, I can't see it.", '"I apologize, but no image was given."',
        "Please provide an image.",
    ],
    "preamble": [
        "Here is a caption for the image: a dog runs.", "Sure! A dog runs.", "Caption: a dog runs.",
        "Here's a short description of the photo:\na dog", "The caption for this image could be a dog.",
        "Certainly, a dog runs.", "**Caption:** a dog runs", "<think>The user wants a caption</think> a dog",
        "assistant\na dog runs",
    ],
    "repetition": [
        "a dog dog dog dog", "a man in a red shirt and a red shirt and a red shirt and",
        "the the the the the",
        "A dog runs on the green grass. A cat sits. A dog runs on the green grass.",
        "red, red, red, red, red",
        "no no no no no no",
    ],
    "empty": ["", "  ", "...", "\n!"],
}  # fmt: skip
SOUND = [
    "a dog runs on grass", "Two men, one in red, one in blue, stand on a very very very tall wall.",
    "A sign that says: I'm sorry, we are closed", "We cannot see the face of the girl with the white T-shirt",
    "A sure-footed goat", "black and white photo of black and white cows", "Here is a dog", "2 + 2 = 4",
    "a man and a woman and a child", "This is a photograph of a red bus.", "I", "a caption contest winner",
]  # fmt: skip


@pytest.mark.parametrize("name", FAULTY)
def test_faults_are_found(name):
    for text in FAULTY[name]:
        assert find_fault(text, True) == CHECKS[name][0], text
        assert find_fault(text, True, [other for other in CHECKS if other != name]) != CHECKS[name][0]


def test_captions_are_sound():
    for text in SOUND:
        assert find_fault(text, True) == "", text
    assert find_fault("a dog runs on", False) == "cut by --max_new_tokens"
    assert find_fault("", False, ()) == "" == find_fault("a dog", False, ["empty"])


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the real captions are not here")
def test_people_write_sound_captions():
    captions, waiting = [], [json.loads(GOLDEN.read_text(encoding="utf-8"))]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (dict, list)):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and len(value.split()) > 4:
            captions.append(value)
    assert len(captions) > 100
    assert not [text for text in captions if find_fault(text, True)]


def test_names_of_rules():
    assert check_names(("cut", "empty")) == ("cut", "empty") and check_names(("none",)) == ()
    with pytest.raises(UserError, match="--checks emtpy: give some of empty, cut"):
        check_names(("emtpy",))


# --- a folder -----------------------------------------------------------------------------------------------

SAYS = {  # by image: in the search, then in each new attempt
    "good": ["a good caption"],
    "lucky": ["I'm sorry, I can't.", "Sure! A dog.", "a lucky caption"],
    "stubborn": ["I'm sorry, I can't help."] * 9,
    "long": [("a caption without an", False)] * 9,
}


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """A folder of images, a model for direct_caption.py that says SAYS about them, and what it was asked."""
    asked = []

    def decode(self, images, options, ids, with_scores):
        found = []
        for name in ids:
            attempt = sum(name == other for other, _ in asked)
            asked.append((name, options))
            said = SAYS[name][attempt]
            text, ended = said if isinstance(said, tuple) else (said, True)
            found.append([(ScoredCaption(text), ended)])
        return found

    monkeypatch.setattr(VisionLanguageCaptioner, "_decode", decode)
    model, folder = save_tiny("llava", tmp_path / "model"), tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(SAYS):
        Image.new("RGB", (30, 40), (60 * number, 0, 0)).save(folder / f"{name}.png")
    return model, folder, asked


def test_faulty_captions_are_drawn_again_and_reported(scripted, run_main, tmp_path):
    model, folder, asked = scripted
    output = tmp_path / "out.csv"
    command = ["--model_path", model, "--test_folder", folder, "--sidecars", "--output_csv", output]
    result = run_main(direct_caption, *command)
    assert result.returncode == 1
    assert dict(read_submission(output)) == {
        "good": "a good caption", "lucky": "a lucky caption", "stubborn": "", "long": "",
    }  # fmt: skip
    assert {path.stem: path.read_text().strip() for path in folder.glob("*.txt")} == {
        "good": "a good caption", "lucky": "a lucky caption",
    }  # fmt: skip
    assert "stubborn.png: a refusal, after 3 attempts: \"I'm sorry, I can't help.\"" in result.stderr
    assert 'long.png: cut by --max_new_tokens, after 3 attempts: "a caption without an"' in result.stderr
    assert "2 images captioned, 2 without a caption" in result.stdout
    tries = {name: [options for other, options in asked if other == name] for name in SAYS}
    assert {name: len(own) for name, own in tries.items()} == {
        "good": 1,
        "lucky": 3,
        "stubborn": 3,
        "long": 3,
    }
    assert not tries["lucky"][0].samples and all(options.samples for options in tries["lucky"][1:])
    assert len({options.seed for options in tries["lucky"]}) == 3
    assert not Journal(output).files()


def test_checks_are_settings(scripted, run_main, tmp_path):
    model, folder, asked = scripted
    command = [direct_caption, "--model_path", model, "--test_folder", folder]
    command += ["--output_csv", tmp_path / "out.csv"]
    assert run_main(*command, "--checks", "none").returncode == 0
    assert (
        len(asked) == len(SAYS) and dict(read_submission(tmp_path / "out.csv"))["lucky"] == SAYS["lucky"][0]
    )
    asked.clear()
    result = run_main(*command, "--checks", "refusal", "cut", "--retries", 0)
    assert result.returncode == 1 and len(asked) == len(SAYS)
    assert (
        "lucky.png: a refusal: " in result.stderr and "long.png: cut by --max_new_tokens: " in result.stderr
    )
    assert_one_line(run_main(*command, "--checks", "refusals"), "--checks refusals", "preamble")
    asked.clear()
    single = [
        direct_caption,
        *(folder / f"{name}.png" for name in ("good", "stubborn")),
        "--model_path",
        model,
    ]
    result = run_main(*single)
    assert result.returncode == 1 and "good.png: a good caption" in result.stdout
    assert "stubborn.png: a refusal" in result.stderr


def test_images_are_prepared_while_the_model_works(scripted, run_main, monkeypatch, tmp_path):
    model, folder, _ = scripted
    prepare, decode = VisionLanguageCaptioner.prepare, VisionLanguageCaptioner._decode
    read_ahead, threads = threading.Event(), set()

    def noted(self, path):
        threads.add(threading.current_thread())
        if Path(path).stem == "lucky":  # of the second batch, in natural order
            read_ahead.set()
        return prepare(self, path)

    def slow(self, images, *arguments):
        assert read_ahead.wait(20)
        return decode(self, images, *arguments)

    monkeypatch.setattr(VisionLanguageCaptioner, "prepare", noted)
    monkeypatch.setattr(VisionLanguageCaptioner, "_decode", slow)
    command = ["--model_path", model, "--test_folder", folder, "--output_csv", tmp_path / "out.csv"]
    result = run_main(direct_caption, *command, "--batch_size", 1, "--checks", "none")
    assert result.returncode == 0, result.stderr
    assert threads and threading.main_thread() not in threads


def test_samples_are_drawn_again_as_the_user_draws_them(scripted, run_main, tmp_path):
    model, folder, asked = scripted
    command = ["--model_path", model, "--test_folder", folder, "--output_csv", tmp_path / "out.csv"]
    run_main(direct_caption, *command, "--temperature", 1.3)
    assert {options.temperature for _, options in asked} == {1.3}


def test_one_caption_of_several_that_is_sound_is_enough(load_scripted):
    captioner, options = load_scripted
    (found,) = captioner.decode_prepared([None], options, ["x"])
    assert [one.text for one in found] == ["a dog"]


@pytest.fixture
def load_scripted(monkeypatch):
    from captioning.decoding.options import DecodingOptions

    rows = [[(ScoredCaption("Sure! A dog"), True), (ScoredCaption("a dog"), True)]]
    monkeypatch.setattr(VisionLanguageCaptioner, "_decode", lambda *arguments: rows)
    captioner = VisionLanguageCaptioner(None, None, None, checks=tuple(CHECKS))
    return captioner, DecodingOptions(num_captions=2)


def test_the_tiny_blip_is_checked_too(blip_folder, demo, run_main):
    """Its weights are random, and what it says has no end."""
    image = next(Path(demo / "test" / "test").iterdir())
    result = run_main(direct_caption, image, "--model_path", blip_folder, "--prompt", "a", "--retries", 1)
    assert result.returncode == 1 and "after 2 attempts" in result.stderr


def test_from_python_too(blip_folder, demo):
    captioner = load_captioner(blip_folder)
    captioner.checks, captioner.retries, captioner.max_new_tokens = ("cut", "empty"), 0, 1
    image = next((demo / "test" / "test").glob("*.jpg"))
    with pytest.raises(UserError, match=r"cut|empty"):
        captioner.caption(image)
    captioner.checks = ()
    assert isinstance(captioner.caption(image), str)
