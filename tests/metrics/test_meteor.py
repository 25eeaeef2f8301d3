"""METEOR compared with the official program: its recorded scores, worked examples, and the program itself."""

import math
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, make_meteor_data
from ground_truth import golden, real_captions

from metrics import Meteor, meteor
from metrics.meteor import java_hash, normalize

# Hypothesis, references, statistics of the kept reference in the order of the program, score
WORKED_EXAMPLES = [
    ("a dog runs", ["a dog runs"], "3 3, 1 1; 2/2/1/1; 0/0/0/0; 0/0/0/0; 0/0/0/0; 1, 3, 3", "1.000000000"),
    ("cat", ["airplane"], "1 1, 0 0; 0/0/0/0; 0/0/0/0; 0/0/0/0; 0/0/0/0; 0, 0, 0", "0.000000000"),
    ("", ["a dog"], "0 2, 0 1; 0/0/0/0; 0/0/0/0; 0/0/0/0; 0/0/0/0; 0, 0, 0", "0.000000000"),
    ("a dog", ["", "a dog runs"], "2 3, 1 1; 1/1/1/1; 0/0/0/0; 0/0/0/0; 0/0/0/0; 1, 2, 2", "0.291706664"),
    ("dog the big", ["the big dog"], "3 3, 1 1; 2/2/1/1; 0/0/0/0; 0/0/0/0; 0/0/0/0; 2, 3, 3", "0.446735253"),
    ("the of", ["the in"], "2 2, 2 2; 0/0/1/1; 0/0/0/0; 0/0/0/0; 0/0/0/0; 1, 1, 1", "0.200000000"),
    ("dogs playfully run", ["dogs playing run"],
     "3 3, 0 0; 2/2/0/0; 1/1/0/0; 0/0/0/0; 0/0/0/0; 1, 3, 3", "0.866666667"),
    ("biker", ["bikers"], "1 1, 0 0; 0/0/0/0; 1/1/0/0; 0/0/0/0; 0/0/0/0; 1, 1, 1", "0.600000000"),
    ("plays", ["runs"], "1 1, 0 0; 0/0/0/0; 0/0/0/0; 1/1/0/0; 0/0/0/0; 1, 1, 1", "0.800000000"),
    ("a kid runs", ["a child runs"], "3 3, 1 1; 1/1/1/1; 0/0/0/0; 1/1/0/0; 0/0/0/0; 1, 3, 3", "0.914285714"),
    ("man", ["people"], "1 1, 0 1; 0/0/0/0; 0/0/0/0; 0/0/0/0; 1/0/0/1; 1, 1, 1", "0.600000000"),
    ("people next to car", ["people near car"],
     "4 3, 2 1; 1/1/1/1; 0/0/0/0; 0/0/0/0; 1/1/1/0; 1, 4, 3", "0.824156306"),
    ("a man in front of a house", ["a man before a house"],
     "7 5, 4 2; 2/2/1/1; 0/0/0/0; 0/0/0/0; 1/1/3/1; 1, 7, 5", "0.848433243"),
    ("to a narrow circle of", ["limited"],
     "5 1, 3 0; 0/0/0/0; 0/0/0/0; 0/0/0/0; 2/1/2/0; 1, 4, 1", "0.294754204"),
    ("children", ["child"], "1 1, 0 0; 0/0/0/0; 0/0/0/0; 0/0/0/0; 0/0/0/0; 0, 0, 0", "0.000000000"),
    ("a dog runs fast", ["a dog run fast"],
     "4 4, 1 1; 2/2/1/1; 1/1/0/0; 0/0/0/0; 0/0/0/0; 1, 4, 4", "0.880000000"),
    ("kid next", ["near"], "2 1, 0 0; 0/0/0/0; 0/0/0/0; 0/0/0/0; 0/0/0/0; 0, 0, 0", "0.000000000"),
    ("man child", ["men girl"], "2 2, 0 0; 0/0/0/0; 0/0/0/0; 1/1/0/0; 1/1/0/0; 1, 2, 2", "0.700000000"),
    ("run field big", ["field large"],
     "3 2, 0 0; 1/1/0/0; 0/0/0/0; 1/1/0/0; 0/0/0/0; 1, 2, 2", "0.399909484"),
    ("a young", ["young person big"], "2 3, 1 0; 1/1/0/0; 0/0/0/0; 0/0/0/0; 0/0/0/0; 1, 1, 1", "0.145454545"),
    ("run a run dog dog", ["a dogs dogs runs a the"],
     "5 6, 1 3; 0/0/1/1; 0/0/0/0; 0/0/0/0; 0/0/0/0; 1, 1, 1", "0.032921811"),
    ("k2", ["ip"], "1 1, 0 0; 1/1/0/0; 0/0/0/0; 0/0/0/0; 0/0/0/0; 1, 1, 1", "1.000000000"),
    ("a c5 flies", ["a as flies"], "3 3, 1 2; 2/1/1/2; 0/0/0/0; 0/0/0/0; 0/0/0/0; 1, 3, 3", "1.000000000"),
    ("the boy 's t-shirt is n't from the u.s.", ["the boy's t shirt isn't from the us"],
     "12 10, 7 5; 4/4/4/4; 0/0/0/0; 0/0/0/0; 0/1/1/0; 3, 9, 9", "0.449239027"),
    ("st. john 5 ... 1,000", ["st john 5 . . . 1000"],
     "5 7, 0 3; 2/2/0/0; 0/0/0/0; 0/0/0/0; 0/0/0/0; 1, 2, 2", "0.191067865"),
    ("cat", ["airplane", "a big airplane in the sky"],
     "1 1, 0 0; 0/0/0/0; 0/0/0/0; 0/0/0/0; 0/0/0/0; 0, 0, 0", "0.000000000"),
    ("a brown dog", ["a dog", "brown dog", "a big brown dog"],
     "3 2, 1 0; 2/2/0/0; 0/0/0/0; 0/0/0/0; 0/0/0/0; 1, 2, 2", "0.466019182"),
    ("two dogs run in snow", ["two dogs are running through the snow", "dogs run in the snow"],
     "5 5, 2 2; 3/3/1/1; 0/0/0/0; 0/0/0/0; 0/0/0/0; 2, 4, 4", "0.434245147"),
]  # fmt: skip

NORMALIZED = {
    "the boy 's hat": "the boy ' s hat", "boy's": "boy 's", "is n't": "is n 't", "t-shirt": "t shirt",
    "6'4": "6 ' 4", "5 '": "5 '", "'90s": "' 90s", "1990 's": "1990 ' s", "o'clock": "o 'clock",
    "-lrb- red -rrb-": "-lrb- red -rrb-", "a/b": "a / b", "#7": "# 7", "2.5": "2.5", "1,000": "1,000",
    "at the st.": "at the st .", "no. 5": "no . 5", "pp. 5": "pp. 5", "vs. them": "vs. them",
    "e.g. this": "eg this", "wait ... what": "wait ... what", "a-b-c": "a b-c", "A Big Dog": "a big dog",
    "black-and-white": "black and white", "u.s.": "us", "a.m. now": "am now", "mr. smith": "mr. smith",
    "\u201chi\u201d": '" hi "', "``hi''": '" hi "', "red,blue": "red , blue", "": "", "caf\xe9": "caf\xe9",
    "日本": "日 本", "the boy 's t-shirt is n't from the u.s.": "the boy ' s t shirt is n 't from the us",
}  # fmt: skip


# -------------------------------------------------------------------------------------------- official scores


def parse_statistics(text: str) -> list[int]:
    words, function_words, *stages, chunks = text.replace(",", ";", 1).split("; ")
    numbers = [*words.split(), *function_words.split()]
    for stage in stages:
        numbers += stage.split("/")
    return [int(number) for number in [*numbers, *chunks.split(", ")]]


@pytest.mark.parametrize("hypothesis, references, expected, score", WORKED_EXAMPLES)
def test_worked_example(scorer, hypothesis, references, expected, score):
    assert scorer.statistics(references, hypothesis) == parse_statistics(expected)
    assert f"{scorer.score(references, hypothesis):.9f}" == score


@pytest.mark.parametrize("rows, score", [(range(1, 29), "0.367798929"), ((1, 5, 26), "0.426880640")])
def test_corpus_of_worked_examples(scorer, rows, score):
    references = {row: WORKED_EXAMPLES[row - 1][1] for row in rows}
    hypotheses = {row: WORKED_EXAMPLES[row - 1][0] for row in rows}
    assert f"{scorer.compute_score(references, hypotheses)[0]:.9f}" == score


def test_recorded_scores(scorer):
    expected = golden()
    corpus, scores = scorer.compute_score(
        expected["tokenized"]["references"], expected["tokenized"]["hypotheses"]
    )
    assert corpus == pytest.approx(expected["scores"]["METEOR"], abs=1e-12)
    assert scores == pytest.approx(list(expected["per_image"]["METEOR"].values()), abs=1e-12)


def run_java(data_dir: Path, images: list[tuple[list[str], str]]) -> tuple[float, list[float], list]:
    """Corpus score, scores and statistics of the Java program, asked as pycocoevalcap asks it."""
    command = ["java", "-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    with subprocess.Popen(command, cwd=data_dir, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL) as process:

        def ask(*parts: str) -> str:
            process.stdin.write((" ||| ".join(parts) + "\n").encode())
            process.stdin.flush()
            return process.stdout.readline().decode().strip()

        statistics = []
        for references, hypothesis in images:
            statistics.append(ask("SCORE", *references, hypothesis.replace("|||", "").replace("  ", " ")))
        scores = [float(ask("EVAL", *statistics))]
        scores += [float(process.stdout.readline()) for _ in images]
        process.stdin.close()
    return scores.pop(), scores, [[int(float(n)) for n in line.split()] for line in statistics]


def test_beside_the_java_program(scorer, data_dir, tmp_path):
    if not shutil.which("java"):
        pytest.skip("needs java")
    captions = [[caption.lower() for caption in group] for group in real_captions()]
    generator = random.Random(0)
    images = []
    for number in range(1000):
        hypothesis, *references = generator.sample(generator.choice(captions), 2)
        if number % 2:
            references = [generator.choice(generator.choice(captions))]
        images.append((references, hypothesis))
    images += [(generator.choice(captions), hypothesis) for hypothesis in STRANGE if "\n" not in hypothesis]
    images += [(["", "a ||| dog runs", "a dog|||||| plays"], "dog runs a | |||| dog")]
    # The paraphrases of these texts alone: the program takes ten seconds to read all of them.
    texts = (scorer._text(text) for references, hypothesis in images for text in [*references, hypothesis])
    phrases = sorted({phrase for text in texts for phrase in text.phrases})
    pairs = [(phrase, target) for phrase in phrases for target in scorer._table.targets(phrase)]
    folder = make_meteor_data(tmp_path / "data_dir", data_dir, pairs)
    expected_corpus, expected_scores, expected_statistics = run_java(folder, images)
    corpus, scores = scorer.compute_score(
        dict(enumerate(references for references, _ in images)),
        dict(enumerate(hypothesis for _, hypothesis in images)),
    )
    assert scores == pytest.approx(expected_scores, abs=1e-12)
    assert corpus == pytest.approx(expected_corpus, abs=1e-12)
    assert [scorer.statistics(*image) for image in images] == expected_statistics
    assert len({round(score, 6) for score in scores}) > 150  # not all zeros


# ---------------------------------------------------------------------------------------------- strange texts

STRANGE = [
    "", " ", "\t", ".", "...", "! ? , ; :", "|||", "a dog ||| runs", "||||",
    "a dog\nruns\r\nfast", "a  dog   runs", "日本語", "\u0000\u001f", "\xa0\u2003", "{} %s \\ \" '",
    "-" * 50, " ".join(["a dog runs in the snow"] * 50), " ".join(f"word{i}" for i in range(300)),
    "a \U0001f415 runs", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
]  # fmt: skip


@pytest.mark.parametrize("hypothesis", [*STRANGE, "\ud800 half a surrogate pair"])
def test_strange_hypothesis_has_a_score(scorer, hypothesis):
    for references in (["a dog runs in the snow", ""], [hypothesis], ["|||", hypothesis, "\n"]):
        score = scorer.score(references, hypothesis)
        assert math.isfinite(score) and 0 <= score <= 1
        corpus, scores = scorer.compute_score({1: references}, {1: hypothesis})
        assert scores == [score] and math.isfinite(corpus)


def test_line_ends_are_blanks(scorer):
    assert scorer.score(["a dog\nruns"], "a dog\r\nruns") == scorer.score(["a dog runs"], "a dog runs") == 1


def test_reference_with_separator_is_two_references(scorer):
    assert scorer.score(["a cat sits ||| a dog runs"], "a dog runs") == 1


def test_mistakes_of_the_caller(scorer):
    with pytest.raises(ValueError, match="reference"):
        scorer.score([], "a dog")
    with pytest.raises(ValueError, match="same images"):
        scorer.compute_score({1: ["a dog"]}, {2: "a dog"})
    assert scorer.compute_score({}, {}) == (0.0, [])


# ------------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize("text, expected", NORMALIZED.items())
def test_normalize(scorer, text, expected):
    assert normalize(text, scorer._lexicon.abbreviations) == expected.split()


def test_java_hash():
    assert java_hash("as") == java_hash("c5") != java_hash("c6")
    assert java_hash("hello") == 99162322
    assert java_hash("\U0001f415") == 31 * 0xD83D + 0xDC15  # two UTF-16 units


# -------------------------------------------------------------------------------------------------- processes


def test_any_number_of_workers_gives_the_same(scorer, meteor_cache, demo_captions):
    references = dict(enumerate(captions[1:] for captions in demo_captions))
    hypotheses = dict(enumerate(captions[0] for captions in demo_captions))
    alone = scorer.compute_score(references, hypotheses)
    for workers in (2, 3):
        assert Meteor(cache_dir=meteor_cache, workers=workers).compute_score(references, hypotheses) == alone
    strange = dict(enumerate([*STRANGE, "\ud800"]))
    references = {number: [text, "a dog"] for number, text in strange.items()}
    alone = scorer.compute_score(references, strange)
    assert Meteor(cache_dir=meteor_cache, workers=2).compute_score(references, strange) == alone


def test_large_corpus_is_shared_by_default(scorer, monkeypatch):
    shares = []
    monkeypatch.setattr(
        scorer, "_in_other_process", lambda share: shares.append(share) or [[0] * 23] * len(share)
    )
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.setattr(meteor, "TEXTS_PER_WORKER", 4)
    captions = {number: "a dog" for number in range(6)}
    for kept, expected in ((12, []), (11, [[(["a dog"], "a dog")] * 2] * 2)):
        monkeypatch.setattr(meteor, "KEPT_TEXTS", kept)
        scorer.compute_score({number: ["a dog"] for number in captions}, captions)
        assert shares == expected


def test_workers_in_a_script_without_a_guard(small_data, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys, threading; sys.path.insert(0, {str(ROOT)!r}); from metrics import Meteor\n"
        "print('started')\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        f"meteor = Meteor({str(small_data)!r}, {str(tmp_path / 'cache')!r}, workers=2)\n"
        "references, hypotheses = {1: ['a dog'], 2: ['people near']}, {1: 'a dog', 2: 'people next to'}\n"
        "print(meteor.compute_score(references, hypotheses)[1][0])\n"
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("started\n1.0\n", "")


def test_failed_worker_is_stood_in_for(scorer, meteor_cache, monkeypatch):
    references, hypotheses = {1: ["a dog"], 2: ["two dogs run"]}, {1: "a dog", 2: "dogs run"}
    expected = scorer.compute_score(references, hypotheses)
    monkeypatch.setattr(sys, "executable", "/no/such/program")
    assert Meteor(cache_dir=meteor_cache, workers=2).compute_score(references, hypotheses) == expected


def test_threads_share_one_meteor(scorer, demo_captions):
    images = [(captions[1:], captions[0]) for captions in demo_captions]
    alone = [scorer.statistics(*image) for image in images]
    fresh = Meteor(cache_dir=scorer._cache_dir)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda image: fresh.statistics(*image), images)) == alone
