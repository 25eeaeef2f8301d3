"""Decoding options in captioners, scripts and files: several captions per image, scores, diversity."""

import csv
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import assert_one_line
from test_decoding import has_repeated

import caption
import caption_from_checkpoint
import direct_caption
import eval as evaluation
import run_pipeline
from captioning.captioners.attention import Captioner
from captioning.captioners.loading import load_captioner
from captioning.command_line import parse_settings
from captioning.data.images import list_images
from captioning.data.prepared import END as END_WORD
from captioning.data.prepared import PAD, UNK
from captioning.data.prepared import START as START_WORD
from captioning.data.submissions import ScoredCaption, caption_rows, read_submission, write_submission
from captioning.decoding.options import UNFINISHED, DecodingOptions
from captioning.report.quality import caption_diversity, sample_diversity
from metrics import bleu4
from tests.reference import TextbookDecoder, textbook_search
from utils import UserError

# --- attention models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captioner(models):
    return Captioner.load(models / "best_checkpoint.pth")


@pytest.fixture(scope="module")
def paths(demo):
    return list_images(demo / "test" / "test")


@torch.no_grad()
@pytest.mark.parametrize("beam_size", [1, 3, 5])
def test_allow_unk_gives_what_the_tutorials_search_gives(captioner, paths, beam_size):
    decoder, word_map = captioner.decoders[0], captioner.word_map
    bias = decoder.fc.bias.data.clone()
    decoder.fc.bias.data[word_map[UNK]] += 6  # <unk> is likely now
    textbook = TextbookDecoder(16, 16, 32, len(word_map), decoder.f_beta.out_features).eval()
    textbook.load_state_dict(decoder.state_dict())
    paths, start, end = paths[:6], word_map[START_WORD], word_map[END_WORD]
    images = torch.stack([captioner.prepare(path) for path in paths])
    (grids,) = captioner.encode(images)
    pooled = torch.nn.functional.adaptive_avg_pool2d(grids.permute(0, 3, 1, 2), 14).permute(0, 2, 3, 1)
    expected = [
        textbook_search(lambda image: image, textbook, encoding, start, end, beam_size) for encoding in pooled
    ]
    found = captioner.caption(paths, beam_size, allow_unk=True)
    without = captioner.caption(paths, beam_size)
    decoder.fc.bias.data.copy_(bias)
    assert found == [" ".join(captioner.words[word] for word in words) for words in expected]
    assert any(UNK in text for text in found) and not any(UNK in text for text in without)


def test_captions_in_batches_are_those_of_single_images(captioner, paths):
    paths = paths[:4]
    one, other = {"no_repeat_ngram": 2, "min_length": 12}, {"remove_bad_endings": True, "num_captions": 3}
    for options in (one, other):
        together = captioner.caption(paths, **options)
        assert [captioner.caption(path, **options) for path in paths] == together
    for text in captioner.caption(paths, no_repeat_ngram=1, min_length=9):
        assert len(text.split()) == len(set(text.split())) >= 9
    drawn = captioner.caption(paths, num_captions=4, temperature=1.0, batch_size=3)
    assert drawn == captioner.caption(paths, num_captions=4, temperature=1.0)
    assert drawn != captioner.caption(paths, num_captions=4, temperature=1.0, seed=1)
    details = captioner.caption(paths, num_captions=4, temperature=1.0, details=True)
    assert [[one.text for one in own.n_best] for own in details] == drawn


def test_wrong_options_are_one_line(captioner, paths):
    for options, part in (
        ({"num_captions": 4}, "--num_captions is 4: a beam of 3"),
        ({"temperature": 0.0}, "--temperature is 0.0"),
        ({"top_p": 1.5}, "--top_p is 1.5: give 1 or less"),
        ({"min_length": 51}, "--min_length is 51: give 50 or less"),
        ({"beam_size": 0}, "--beam_size is 0"),
        ({"seed": -1}, "--seed is -1"),
    ):
        with pytest.raises(UserError, match=part):
            captioner.caption(paths[0], **options)


# --- BLIP ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blip(blip_folder):
    return load_captioner(blip_folder)


def test_blip_takes_the_options_that_transformers_has(blip, paths):
    paths = paths[:5]
    pixels, ids = torch.stack([blip.prepare(path) for path in paths]), [*"abcde"]
    end = blip.tokenizer.sep_token_id

    def tokens(**options) -> list[list[int]]:
        inputs = blip.batch(pixels)
        found = blip.generate(inputs, DecodingOptions(**options), ids, 1).sequences.tolist()
        return [own[1 : own.index(end) if end in own else None] for own in found]

    assert any(has_repeated(own, 2) for own in tokens())
    bound = tokens(no_repeat_ngram=2, min_length=20)
    assert all(not has_repeated(own, 2) and len(own) >= 20 for own in bound)
    options = DecodingOptions(beam_size=6, num_captions=3)
    several = blip.decode_prepared(pixels, options, with_scores=True)
    details = blip.describe_prepared(pixels, options)
    for own, caption_details in zip(several, details):
        assert len(own) == 3 == len({one.text for one in own})
        expected = {one.text: one for one in caption_details.n_best}
        for one in own:
            assert one.log_prob == pytest.approx(expected[one.text].log_prob, abs=1e-4)
            words, log_probs = zip(*one.words)
            assert list(words) == expected[one.text].words
            assert log_probs == pytest.approx(expected[one.text].word_log_probs, abs=1e-4)
            assert one.log_prob_per_word == pytest.approx(one.log_prob / (len(one.text.split()) + 1))
    drawn = DecodingOptions(num_captions=4, temperature=0.8, top_p=0.95)
    together = blip.decode_prepared(pixels, drawn, ids, with_scores=True)
    assert [[one.text for one in own] for own in together] == [
        [one.text for one in blip.decode_prepared(pixels[i : i + 1], drawn, ids[i : i + 1])[0]]
        for i in range(len(paths))
    ]
    assert len({one.text for own in together for one in own}) > len(paths)
    details = blip.describe_prepared(pixels, drawn, ids)
    for own, caption_details in zip(together, details):
        assert [one.text for one in own] == [one.text for one in caption_details.n_best]
        assert [one.log_prob for one in own] == pytest.approx(
            [one.log_prob for one in caption_details.n_best], abs=1e-4
        )


def test_blip_with_a_prompt_scores_what_follows_it(blip, paths):
    pixels = [blip.prepare(paths[0])]
    asked = replace(blip, max_new_tokens=8, prompt="a red")
    kept, cut = (
        replace(asked, keep_prompt=keep).decode_prepared(pixels, DecodingOptions(), with_scores=True)[0][0]
        for keep in (True, False)
    )
    assert kept.text == f"a red {cut.text}".strip() and kept.log_prob == cut.log_prob
    assert kept.log_prob_per_word == pytest.approx(cut.log_prob / (len(cut.text.split()) + 1))


@pytest.mark.parametrize("name", ["length_penalty", "remove_bad_endings", "allow_unk"])
def test_blip_refuses_what_it_cannot(blip, paths, name):
    with pytest.raises(UserError, match=f"--{name} is for attention models alone"):
        blip.caption(paths[0], **{name: True})


# --- folders ------------------------------------------------------------------------------------------------


def read_csv(file):
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_several_captions_and_scores_in_a_csv(models, demo, captioner, paths, run_main, tmp_path):
    output, model = tmp_path / "out.csv", models / "best_checkpoint.pth"
    folder = ["--test_folder", demo / "test" / "test", "--output_csv", output]
    result = run_main(caption, "--model", model, *folder)
    assert result.returncode == 0 and output.read_text().startswith("image_id,caption\n")
    plain = read_submission(output)
    result = run_main(caption, "--model", model, *folder, "--with_scores")
    assert output.read_text().startswith("image_id,caption,log_prob,log_prob_per_word\n")
    assert read_submission(output) == plain
    for row in read_csv(output):
        per_word = float(row["log_prob"]) / (len(row["caption"].split()) + 1)
        assert float(row["log_prob_per_word"]) == pytest.approx(per_word, abs=1e-4)
    result = run_main(
        caption_from_checkpoint, "--checkpoint", model, *folder, "--num_captions", 3, "--with_scores"
    )
    assert result.returncode == 0, result.stderr
    rows = read_csv(output)
    assert list(rows[0]) == ["image_id", "caption", "rank", "log_prob", "log_prob_per_word"]
    assert [row["rank"] for row in rows] == ["1", "2", "3"] * len(paths)
    assert [(row["image_id"], row["caption"]) for row in rows if row["rank"] == "1"] == plain
    for start in range(0, len(rows), 3):
        own = rows[start : start + 3]
        assert len({row["caption"] for row in own}) == 3 and len({row["image_id"] for row in own}) == 1
        log_probs = [float(row["log_prob"]) for row in own]
        assert log_probs == sorted(log_probs, reverse=True)
    lines = tmp_path / "out.jsonl"
    assert (
        run_main(caption, "--model", model, *folder[:2], "--output_csv", lines, "--with_scores").returncode
        == 0
    )
    for line in lines.read_text().splitlines():
        entry = json.loads(line)
        words, log_probs = zip(*entry["words"]) if entry["words"] else ((), ())
        assert " ".join(words) == entry["caption"] and sum(log_probs) >= entry["log_prob"] - 1e-3
    options = ["--num_captions", 2, "--temperature", 1, "--batch_size", 5]
    assert run_main(caption, "--model", model, *folder[:2], "--output_csv", lines, *options).returncode == 0
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert list(found[0]) == ["image_id", "caption", "rank"] and len(found) == 2 * len(paths)
    # the samples are those of the same ids elsewhere
    drawn = captioner.decode_prepared(
        torch.stack([captioner.prepare(path) for path in paths]),
        DecodingOptions(num_captions=2, temperature=1.0),
        [row["image_id"] for row in found[::2]],
    )
    assert [row["caption"] for row in found] == [one.text for own in drawn for one in own]


def test_single_images_print_their_captions(models, paths, run_main, tmp_path):
    command = [caption, paths[0], "--model", models / "best_checkpoint.pth", "--figure", tmp_path / "f.png"]
    result = run_main(*command, "--num_captions", 3, "--with_scores")
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and len(lines) == 3, result.stderr
    assert all("(log-probability -" in line and line.endswith(" per word)") for line in lines)
    assert lines[0].startswith(Captioner.load(models).caption(paths[0]))
    drawn = run_main(*command, "--num_captions", 7, "--top_p", 0.9).stdout
    assert len(drawn.splitlines()) == 7 and "log-probability" not in drawn


def test_blip_writes_them_too(blip, blip_folder, demo, paths, run_main, tmp_path):
    output = tmp_path / "out.csv"
    command = ["--model_path", blip_folder, "--test_folder", demo / "test" / "test", "--output_csv", output]
    command += ["--checks", "none"]  # its weights are random
    result = run_main(direct_caption, *command, "--num_captions", 2, "--with_scores", "--no_repeat_ngram", 2)
    assert result.returncode == 0, result.stderr
    rows = read_csv(output)
    expected = blip.caption(paths, num_captions=2, no_repeat_ngram=2)
    assert [row["caption"] for row in rows] == [text for own in expected for text in own]
    assert all(float(row["log_prob"]) < 0 for row in rows)
    result = run_main(direct_caption, *command, "--min_length", 40, "--max_new_tokens", 30)
    assert_one_line(result, "--min_length is 40", "--max_new_tokens")
    result = run_main(
        direct_caption,
        paths[0],
        *command[:2],
        "--checks",
        "none",
        "--prompt",
        "a red",
        "--num_captions",
        2,
        "--top_p",
        0.5,
    )
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    "options, part",
    [
        (["--num_captions", "2", "--sidecars"], "leave --sidecars out"),
        (["--with_scores", "--sidecars"], "leave --sidecars out"),
        (["--num_captions", "2", "--output_csv", "x.json"], "x.json: COCO results hold one caption"),
        (["--num_captions", "9"], "--num_captions is 9"),
        (["--top_p", "0"], "--top_p is 0.0: give more than 0"),
    ],
)
@pytest.mark.parametrize("script", [caption, caption_from_checkpoint, direct_caption])
def test_what_cannot_be_is_refused(script, options, part):
    with pytest.raises(UserError, match=part):
        parse_settings(script.Settings, options)


def test_the_best_of_several_captions_come_back(tmp_path, capsys):
    """Of several captions that of rank 1; the words and their log-probabilities stand in JSON lines alone."""
    best = ScoredCaption("x, y", -1.23456, -0.4, [("x", -0.11111), ("y", -1.0)])
    captions = [("a", [best, ScoredCaption("z", -2.0, -1.0)]), ("b", [ScoredCaption("")])]
    rows, columns = caption_rows(captions, True, True)
    assert rows[0] == ("a", "x, y", 1, -1.2346, -0.4, [("x", -0.1111), ("y", -1.0)])
    assert rows[2] == ("b", "", 1, None, None, None)
    for extension in (".csv", ".jsonl", ".json"):
        file = tmp_path / f"x{extension}"
        write_submission(file, rows, columns)
        assert read_submission(file) == [("a", "x, y"), ("b", "")]
        assert (
            f"{file}: several captions per image; those of rank 1 count, 1 do not" in capsys.readouterr().out
        )
        assert ("words" in file.read_text()) == (extension == ".jsonl")
    first = json.loads((tmp_path / "x.jsonl").read_text().splitlines()[0])
    assert first["words"] == [["x", -0.1111], ["y", -1.0]] and first["log_prob"] == -1.2346
    for text, part in (
        ("image_id,caption,rank\na,b,first\n", "line 2: its rank is 'first'"),
        ("image_id,caption,rank\na,b,2\n", "no captions of rank 1"),
    ):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(UserError, match=part):
            read_submission(tmp_path / "x.csv")


def test_the_pipeline_passes_the_options_on_and_keeps_one_caption():
    settings = parse_settings(run_pipeline.Settings, ["--no_repeat_ngram", "3", "--blip_min_length", "4"])
    wanted = run_pipeline.step_settings(settings, caption.Settings, num_captions=1)
    assert (wanted.no_repeat_ngram, wanted.num_captions) == (3, 1)
    assert run_pipeline.step_settings(settings, direct_caption.Settings, "blip_").min_length == 4
    with pytest.raises(UserError, match="num_captions"):
        parse_settings(run_pipeline.Settings, ["--num_captions", "3"])


# --- eval.py ------------------------------------------------------------------------------------------------


def test_diversity_of_samples():
    same = sample_diversity([[["a", "dog", "on", "grass"]] * 3] * 2)
    assert same["div1"] == pytest.approx(1 / 3) and same["mbleu"] == pytest.approx(1)
    words = [str(number) for number in range(24)]
    apart = sample_diversity([[words[:6], words[6:12], words[12:18]], [words[:4], words[4:8], words[8:12]]])
    assert apart["div1"] == apart["div2"] == 1 and apart["mbleu"] < 1e-3 and apart["samples"] == 3
    rng = np.random.default_rng(0)
    samples = [[[*map(str, rng.integers(0, 4, 9))] for _ in range(4)] for _ in range(5)]
    expected = [
        bleu4([[s for j, s in enumerate(own) if j != k] for own in samples], [own[k] for own in samples])
        for k in range(4)
    ]
    assert sample_diversity(samples)["mbleu"] == pytest.approx(np.mean(expected), abs=1e-4)
    counts = [Counter(word for s in own for word in s) for own in samples]
    assert sample_diversity(samples)["div1"] == pytest.approx(np.mean([len(c) / c.total() for c in counts]))


def test_diversity_of_captions():
    captions = {"1": "A dog runs.", "2": "a dog runs", "3": "a cat on a"}
    found = caption_diversity(captions, {("a", "dog", "runs")})
    assert found == {
        "distinct": 2 / 3, "novel": pytest.approx(1 / 3), "words_used": 5, "bad_endings": 1 / 3,
        "repetitions": 0,
    }  # fmt: skip
    assert caption_diversity(captions)["novel"] is None


def test_eval_prints_diversity_and_writes_log_probabilities(prepared, models, demo, run_main, tmp_path):
    command = [evaluation, "--checkpoint", models / "best_checkpoint.pth", "--data_folder", prepared]
    files = {name: tmp_path / name for name in ("s.json", "c.csv", "p.csv")}
    result = run_main(
        *command, "--beam_sizes", "1,3", "--diversity", "--with_scores", "--no_repeat_ngram", 2,
        "--output_json", files["s.json"], "--output_captions", files["c.csv"],
        "--per_image_csv", files["p.csv"],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "5 samples per image: Div-1 0." in result.stdout and "mBLEU-4" in result.stdout
    for row in json.loads(files["s.json"].read_text())["scores"]:
        found = row["diversity"]
        assert 0 <= found["novel"] <= 1 and 0 < found["div1"] <= found["div2"] <= 1 and found["samples"] == 5
    written = read_csv(tmp_path / "c_beam3.csv")
    assert all(not has_repeated(row["caption"].split(), 2) for row in written)
    own = {row["image_id"]: row for row in read_csv(files["p.csv"]) if row["beam_size"] == "3"}
    for row in written:
        assert own[row["image_id"]]["log_prob"] == row["log_prob"] and float(row["log_prob"]) < 0
    # of one file of captions, without samples
    references = demo / "test_captions.csv"
    result = run_main(
        evaluation, "--submission", tmp_path / "c_beam3.csv", "--references", references, "--diversity",
        "--data_folder", prepared,
    )  # fmt: skip
    assert result.returncode == 0 and "distinct" in result.stdout and "samples per" not in result.stdout


def test_samples_of_eval_depend_on_neither_batch_nor_cache(prepared, models):
    options = {"data_folder": str(prepared), "split": "val", "beam_sizes": (1,), "diversity": 3}
    checkpoint = (str(models / "best_checkpoint.pth"),)
    first = evaluation.evaluate(evaluation.Settings(checkpoint, **options))
    other = evaluation.Settings(checkpoint, **options, batch_size=3, cache_features=False)
    second = evaluation.evaluate(other)
    assert (first[0]["features"], second[0]["features"]) == ("cached", "computed")
    assert first[0]["diversity"] == second[0]["diversity"]


@pytest.mark.parametrize(
    "options, part",
    [
        (["--diversity", "1"], "--diversity is 1"),
        (["--temperature", "1"], "samples of --diversity"),
        (["--diversity", "x"], "--diversity"),
        (["--no_repeat_ngram", "-1"], "--no_repeat_ngram is -1"),
    ],
)
def test_wrong_settings_of_eval(options, part):
    with pytest.raises(UserError, match=part):
        parse_settings(evaluation.Settings, options)


def test_words_that_end_a_caption_badly_are_known_to_the_model(captioner):
    rules = captioner._rules(DecodingOptions(remove_bad_endings=True))
    assert {captioner.words[index] for index in rules.unfinished} == UNFINISHED & captioner.word_map.keys()
    assert len(rules.unfinished) > 3 and [captioner.words[i] for i in rules.forbidden] == [
        PAD,
        START_WORD,
        UNK,
    ]
