"""Several runs on one folder at once, and killed: a file is from one model, or a run was refused."""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from folder_images import ColourCaptioner, Killed, make_images, run

from captioning.data.sidecars import Backup
from captioning.data.submissions import read_submission
from utils import UserError

MODES = ("skip", "overwrite", "append", "prepend")


# --- small runs in forked processes -------------------------------------------------------------------------


class Meeting:
    """Lets processes wait for each other: each has a file for what it has come to."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()

    def reach(self, what: str) -> None:
        (self.folder / f"{what} {os.getpid()}").touch()

    def wait(self, what: str, number: int) -> None:
        end = time.monotonic() + 60
        while sum(name.startswith(what) for name in os.listdir(self.folder)) < number:
            assert time.monotonic() < end, f"{what}: waited in vain"
            time.sleep(0.005)


class MeetingCaptioner(ColourCaptioner):
    """At its first batch it says that it works, and waits for others to have come to `what`."""

    def __init__(self, meeting: Meeting, what: str, number: int, word: str = "colour"):
        super().__init__(word=word)
        self.meeting, self.what, self.number = meeting, what, number

    def decode_prepared(self, *arguments, **options):
        if not self.batches:
            self.meeting.reach("work")
            self.meeting.wait(self.what, self.number)
        return super().decode_prepared(*arguments, **options)


def at_once(meeting: Meeting, *jobs: Callable[[], object]) -> list[str]:
    """What each job raised as an error of the user, "" where it went well; each in a process of its own."""
    children = []
    for job in jobs:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            error = "a traceback"
            try:
                job()
                error = ""
            except UserError as refused:
                error = str(refused)
            finally:
                meeting.reach("refused" if error else "done")
                os.write(write, json.dumps(error).encode())
                os._exit(0)
        os.close(write)
        children.append((child, read))
    answers = []
    for child, answer in children:
        os.waitpid(child, 0)
        answers.append(json.loads(os.read(answer, 10_000)))
        os.close(answer)
    return answers


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("existing", MODES)
def test_the_same_command_several_times_at_once(number, existing, tmp_path):
    folder, meeting = make_images(tmp_path / "in", 24), Meeting(tmp_path / "meeting")
    for image in range(0, 24, 2):
        (folder / f"img{image}.txt").write_text("old")

    def job() -> None:
        run(MeetingCaptioner(meeting, "refused", number - 1), folder, sidecars=True, existing=existing)

    errors = sorted(at_once(meeting, *[job] * number))
    refusal = (
        f"{folder}: another run is writing .txt sidecars there; wait for its end, or give another --side"
    )
    assert errors[0] == "" and all(error.startswith(refusal) for error in errors[1:])
    for image in range(24):
        text = (folder / f"img{image}.txt").read_text()
        assert text.count(f"colour {image} 0 200") == (existing != "skip" or image % 2 == 1)
        assert text.count("old") == (image % 2 == 0 and existing != "overwrite")
    names = {path.name for path in folder.iterdir() if path.suffix not in (".png", ".txt")}
    assert names == (set() if existing == "skip" else {Backup.FOLDER})


def test_two_models_and_one_output(tmp_path):
    folder, output = make_images(tmp_path / "in", 24), tmp_path / "new" / "out.csv"
    meeting = Meeting(tmp_path / "meeting")

    def job(word: str) -> None:
        run(MeetingCaptioner(meeting, "refused", 1, word), folder, output, model=word)

    errors = at_once(meeting, partial(job, "a"), partial(job, "b"))
    assert sorted(errors) == [
        "",
        f"{output}: another run is writing it; wait for its end, or give another file",
    ]
    captions = [text for _, text in read_submission(output)]
    assert len(captions) == 24 and all(text.startswith("ab"[errors.index("")]) for text in captions)
    assert os.listdir(output.parent) == ["out.csv"]


def test_two_models_and_two_extensions_do_not_meet(tmp_path):
    folder, meeting = make_images(tmp_path / "in", 24), Meeting(tmp_path / "meeting")
    extensions = ("txt", "txt2", "caption")

    def job(extension: str) -> None:
        captioner = MeetingCaptioner(meeting, "work", 3, extension)
        run(captioner, folder, sidecars=True, sidecar_extension=extension, model=extension)

    assert at_once(meeting, *(partial(job, extension) for extension in extensions)) == ["", "", ""]
    for extension in extensions:
        for number in range(24):
            assert (folder / f"img{number}.{extension}").read_text() == f"{extension} {number} 0 200\n"
    assert len(os.listdir(folder)) == 4 * 24


@pytest.mark.parametrize("first", ["whole", "part"])
def test_a_run_on_a_subfolder_of_another_run(first, tmp_path):
    folder, meeting = make_images(tmp_path / "in", 12), Meeting(tmp_path / "meeting")
    part = make_images(folder / "a" / "b", 12)

    def job(name: str, extension: str, number: int) -> None:
        if name != first:
            meeting.wait("work", 1)
        where, captioner = folder if name == "whole" else part, MeetingCaptioner(meeting, "refused", number)
        run(captioner, where, sidecars=True, sidecar_extension=extension, recursive=name == "whole")

    second = "part" if first == "whole" else "whole"
    jobs = [
        partial(job, first, ".txt", 1),
        partial(job, second, ".txt", 0),
        partial(job, second, ".caption", 0),
    ]
    errors = at_once(meeting, *jobs)
    where = folder if first == "whole" else part
    assert (
        errors[0] == "" and errors[1].startswith(f"{where}: another run is writing .txt") and errors[2] == ""
    )
    assert len(list(folder.rglob("*.txt"))) == (24 if first == "whole" else 12)
    assert not list(folder.rglob(".captions*"))


# --- killed in the middle -----------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", MODES)
def test_no_file_is_torn_wherever_a_run_ends(existing, tmp_path, monkeypatch):
    """Ended before the n-th rename, for a number of random n; SIGKILL itself is in the slow tests."""
    folder, rng = make_images(tmp_path / "in", 60), random.Random(existing)
    before = {}
    for number in range(0, 60, 2):
        before[number] = f"{'é' * (number % 3)}old {number}".encode(["utf-8", "utf-16", "cp1252"][number % 3])
        (folder / f"img{number}.txt").write_bytes(before[number])
    plain, renames = os.replace, itertools.count(1)
    dies_at = set(rng.sample(range(2, 60), 6))

    def replace(*names):
        if next(renames) in dies_at:
            raise Killed
        return plain(*names)

    monkeypatch.setattr(os, "replace", replace)
    kills = 0
    while True:
        try:
            run(ColourCaptioner(), folder, sidecars=True, existing=existing)
            break
        except Killed:
            kills += 1
        for number in range(60):
            path = folder / f"img{number}.txt"
            content = path.read_bytes() if path.exists() else None
            assert content == before.get(number) or is_whole(content, number, existing), (number, content)
    assert kills >= 3
    for number in range(60):
        content = (folder / f"img{number}.txt").read_bytes()
        assert is_whole(content, number, existing) or (existing == "skip" and content == before[number])
    if existing != "skip":
        kept = folder / Backup.FOLDER
        assert {path.name: path.read_bytes() for path in (kept / Backup.FIRST).iterdir()} == {
            f"img{number}.txt": content for number, content in before.items()
        }
        new = {f"img{number}.txt" for number in range(60) if number not in before}
        assert {*(kept / Backup.NEW).read_text().splitlines()} == new


def is_whole(content: bytes | None, number: int, existing: str) -> bool:
    """Whether a sidecar has all that it is to have, once."""
    if content is None:
        return False
    codec = "utf-8" if number % 2 or existing == "overwrite" else ["utf-8", "utf-16", "cp1252"][number % 3]
    text = content.decode(codec)
    olds = 1 if number % 2 == 0 and existing in ("append", "prepend") else 0
    return text.count(f"colour {number} 0 200") == 1 and text.count(f"old {number}") == olds
