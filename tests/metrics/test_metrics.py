"""Scores compared with the official evaluation: its recorded tokens and scores, and the program itself."""

import importlib.util
import json
import math
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from ground_truth import golden, has_real_captions, real_captions

import metrics
from metrics import CiderD, MeteorDataError, bleu4, rouge_l, score_captions, tokenize

ROOT = Path(__file__).resolve().parents[2]

# What the official tokenizer returns; compared with it below where it is installed
HARD_CAPTIONS = {
    "The man's dog isn't here.": "the man 's dog is n't here",
    "Mr. Smith and mrs. Jones on Main St. in the U.S.": "mr. smith and mrs. jones on main st. in the u.s.",
    "No. 5 says no. Dogs": "no. 5 says no dogs",
    "1,000 people, 2.5 dogs and 3.": "1,000 people 2.5 dogs and 3",
    "a t-shirt, black-and-white - a dog -- a cat": "a t-shirt black-and-white a dog a cat",
    "red,blue-green and red,blue": "red,blue-green and red blue",
    "man/woman and/or 1/2 w/ a/b/c": "man/woman and/or 1/2 w / a/b/c",
    "\"one\" 'two' ``three'' \u201cfour\u201d \u2018five\u2019 \xabsix\xbb": "one two three four five six",
    "(a dog) [a cat] {a cow}": "-lrb- a dog -rrb- -lsb- a cat -rsb- -lcb- a cow -rcb-",
    "I cannot, gonna gotta wanna lemme gimme": "i can not gon na got ta wan na lem me gim me",
    "can't won't don\u2019t DIDN'T I'd they've": "ca n't wo n't do n't did n't i 'd they 've",
    "'90s the 1990's at 5 o'clock, rock 'n' roll": "'90s the 1990 's at 5 o'clock rock 'n' roll",
    "O'Neil ma'am y'all ski'ing 'em 'tis": "o'neil ma'am y' all ski'ing 'em 't is",
    "$5 US$5 \xa35 \u20ac5 5\xa2 5% #7 #dog @cat": "$ 5 us$ 5 # 5 $ 5 5 cents 5 % # 7 #dog @cat",
    "black & white AT&T R&B": "black & white at&t r&b",
    "wait... what.... \u2026 no!! yes?! oh!": "wait what no !! yes ?! oh",
    "a dog \U0001f415 runs \u2764": "a dog runs \u2764",
    "http://www.example.com/a?b=c, foo.com or a@b.com": "http://www.example.com/a?b=c foo.com or a@b.com",
    "at 5:30 or 5:30pm, 5 p.m.": "at 5:30 or 5:30 pm 5 p.m.",
    "caf\xe9 na\xefve \xd1and\xfa \xbd cup": "caf\xe9 na\xefve \xf1and\xfa 1/2 cup",
    "a \u2013 b \u2014 c\u2014d": "a b c d",
    "a red shirt.The man,a dog .. and ,cat": "a red shirt.the man a dog and cat",
    "so :) and ;-) &amp; <b>bold</b>": "so :-rrb- and ;--rrb- & <b> bold </b>",
    "dog., dog.? 5'10\" 50's": "dog. dog 5 10 50 's",
    "": "",
    " . ": "",
}

REFERENCES = {
    1: ["A dog runs through the snow.", "The brown dog is running in snow"],
    2: ["Two children play on a beach", "Kids are playing at the beach.", "two kids on a beach"],
    3: ["a man rides a red bicycle down the street"],
}
HYPOTHESES = {1: "A dog is running in the snow.", 2: "two kids play on the sand", 3: "A man on a bicycle"}


@pytest.fixture
def no_meteor(monkeypatch):
    """Scoring as where pycocoevalcap is not installed: quicker, where METEOR does not matter."""

    def missing():
        raise MeteorDataError("METEOR needs the data of pycocoevalcap: pip install pycocoevalcap")

    monkeypatch.setattr(metrics.scores, "Meteor", missing)


@pytest.fixture(params=["photographs", "demonstration"])
def groups(request, demo_captions) -> list[list[str]]:
    """The captions of many images: those of real photographs, and everywhere those of the demonstration."""
    return real_captions() if request.param == "photographs" else demo_captions


def official(module: str, name: str):
    """A class of pycocoevalcap; none of its Python needs Java."""
    return getattr(pytest.importorskip(f"pycocoevalcap.{module}"), name)


# -------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("caption, words", HARD_CAPTIONS.items())
def test_tokens(caption, words):
    assert tokenize(caption) == words.split()


def test_recorded_tokens():
    expected = golden()
    for key, captions in expected["references"].items():
        assert [" ".join(tokenize(c)) for c in captions] == expected["tokenized"]["references"][key]
    for key, caption in expected["hypotheses"].items():
        assert " ".join(tokenize(caption)) == expected["tokenized"]["hypotheses"][key]


def test_tokens_beside_the_java_program(tmp_path):
    spec = importlib.util.find_spec("pycocoevalcap")
    if not (spec and shutil.which("java")):
        pytest.skip("needs java and pycocoevalcap")
    (jar,) = Path(next(iter(spec.submodule_search_locations))).glob("tokenizer/*.jar")
    captions = [caption for caption in HARD_CAPTIONS if caption.strip()]
    if has_real_captions():
        captions += [caption.replace("\n", " ") for group in real_captions() for caption in group]
    text = tmp_path / "captions.txt"
    text.write_text("\n".join(captions), encoding="utf-8")
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", jar, "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", text]
    lines = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\n")
    dropped = official("tokenizer.ptbtokenizer", "PUNCTUATIONS")
    for caption, line in zip(captions, lines):
        assert tokenize(caption) == [word for word in line.split() if word not in dropped], caption


def test_tokens_are_words_without_blanks_or_capitals():
    generator = random.Random(0)
    pieces = [*HARD_CAPTIONS, *map(chr, range(1, 0x250)), "\u2019s", "\ud800", "<a b", "b>", "no.", " ", "\n"]
    for _ in range(500):
        caption = "".join(generator.choices(pieces, k=8))
        words = tokenize(caption)
        assert all(words) and " ".join(words).split() == words
        assert words == tokenize(caption)  # remembered pieces or not
        assert [word.lower() for word in words] == words


def test_long_captions_take_no_time():
    for piece in ("a-", "a.", "<a", "'", "a'", "1,", "a@", "-", "a/", "www.a", "!", "x"):
        tokenize(piece * 2000)


# ---------------------------------------------------------------------------------------- the official scores


def test_recorded_scores(scorer):
    expected = golden()
    result = score_captions(expected["references"], expected["hypotheses"], scorer)
    assert result.overall.keys() == expected["scores"].keys()
    for name, score in expected["scores"].items():
        assert result.overall[name] == pytest.approx(score, abs=1e-9)
    for name, scores in expected["per_image"].items():
        for key, score in scores.items():
            assert result.per_image[key][name] == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize("source", ["photographs", "demonstration", "recorded", "small"])
def test_beside_the_official_scorers(source, no_meteor, demo_captions):
    if source == "recorded":
        references, hypotheses = golden()["references"], golden()["hypotheses"]
    elif source != "small":
        groups = real_captions() if source == "photographs" else demo_captions
        groups = [group for group in groups if len(group) == 5]
        hypotheses = {i: group[i % 5] for i, group in enumerate(groups)}
        references = {i: group[: i % 5] + group[i % 5 + 1 :] for i, group in enumerate(groups)}
    else:
        references = REFERENCES | {4: ["", "a dog"], 5: ["a"], 6: [".", "!"], 7: ["a b c d e"], 8: ["x y"]}
        hypotheses = HYPOTHESES | {4: "", 5: "a", 6: ".", 7: "e d c b a a a a", 8: "a a a b c"}
    result = score_captions(references, hypotheses)
    words = {key: [" ".join(tokenize(c)) for c in captions] for key, captions in references.items()}
    guesses = {key: [" ".join(tokenize(hypotheses[key]))] for key in references}

    overall, columns = official("bleu.bleu", "Bleu")(4).compute_score(words, guesses, verbose=0)
    scores = {f"Bleu_{n}": pair for n, pair in enumerate(zip(overall, columns), 1)}
    scores["ROUGE_L"] = official("rouge.rouge", "Rouge")().compute_score(words, guesses)
    scores["CIDEr"] = official("cider.cider", "Cider")().compute_score(words, guesses)
    for name, (score, column) in scores.items():
        assert result.overall[name] == pytest.approx(score, abs=1e-9)
        own = [image[name] for image in result.per_image.values()]
        assert own == pytest.approx(list(column), abs=1e-9)


def test_bleu4_is_nltks(groups):
    from nltk.translate.bleu_score import corpus_bleu

    groups = [[tokenize(caption) for caption in group] for group in groups]
    references, hypotheses = [group[1:] for group in groups], [group[0] for group in groups]
    assert bleu4(references, hypotheses) == corpus_bleu(references, hypotheses) > 0.1


def test_bleu4_is_the_official_one_where_all_is_regular(no_meteor, groups):
    references = {i: group[1:] for i, group in enumerate(groups)}
    hypotheses = {i: group[0] for i, group in enumerate(groups)}
    hypotheses = {i: caption for i, caption in hypotheses.items() if len(tokenize(caption)) >= 4}
    references = {i: references[i] for i in hypotheses}
    overall = score_captions(references, hypotheses).overall
    words = [[tokenize(caption) for caption in captions] for captions in references.values()]
    assert bleu4(words, list(map(tokenize, hypotheses.values()))) == pytest.approx(
        overall["Bleu_4"], abs=1e-9
    )


def test_bleu4_without_a_match(no_meteor):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bleu4([[list("abcde")]], [list("abxyz")]) == 0
        assert bleu4([[list("abcde")]], [[]]) == 0
    assert 0 < score_captions({1: ["a b c d e"]}, {1: "a b x y z"}).overall["Bleu_4"] < 1e-4


# ------------------------------------------------------------------------------------------------- properties


def test_same_caption_scores_one(scorer):
    captions = {i: caption for i, (caption, *_) in enumerate(REFERENCES.values())}
    result = score_captions({i: [caption] for i, caption in captions.items()}, captions, scorer)
    for scores in (result.overall, *result.per_image.values()):
        assert scores.pop("CIDEr") == pytest.approx(10)
        assert list(scores.values()) == pytest.approx([1.0] * 6)


def test_scores_are_in_their_ranges(scorer):
    result = score_captions(REFERENCES, HYPOTHESES, scorer)
    assert list(result.per_image) == list(REFERENCES)
    for scores in (result.overall, *result.per_image.values()):
        assert all(0 <= score <= (10 if name == "CIDEr" else 1) for name, score in scores.items())
        assert scores["Bleu_1"] >= scores["Bleu_2"] >= scores["Bleu_3"] >= scores["Bleu_4"]
    for name in ("ROUGE_L", "CIDEr"):
        mean = sum(scores[name] for scores in result.per_image.values()) / 3
        assert result.overall[name] == pytest.approx(mean)


def test_order_does_not_matter(no_meteor):
    forward = score_captions(REFERENCES, HYPOTHESES)
    backward = {key: captions[::-1] for key, captions in reversed(REFERENCES.items())}
    result = score_captions(backward, HYPOTHESES)
    assert result.overall == pytest.approx(forward.overall, abs=1e-12)
    for key, scores in forward.per_image.items():
        assert result.per_image[key] == pytest.approx(scores, abs=1e-12)


def test_lists_score_as_dictionaries_do(no_meteor):
    by_key = score_captions(REFERENCES, HYPOTHESES)
    by_position = score_captions(list(REFERENCES.values()), tuple(HYPOTHESES.values()))
    assert by_position.overall == by_key.overall
    assert list(by_position.per_image) == [0, 1, 2]
    assert list(by_position.per_image.values()) == list(by_key.per_image.values())


def test_case_and_full_stop_do_not_matter(no_meteor):
    shouted = {key: caption.upper().rstrip(".") + " ." for key, caption in HYPOTHESES.items()}
    assert score_captions(REFERENCES, shouted) == score_captions(REFERENCES, HYPOTHESES)


def test_one_more_reference_never_lowers_rouge():
    generator = random.Random(0)
    for _ in range(200):
        *references, hypothesis = (generator.choices("abcdef", k=generator.randint(0, 9)) for _ in range(4))
        scores = [rouge_l(references[:n], hypothesis) for n in (1, 2, 3)]
        assert scores == sorted(scores)


# ------------------------------------------------------------------------------------------------ mistakes


def test_images_that_do_not_fit(no_meteor):
    with pytest.raises(ValueError, match="2 images without a hypothesis: 1, 2"):
        score_captions(REFERENCES, {3: HYPOTHESES[3]})
    with pytest.raises(ValueError, match="1 image without a reference: 'b'"):
        score_captions({"a": ["a dog"]}, {"a": "a dog", "b": "a cat"})
    with pytest.raises(ValueError, match="without a reference: 1"):
        score_captions({1: []}, {1: "a dog"})
    with pytest.raises(ValueError, match=r"30 images without a hypothesis: 0, .*9, \.\.\.$"):
        score_captions({i: ["a dog"] for i in range(31)}, {30: "a dog"})
    with pytest.raises(ValueError, match="no captions"):
        score_captions({}, {})
    with pytest.raises(TypeError, match="list of captions"):
        score_captions({1: "a dog"}, {1: "a dog"})
    with pytest.raises(TypeError, match="not list"):
        score_captions({1: ["a dog"]}, {1: ["a dog"]})
    with pytest.raises(ValueError, match="2 images have references, but 1 have a hypothesis"):
        score_captions([["a dog"], ["a cat"]], ["a dog"])
    for references, hypotheses in (({1: ["a dog"]}, ["a dog"]), ([["a dog"]], "a dog"), ("a dog", "a dog")):
        with pytest.raises(TypeError, match="two dictionaries or two lists"):
            score_captions(references, hypotheses)
    with pytest.raises(TypeError, match="list of captions"):
        score_captions(["a dog"], ["a dog"])
    with pytest.raises(ValueError, match="no captions"):
        score_captions([], [])


def test_without_meteor(no_meteor, capsys):
    result = score_captions(REFERENCES, HYPOTHESES)
    assert list(result.overall) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert "METEOR" in output.err and "pip install pycocoevalcap" in output.err


def test_needs_no_installed_package():
    # -S: without the installed packages, NLTK and pycocoevalcap among them
    code = "import sys; sys.path.insert(0, sys.argv[1]); from metrics import score_captions\n"
    code += "print(len(score_captions({1: ['a dog']}, {1: 'a dog'}).overall))"
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code, str(ROOT)], capture_output=True, text=True)
    assert run.stdout == "6\n" and run.stderr.startswith("METEOR left out"), run.stderr


# ---------------------------------------------------------------------------------------------------- CIDEr-D


def words_of(captions_of_images) -> list[list[list[str]]]:
    return [[tokenize(caption) for caption in captions] for captions in captions_of_images]


def test_cider_reward_is_the_official_score(no_meteor, groups):
    groups = groups[:500]
    words = words_of(groups)
    cider = CiderD.from_references([captions[1:] for captions in words])
    expected = score_captions(
        {i: g[1:] for i, g in enumerate(groups)}, {i: g[0] for i, g in enumerate(groups)}
    )
    batch = [words[i] for i in (7, 3, 7, 11)]  # any images in any order
    scores = cider.score([captions[1:] for captions in batch], [captions[0] for captions in batch])
    assert scores == pytest.approx([expected.per_image[i]["CIDEr"] for i in (7, 3, 7, 11)], abs=1e-12)
    assert cider.score([words[5][1:]] * 2, [words[5][0], []])[1] == 0


def test_cider_frequencies_can_be_saved():
    references = words_of(REFERENCES.values())
    hypotheses = [tokenize(caption) for caption in HYPOTHESES.values()]
    cider = CiderD.from_references(references)
    saved = json.loads(json.dumps(cider.to_dict()))
    assert saved["n_documents"] == 3 and saved["document_frequencies"]["a"] == 3
    assert saved["document_frequencies"]["on a beach"] == 1
    again = CiderD.from_dict(saved)
    assert again.to_dict() == saved
    assert again.score(references, hypotheses) == cider.score(references, hypotheses)


def test_cider_mistakes():
    cider = CiderD.from_references(words_of(REFERENCES.values()))
    with pytest.raises(ValueError):
        cider.score([[["a"]]], [])
    with pytest.raises(ValueError, match="without a reference"):
        cider.score([[]], [["a"]])
    with pytest.raises(ValueError, match="documents"):
        CiderD({("a",): 3}, 2)
    with pytest.raises(ValueError, match="documents"):
        CiderD.from_references([])


def test_cider_of_one_image_is_zero():
    # Every word is in every document, so none says anything: the reward wants frequencies of a whole set.
    assert CiderD.from_references([[["a", "dog"]]]).score([[["a", "dog"]]], [["a", "dog"]]) == [0.0]
    assert math.isfinite(CiderD({}, 10).score([[["a"]]], [["a"]])[0])
