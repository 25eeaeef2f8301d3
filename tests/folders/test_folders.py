"""Captioning a folder: sidecars, subfolders, formats, unreadable files, full memory."""

import itertools
import json
import os
import re
import time

import pytest
import torch
from folder_images import ColourCaptioner, Killed, add_unreadable_files, make_images, no_captioner, run
from PIL import Image

from captioning.data.annotations import read_annotations
from captioning.data.sidecars import Backup, Sidecars
from captioning.data.submissions import ScoredCaption, read_submission, write_submission
from captioning.decoding.options import DecodingOptions
from captioning.folders.plan import FolderOptions, find_images
from captioning.folders.run import HalvingCaptioner, caption_folder
from utils import UserError, printable

# --- sidecars -----------------------------------------------------------------------------------------------


def sidecars_of(folder) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.txt")}


def test_sidecars_are_written_and_then_nothing_is_done(tmp_path, capsys):
    folder = make_images(tmp_path / "in", 6)
    words = {"prefix": "{folder} style, {name},", "suffix": ", photo"}
    run(ColourCaptioner(), folder, sidecars=True, **words)
    assert sidecars_of(folder) == {
        f"img{i}.txt": f"in style, img{i}, colour {i} 0 200, photo\n" for i in range(6)
    }
    assert capsys.readouterr().out.splitlines()[-1] == f"6 images captioned: captions in {folder}/*.txt"
    assert sorted(os.listdir(tmp_path)) == ["in"] and len(os.listdir(folder)) == 12
    run(no_captioner, folder, sidecars=True, **words)
    assert "6 had a sidecar before" in capsys.readouterr().out
    run(no_captioner, folder, tmp_path / "out.csv", sidecars=True)
    assert dict(read_submission(tmp_path / "out.csv"))["img3"] == "in style, img3, colour 3 0 200, photo"
    (folder / "img2.txt").unlink()
    captioner = ColourCaptioner()
    run(captioner, folder, sidecars=True)
    assert captioner.seen == 1 and sidecars_of(folder)["img2.txt"] == "colour 2 0 200\n"


@pytest.mark.parametrize(
    "existing, expected",
    [
        ("skip", "mine\n"),
        ("overwrite", "colour 0 0 200\n"),
        ("append", "mine, colour 0 0 200\n"),
        ("prepend", "colour 0 0 200, mine\n"),
    ],
)
def test_existing_sidecars(existing, expected, tmp_path):
    folder = make_images(tmp_path / "in", 5)
    (folder / "img0.caption").write_text("mine\n")
    run(ColourCaptioner(), folder, sidecars=True, sidecar_extension="caption", existing=existing)
    assert (folder / "img0.caption").read_text() == expected
    assert (folder / "img1.caption").read_text() == "colour 1 0 200\n"


@pytest.mark.parametrize("existing", ["overwrite", "append", "prepend"])
def test_kills_between_journal_and_sidecars_leave_none_out_and_none_twice(existing, tmp_path, monkeypatch):
    folders = {name: make_images(tmp_path / name, 10) for name in ("whole", "killed")}
    for folder in folders.values():
        for number in range(10):
            (folder / f"img{number}.txt").write_text("b\xe9\n", encoding="latin-1")
    run(ColourCaptioner(), folders["whole"], sidecars=True, existing=existing)
    plain, writes = Sidecars.write, itertools.count(1)

    def killed_while_writing(self, *arguments):
        if next(writes) in (3, 7, 12):
            raise Killed
        plain(self, *arguments)

    monkeypatch.setattr(Sidecars, "write", killed_while_writing)
    seen = 0
    for _ in range(3):
        captioner = ColourCaptioner()
        with pytest.raises(Killed):
            run(captioner, folders["killed"], sidecars=True, existing=existing)
        seen += captioner.seen
    captioner = ColourCaptioner()
    run(captioner, folders["killed"], sidecars=True, existing=existing)
    assert seen + captioner.seen == 10  # each was in the journal before its sidecar was written
    for path in folders["whole"].glob("*.txt"):
        assert path.read_bytes() == (folders["killed"] / path.name).read_bytes()


def test_sidecars_that_cannot_be_are_refused(tmp_path):
    folder = make_images(tmp_path / "in", 2)
    for options, part in (
        ({"sidecar_extension": ".JPG"}, "--sidecar_extension"),
        ({"sidecar_extension": ""}, "--sidecar_extension"),
        ({"sidecar_extension": "/../x"}, "--sidecar_extension"),
    ):
        with pytest.raises(UserError, match=part):
            run(no_captioner, folder, sidecars=True, **options)
    with pytest.raises(UserError, match="are for --sidecars"):
        run(no_captioner, folder, tmp_path / "out.csv", prefix="a photo of")
    Image.new("RGB", (5, 5)).save(folder / "img1.jpg")
    with pytest.raises(UserError, match=re.escape(f"{folder}/img1.txt would be the sidecar of")):
        run(no_captioner, folder, sidecars=True)
    assert not list(folder.glob("*.txt")) and not list(folder.glob(".*"))
    with pytest.raises(UserError, match=r"\.csv, \.json, \.jsonl"):
        run(no_captioner, folder, tmp_path / "out.tsv")


def test_a_place_where_no_sidecar_can_be_is_one_problem(tmp_path, capsys):
    folder = make_images(tmp_path / "in", 5)
    (folder / "img3.txt").mkdir()
    problems = run(ColourCaptioner(), folder, sidecars=True, existing="overwrite")
    assert len(problems) == 1 and "img3.txt" in problems[0] and len(list(folder.glob("*.txt"))) == 5
    printed = capsys.readouterr()
    assert "sidecar not written: " in printed.err and "no caption" not in printed.err
    assert "5 images captioned, 1 sidecar not written: captions in" in printed.out


# --- subfolders and formats ---------------------------------------------------------------------------------


def test_subfolders(tmp_path, capsys):
    folder = make_images(tmp_path / "in", 2)
    make_images(folder / "b" / "c", 1)
    make_images(folder / "a 10", 1, ".jpg")
    make_images(folder / "a 9", 1)
    make_images(folder / ".trash", 3)
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "b" / "notes.md").write_text("no image")
    (folder / "b" / "up").symlink_to(folder)
    run(ColourCaptioner(), folder, tmp_path / "out.csv")
    assert f"left out: 3 images in subfolders of {folder}; --recursive" in capsys.readouterr().out
    assert [row[0] for row in read_submission(tmp_path / "out.csv")] == ["img0", "img1"]
    run(ColourCaptioner(), folder, tmp_path / "out.jsonl", recursive=True, sidecars=True, prefix="{folder}")
    rows = read_submission(tmp_path / "out.jsonl")
    assert [row[0] for row in rows] == [
        "a 9/img0.png",
        "a 10/img0.jpg",
        "b/c/img0.png",
        "img0.png",
        "img1.png",
    ]
    assert (folder / "b" / "c" / "img0.txt").read_text() == "c colour 0 0 200\n"
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"{tmp_path}/out.jsonl and {folder}/**/*.txt")


def test_metadata_of_a_folder(tmp_path, capsys):
    """file_name is what Hugging Face looks for beside the file; text is what a sidecar would say."""
    folder = make_images(tmp_path / "in", 2)
    make_images(folder / "b", 1)
    (folder / "broken.png").write_bytes(b"no image")
    options = {"recursive": True, "prefix": "{folder} style,", "suffix": ", photo"}
    run(ColourCaptioner(), folder, folder / "metadata.jsonl", **options)
    entries = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert entries == [
        {"file_name": "b/img0.png", "text": "b style, colour 0 0 200, photo"},
        {"file_name": "img0.png", "text": "in style, colour 0 0 200, photo"},
        {"file_name": "img1.png", "text": "in style, colour 1 0 200, photo"},
    ]
    records = read_annotations(folder, folder)
    assert [(own.path, own.captions) for own in records] == [
        (str(folder / entry["file_name"]), [entry["text"]]) for entry in entries
    ]
    for output, start in ((tmp_path / "metadata.jsonl", "in/"), (tmp_path / "x" / "metadata.jsonl", "")):
        assert "put it there" not in capsys.readouterr().out
        run(ColourCaptioner(), folder, output, recursive=True)
        names = [json.loads(line)["file_name"] for line in output.read_text().splitlines()]
        assert names == [f"{start}{entry['file_name']}" for entry in entries]
    assert f"{output}: its file names start from {folder}; put it there" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"metadata hold one caption per image"):
        run(ColourCaptioner(), folder, folder / "metadata.jsonl", decoding=DecodingOptions(num_captions=2))
    with pytest.raises(UserError, match=r"are for --sidecars: add it .the last two are for metadata.jsonl"):
        run(ColourCaptioner(), folder, folder / "x.jsonl", prefix="x")


@pytest.mark.parametrize("name", ["metadata.jsonl", "my captions.csv"])
def test_an_output_among_the_images_keeps_what_the_user_had(name, tmp_path, capsys, monkeypatch):
    folder, mine = make_images(tmp_path / "in", 2), '{"file_name": "img0.png", "text": "by hand"}\n'
    (folder / name).write_text(mine)
    kept = folder / Backup.FOLDER / Backup.FIRST / name
    for _ in range(3):  # what a run of ours wrote is not kept
        run(ColourCaptioner(), folder, folder / name)
        assert kept.read_text() == mine and "colour 0" in (folder / name).read_text()
        assert f"what {folder / name} said before is in {kept.parent}" in capsys.readouterr().out
    assert os.listdir(kept.parent) == [name]
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for number, place in enumerate((name, f"../link/{name}"), start=2):  # however it is named
        (folder / name).write_text(f"by hand, {number}")
        run(ColourCaptioner(), ".", place)
        assert (
            folder / Backup.FOLDER / Backup.LATER / f"{name}.{number}"
        ).read_text() == f"by hand, {number}"
    (folder / name).write_text("not kept")
    run(ColourCaptioner(), folder, folder / name, backup=False)
    assert os.listdir(kept.parent) == [name] and len(os.listdir(folder / Backup.FOLDER / Backup.LATER)) == 2


def test_an_output_elsewhere_is_no_users_text(tmp_path):
    folder, output = make_images(tmp_path / "in", 2), tmp_path / "metadata.jsonl"
    output.write_text("of an earlier run")
    run(ColourCaptioner(), folder, output)
    assert "colour" in output.read_text() and not (folder / Backup.FOLDER).exists()


def test_the_list_of_ids_is_no_output(tmp_path):
    folder = make_images(tmp_path / "test" / "test", 2)
    for place in (folder, folder.parent, tmp_path):
        (place / "test.csv").write_text("image_id\nimg1\n")
        with pytest.raises(UserError, match="has the images' ids"):
            run(no_captioner, folder, place / "test.csv")
        assert (place / "test.csv").read_text() == "image_id\nimg1\n"
        (place / "test.csv").unlink()


def test_one_folder_of_100000_files(tmp_path):
    """Only names: what is done for each file before it is read takes next to no time."""
    for number in range(100_000):
        os.mknod(tmp_path / f"{number}.jpg") if hasattr(os, "mknod") else (tmp_path / f"{number}.jpg").touch()
    started = time.process_time()
    rows = find_images(tmp_path)
    Sidecars().check([path for _, path in rows], tmp_path)
    assert time.process_time() - started < 10  # about two seconds
    assert len(rows) == 100_000 and rows[99_999] == ("99999", str(tmp_path / "99999.jpg"))


@pytest.mark.parametrize("extension", [".csv", ".json", ".jsonl"])
def test_formats_come_back(extension, tmp_path):
    rows = [("a/b.png", 'a "quoted", caption'), ("é", ""), ("c\nd", "二\u2028x"), ("391895", "a dog")]
    write_submission(tmp_path / f"x{extension}", rows)
    assert read_submission(tmp_path / f"x{extension}") == rows


def test_damaged_json_lines(tmp_path):
    file = tmp_path / "x.jsonl"
    for line in ("[1]", "{", '{"image_id": 1}', '{"image_id": 1, "caption": 2}'):
        file.write_text('{"image_id": "a", "caption": "b"}\n' + line)
        with pytest.raises(UserError, match="line 2"):
            read_submission(file)
    file.write_bytes(b"\0\0\0")
    with pytest.raises(UserError, match="not a text file"):
        read_submission(file)


# --- files that cannot be captioned -------------------------------------------------------------------------


def test_bad_files_get_an_empty_row_and_a_line_each(tmp_path, capsys):
    folder, output = make_images(tmp_path / "in", 30), tmp_path / "out.csv"
    bad = add_unreadable_files(folder)
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as stream:  # a name that is not UTF-8
        stream.write((folder / "img0.png").read_bytes())
    problems = run(ColourCaptioner(), folder, output, sidecars=True)
    printed = capsys.readouterr()
    assert len(problems) == bad and f"31 images captioned, {bad} without" in printed.out
    lines = [line.partition("no caption: ")[2] for line in printed.err.splitlines()]
    *named, more = [line for line in lines if line]
    assert len(named) == 5 and set(named) < set(map(printable, problems))
    assert more == f"... and {bad - 5} more; their rows in {output} are empty"
    for part in (
        "empty.jpg: an empty file",
        "loop.jpg: a link",
        "pipe.jpg: a pipe",
        "device.jpg: a device",
        "phone.heic: ",
        "two\\nlines.png",
    ):
        assert any(part in printable(problem) for problem in problems), part
    rows = dict(read_submission(output))
    assert len(rows) == 31 + bad and sum(not caption for caption in rows.values()) == bad
    with open(os.fsencode(folder) + b"/caf\xe9.txt") as stream:
        assert stream.read() == rows["caf\\xe9"] + "\n" == "colour 0 0 200\n"
    assert len(list(folder.glob("*.txt"))) == 31 and all(
        (folder / f"img{i}.txt").read_text() == rows[f"img{i}"] + "\n" for i in range(30)
    )
    again = run(no_captioner, folder, sidecars=True)  # the unreadable ones are tried again, without a model
    assert sorted(again) == sorted(problems)


def test_a_file_without_permission(tmp_path, monkeypatch):
    folder = make_images(tmp_path / "in", 2)
    plain = Image.open

    def refuse(path, *arguments, **options):
        if "img1" in str(path):
            raise PermissionError(13, "Permission denied", path)
        return plain(path, *arguments, **options)

    monkeypatch.setattr(
        Image, "open", refuse
    )  # root may read any file, so taking its permission shows nothing
    (problem,) = run(ColourCaptioner(), folder, tmp_path / "out.csv")
    assert "img1.png: cannot be read (Permission denied)" in problem


def test_ids_of_a_list_reach_no_linked_folder(tmp_path, capsys):
    folder = make_images(tmp_path / "p", 2)
    make_images(tmp_path / "outside", 1)
    make_images(folder / "own", 1)
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "near").symlink_to(folder / "own")
    (tmp_path / "t.csv").write_text("image_id\nimg0\nlink/img0.png\nnear/img0.png\nown/img0.png\n")
    (problem,) = run(ColourCaptioner(), folder, tmp_path / "s.csv", test_csv=tmp_path / "t.csv")
    assert problem.startswith(f"{folder}/link/img0.png: in a folder that a link leads to; give that one")
    captions = dict(read_submission(tmp_path / "s.csv"))
    assert [name for name, text in captions.items() if not text] == ["link/img0.png"]


def test_nothing_readable_is_wrong_input(tmp_path):
    folder = make_images(tmp_path / "in", 1)
    (folder / "img0.png").write_text("x")
    with pytest.raises(UserError, match="not one readable image among 1"):
        run(no_captioner, folder, tmp_path / "out.csv")
    (folder / "img0.png").unlink()
    make_images(folder / "deeper", 3)
    with pytest.raises(UserError, match="3 in its subfolders, which --recursive takes"):
        run(no_captioner, folder, tmp_path / "out.csv")
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_printable():
    assert printable("a\n\x1b[1mb\udce9 é") == "a\\n\\x1b[1mb\\udce9 é"


# --- memory and sanity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [1, 3, 7])
def test_a_full_gpu_halves_the_batch(room, tmp_path, capsys):
    folder = make_images(tmp_path / "in", 21)

    class Small(ColourCaptioner):
        def decode_prepared(self, images, options, ids, with_scores=False):
            if len(images) > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().decode_prepared(images, options, ids)

    run(ColourCaptioner(), folder, tmp_path / "plain.csv")
    small = Small()
    options = FolderOptions(folder, output_csv=tmp_path / "halved.csv", batch_size=16)
    caption_folder(options, lambda: small, "model", DecodingOptions())
    assert (tmp_path / "halved.csv").read_bytes() == (tmp_path / "plain.csv").read_bytes()
    assert small.seen == 21 and "memory is full with 16 images at a time" in capsys.readouterr().err


def test_one_image_that_is_too_much_ends_the_run():
    def full(images, ids):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        HalvingCaptioner(full, 4)([torch.zeros(1)] * 3, ["a", "b", "c"])


def test_collapsed_and_empty_captions_are_named(tmp_path, capsys):
    folder = make_images(tmp_path / "in", 45)

    class Collapsed(ColourCaptioner):
        def decode_prepared(self, images, options, ids, with_scores=False):
            texts = ["a dog", "", *["a dog"] * len(images)][: len(images)]
            return [[ScoredCaption(text)] for text in texts]

    run(Collapsed(), folder, tmp_path / "out.csv")
    err = capsys.readouterr().err
    assert "only 2 different captions for 45 images: the model has probably collapsed" in err
    assert "11 of 45 captions are empty" in err
    run(ColourCaptioner(), folder, tmp_path / "out.csv")
    err = capsys.readouterr().err
    assert "collapsed" not in err and "are empty" not in err
