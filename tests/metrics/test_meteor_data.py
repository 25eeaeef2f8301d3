"""METEOR's word lists, stemmer and paraphrase table: right, built once, and clear about what is damaged."""

import gzip
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT

from metrics import Meteor, MeteorDataError, meteor
from metrics.meteor_data import Lexicon, ParaphraseTable, stem

# As in the stemmer of 2010; later Snowball versions give added -> ad and others
STEMS = {
    "skies": "sky", "dying": "die", "news": "news", "a": "a", "is": "is", "'tis": "tis", "boy's": "boy",
    "caresses": "caress", "ties": "tie", "cries": "cri", "gas": "gas", "gaps": "gap", "kiwis": "kiwi",
    "bus": "bus", "outing": "outing", "proceeded": "proceed", "feed": "feed", "agreed": "agre",
    "hopping": "hop", "hoping": "hope", "luxuriated": "luxuri", "troubled": "troubl", "sized": "size",
    "added": "ad", "sing": "sing", "playfully": "play", "yellow": "yellow", "saying": "say", "enjoy": "enjoy",
    "cry": "cri", "by": "by", "say": "say", "generously": "generous", "communism": "communism",
    "arsenal": "arsenal", "realization": "realiz", "nationally": "nation", "conditional": "condit",
    "biologist": "biologist", "geology": "geolog", "quickly": "quick", "hopefully": "hope",
    "electrical": "electr", "formative": "format", "decorative": "decor", "adoption": "adopt",
    "replacement": "replac", "controlling": "control", "rolled": "roll", "rate": "rate", "cease": "ceas",
    "parable": "parabl", "probate": "probat", "bikers": "biker", "running": "run", "children": "children",
}  # fmt: skip


@pytest.mark.parametrize("word, expected", STEMS.items())
def test_stem(word, expected):
    assert stem(word) == expected


def test_synsets(data_dir):
    lexicon = Lexicon(data_dir / "meteor-1.5.jar")
    assert lexicon.synsets("children") >= lexicon.synsets("child") > frozenset()
    assert lexicon.synsets("plays") & lexicon.synsets("runs")
    assert lexicon.synsets("zzzz") == lexicon.synsets("ss") - lexicon.synsets("ss") == frozenset()


# ------------------------------------------------------------------------------- the paraphrase table's cache


def test_table_has_all_pairs_in_order(data_dir, scorer):
    sources = {}
    with gzip.open(data_dir / "data" / "paraphrase-en.gz", "rt", encoding="utf-8") as file:
        for _, (_, source, target) in zip(range(50_000), zip(file, file, file)):
            sources.setdefault(source[:-1], []).append(target[:-1])
    sources.popitem()  # it may go on
    assert len(sources) > 1000
    assert all(list(scorer._table.targets(source)) == targets for source, targets in sources.items())
    assert not scorer._table.targets("no such phrase at all")


def small_score(small_data: Path, cache_dir: Path) -> float:
    return Meteor(small_data, cache_dir).score(["people near car"], "people next to car")


def test_cache_is_made_again_when_damaged(small_data, tmp_path):
    cache_dir = tmp_path / "cache"
    expected = small_score(small_data, cache_dir)
    (cached,) = cache_dir.iterdir()
    whole = cached.read_bytes()
    for damaged in (b"", b"12345", bytes(100), whole[:-1], whole[:40], b"x" + whole[1:]):
        cached.unlink()
        cached.write_bytes(damaged)
        assert small_score(small_data, cache_dir) == expected
        assert cached.read_bytes() == whole


def test_interrupted_build_leaves_nothing(small_data, tmp_path, monkeypatch):
    def interrupted(packed):
        yield b"next to", [b"near"]
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ParaphraseTable, "_read", staticmethod(interrupted))
        with pytest.raises(KeyboardInterrupt):
            small_score(small_data, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())

    killed = tmp_path / "cache" / "killed.partial"
    killed.write_bytes(b"half a table")
    os.utime(killed, (0, 0))
    assert small_score(small_data, tmp_path / "cache") > 0.8
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_another_data_file_has_another_cache(small_data, tmp_path):
    assert small_score(small_data, tmp_path / "cache") > 0.8
    table = gzip.compress(b"0.5\nman\npeople\n")
    (small_data / "data" / "paraphrase-en.gz").write_bytes(table)
    assert small_score(small_data, tmp_path / "cache") < 0.8
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_processes_that_build_at_once(small_data, tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); from metrics import Meteor; "
    code += "print(Meteor(sys.argv[2], sys.argv[3]).score(['people near car'], 'people next to car'))"
    command = [sys.executable, "-c", code, str(ROOT), str(small_data), str(tmp_path / "cache")]
    with ThreadPoolExecutor(6) as pool:
        runs = list(pool.map(lambda _: subprocess.run(command, capture_output=True, text=True), range(6)))
    assert {(run.returncode, run.stderr) for run in runs} == {(0, "")}
    assert {float(run.stdout) for run in runs} == {small_score(small_data, tmp_path / "cache")}
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_without_a_cache_directory(small_data, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    expected = small_score(small_data, tmp_path / "cache")
    with pytest.warns(UserWarning, match="in memory"):
        scorer = Meteor(small_data, tmp_path / "file" / "cache", workers=2)
    assert scorer.score(["people near car"], "people next to car") == expected
    assert scorer.compute_score({1: ["people near car"]}, {1: "people next to car"})[1] == [expected]


def test_cache_directory_of_the_platform(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for platform, place in {"linux": ".cache", "darwin": "Library/Caches"}.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert meteor.user_cache() == tmp_path / place
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert meteor.user_cache() == tmp_path / "mine"


# ------------------------------------------------------------------------------------ missing or damaged data


def test_missing_package():
    code = "import sys; sys.path.insert(0, sys.argv[1]); from metrics import meteor\n"
    code += "try: meteor.Meteor()\nexcept meteor.MeteorDataError as error: print(error)"
    # -S: without the installed packages
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code, str(ROOT)], capture_output=True, text=True)
    assert run.stdout == "METEOR needs the data of pycocoevalcap: pip install pycocoevalcap\n", run.stderr


def damage(data: bytes, how: str) -> bytes:
    middle = len(data) // 2
    return {
        "empty": b"",
        "other": b"this is no archive",
        "cut": data[:middle],
        "flipped": data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :],
        "checksum": data[:-8] + bytes(4) + data[-4:],
    }[how]


@pytest.mark.parametrize("how", ["empty", "other", "cut", "flipped", "checksum", "missing", "no pairs"])
@pytest.mark.parametrize("name", ["meteor-1.5.jar", "data/paraphrase-en.gz"])
def test_damaged_data(small_data, tmp_path, name, how):
    path = small_data / name
    if how == "missing":
        path.unlink()
    elif how == "no pairs":
        path.write_bytes(gzip.compress(b"") if name.endswith("gz") else b"PK\5\6" + bytes(18))
    elif how in ("flipped", "checksum") and name.endswith("jar"):
        # What matters in a jar lies elsewhere: a packed word list, and its name in the directory at the end.
        jar = bytearray(path.read_bytes())
        name_in_jar = b"synonym/english.synsets"
        at = jar.find(name_in_jar) + 1000 if how == "flipped" else jar.rfind(name_in_jar)
        jar[at : at + 8] = bytes(8)
        path.write_bytes(jar)
    else:
        path.write_bytes(damage(path.read_bytes(), how))
    with pytest.raises(MeteorDataError) as raised:
        Meteor(small_data, tmp_path / "cache")
    message = str(raised.value)
    assert "\n" not in message and str(path) in message and "pip install" in message
    assert not list((tmp_path / "cache").glob("*"))
