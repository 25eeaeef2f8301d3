"""One bad file never ends a folder, and nothing is written outside of it: links, devices, pipes, permissions,
encodings, odd names, folders that are gone."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import assert_one_line
from folder_images import ColourCaptioner, Killed, make_images, no_captioner, run
from PIL import Image

from captioning.data.sidecars import Backup
from captioning.data.submissions import read_submission, write_submission
from captioning.folders.journal import Entry, Journal
from utils import UserError, printable

MODES = ("skip", "overwrite", "append", "prepend")


@contextmanager
def without_privileges():
    """As a user who may not read every file, even where the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that every user can reach, unlike tmp_path."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    for path in folder.rglob("*"):
        path.chmod(0o777)
    shutil.rmtree(folder)


# --- what cannot be read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", MODES)
def test_files_without_permission_are_named_and_the_rest_goes_on(existing, open_folder):
    other = make_images(open_folder / "other", 2)
    (other / "img0.txt").write_text("mine")
    run(ColourCaptioner(), other, sidecars=True, existing=existing)  # imports all that it needs
    folder = make_images(open_folder / "in", 8)
    for name in ("img1.txt", "img2.txt", "img3.txt"):
        (folder / name).write_text("mine")
    for path in (open_folder, folder, folder / "img2.txt"):
        path.chmod(0o777)
    for name in ("img0.png", "img1.txt"):
        (folder / name).chmod(0)
    (folder / "img3.txt").chmod(0o444)
    with without_privileges():
        if os.access(folder / "img1.txt", os.R_OK, effective_ids=True):
            pytest.skip("this user may read every file")
        problems = run(ColourCaptioner(), folder, sidecars=True, existing=existing)
    assert sorted(problems) == [
        f"{folder}/img0.png: cannot be read (Permission denied)",
        f"{folder}/img1.txt: cannot be read (Permission denied)",
        *([] if existing == "skip" else [f"{folder}/img3.txt: cannot be written (it is read-only)"]),
    ]
    (folder / "img1.txt").chmod(0o644)
    assert (folder / "img1.txt").read_text() == "mine" and "mine" in read_kept(folder, "img2.txt")
    assert all((folder / f"img{number}.txt").exists() for number in range(4, 8))
    assert (folder / "img3.txt").read_text() == "mine"
    assert not (folder / "img0.txt").exists() and not list(folder.glob(".captions*"))


def read_kept(folder, name: str) -> str:
    """A sidecar's text and what it was before."""
    return "".join(
        path.read_text()
        for path in (folder / name, folder / Backup.FOLDER / Backup.FIRST / name)
        if path.exists()
    )


PLACES = {
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "full device": lambda path: path.symlink_to("/dev/full"),
    "link to a folder": lambda path: path.symlink_to("/usr"),
    "loop": lambda path: path.symlink_to(path),
    "huge": lambda path: path.write_bytes(b"x" * 2_000_000),
}


@pytest.mark.parametrize("existing", MODES)
@pytest.mark.parametrize("output", [False, True])
def test_sidecars_that_are_no_files(existing, output, tmp_path, capsys):
    folder = make_images(tmp_path / "in", 12)
    for number, make in enumerate(PLACES.values()):
        make(folder / f"img{number}.txt")
    file = tmp_path / "out.csv" if output else None
    for _ in range(2):
        captioner = ColourCaptioner()
        problems = run(captioner, folder, file, sidecars=True, existing=existing)
        assert len(problems) == len(PLACES) and all(problem.isprintable() for problem in problems)
        for number in range(len(PLACES)):
            assert f"{folder}/img{number}.txt: " in "\n".join(problems)
        kind = "no caption" if existing == "skip" else "sidecar not written"
        assert f"{kind}: " in capsys.readouterr().err
    for number in range(len(PLACES), 12):
        assert f"colour {number} 0 200" in (folder / f"img{number}.txt").read_text()
    assert os.path.islink(folder / "img2.txt") and (folder / "img1.txt").is_fifo()
    assert not list(folder.glob(".captions*"))


def test_only_bad_sidecars_are_no_wrong_input(tmp_path):
    folder = make_images(tmp_path / "in", 1)
    (folder / "img0.txt").mkdir()
    assert len(run(no_captioner, folder, sidecars=True)) == 1


def test_a_bad_place_that_is_mended_between_kill_and_rerun(tmp_path):
    folder = make_images(tmp_path / "in", 8)
    (folder / "img0.txt").mkdir()
    (folder / "img1.txt").write_bytes(b"m\0ne")
    with pytest.raises(Killed):
        run(ColourCaptioner(kill_at=2), folder, sidecars=True, existing="append")
    (folder / "img0.txt").rmdir()
    (folder / "img1.txt").write_text("mine")
    assert not run(ColourCaptioner(), folder, sidecars=True, existing="append")
    assert (folder / "img0.txt").read_text() == "colour 0 0 200\n"
    assert (folder / "img1.txt").read_text() == "mine, colour 1 0 200"


# --- links --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", MODES)
def test_links_lead_nothing_out_of_the_folder(existing, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "text").write_text("mine")
    (outside / "blank").write_text("")
    folder = make_images(tmp_path / "in", 8)
    names = [".captions.txt.journal-0", ".captions.txt.journal-1", ".captions.txt.journal-7", "out.csv",
             "out.csv.journal-0", "img0.txt"]  # fmt: skip
    for name in names:
        (folder / name).symlink_to(outside / "text")
    for name, target in (("img1.txt", "blank"), ("img2.txt", "none"), ("img3.txt", "deeper/none")):
        (folder / name).symlink_to(outside / target)
    (folder / "img4.txt").symlink_to(folder / "img5.png")
    image = (folder / "img5.png").read_bytes()
    before = sorted(os.listdir(outside))
    for output in (None, folder / "out.csv"):
        run(ColourCaptioner(), folder, output, sidecars=True, existing=existing)
    assert sorted(os.listdir(outside)) == before and (outside / "text").read_text() == "mine"
    assert (outside / "blank").read_text() == "" and (folder / "img5.png").read_bytes() == image
    for number in (1, 2, 3, 5, 6, 7):
        assert (folder / f"img{number}.txt").read_text() == f"colour {number} 0 200\n"
        assert not (folder / f"img{number}.txt").is_symlink()
    assert len(read_submission(folder / "out.csv")) == 8
    assert (folder / "img0.txt").is_symlink() == (existing == "skip")
    assert not list(folder.glob("*journal*")) and not list(folder.glob(".captions*"))


def test_sidecars_of_images_in_linked_folders_are_refused(tmp_path):
    folder, outside = make_images(tmp_path / "in", 1), make_images(tmp_path / "outside", 1)
    (folder / "linked").symlink_to(outside)
    (tmp_path / "ids.csv").write_text("image_id\nimg0\nlinked/img0.png\n")
    with pytest.raises(UserError, match=f"{folder}/linked: leads out of {folder}"):
        run(no_captioner, folder, test_csv=tmp_path / "ids.csv", sidecars=True)
    assert os.listdir(outside) == ["img0.png"] and not list(folder.glob("*.txt"))


@pytest.mark.parametrize("name", ["out.csv.journal-0", ".out.csv.lock"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/full"), Path.mkdir])
def test_journals_and_locks_that_are_no_files(make, name, tmp_path):
    """Replaced, or refused: in no case waited for, or read from."""
    make(tmp_path / name)
    try:
        run(ColourCaptioner(), make_images(tmp_path / "in", 3), tmp_path / "out.csv")
    except (UserError, OSError) as error:
        assert name in printable(str(error))
    else:
        assert len(read_submission(tmp_path / "out.csv")) == 3


# --- names --------------------------------------------------------------------------------------------------


def test_names_that_are_not_utf8(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xfc"))
    make_images(folder, 2)
    image = Path(os.fsdecode(os.fsencode(folder) + b"/\xe9.png"))
    shutil.copy(folder / "img1.png", image)
    make_images(folder / "b" / os.fsdecode(b"\xff"), 1)
    for existing, output in (("skip", "a.csv"), ("overwrite", "a.json"), ("append", "a.jsonl")):
        how = {"prefix": "{name} of {folder},", "existing": existing, "recursive": True}
        with pytest.raises(Killed):
            run(ColourCaptioner(kill_at=1), folder, tmp_path / output, sidecars=True, **how)
        assert not run(ColourCaptioner(), folder, tmp_path / output, sidecars=True, **how)
        captions = dict(read_submission(tmp_path / output))
        assert captions.keys() == {"img0.png", "img1.png", "\\xe9.png", "b/\\xff/img0.png"}
        assert captions["\\xe9.png"].endswith("colour 1 0 200")
    assert image.with_suffix(".txt").read_text() == "\\xe9 of f\\xfc, colour 1 0 200\n"
    (folder / "\\xe9.png").write_bytes(image.read_bytes())
    with pytest.raises(UserError, match="rename one"):
        run(no_captioner, folder, tmp_path / "a.csv")


def test_a_sidecar_whose_name_is_too_long_to_be_written_aside(tmp_path):
    folder = make_images(tmp_path / "in", 2)
    (folder / "img1.png").rename(folder / f"{'x' * 245}.png")
    (problem,) = run(ColourCaptioner(), folder, sidecars=True)
    assert "cannot be written (File name too long)" in problem
    assert (folder / "img0.txt").read_text() == "colour 0 0 200\n"


@pytest.mark.parametrize("extension", [".csv", ".json", ".jsonl"])
def test_an_id_of_a_file_name_that_is_not_utf8(extension, tmp_path):
    write_submission(tmp_path / f"x{extension}", [("a\udce9", "b")])
    escaped = extension == ".csv"
    assert read_submission(tmp_path / f"x{extension}") == [("a\\udce9", "b") if escaped else ("a\udce9", "b")]


def test_line_ends_and_formulas_in_a_csv(tmp_path):
    ids = [f"{start}{middle}" for start in "=+-@\t\r\n" for middle in ("1", "1\r2", "1\n2")]
    rows = [(image_id, image_id) for image_id in ids]
    write_submission(tmp_path / "a.csv", rows, escape_formulas=True)
    assert read_submission(tmp_path / "a.csv") == rows
    assert (tmp_path / "a.csv").read_bytes().count(b"'") == 2 * len(rows)
    write_submission(tmp_path / "b.csv", [("a\rb", "c\rd"), ("e", "f\rg")])
    assert read_submission(tmp_path / "b.csv") == [("a\rb", "c\rd"), ("e", "f\rg")]


# --- what is gone in mid-run --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", ["output folder", "journal", "images", "images and sidecars", "sidecar folder"]
)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_what_is_removed_in_mid_run_is_one_line(what, batch, tmp_path):
    folder, output = make_images(tmp_path / "in", 12), tmp_path / "out" / "a.csv"

    class Removing(ColourCaptioner):
        def decode_prepared(self, *arguments, **options):
            if self.batches == batch - 1:
                if "folder" in what and "out" in what:
                    shutil.rmtree(output.parent)
                elif what == "journal":
                    Journal(output).path(0).unlink()
                else:
                    shutil.rmtree(folder)
            return super().decode_prepared(*arguments, **options)

    output_given = None if "sidecar" in what else output
    try:
        problems = run(Removing(), folder, output_given, sidecars="sidecar" in what)
    except UserError as error:
        assert what != "images" and "removed" in str(error) and str(error).isprintable()
    else:
        assert what == "images" and all("no such" in text.lower() for text in problems)
    assert not (tmp_path / "in").exists() or what in ("output folder", "journal")


@dataclass
class NoSettings:
    pass


def test_a_file_that_is_gone_ends_a_script_with_one_line(run_main, tmp_path):
    def main(settings) -> None:
        (tmp_path / "gone" / "file").read_bytes()

    result = run_main(SimpleNamespace(__name__="script", main=main, Settings=NoSettings))
    assert_one_line(result, f"No such file or directory: {tmp_path}/gone/file")


# --- journals -----------------------------------------------------------------------------------------------


def test_a_journal_takes_lines_of_its_own_run_alone(tmp_path):
    """As where two runs without locks have one output, or a process outlives the run that it was part of."""
    journal, entry = Journal(tmp_path / "out.csv"), Entry("a", [("b", None, None)], [])
    first, second = {"run": "1", "model": "m"}, {"run": "2", "model": "m"}
    journal.begin(first, [])
    for process in (0, 1):
        journal.append(process, first, [entry])
    journal.begin(second, [])
    for process in (0, 1, 2):
        with pytest.raises(UserError, match="written by another run"):
            journal.append(process, first, [entry])
    assert journal.files() == [journal.path(0)] and journal.count() == 0
    journal.append(1, second, [entry])
    assert journal.read({"model": "m"})[0].keys() == {"a"}  # a rerun goes on, whatever its own number
    assert journal.read({"model": "other"}) == ({}, ["model", "model"])


def test_an_overtaken_run_ends_and_writes_no_more(tmp_path, monkeypatch):
    folder, output = make_images(tmp_path / "in", 12), tmp_path / "out.csv"
    monkeypatch.setattr("captioning.files.fcntl", None)  # as on Windows

    class Overtaken(ColourCaptioner):
        def decode_prepared(self, *arguments, **options):
            if self.batches == 1:
                run(ColourCaptioner(word="other"), folder, output, model="other")
            return super().decode_prepared(*arguments, **options)

    with pytest.raises(UserError, match="written by another run"):
        run(Overtaken(), folder, output)
    assert all(text.startswith("other") for _, text in read_submission(output))
    assert sorted(os.listdir(tmp_path)) == ["in", "out.csv"]


@pytest.mark.parametrize("line", [
    b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b'{"image_id": ["a"]}', b'{"image_id": "img0"}',
    b'{"image_id": "img0", "captions": [], "file": [], "before": null, "after": null}',
    b'{"image_id": "img0", "captions": [[]], "file": [], "before": null, "after": null}',
    b'{"image_id": "img0", "captions": [[1]], "file": [], "before": null, "after": null}',
    b'{"image_id": "img0", "captions": [["a", "b", 1]], "file": [], "before": null, "after": null}',
    b'{"image_id": "img0", "captions": [["a", 1, 1, 1]], "file": [], "before": null, "after": null}',
    b'{"image_id": "img0", "captions": [["a", 1, 1, [1]]], "file": [], "before": null, "after": null}',
    b'{"image_id": "img0", "captions": [["a", 1, 1, [["b"]]]], "file": [], "before": null, "after": null}',
    b'{"image_id": "img0", "captions": [["a", 1, 1, null, 1]], "file": [], "before": null, "after": null}',
    b'{"image_id": "img0", "captions": [["a"]], "file": [], "before": "\\u6771", "after": null}',
    b'{"image_id": "img0", "captions": [["a"]], "file": {}, "before": null, "after": null}',
])  # fmt: skip
def test_journals_from_elsewhere(line, tmp_path):
    folder, output = make_images(tmp_path / "in", 8), tmp_path / "out.csv"
    with pytest.raises(Killed):
        run(ColourCaptioner(kill_at=2), folder, output)
    journal = Journal(output)
    with journal.path(0).open("ab") as stream:
        stream.write(line + b"\n")
    journal.path(1).write_bytes(line)
    captioner = ColourCaptioner()
    run(captioner, folder, output)
    assert captioner.seen == 4 and len(set(read_submission(output))) == 8 and not journal.files()


def test_names_that_are_no_journals_are_left_alone(tmp_path):
    folder, output = make_images(tmp_path / "in", 2), tmp_path / "out.csv"
    names = ["out.csv.journal-x.csv", "out.csv.journal-", "out.csv.journal-1.bak", "aout.csv.journal-0"]
    for name in names:
        (tmp_path / name).write_text("mine")
    run(ColourCaptioner(), folder, output)
    assert all((tmp_path / name).read_text() == "mine" for name in names)


def test_what_killed_runs_left_beside_sidecars_is_removed(tmp_path):
    folder = make_images(tmp_path / "in", 2)
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    (folder / Backup.FOLDER).mkdir()
    left = [folder / f".img0.txt.{dead}.partial", folder / Backup.FOLDER / f".img0.txt.{dead}.partial"]
    others = [folder / f".img0.caption.{dead}.partial", folder / f".img0.txt.{os.getppid()}.partial"]
    for file in left + others:
        file.write_text("cut sho")
    run(ColourCaptioner(), folder, sidecars=True, existing="append")
    assert not any(file.exists() for file in left) and all(file.exists() for file in others)


def test_a_changed_image_is_captioned_again_beside_its_sidecar(tmp_path):
    for existing in MODES:
        folder = make_images(tmp_path / existing, 8)
        if existing != "skip":
            (folder / "img0.txt").write_text("old")
        with pytest.raises(Killed):
            run(ColourCaptioner(kill_at=2), folder, sidecars=True, existing=existing)
        Image.new("RGB", (9, 7), (99, 98, 97)).save(folder / "img0.png")
        run(ColourCaptioner(), folder, sidecars=True, existing=existing)
        expected = {"append": "old, colour 99 98 97", "prepend": "colour 99 98 97, old"}
        assert (folder / "img0.txt").read_text() == expected.get(existing, "colour 99 98 97\n")
