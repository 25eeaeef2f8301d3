"""Settings that no run can want are refused before any work, with one line."""

import pytest

import caption
import caption_from_checkpoint
import convert_checkpoint
import create_input_files
import direct_caption
import eval as evaluation
import make_demo_data
import run_pipeline
import train
import train_model
import view_captions
from captioning.command_line import parse_settings
from utils import UserError

SCRIPTS = (
    caption,
    caption_from_checkpoint,
    create_input_files,
    direct_caption,
    evaluation,
    train,
    train_model,
)
WRONG = {
    int: ("-1", "99999999999", "1e3", "nan", ""),
    float: ("nan", "-inf", "-1000", "1e300", "inf", "text"),
}
UNBOUNDED = {"grad_clip"}  # "inf" is no clipping
ACCEPTED = {  # "0 or more" with no bound: a delay that long never comes, and does no harm
    "patience", "keep_checkpoints", "fine_tune_after", "min_word_freq", "decay_after", "worst", "limit",
}  # fmt: skip
NUMBERS = [
    (script, name, kind)
    for script in SCRIPTS
    for name, field in script.Settings.__dataclass_fields__.items()
    for kind in (int, float)
    if field.type.split(" ")[0] == kind.__name__
]


@pytest.mark.parametrize("script, name, kind", NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_numbers_out_of_all_bounds_are_refused(script, name, kind):
    for value in WRONG[kind]:
        if (name in UNBOUNDED and value in ("inf", "1e300")) or (name in ACCEPTED and value.isdigit()):
            continue
        with pytest.raises(UserError, match=f"--{name}"):
            parse_settings(script.Settings, [f"--{name}={value}"])


def test_the_findings():
    for script, name, value in (
        (caption, "workers", "500"), (create_input_files, "seed", "-1"), (train, "emb_dim", "999999999"),
        (caption, "length_penalty", "nan"), (direct_caption, "num_beams", "100000"),
        (create_input_files, "image_size", "100000"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"--{name} is {value}: give"):
            parse_settings(script.Settings, [f"--{name}", value])


ALL = (*SCRIPTS, convert_checkpoint, make_demo_data, run_pipeline, view_captions)


@pytest.mark.parametrize("script", ALL, ids=lambda script: script.__name__)
def test_two_dashes_and_endless_numbers_get_one_line(script):
    for name, field in script.Settings.__dataclass_fields__.items():
        with pytest.raises(UserError, match=f"--{name}=--: no value is called --"):
            parse_settings(script.Settings, [f"--{name}=--"])
        if field.type.split(" ")[0] in ("int", "tuple[int,", "Device"):
            with pytest.raises(UserError) as error:
                parse_settings(script.Settings, [f"--{name}", "9" * 5000])
            assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "script, same",
    [
        (evaluation, ["--output_json", "a", "--output_captions", "./a"]),
        (evaluation, ["--output_captions", "a.csv", "--per_image_csv", "a.csv"]),
        (evaluation, ["--output_captions", "a", "--references", "a", "--submission", "b"]),
        (evaluation, ["--per_image_csv", "b", "--references", "a", "--submission", "c", "b"]),
        (run_pipeline, ["--output_folder", "models", "--data_folder", "models/"]),
        (run_pipeline, ["--output_csv", "train.csv"]),
        (run_pipeline, ["--output_csv", "a.csv", "--blip_csv", "a.csv"]),
        (run_pipeline, ["--blip_folder", "test/test"]),
        (caption, ["--output_csv", "test.csv", "--test_csv", "./test.csv"]),
    ],
)
def test_no_file_is_written_twice_or_over_an_input(script, same):
    with pytest.raises(UserError, match=r"are both .*: give another name to write to"):
        parse_settings(script.Settings, same)


def test_the_defaults_are_good():
    for script in SCRIPTS:
        parse_settings(script.Settings, [])
