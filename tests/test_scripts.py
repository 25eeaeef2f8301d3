"""The scripts as users type them: what they write, and what they say of wrong input."""

import csv
import importlib
import re
import shutil
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line
from PIL import Image

from caption import caption_image_beam_search, caption_images
from captioning.captioners.attention import load_models
from captioning.command_line import parse_settings, read_field_comments
from captioning.data.images import read_image
from utils import UserError, check_output, write_json


def read_rows(file):
    with open(file, encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream))


# --- settings -----------------------------------------------------------------------------------------------


@dataclass
class Example:
    name: str = "a"  # a name
    number: int = 3  # how many, 50% of them
    rate: float | None = None  # a rate
    flag: bool = False  # yes or no
    mode: Literal["x", "y"] = "x"  # one of two


def test_settings_come_from_the_dataclass(capsys):
    settings = parse_settings(
        Example, ["--number", "5", "--rate", "1e-3", "--flag", "--mode", "y", "--name", "b"]
    )
    assert settings == Example("b", 5, 1e-3, True, "y")
    assert parse_settings(Example, ["--flag", "False", "--rate", "none"]) == Example()
    for wrong in (
        ["--number", "x"],
        ["--mode", "z"],
        ["--other", "1"],
        ["--flag", "perhaps"],
        ["--num", "1"],
    ):
        with pytest.raises(UserError, match=wrong[0]):
            parse_settings(Example, wrong)
    with pytest.raises(SystemExit):
        parse_settings(Example, ["--help"])
    help_text = capsys.readouterr().out
    assert "how many, 50% of them (default: 3)" in help_text and "x|y" in help_text


@pytest.mark.parametrize(
    "script",
    sorted(path.stem for path in ROOT.glob("*.py") if "run_script(main, Settings)" in path.read_text()),
)
def test_help_lists_every_setting_under_its_heading(script, run_script):
    result = run_script(f"{script}.py", "--help")
    assert result.returncode == 0 and len(result.stdout.splitlines()[0]) < 80
    headings = re.split(r"^(\S.*):\n(?=  )", result.stdout, flags=re.MULTILINE)
    listed = {
        name: heading
        for heading, options in zip(headings[1::2], headings[2::2])
        for name in re.findall(r"^  (?:--)?(\w+)", options, flags=re.MULTILINE)
    }
    comments = read_field_comments(importlib.import_module(script).Settings)
    assert len(comments) > 2
    for name, comment in comments.items():
        in_front = name == "images"  # without a name
        assert listed[name] == ("positional arguments" if in_front else comment.heading or "options"), name


# --- captions -----------------------------------------------------------------------------------------------


def test_image_mode(demo, models, run_script, tmp_path):
    image = demo / "test" / "test" / "test_0001.jpg"
    figure = tmp_path / "figure.png"
    result = run_script(
        "caption.py", "--img", image, "--model", models / "best_checkpoint.pth", "--figure", figure
    )
    assert result.returncode == 0, result.stderr
    encoder, decoder, word_map = load_models(models / "encoder.pth", models / "decoder.pth")
    words, alphas = caption_image_beam_search(encoder, decoder, image, word_map, beam_size=3)
    assert result.stdout.strip() == " ".join(words)
    assert alphas.shape == (len(words), 14, 14)
    torch.testing.assert_close(alphas.sum(dim=(1, 2)), torch.ones(len(words), device=alphas.device))
    assert np.ptp(read_image(figure)) > 100


def test_folder_mode_follows_test_csv(demo, models, run_script, tmp_path):
    folder = tmp_path / "test" / "test"
    shutil.copytree(demo / "test" / "test", folder)
    (folder / "test_0002.jpg").write_text("no image")
    ids = ["test_0003", "gone", "test_0001", "test_0002", "001"]
    Image.open(folder / "test_0001.jpg").convert("L").save(folder / "001.png")
    (tmp_path / "test.csv").write_text("\n".join(["image_id", *ids]))
    result = run_script(
        "caption.py", "--encoder_path", models / "encoder.pth", "--decoder_path", models / "decoder.pth",
        "--test_folder", folder, "--output_csv", tmp_path / "out.csv",
    )  # fmt: skip
    assert result.returncode == 1 and "gone" in result.stderr and "test_0002.jpg" in result.stderr
    header, *rows = read_rows(tmp_path / "out.csv")
    assert header == ["image_id", "caption"] and [row[0] for row in rows] == ids
    encoder, decoder, word_map = load_models(models / "encoder.pth", models / "decoder.pth")
    for image_id, caption in rows:
        paths = {"gone": None, "test_0002": None, "001": folder / "001.png"}
        path = paths.get(image_id, folder / f"{image_id}.jpg")
        words = caption_image_beam_search(encoder, decoder, path, word_map)[0] if path else []
        assert caption == " ".join(words)


def test_folder_mode_without_test_csv_is_in_natural_order(demo, models, tmp_path):
    folder = tmp_path / "a" / "b" / "photos"
    folder.mkdir(parents=True)
    for name in ("p10.jpg", "p9.jpg", "p1.jpg"):
        shutil.copy(demo / "test" / "test" / "test_0001.jpg", folder / name)
    (folder.parent / "test.csv").write_text("image_id\nother\n")  # about other images
    for batch_size in (1, 2):
        caption_images(
            models / "encoder.pth",
            models / "decoder.pth",
            None,
            folder,
            tmp_path / "out.csv",
            batch_size=batch_size,
        )
        rows = read_rows(tmp_path / "out.csv")[1:]
        assert [row[0] for row in rows] == ["p1", "p9", "p10"] and len({row[1] for row in rows}) == 1


def test_captions_do_not_depend_on_the_batch(demo, models, tmp_path):
    results = []
    for batch_size in (1, 5, 32):
        file = tmp_path / f"{batch_size}.csv"
        caption_images(
            models / "encoder.pth",
            models / "decoder.pth",
            None,
            demo / "test" / "test",
            file,
            batch_size=batch_size,
        )
        results.append(read_rows(file))
    assert results[0] == results[1] == results[2] and len(results[0]) == 13


# --- wrong input --------------------------------------------------------------------------------------------


def test_wrong_input_of_preparation(run_script, tmp_path):
    output = tmp_path / "out"
    script = ["create_input_files.py", "--output_folder", output]
    (tmp_path / "empty.csv").touch()
    (tmp_path / "columns.csv").write_text("number,colour\n1,red\n")
    (tmp_path / "good.csv").write_text("image_id,caption\na,a dog\n")
    nothing = run_script(*script, "--annotations", tmp_path / "none.csv", "--image_folder", tmp_path)
    assert_one_line(nothing, "none.csv")
    assert_one_line(
        run_script(*script, "--annotations", tmp_path / "empty.csv", "--image_folder", tmp_path), "empty.csv"
    )
    wrong = run_script(*script, "--annotations", tmp_path / "columns.csv", "--image_folder", tmp_path)
    assert_one_line(wrong, "columns.csv", "number,colour", "image_id")
    no_folder = run_script(
        *script, "--annotations", tmp_path / "good.csv", "--image_folder", tmp_path / "nowhere"
    )
    assert_one_line(no_folder, "nowhere")
    assert_one_line(run_script(*script, "--max_len", 0), "--max_len")
    assert_one_line(run_script(*script, "--max_length", 5), "--max_length")
    assert not output.exists()


def test_places_that_cannot_be_written_are_refused_first(run_script, prepared, models, demo, tmp_path):
    (tmp_path / "file").write_text("mine")
    below = tmp_path / "file" / "out"
    result = run_script("train.py", "--data_folder", prepared, "--output_folder", below)
    assert_one_line(result, below, "is a file")
    result = run_script(
        "caption_from_checkpoint.py", "--checkpoint", models / "best_checkpoint.pth",
        "--test_folder", demo / "test" / "test", "--output_csv", tmp_path,
    )  # fmt: skip
    assert_one_line(result, tmp_path, "is a folder")
    assert (tmp_path / "file").read_text() == "mine"
    for path, folder in ((below, False), (below, True), (tmp_path / "file", True), (tmp_path, False)):
        with pytest.raises(UserError):
            check_output(path, folder)
    check_output(tmp_path / "new" / "file")
    check_output(tmp_path, folder=True)


def test_the_pipeline_knows_what_captions_depend_on(demo, models, tmp_path):
    import caption
    import run_pipeline
    from captioning.data.fingerprints import stamp_files

    captions, files = tmp_path / "captions.csv", [tmp_path / "model.pth"]
    files[0].write_bytes((models / "decoder.pth").read_bytes())
    shutil.copytree(demo / "test" / "test", tmp_path / "images")
    wanted = caption.Settings(test_folder=str(tmp_path / "images"), output_csv=str(captions))
    assert not run_pipeline.is_up_to_date(wanted, files)
    captions.write_text("image_id,caption\n")
    assert not run_pipeline.is_up_to_date(wanted, files), "somebody else's"
    stamped = stamp_files([*run_pipeline.inputs_of_captions(wanted, files), captions])
    record = {"settings": run_pipeline.deciding_settings(wanted), "files": stamped}
    write_json(run_pipeline.record_file(wanted, files), record)
    assert run_pipeline.is_up_to_date(wanted, files)
    assert not run_pipeline.is_up_to_date(replace(wanted, beam_size=1), files)
    image = next((tmp_path / "images").glob("*.jpg"))
    image.write_bytes(image.read_bytes() + b" ")
    assert not run_pipeline.is_up_to_date(wanted, files)


def test_the_pipeline_takes_every_setting_and_edits_hold():
    """An edit at the top of a script is a changed default of its Settings; a flag beats it."""
    import caption
    import create_input_files
    import run_pipeline
    import train
    import train_model

    def step(settings_class, *argv, **options):
        return run_pipeline.step_settings(
            parse_settings(run_pipeline.Settings, argv), settings_class, **options
        )

    flags = [
        "--batch_size",
        "4",
        "--min_word_freq",
        "2",
        "--blip_epochs",
        "7",
        "--seed",
        "9",
        "--beam_size",
        "2",
    ]
    assert step(train.Settings, *flags).batch_size == 4 and step(train.Settings, *flags).epochs == 3
    assert step(create_input_files.Settings, *flags).min_word_freq == 2
    assert step(caption.Settings, *flags).beam_size == 2
    blip = step(train_model.Settings, *flags, prefix="blip_")
    assert (blip.epochs, blip.seed, blip.batch_size) == (7, 9, 8)

    @dataclass
    class Edited(train.Settings):
        batch_size: int = 5
        decoder_lr: float = 1e-3
        epochs: int = 11

    edited = step(Edited, "--epochs", "2")
    assert (edited.batch_size, edited.decoder_lr, edited.epochs) == (5, 1e-3, 2)
    with pytest.raises(UserError, match="unrecognized"):
        parse_settings(run_pipeline.Settings, ["--encoder_path", "x"])


def test_a_misspelt_setting_is_told_its_name():
    import run_pipeline

    with pytest.raises(UserError, match="--epoch 5; did you mean --epochs"):
        parse_settings(run_pipeline.Settings, ["--epoch", "5"])
    with pytest.raises(UserError, match=r"unrecognized arguments: --zzz 5; [^;]* lists the settings$"):
        parse_settings(run_pipeline.Settings, ["--zzz", "5"])


def test_wrong_input_of_training(run_script, prepared, tmp_path):
    output = tmp_path / "out"
    script = ["train.py", "--output_folder", output]
    assert_one_line(run_script(*script, "--data_folder", tmp_path / "nothing"), "nothing")
    script += ["--data_folder", prepared]
    assert_one_line(run_script(*script, "--encoder_name", "resnet1"), "resnet1", "resnet101")
    assert_one_line(
        run_script(*script, "--encoder_name", "resnet18", "--encoder_weights", "no.pth"), "no.pth"
    )
    assert_one_line(run_script(*script, "--checkpoint", prepared / "word_map.json"), "word_map.json")
    assert not output.exists()


@pytest.mark.slow
def test_wrong_input_of_captioning(run_script, models, demo, prepared, tmp_path):
    folder = demo / "test" / "test"
    out = tmp_path / "out.csv"
    good = [
        "--encoder_path",
        models / "encoder.pth",
        "--decoder_path",
        models / "decoder.pth",
        "--output_csv",
        out,
    ]
    assert_one_line(run_script("caption.py", *good, "--test_folder", tmp_path / "nowhere"), "nowhere")
    assert_one_line(run_script("caption.py", *good, "--test_folder", prepared), prepared)
    (tmp_path / "words.json").write_text('{"<pad>": 0, "dog": 1}')
    word_map = run_script("caption.py", *good, "--test_folder", folder, "--word_map", tmp_path / "words.json")
    assert_one_line(word_map, "words.json", "--word_map")
    (tmp_path / "text.pth").write_text("no checkpoint")
    for path in (
        tmp_path / "text.pth",
        tmp_path / "none.pth",
        prepared / "val_images.hdf5",
        models / "decoder.pth",
    ):
        assert_one_line(
            run_script("caption.py", "--model", path, "--test_folder", folder, "--output_csv", out), path
        )
    torch.save({"some": torch.zeros(2)}, tmp_path / "other.pth")
    assert_one_line(
        run_script("caption.py", "--model", tmp_path / "other.pth", "--test_folder", folder), "other.pth"
    )
    (tmp_path / "text.jpg").write_text("no image")
    for image in (tmp_path / "text.jpg", tmp_path / "none.jpg"):
        assert_one_line(
            run_script("caption.py", "--model", models / "best_checkpoint.pth", "--img", image), image
        )
    assert not out.exists()


def test_a_checkpoint_cannot_run_code(run_script, demo, tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "it_ran"), "w"))

    torch.save(
        {"settings": {}, "word_map": {}, "encoder": Harmful(), "decoder": {}}, tmp_path / "harmful.pth"
    )
    assert_one_line(
        run_script(
            "caption.py", "--model", tmp_path / "harmful.pth", "--test_folder", demo / "test" / "test"
        ),
        "harmful.pth",
    )
    assert not (tmp_path / "it_ran").exists()
