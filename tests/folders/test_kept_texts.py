"""What sidecars say before a run changes them: added to in its encoding, kept with permissions, restored."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT
from folder_images import ColourCaptioner, Killed, make_images, no_captioner, run

from captioning.data.sidecars import Backup
from captioning.data.submissions import read_submission
from captioning.folders.journal import Journal

MODES = ("skip", "overwrite", "append", "prepend")

CONTENTS = ["it’s".encode("cp1252"), "赤い帽子".encode("cp932"), "é\r\n".encode("utf-16"), b"plain",
            b"b\0nary\0\x01", b"", b" \r\n", b"\xff\xfe"]  # fmt: skip


def make_sidecars(folder) -> list[bytes]:
    """Five that have something in them and three blank ones, of nine images."""
    for number, content in enumerate(CONTENTS):
        (make_images(folder, 9) / f"img{number}.txt").write_bytes(content)
    return CONTENTS


def test_sidecars_in_other_encodings_and_blank_ones_are_skipped_or_not(tmp_path, capsys):
    contents = make_sidecars(tmp_path / "in")
    captioner = ColourCaptioner()
    assert not run(captioner, tmp_path / "in", sidecars=True)
    assert captioner.seen == 4 and "4 images captioned, 5 had a sidecar before" in capsys.readouterr().out
    for number, content in enumerate(contents[:5]):
        assert (tmp_path / "in" / f"img{number}.txt").read_bytes() == content
    (problem,) = run(no_captioner, tmp_path / "in", tmp_path / "out.csv", sidecars=True)
    assert "img4.txt: not a text file" in problem
    rows = read_submission(tmp_path / "out.csv")
    assert [text for _, text in rows] == [
        "it’s", "赤い帽子", "é", "plain", "", *(f"colour {number} 0 200" for number in (5, 6, 7, 8))
    ]  # fmt: skip
    assert not (tmp_path / "in" / Backup.FOLDER).exists()  # nothing of the user's was changed


@pytest.mark.parametrize("existing", ["overwrite", "append", "prepend"])
@pytest.mark.parametrize("backup", [True, False])
def test_what_was_there_before_is_kept(existing, backup, tmp_path, capsys):
    folder = tmp_path / "in"
    contents = make_sidecars(folder)
    for _ in range(2):
        problems = run(ColourCaptioner(), folder, sidecars=True, existing=existing, backup=backup)
        assert len(problems) == (existing != "overwrite") and all("img4.txt" in text for text in problems)
    found = [(folder / f"img{number}.txt").read_bytes() for number in range(9)]
    if existing == "overwrite":
        assert found == [f"colour {number} 0 200\n".encode() for number in range(9)]
    else:
        assert found[4] == contents[4] and b"it\x92s" in found[0] and found[0].count(b"colour 0 0 200") == 1
        assert "é" in found[2].decode("utf-16") and found[2].decode("utf-16").endswith("\r\n")
    kept = {path.name: path.read_bytes() for path in folder.glob(f"{Backup.FOLDER}/{Backup.FIRST}/img*")}
    changed = [number for number in range(8) if number != 4 or existing == "overwrite"]  # blank ones too
    assert kept == ({f"img{number}.txt": contents[number] for number in changed} if backup else {})
    if backup:
        assert (folder / Backup.FOLDER / Backup.NEW).read_text() == "img8.txt\n"
    said = f"what the sidecars said before they were changed is in {folder}/{Backup.FOLDER}/{Backup.FIRST}\n"
    first, second = capsys.readouterr().out.split("9 images captioned")[1:]
    assert first.count(said) == backup and said not in second, "the second run changes nothing"
    assert second.startswith(f", {9 if existing == 'overwrite' else 8} sidecars unchanged")


def test_the_trigger_word_stays_first(tmp_path, capsys):
    folder = make_images(tmp_path / "in", 6)
    for number in range(4):
        (folder / f"img{number}.txt").write_text(f"ohwx man, number {number}")
    with pytest.raises(Killed):
        run(ColourCaptioner(kill_at=2), folder, sidecars=True, existing="prepend")
    run(ColourCaptioner(), folder, sidecars=True, existing="prepend")
    assert (folder / "img0.txt").read_text() == "ohwx man, colour 0 0 200, number 0"
    assert (folder / "img4.txt").read_text() == "colour 4 0 200\n"
    said = "captions go behind what several sidecars begin with: "
    assert f'{said}"ohwx man" (4 of 4)' in capsys.readouterr().out
    run(ColourCaptioner(word="paint"), folder, sidecars=True, existing="append", prefix="ohwx man,")
    assert (folder / "img0.txt").read_text() == "ohwx man, colour 0 0 200, number 0, paint 0 0 200"
    assert (folder / "img4.txt").read_text() == "ohwx man, colour 4 0 200, paint 4 0 200\n"


def test_what_several_sidecars_begin_with_stays_first_in_these_alone(tmp_path, capsys):
    """Also where the run is interrupted and no longer finds as many of them."""
    folder = make_images(tmp_path / "in", 40)
    texts = [*["ohwx man, mine"] * 3, *["sks, mine"] * 4, *["two of all, mine"] * 2, *["mine, too"] * 2]
    for number, text in enumerate(texts, start=15):
        (folder / f"img{number}.txt").write_text(text)
    (folder / "img38.txt").write_text("ohwx man, mine")
    with pytest.raises(Killed):
        run(ColourCaptioner(kill_at=5), folder, sidecars=True, existing="prepend")
    for number in (17, 18):  # so that "ohwx man" is no longer among those of several
        (folder / f"img{number}.txt").unlink()
    run(ColourCaptioner(), folder, sidecars=True, existing="prepend")
    found = {number: (folder / f"img{number}.txt").read_text() for number in (15, 20, 22, 25, 38)}
    assert found == {
        15: "ohwx man, colour 15 0 200, mine",
        20: "sks, colour 20 0 200, mine",
        22: "colour 22 0 200, two of all, mine",
        25: "colour 25 0 200, mine, too",
        38: "ohwx man, colour 38 0 200, mine",
    }
    assert capsys.readouterr().out.count("what several sidecars begin with: ") == 2
    few = make_images(tmp_path / "few", 8)
    for number in range(8):
        (few / f"img{number}.txt").write_text("ohwx, mine" if number < 2 else f"mine {number}")
    run(ColourCaptioner(), few, sidecars=True, existing="prepend")
    assert '2 of 8 sidecars begin with "ohwx", too few to keep it first: ' in capsys.readouterr().out


# --- permissions, and the old state back --------------------------------------------------------------------


@pytest.mark.parametrize("existing", MODES)
def test_a_sidecar_and_what_is_kept_of_it_keep_their_permissions(existing, tmp_path, monkeypatch):
    """Also where the file system has no further names for a file, and in the journal of a killed run."""
    folder, modes = make_images(tmp_path / "in", 8), (0o600, 0o640, 0o664, 0o444, 0o600)
    for number, mode in enumerate(modes):
        sidecar = folder / f"img{number}.txt"
        sidecar.write_text("" if existing == "skip" or number == 4 else "mine")
        sidecar.chmod(mode)
    monkeypatch.setattr(os, "link", lambda *names, **options: os.stat("/nowhere"))
    with pytest.raises(Killed):
        run(ColourCaptioner(kill_at=2), folder, sidecars=True, existing=existing)
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in Journal(folder / ".captions.txt").files())
    problems = run(ColourCaptioner(), folder, sidecars=True, existing=existing)
    assert problems == [f"{folder}/img3.txt: cannot be written (it is read-only)"]
    assert "colour" not in (folder / "img3.txt").read_text()
    for number, mode in enumerate(modes):
        assert (folder / f"img{number}.txt").stat().st_mode & 0o777 == mode
        assert number == 3 or "colour" in (folder / f"img{number}.txt").read_text()
    kept = {path.name: path.stat().st_mode & 0o777 for path in folder.glob(f"{Backup.FOLDER}/*/img*")}
    expected = {f"img{number}.txt": mode for number, mode in enumerate(modes) if number != 3}
    assert kept == ({} if existing == "skip" else expected)


def test_the_old_state_comes_back_as_the_page_says(tmp_path):
    """Blank sidecars and those that were not there too; what was kept later stays in the backup."""
    folder = make_images(tmp_path / "photos", 12)
    make_images(folder / "b", 3)
    names = ["img1.txt", "img2.txt", "img3.txt", "b/img0.txt", "img7.txt"]
    for number, name in enumerate(names):
        (folder / name).write_text(["mine\n", "", " \r\n", "Mine, in b", "left"][number])
        (folder / name).chmod([0o600, 0o644, 0o664, 0o640, 0o444][number])
    shutil.copy(folder / "img9.png", folder / "- odd 'name' \\ .png")
    shutil.copy(folder / "img9.png", folder / os.fsdecode(b"\xe9.png"))
    shutil.copy(folder / "img9.png", folder / "two\nimg5.png")
    (folder / "img5.txt").write_text("mine")

    def state() -> dict[str, tuple[bytes, int]]:
        files = [path for path in folder.rglob("*") if path.is_file() and Backup.FOLDER not in path.parts]
        return {str(path): (path.read_bytes(), path.stat().st_mode) for path in files}

    before = state()
    for word, existing in (("colour", "append"), ("paint", "prepend"), ("hue", "overwrite")):
        run(ColourCaptioner(word=word), folder, sidecars=True, existing=existing, recursive=True)
        (folder / "img1.txt").write_text(f"by hand {word}")
    assert {*os.listdir(folder / Backup.FOLDER / Backup.LATER)} == {"img1.txt.2", "img1.txt.3"}
    page = (ROOT / "docs" / "folders.md").read_text("utf-8")
    command = "cd photos/" + page.partition("    cd photos/")[2].partition("\n\n")[0]
    result = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert not result.stderr and result.returncode == 0
    after = state()
    assert after.pop(str(folder / "two\nimg5.txt")), "a name of two lines is in no list"
    assert after == before
