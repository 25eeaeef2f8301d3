"""Evaluation of models, ensembles and files of captions, and captioning from checkpoints."""

import csv
import json
import shutil
import subprocess
import sys
from statistics import fmean

import pytest
import torch
from conftest import ROOT, TWO_PROCESSES, assert_one_line

import caption_from_checkpoint
import eval as evaluation
import train
from captioning.captioners.attention import Captioner
from captioning.command_line import parse_settings
from captioning.data.annotations import read_annotations
from captioning.data.image_names import coco_id
from captioning.data.submissions import read_submission, write_submission
from captioning.weights.checkpoints import load_checkpoint, save_checkpoint
from metrics import score_captions
from utils import UserError


@pytest.fixture(scope="module")
def other(prepared, tmp_path_factory):
    """A second model of the same data, other seed and sizes."""
    output = tmp_path_factory.mktemp("other")
    sizes = {"emb_dim": 12, "attention_dim": 20, "decoder_dim": 24, "decoder_lr": 1e-2}
    train.train(
        train.Settings(str(prepared), str(output), "efficientnet_lite0", epochs=3, workers=0, seed=5, **sizes)
    )
    return output


def settings(prepared, *checkpoints, **options):
    files = tuple(str(file / "best_checkpoint.pth") for file in checkpoints)
    return evaluation.Settings(files, data_folder=str(prepared), **options)


@pytest.fixture
def captions(demo):
    """The first reference of each test image."""
    return {p.image_id: p.captions[0] for p in read_annotations(demo / "test_captions.csv")}


# --- models -------------------------------------------------------------------------------------------------


def test_scores_of_a_model_are_those_of_its_captions(prepared, demo, models, tmp_path, run_script):
    rows = evaluation.evaluate(settings(prepared, models, beam_sizes=(1, 3)))
    assert [row["beam_size"] for row in rows] == [1, 3]
    output = tmp_path / "out.csv"
    result = run_script(
        "caption_from_checkpoint.py", "--checkpoint", models / "best_checkpoint.pth",
        "--test_folder", demo / "test" / "test", "--output_csv", output, "--batch_size", 5,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert dict(read_submission(output)) == rows[1]["captions"]
    own = evaluation.score_submission(output, demo / "test_captions.csv")
    assert own["scores"].overall == rows[1]["scores"].overall
    references = {p.image_id: p.captions for p in read_annotations(demo / "test_captions.csv")}
    official = score_captions(references, rows[1]["captions"]).overall
    assert official == pytest.approx(own["scores"].overall, abs=1e-6)  # BLEU without a match is not quite 0


def test_cached_features_and_batches_do_not_matter(prepared, models):
    first = evaluation.evaluate(settings(prepared, models, split="val", beam_sizes=(2,)))
    other_way = settings(prepared, models, split="val", beam_sizes=(2,), batch_size=3, cache_features=False)
    second = evaluation.evaluate(other_way)
    assert (first[0]["features"], second[0]["features"]) == ("cached", "computed")
    assert first[0]["captions"] == second[0]["captions"]


def test_ensemble_of_one_model_twice_is_that_model(prepared, models):
    single, twice = (
        evaluation.evaluate(settings(prepared, *[models] * count, beam_sizes=(1, 3, 5))) for count in (1, 2)
    )
    assert [row["captions"] for row in single] == [row["captions"] for row in twice]


def test_ensemble_does_not_depend_on_the_order_and_shares_encoders(prepared, models, other):
    files = [folder / "best_checkpoint.pth" for folder in (models, other)]
    images = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    there, back = Captioner.load(files), Captioner.load(files[::-1])
    assert len(there.encoders) == 1 and len(there.decoders) == 2
    results = [captioner.search(captioner.encode(images), 3) for captioner in (there, back)]
    for a, b in zip(*results):
        assert a.words == b.words and a.score == pytest.approx(b.score, abs=1e-4)
    alone = Captioner.load(files[:1])
    scores = [found.score for found in alone.search(alone.encode(images), 3)]
    assert scores != pytest.approx([found.score for found in results[0]], abs=1e-3)


def test_the_table_and_its_files(prepared, models, tmp_path, run_script):
    result = run_script(
        "eval.py", "--checkpoint", models / "best_checkpoint.pth", "--data_folder", prepared,
        "--beam_sizes", "1,2", "--output_json", tmp_path / "s.json", "--output_captions", tmp_path / "c.json",
        "--per_image_csv", tmp_path / "p.csv",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()[1:3]] == ["1", "2"]
    scores = json.loads((tmp_path / "s.json").read_text())["scores"]
    with open(tmp_path / "p.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for line in scores:
        own = [row for row in rows if row["beam_size"] == str(line["beam_size"])]
        assert len(own) == line["images"] == 12
        for name in ("CIDEr", "ROUGE_L"):
            assert fmean(float(row[name]) for row in own) == pytest.approx(line[name])
        captions = dict(read_submission(tmp_path / f"c_beam{line['beam_size']}.json"))
        assert captions == {row["image_id"]: row["caption"] for row in own}


@pytest.mark.slow
def test_two_processes_score_each_image_once(prepared, models, tmp_path):
    command = [str(ROOT / "eval.py"), "--checkpoint", str(models / "best_checkpoint.pth")]
    command += ["--data_folder", str(prepared), "--beam_sizes", "2", "--output_json"]
    for name, start in (("one", [sys.executable]), ("two", TWO_PROCESSES)):
        subprocess.run([*start, *command, str(tmp_path / name)], check=True, capture_output=True)
    one, two = (json.loads((tmp_path / name).read_text())["scores"][0] for name in ("one", "two"))
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    for line in (one, two):
        del line["images_per_second"]
    assert one == two


def test_wrong_input_for_models(prepared, demo, models, other, tmp_path, run_script):
    result = run_script(
        "eval.py",
        "--data_folder",
        prepared,
        "--checkpoint",
        models / "best_checkpoint.pth",
        "--split",
        "middle",
    )
    assert_one_line(result, "no middle split")
    with pytest.raises(UserError, match="beam_sizes"):
        settings(prepared, models, beam_sizes=(0,))
    with pytest.raises(UserError, match="--references"):
        evaluation.Settings(submission="x.csv")
    good, bad = models / "best_checkpoint.pth", tmp_path / "changed.pth"
    changed = load_checkpoint(other / "best_checkpoint.pth")
    words = list(changed["word_map"])
    changed["word_map"] = {
        word: index for index, word in enumerate([words[0], words[2], words[1], *words[3:]])
    }
    save_checkpoint(bad, changed)
    with pytest.raises(UserError, match=r"changed.pth: its word map"):
        Captioner.load([good, bad])
    changed = load_checkpoint(other / "best_checkpoint.pth")
    changed["data"]["settings"]["image_size"] = 96
    save_checkpoint(bad, changed)
    with pytest.raises(UserError, match=r"changed.pth: trained on images of 96 pixels"):
        Captioner.load([good, bad])
    with pytest.raises(UserError, match="--image_size 96"):
        evaluation.evaluate(evaluation.Settings((str(bad),), data_folder=str(prepared)))


@pytest.mark.slow
def test_checkpoints_are_chosen(prepared, demo, models, other, tmp_path, run_script):
    folder = tmp_path / "output_models"
    shutil.copytree(other, folder)
    command = ["caption_from_checkpoint.py", "--checkpoint_folder", folder]
    command += ["--test_folder", demo / "test" / "test", "--output_csv", tmp_path / "out.csv"]
    result = run_script(*command)
    assert result.returncode == 0 and "best_checkpoint.pth" in result.stdout
    (tmp_path / "empty").mkdir()
    nowhere = run_script(*command, "--test_folder", tmp_path / "empty")
    assert_one_line(nowhere, "empty", "no images in it")
    assert not nowhere.stdout, "a checkpoint is announced when there is an image for it"
    result = run_script(*command, "--ensemble_mode")
    names = [f"checkpoint_epoch_{number}.pth" for number in (1, 2, 3)]
    assert result.returncode == 0 and all(result.stdout.count(name) <= 1 for name in names)
    assert result.stdout.splitlines()[0].count(".pth") == 3, "the best one is one of the three"
    assert_one_line(run_script(*command, "--checkpoint", "a.pth"), "a.pth", "no such checkpoint")
    with pytest.raises(UserError, match="--ensemble_mode"):
        caption_from_checkpoint.Settings(checkpoint=("a.pth", "b.pth"))
    for file in folder.glob("checkpoint_*"):
        file.unlink()
    with pytest.raises(UserError, match="1 checkpoint in it"):
        caption_from_checkpoint.choose_checkpoints(
            caption_from_checkpoint.Settings(ensemble_mode=True, checkpoint_folder=str(folder))
        )


# --- files of captions --------------------------------------------------------------------------------------


def test_submission_layouts_score_alike(demo, captions, tmp_path):
    references = demo / "test_captions.csv"
    rows = list(captions.items())
    write_submission(tmp_path / "a.csv", rows)
    write_submission(tmp_path / "b.json", rows[::-1])
    write_submission(tmp_path / "c.csv", [(f"{image_id}.jpg", caption) for image_id, caption in rows])
    scores = [
        evaluation.score_submission(tmp_path / name, references) for name in ("a.csv", "b.json", "c.csv")
    ]
    assert scores[0]["scores"].overall["Bleu_4"] == pytest.approx(1)
    for other_scores in scores[1:]:
        assert other_scores["scores"].overall == pytest.approx(scores[0]["scores"].overall)


def test_of_several_captions_the_best_is_scored(demo, captions, tmp_path, capsys):
    references, columns = demo / "test_captions.csv", ("rank", "log_prob", "log_prob_per_word")
    several = [
        (image_id, text, rank, -float(rank), -0.1 * rank)
        for image_id, best in captions.items()
        for rank, text in enumerate([best, "a worse one"], start=1)
    ]
    for name in ("several.csv", "several.jsonl"):
        write_submission(tmp_path / name, several, columns)
        row = evaluation.score_submission(tmp_path / name, references)
        assert row["captions"] == captions
        assert f"those of rank 1 count, {len(captions)} do not" in capsys.readouterr().out
    write_submission(tmp_path / "second.csv", [line for line in several if line[2] == 2], columns)
    with pytest.raises(UserError, match="no captions of rank 1"):
        evaluation.score_submission(tmp_path / "second.csv", references)


def test_coco_numbers(tmp_path):
    assert coco_id("COCO_val2014_000000391895.jpg") == coco_id("391895") == 391895
    assert coco_id("test_0001") == "test_0001"
    references = {
        "images": [{"id": number, "file_name": f"{number:012}.jpg"} for number in (7, 11)],
        "annotations": [{"image_id": number, "caption": f"image {number} here"} for number in (7, 11)],
    }
    (tmp_path / "r.json").write_text(json.dumps(references))
    rows = [("COCO_val2014_000000000007.jpg", "image 7 here"), ("11", "image 11 here")]
    for name in ("s.csv", "s.json"):
        write_submission(tmp_path / name, rows)
        row = evaluation.score_submission(tmp_path / name, tmp_path / "r.json")
        assert list(row["captions"]) == ["7", "11"] and row["scores"].overall["Bleu_1"] == pytest.approx(1)
    assert json.loads((tmp_path / "s.json").read_text())[0]["image_id"] == 7


def test_incomplete_submissions_are_refused_by_name(demo, captions, tmp_path, run_script, capsys):
    references = demo / "test_captions.csv"
    rows = list(captions.items())
    write_submission(tmp_path / "s.csv", rows[1:])
    result = run_script("eval.py", "--submission", tmp_path / "s.csv", "--references", references)
    assert_one_line(result, "s.csv", rows[0][0])
    for wrong, name in (
        ([*rows, (rows[3][0], "again")], rows[3][0]),
        ([*rows, (rows[3][0] + ".jpg", "again")], rows[3][0]),
        ([*rows, ("nobody", "a dog")], "nobody"),
    ):
        write_submission(tmp_path / "s.csv", wrong)
        with pytest.raises(UserError, match=f"s.csv: 1 id .*{name}"):
            evaluation.score_submission(tmp_path / "s.csv", references)
    write_submission(tmp_path / "s.csv", [*rows[2:], ("nobody", "a dog")])
    row = evaluation.score_submission(tmp_path / "s.csv", references, partial=True)
    assert (row["images"], row["missing"], row["unknown"]) == (len(rows) - 2, 2, 1)
    assert "PARTIAL" in capsys.readouterr().out
    write_submission(tmp_path / "s.csv", [(rows[0][0], ""), *rows[1:]])
    row = evaluation.score_submission(tmp_path / "s.csv", references)
    assert row["scores"].per_image[rows[0][0]]["CIDEr"] == 0
    assert "1 of 12 captions are empty" in capsys.readouterr().out


def test_several_files_are_scored_on_the_images_that_all_have(demo, captions, tmp_path, capsys, run_main):
    references, rows = demo / "test_captions.csv", list(captions.items())
    parts = {"a.csv": rows[3:], "b.csv": [*rows[:-1], ("nobody", "a dog")], "c.csv": rows[3:-1]}
    for name, own in parts.items():
        write_submission(tmp_path / name, own)
    files = [tmp_path / name for name in parts]
    out = tmp_path / "s.json"
    options = (
        "--references",
        references,
        "--partial",
        "--output_json",
        out,
        "--per_image_csv",
        tmp_path / "p",
    )
    result = run_main(evaluation, "--submission", *files, *options)
    assert result.returncode == 0, result.stderr
    scores = json.loads(out.read_text())["scores"]
    assert [line["images"] for line in scores] == [8, 8, 8]
    assert len({json.dumps([line[name] for name in ("CIDEr", "Bleu_4")]) for line in scores}) == 1
    alone = evaluation.score_submission(files[2], references, partial=True)["scores"].overall
    assert scores[0]["CIDEr"] == alone["CIDEr"]
    for line in (
        f"PARTIAL: {files[0]} has captions of 9 of 12 images, 3 missing\n",
        f"PARTIAL: {files[1]} has captions of 11 of 12 images, 1 missing, 1 unknown row left out\n",
        f"PARTIAL: scored on the 8 images that all have; left out: 1 of {files[0]}, 3 of {files[1]}\n",
        "\n8 images\n",
    ):
        assert line in result.stdout
    write_submission(files[0], rows[:2])
    result = run_main(evaluation, "--submission", files[0], files[2], *options)
    assert_one_line(result, "no image that all have")


def test_metadata_elsewhere_says_where_it_belongs(demo, captions, tmp_path, run_main):
    write_submission(tmp_path / "s.csv", list(captions.items()))
    options = ("--submission", tmp_path / "s.csv", "--references", demo / "test_captions.csv")
    options += (
        "--image_folder",
        shutil.copytree(demo / "test" / "test", tmp_path / "in"),
        "--output_captions",
    )
    for place, said in ((tmp_path / "out", True), (tmp_path, False), (tmp_path / "in", False)):
        result = run_main(evaluation, *options, place / "metadata.jsonl")
        assert result.returncode == 0 and ("put it there" in result.stdout) == said


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("s.csv", "dog,cat\na,b\n", 'its first line is "dog,cat"; looked for'),
        ("s.csv", "image_id\na.jpg\n", "line 2: no caption in it"),
        ("s.csv", "image_id,caption\n", "no captions"),
        ("s.csv", "", "is empty"),
        ("s.csv", b"image_id,caption\na,A dog \0\n", "not a text file .byte 25, in line 2"),
        ("s.csv", "image_id,caption,rank\na,A dog,first\n", "line 2: its rank is 'first'"),
        ("s.json", "{}", "JSON of no known layout"),
        ("s.json", '[{"image_id": 3}]', "entry 1: no caption in it"),
        ("s.json", '[{"image_id": 3, "caption": ["a dog", "a cat"]}]', "2 captions; give one"),
        ("s.json", '[{"image_id": 3, "caption": 5}]', "its caption is 5"),
        ("s.json", "[", "not a JSON file"),
    ],
)
def test_damaged_submissions(name, content, part, tmp_path):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=part):
        read_submission(tmp_path / name)


def test_several_values_of_a_setting():
    assert parse_settings(evaluation.Settings, ["--beam_sizes", "1,3", "5"]).beam_sizes == (1, 3, 5)
    assert parse_settings(evaluation.Settings, ["--checkpoint", "a,b", "c"]).checkpoint == ("a,b", "c")
    with pytest.raises(UserError, match="beam_sizes"):
        parse_settings(evaluation.Settings, ["--beam_sizes", "1,x"])
