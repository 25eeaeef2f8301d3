"""Comparison, caption quality, the pointing score, and eval.py's looks at single images."""

import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line
from PIL import Image

import eval as evaluation
from captioning.captioners.base import Caption
from captioning.data.images import read_image
from captioning.data.submissions import write_submission
from captioning.report.comparison import (
    Interval,
    bootstrap_difference,
    compare_files,
    compare_models,
    compare_pairs,
    print_intervals,
    verdict,
)
from captioning.report.figures import draw_attention
from captioning.report.quality import (
    attention_summary,
    caption_quality,
    distinct_ngrams,
    entropy,
    has_repetition,
    inside,
    named_objects,
    pointing_score,
    read_boxes,
)
from captioning.report.scoring import report_scores
from captioning.weights.checkpoints import load_checkpoint, save_checkpoint
from metrics import score_captions
from utils import UserError

# --- comparison ---------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    rng = np.random.default_rng(1)
    first = rng.normal(size=(400, 1))
    gains = rng.normal(0.3, 1.0, size=(400, 1))
    found = bootstrap_difference(first, first + gains)
    half = 1.96 * gains.std(ddof=1) / 20
    assert found.difference == pytest.approx(gains.mean())
    assert (found.low, found.high) == pytest.approx((gains.mean() - half, gains.mean() + half), abs=0.02)
    assert bootstrap_difference(first, first) == (0, 0, 0)
    assert bootstrap_difference(first, first + gains) == found  # the same every time


def test_chance_is_called_chance_and_more_is_called_more():
    """Of two models that are alike, about one interval in twenty leaves out zero."""
    rng = np.random.default_rng(2)
    alike = [bootstrap_difference(*rng.normal(size=(2, 50, 1))).more_than_chance for _ in range(60)]
    assert sum(alike) <= 9
    better = bootstrap_difference(np.zeros((50, 1)), rng.normal(1.0, size=(50, 1)))
    assert better.more_than_chance
    assert verdict(better, "CIDEr", "a", "b").startswith("b is better than a by CIDEr")
    worse = bootstrap_difference(rng.normal(1.0, size=(50, 1)), np.zeros((50, 1)))
    assert verdict(worse, "CIDEr", "a", "b").startswith("a is better than b by CIDEr")
    with pytest.raises(UserError, match="two images"):
        bootstrap_difference(np.zeros((1, 1)), np.ones((1, 1)))


def test_differences_are_those_of_the_tables():
    references = {str(i): [f"a dog number {i} runs on grass", f"the dog {i} is running"] for i in range(8)}
    good = {key: texts[0] for key, texts in references.items()}
    bad = {key: text.replace("grass", "a red sofa") if int(key) % 2 else text for key, text in good.items()}
    scores = [score_captions(references, captions) for captions in (good, bad)]
    found = compare_models(references, [good, bad], scores)
    for name in ("Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr"):
        difference = scores[1].overall[name] - scores[0].overall[name]
        assert found["intervals"][name].difference == pytest.approx(difference, abs=1e-6)
        assert found["intervals"][name].high <= 1e-9
    assert (found["wins"], found["losses"], found["ties"], found["identical"]) == (0, 4, 4, 0.5)
    assert 0.5 < found["overlap"] < 1


def test_a_bleu_without_a_match_is_zero_and_no_difference():
    """The official evaluation's small constants differ from model to model where no 4-gram matches."""
    references = {str(i): [f"a dog number {i} runs on the grass"] for i in range(8)}
    first = {key: "a dog on the sofa and it sleeps" for key in references}
    second = {key: "the dog is red" for key in references}
    official = [score_captions(references, captions).overall["Bleu_4"] for captions in (first, second)]
    assert 0 < official[1] < official[0] < 1e-3
    scores = [report_scores(references, captions) for captions in (first, second)]
    assert [of_model.overall["Bleu_4"] for of_model in scores] == [0, 0]
    assert {of_image["Bleu_4"] for of_model in scores for of_image in of_model.per_image.values()} == {0}
    assert scores[0].overall["Bleu_2"] == score_captions(references, first).overall["Bleu_2"] > 0
    found = compare_models(references, [first, second], scores)["intervals"]
    assert found["Bleu_4"] == (0, 0, 0) and not found["Bleu_4"].more_than_chance
    assert found["Bleu_1"].more_than_chance
    # too short for any 4-gram
    assert report_scores(references, dict.fromkeys(references, "a dog runs")).overall["Bleu_4"] == 0


def test_what_rounds_to_zero_is_no_difference(capsys):
    interval = Interval(-2e-5, -4e-5, -1e-5)
    assert not interval.more_than_chance and "may be chance (+0.0000, " in verdict(
        interval, "CIDEr", "a", "b"
    )
    print_intervals({"Bleu_4": interval})
    assert capsys.readouterr().out == "  BLEU-4    +0.0000  [+0.0000, +0.0000]  may be chance\n"
    assert Interval(-2e-4, -3e-4, -1e-4).more_than_chance


def test_pairs_are_compared_on_the_images_that_both_have(capsys):
    references = {str(i): [f"a dog number {i} runs on grass"] for i in range(6)}
    whole = {key: texts[0] for key, texts in references.items()}
    captions = [whole, {key: f"{whole[key]} today" for key in "0123"}, {"5": whole["5"]}]
    scores = [report_scores({key: references[key] for key in own}, own) for own in captions]
    (pair,) = compare_pairs(references, ["a", "b", "c"], captions, scores)
    assert (pair["first"], pair["second"], pair["images"]) == (0, 1, 4)
    on_four = {key: references[key] for key in "0123"}
    difference = (
        report_scores(on_four, captions[1]).overall["CIDEr"]
        - report_scores(on_four, {key: whole[key] for key in "0123"}).overall["CIDEr"]
    )
    assert pair["intervals"]["CIDEr"].difference == pytest.approx(difference) and pair["losses"] == 4
    assert capsys.readouterr().out.splitlines() == [
        "a and c: 1 scored image in common, not compared",
        "b and c: 0 scored images in common, not compared",
    ]


# --- quality ------------------------------------------------------------------------------------------------


def test_quality_of_captions():
    texts = ["a man in a man in", "a dog on a", "a dog on grass", "a dog on grass", ""]
    captions = {str(i): text.split() for i, text in enumerate(texts)}
    references = {key: [["a", "dog", "on", "grass"]] for key in captions}
    found = caption_quality(captions, references, {"a", "dog"}, {("a", "dog", "on", "grass")})
    assert found["lengths"] == {0: 1, 4: 3, 6: 1} and found["mean_length"] == 18 / 5
    assert found["distinct"] == 4 / 5 and found["in_training"] == 2 / 5 and found["empty"] == 1 / 5
    assert found["repetitions"] == 1 / 5
    assert found["bad_endings"] == 2 / 5  # "in" and "a"
    assert (found["words_used"], found["words_known"]) == (6, 2)
    assert found["div1"] == 6 / 18 and found["div2"] == pytest.approx(7 / 14)
    assert found["usage"][0]["word"] in ("man", "in") and found["usage"][-1]["word"] == "grass"
    assert has_repetition(["dog", "dog"]) and not has_repetition(["a", "dog", "and", "a", "cat"])
    assert distinct_ngrams([], 2) == 0.0
    assert caption_quality({}, None)["captions"] == 0


def test_attention_summary():
    even, sharp = np.full((4, 4), 1 / 16), np.zeros((4, 4))
    sharp[1, 2] = 1
    assert entropy(np.stack([even, sharp])).tolist() == [4, 0]
    found = attention_summary([["a", "dog"], ["a"]], [np.stack([even, sharp]), even[None]])
    assert [(row["word"], row["entropy"], row["count"]) for row in found["words"]] == [
        ("dog", 0, 1),
        ("a", 4, 2),
    ]
    assert np.array(found["mean_maps"]["all words"]) == pytest.approx((2 * even + sharp) / 3)
    assert found["largest_entropy"] == 4
    assert attention_summary([], []) == {}


# --- figures ------------------------------------------------------------------------------------------------


def test_a_figure_of_whatever_a_captioner_takes(demo, tmp_path):
    path = demo / "test" / "test" / "test_0001.jpg"
    image = Image.open(path)
    array = np.asarray(image)
    maps = torch.rand(2, 14, 14)
    forms = (path, str(path), image, array, torch.from_numpy(array.copy()).permute(2, 0, 1))
    for number, form in enumerate(forms):
        draw_attention(tmp_path / f"{number}.png", form, ["a", "dog"], maps if number % 2 else maps.numpy())
    figures = [read_image(tmp_path / f"{number}.png") for number in range(len(forms))]
    assert np.ptp(figures[0]) > 100 and all((figure == figures[0]).all() for figure in figures)
    with pytest.raises(UserError, match="taken as uint8"):
        draw_attention(tmp_path / "a.png", array / 255, ["a"], maps)


# --- pointing -----------------------------------------------------------------------------------------------


def looking(words: str, cells: list[tuple[int, int]]) -> Caption:
    maps = torch.zeros(len(cells), 14, 14)
    for attention, cell in zip(maps, cells):
        attention[cell] = 1
    return Caption(words, words.split(), 0.0, [0.0] * len(cells), maps)


def test_pointing_counts_hits_and_what_chance_would_hit(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    boxes = {
        "a": [{"shape": "circle", "box": [0, 0, 100, 50]}, {"shape": "star", "box": [190, 90, 200, 100]}]
    }
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    objects, names = read_boxes(tmp_path / "boxes.json", {"a": tmp_path / "a.png"})
    found = pointing_score(
        {"a": looking("two circles a star squares", [(0, 0), (6, 6), (9, 9), (0, 0), (5, 5)])}, objects, names
    )
    assert (found.words, found.hits) == (2, 1)  # the star's maximum is at the wrong end
    assert found.chance == pytest.approx((49 / 196 + 1 / 196) / 2)
    assert found.by_name == {"circle": (1, 1), "star": (1, 0)}
    nothing = pointing_score({"a": looking("a dog", [(0, 0)] * 2)}, objects, names)
    assert nothing.words == 0 and math.isnan(nothing.score)


def test_coco_instances_and_synonyms(tmp_path):
    content = {
        "images": [{"id": 7, "width": 100, "height": 50, "file_name": "COCO_val2014_000000000007.jpg"}],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "traffic light"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [50, 0, 50, 50]},
            {"image_id": 7, "category_id": 2, "bbox": [0, 0, 10, 10]},
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    objects, names = read_boxes(tmp_path / "instances.json", {})
    words = ["two", "men", "at", "a", "traffic", "light"]
    assert named_objects(words, names) == [("person", 1, 2), ("traffic light", 4, 6)]
    caption = looking(" ".join(words), [(0, 0), (3, 9), (0, 0), (0, 0), (0, 0), (0, 0)])
    found = pointing_score({"COCO_val2014_000000000007": caption}, objects, names)
    assert (found.words, found.hits) == (2, 2)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for wrong in ([], {"a": [{"box": 3}]}, {"annotations": []}):
        (tmp_path / "wrong.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="not boxes"):
            read_boxes(tmp_path / "wrong.json", {"a": tmp_path / "a.png"})


def test_attention_that_looks_at_random_scores_like_chance(demo):
    """The score can fail: maps that point at the boxes score 1, the same maps shuffled score like chance."""
    paths = {path.stem: path for path in sorted((demo / "train" / "train").glob("*.jpg"))}
    objects, names = read_boxes(demo / "boxes.json", paths)
    captions, shuffled = {}, {}
    rng = np.random.default_rng(0)
    for image_id, own in objects.items():
        words = list(own) * 10
        cells = [np.argwhere(inside(own[name], 14, 14))[0] for name in words]
        captions[image_id] = looking(" ".join(words), [tuple(cell) for cell in cells])
        random = [tuple(rng.integers(0, 14, 2)) for _ in words]
        shuffled[image_id] = looking(" ".join(words), random)
    right, wrong = (pointing_score(several, objects, names) for several in (captions, shuffled))
    assert right.score == 1 and right.words > 400
    error = 4 * math.sqrt(wrong.chance / wrong.words)
    assert wrong.score == pytest.approx(wrong.chance, abs=error) and wrong.chance + error < 0.5


# --- eval.py ------------------------------------------------------------------------------------------------


def rows_of(file) -> list[dict]:
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def submissions(demo, tmp_path):
    """The first and the second reference as two models' captions."""
    rows: dict[str, list[str]] = {}
    for row in rows_of(demo / "test_captions.csv"):
        rows.setdefault(row["image_id"], []).append(row["caption"])
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for i, file in enumerate(files):
        write_submission(file, [(image_id, "a dog" if i and n % 2 else texts[0])
                                for n, (image_id, texts) in enumerate(rows.items())])  # fmt: skip
    return files


def test_two_submissions_are_compared(demo, submissions, tmp_path, run_script):
    result = run_script(
        "eval.py", "--submission", *submissions, "--references", demo / "test_captions.csv",
        "--per_image_csv", tmp_path / "p.csv", "--worst", 4, "--figure", tmp_path / "w.png",
        "--output_json", tmp_path / "s.json", "--output_captions", tmp_path / "c.csv",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"{submissions[0]} is better than {submissions[1]} by CIDEr" in result.stdout
    assert "wins 0 images, loses 6, ties 6" in result.stdout
    assert f"written: {tmp_path / 's.json'}, " in result.stdout and "w.png" in result.stdout
    lines = rows_of(tmp_path / "p.csv")
    assert len(lines) == 24 and {line["model"] for line in lines} == set(map(str, submissions))
    assert all(line["image"].endswith(f"{line['image_id']}.jpg") for line in lines)
    assert lines[0]["references"].count(" | ") == 4
    assert len(json.loads((tmp_path / "s.json").read_text())["scores"]) == 2
    assert (tmp_path / "c_2.csv").read_text() == submissions[1].read_text()
    with Image.open(tmp_path / "w.png") as figure:
        assert figure.width > 1000


def test_files_of_single_images_are_compared(demo, submissions, tmp_path, run_main, capsys):
    files = [tmp_path / "p.csv", tmp_path / "q.csv"]
    for submission, file in zip(submissions, files):
        settings = evaluation.Settings(
            submission=(str(submission),), references=str(demo / "test_captions.csv"), per_image_csv=str(file)
        )
        evaluation.main(settings)
    capsys.readouterr()
    evaluation.main(evaluation.Settings(compare=tuple(map(str, files))))
    printed = capsys.readouterr().out
    assert f"{files[0]} is better than {files[1]} by CIDEr" in printed
    assert "BLEU here is the mean of each image's own" in printed
    compare_files(*[str(files[0])] * 2)
    assert "may be chance (+0.0000" in capsys.readouterr().out
    assert_one_line(run_main(evaluation, "--compare", files[0]), "--compare", "two files")
    plain = submissions[0].with_name("plain.csv")
    plain.write_bytes("Dateiname;Beschreibung\r\na.jpg;Hund läuft\r\n".encode("cp1252"))
    for file in (submissions[0], plain):  # files of captions
        result = run_main(evaluation, "--compare", files[0], file)
        assert_one_line(result, file, "eval.py --submission FIRST SECOND --references FILE")
    both = tmp_path / "both.csv"
    lines = files[1].read_text().splitlines(keepends=True)[1:]
    both.write_text(files[0].read_text() + "".join(lines))
    result = run_main(evaluation, "--compare", both, files[1])
    assert_one_line(
        result, f"{both}: has the scores of 2 files", f"--submission {submissions[0]} {submissions[1]}"
    )
    both.write_bytes(files[0].read_text().replace("dog", "Hündin").encode("cp1252"))
    compare_files(str(both), str(files[0]))
    assert_one_line(run_main(evaluation, "--compare", files[0], "nowhere.csv"), "nowhere.csv", "no such")


def test_the_pointing_score_of_a_model(prepared, models, demo, tmp_path, capsys):
    checkpoint = load_checkpoint(models / "best_checkpoint.pth")
    checkpoint["decoder"]["fc.bias"][checkpoint["word_map"]["circle"]] += 2  # so that an object is named
    save_checkpoint(tmp_path / "model.pth", checkpoint)
    settings = evaluation.Settings(
        (str(tmp_path / "model.pth"),), data_folder=str(prepared), beam_sizes=(1,),
        boxes=str(demo / "boxes.json"), output_json=str(tmp_path / "s.json"),
    )  # fmt: skip
    evaluation.main(settings)
    assert "a uniform guess for" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "s.json").read_text())["scores"]
    assert row["pointing"]["words"] > 0 and 0 < row["pointing"]["chance"] < 0.5


def test_scoring_a_file_imports_no_torch():
    code = "import sys, eval; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
