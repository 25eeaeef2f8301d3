"""Captioning a folder goes on after a kill with what is missing, or anew where anything has changed."""

import os
import random
import shutil
import subprocess
import sys

import pytest
from folder_images import BATCH, ColourCaptioner, Killed, make_images, no_captioner, run
from PIL import Image

from captioning.data.submissions import ScoredCaption, read_submission
from captioning.decoding.options import DecodingOptions
from captioning.folders.journal import Entry, Journal


def test_kills_cost_a_batch_each_and_change_nothing(tmp_path, capsys):
    folder, kills = make_images(tmp_path / "in", 150), 10
    run(ColourCaptioner(), folder, tmp_path / "whole.csv")
    seen, random_batch = 0, random.Random(0)
    for _ in range(kills):
        captioner = ColourCaptioner(kill_at=random_batch.randint(1, 5))
        with pytest.raises(Killed):
            run(captioner, folder, tmp_path / "killed.csv")
        seen += captioner.seen
        assert not (tmp_path / "killed.csv").exists()
    last = ColourCaptioner()
    run(last, folder, tmp_path / "killed.csv")
    assert 150 < seen + last.seen <= 150 + kills * BATCH and last.seen < 150
    assert (tmp_path / "killed.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert "going on: " in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["in", "killed.csv", "whole.csv"]


def test_another_setting_or_model_starts_anew_and_says_so(tmp_path, capsys):
    folder, output = make_images(tmp_path / "in", 12), tmp_path / "out.csv"

    def killed(**options):
        with pytest.raises(Killed):
            run(ColourCaptioner(kill_at=3), folder, output, **options)

    killed()
    captioner = ColourCaptioner(word="other")
    run(captioner, folder, output, beam_size=2)
    assert captioner.seen == 12 and "another beam_size; not used, starting anew" in capsys.readouterr().out
    assert all(caption.startswith("other") for _, caption in read_submission(output))
    killed()
    weights = tmp_path / "weights"
    weights.write_text("1")
    killed(model=[weights])
    assert "another model" in capsys.readouterr().out
    captioner = ColourCaptioner()
    os.utime(weights, (1, 1))  # the same content is the same model, however old
    run(captioner, folder, output, model=[weights])
    assert captioner.seen == 4
    killed(model=[weights])
    weights.write_text("2")
    captioner = ColourCaptioner()
    run(captioner, folder, output, model=[weights])
    assert captioner.seen == 12


@pytest.mark.parametrize("decoding", [
    {"length_penalty": 1.0}, {"no_repeat_ngram": 3}, {"min_length": 5}, {"remove_bad_endings": True},
    {"allow_unk": True}, {"num_captions": 2}, {"temperature": 1.0}, {"top_p": 0.9}, {"seed": 5},
])  # fmt: skip
def test_other_decoding_starts_anew_and_says_so(decoding, tmp_path, capsys):
    folder, output = make_images(tmp_path / "in", 12), tmp_path / "out.csv"
    with pytest.raises(Killed):
        run(ColourCaptioner(kill_at=3), folder, output, decoding=DecodingOptions())
    captioner = ColourCaptioner()
    run(captioner, folder, output, decoding=DecodingOptions(**decoding))
    assert captioner.seen == 12
    assert f"another {next(iter(decoding))}; not used, starting anew" in capsys.readouterr().out


def test_several_captions_with_scores_survive_a_kill(tmp_path):
    class Several(ColourCaptioner):
        def decode_prepared(self, images, options, ids, with_scores=False):
            found = super().decode_prepared(images, options, ids)
            return [[ScoredCaption(f"{text} {k}", -k / 3, -k / 9) for k in (1, 2)] for ((text, *_),) in found]

    folder = make_images(tmp_path / "in", 30)
    (folder / "img7.png").write_text("no image")
    how = {"decoding": DecodingOptions(num_captions=2), "with_scores": True}
    run(Several(), folder, tmp_path / "whole.csv", **how)
    with pytest.raises(Killed):
        run(Several(kill_at=4), folder, tmp_path / "killed.csv", **how)
    captioner = Several()
    run(captioner, folder, tmp_path / "killed.csv", **how)
    assert 0 < captioner.seen < 29
    assert (tmp_path / "killed.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    lines = (tmp_path / "whole.csv").read_text().splitlines()
    assert lines[:3] == [
        "image_id,caption,rank,log_prob,log_prob_per_word",
        "img0,colour 0 0 200 1,1,-0.3333,-0.1111",
        "img0,colour 0 0 200 2,2,-0.6667,-0.2222",
    ]
    assert "img7,,1,," in lines and len(lines) == 1 + 2 * 29 + 1


def test_an_image_that_changed_meanwhile_is_captioned_again(tmp_path):
    folder, output = make_images(tmp_path / "in", 12), tmp_path / "out.csv"
    with pytest.raises(Killed):
        run(ColourCaptioner(kill_at=3), folder, output)
    Image.new("RGB", (9, 7), (99, 98, 97)).save(folder / "img1.png")
    (folder / "img2.png").unlink()
    make_images(tmp_path / "more", 14)
    shutil.copy(tmp_path / "more" / "img13.png", folder)
    captioner = ColourCaptioner()
    run(captioner, folder, output)
    assert captioner.seen == 4 + 1 + 1  # the rest, the changed one, the new one
    captions = dict(read_submission(output))
    assert captions["img1"] == "colour 99 98 97" and "img2" not in captions and len(captions) == 12


def test_a_journal_that_a_kill_cut_short_or_damaged(tmp_path):
    journal = Journal(tmp_path / "out.csv")
    key, entries = (
        {"model": "m"},
        [Entry(f"id{i}", [ScoredCaption("a \u2028 caption\n", -1.5, -0.5)], ["p", 1, 2]) for i in range(3)],
    )
    journal.begin(key, entries[:1])
    journal.append(0, key, entries[1:2])
    journal.append(1, key, entries[2:])
    assert journal.read(key) == ({entry.image_id: entry for entry in entries}, []) and journal.count() == 3
    whole = journal.path(0).read_bytes()
    for length in range(len(whole)):
        journal.path(0).write_bytes(whole[:length])
        found, _ = journal.read(key)
        assert found["id2"] == entries[2] and all(found[name] == entries[int(name[2])] for name in found)
    for damage in (b"", b"\xff\n", b"[]\n", b'{"model": "m"}\n[1]\n{"image_id": 1}\n"x"\n'):
        journal.path(0).write_bytes(damage)
        assert set(journal.read(key)[0]) == {"id2"}
    journal.begin(key, entries)
    assert journal.files() == [journal.path(0)]
    journal.end_early()
    assert journal.ended_early() and journal.count() == 3 and len(journal.read(key)[0]) == 3


def test_the_file_is_written_even_where_all_was_done_before(tmp_path):
    """A kill between the last batch and the output."""
    folder, output = make_images(tmp_path / "in", 8), tmp_path / "out.csv"
    captioner = ColourCaptioner()
    run(captioner, folder, tmp_path / "whole.csv")
    with pytest.raises(Killed):
        run(ColourCaptioner(kill_at=2), folder, output)
    (folder / "img7.png").write_text("")
    for number in (4, 5, 6):
        (folder / f"img{number}.png").unlink()
    run(no_captioner, folder, output)
    assert [bool(text) for _, text in read_submission(output)] == [True] * 4 + [False]


def test_what_was_left_before_a_rename_is_removed(tmp_path):
    folder, output = make_images(tmp_path / "in", 4), tmp_path / "out.csv"
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = [tmp_path / f".{name}.{process.pid}.partial" for name in ("out.csv", "out.csv.journal-0")]
    others = [tmp_path / f".other.csv.{process.pid}.partial", tmp_path / f".out.csv.{os.getppid()}.partial"]
    for file in left + others:
        file.write_text("cut sho")
    run(ColourCaptioner(), folder, output)
    assert sorted(tmp_path.glob(".*")) == sorted(others)
