"""The state that an interrupted training leaves: when it is written, and when it is gone on from."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import read_history, small_settings
from interrupted_training import OPTIONS, assert_same, assert_same_training, interrupt, start

import train
from captioning.command_line import make_settings
from captioning.training import loop
from captioning.training import resume as resuming
from captioning.training.optimization import Run
from utils import UserError


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """Two epochs of eight steps."""
    output = tmp_path_factory.mktemp("whole")
    train.train(small_settings(prepared, output, **OPTIONS))
    return output


def test_a_signal_in_the_validation_keeps_the_epochs_training(prepared, whole, tmp_path, monkeypatch, capsys):
    settings = small_settings(prepared, tmp_path / "cut", **OPTIONS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="8 of its 8 steps") as raised:
        patch.setattr(train, "caption_scores", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        train.train(settings)
    assert "epoch 1 is saved after" in str(raised.value)
    interrupt(monkeypatch, train.train, replace(settings, resume=True), 1)  # that of epoch 2
    assert "in epoch 1 after 8 of its 8 steps, from" in capsys.readouterr().out
    train.train(replace(settings, resume=True))
    assert_same_training(whole, tmp_path / "cut")


def test_a_signal_after_an_epochs_checkpoint(prepared, whole, tmp_path, monkeypatch):
    settings = small_settings(prepared, tmp_path / "cut", **OPTIONS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="epoch 1 is complete in"):
        patch.setattr(loop.Monitor, "report_epoch", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        train.train(settings)
    assert not (tmp_path / "cut" / "last.pth").exists()
    train.train(replace(settings, resume=True))
    assert_same(read_history(whole), read_history(tmp_path / "cut"))


# --- which state is gone on from ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(prepared, tmp_path_factory):
    """The same, interrupted in the third step of epoch 2."""
    output = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, train.train, small_settings(prepared, output, **OPTIONS), 11)
    return output


@pytest.fixture
def cut(stopped, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(stopped, tmp_path / "cut"))


def go_on(prepared, output, capsys, **given) -> str:
    """Resume as from the command line; return the line that says from where."""
    names = {"data_folder": str(prepared), "output_folder": str(output), "resume": True, "epochs": 2}
    train.train(make_settings(train.Settings, names | given))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("going on")]
    return line


def test_the_line_says_where_it_goes_on(prepared, whole, cut, capsys):
    assert "going on in epoch 2 after 3 of its 8 steps, from" in go_on(prepared, cut, capsys)
    assert_same_training(whole, cut)


def test_last_pth_may_be_named(prepared, whole, cut, capsys):
    go_on(prepared, cut, capsys, resume=False, checkpoint=str(cut / "last.pth"))
    assert_same_training(whole, cut)


def test_another_rate_applies_at_once_and_another_batch_size_from_the_epochs_start(prepared, cut, capsys):
    shutil.copytree(cut, cut.parent / "other")
    assert "3 of its 8 steps" in go_on(prepared, cut, capsys, decoder_lr=1e-5)
    assert read_history(cut)[1]["decoder_lr"] == 1e-5 and not (cut / "earlier_1").exists()
    line = go_on(prepared, cut.parent / "other", capsys, batch_size=8)
    assert "after epoch 1 of" in line and "last.pth: in the middle of epoch 2" in line
    assert "cannot go on with batch_size 8 (was 4)" in line
    assert (cut.parent / "other" / "earlier_1" / "last.pth").is_file()
    with pytest.raises(UserError, match="cannot go on with batch_size 8"):
        named = str(cut.parent / "other" / "earlier_1" / "last.pth")
        go_on(prepared, cut, capsys, resume=False, checkpoint=named, batch_size=8)


def edit(file: Path, change) -> None:
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)


def rewrite_random_state(content: dict) -> None:
    content["progress"]["processes"][0]["random"]["cpu"] = torch.zeros(5, dtype=torch.uint8)


UNUSABLE = {
    "other training data": lambda content: content["progress"].update(data={"train_images.hdf5": "abc"}),
    "processes 1 (was 2)": lambda content: content["progress"]["processes"].append(
        content["progress"]["processes"][0]
    ),
    "not of the epoch after the newest": lambda content: content["history"][0].update(train_loss=1.0),
    "a history of 0 epochs": lambda content: content["history"].clear(),
    "progress.steps is 0": lambda content: content["progress"].update(steps=0),
    "progress.processes[0].loss is nan": lambda content: content["progress"]["processes"][0].update(
        loss=float("nan")
    ),
    "expected the state of a random generator": rewrite_random_state,
    "expected tensors of finite numbers": lambda content: content["decoder"]["fc.bias"].fill_(float("inf")),
    "progress is a list": lambda content: content.update(progress=[]),
    "of the epoch after": lambda content: content.pop("progress"),
}


class Stop(Exception):
    pass


def first_line(prepared, output, capsys, monkeypatch) -> str:
    """The line that says from where a resumed training goes on; it stops there."""

    def stop(*_):
        raise Stop

    monkeypatch.setattr(train, "train_one_epoch", stop)
    with pytest.raises(Stop):
        go_on(prepared, output, capsys)
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("going on"))


@pytest.mark.parametrize("reason", UNUSABLE)
def test_a_state_that_cannot_be_trusted_is_left(reason, prepared, cut, capsys, monkeypatch):
    edit(cut / "last.pth", UNUSABLE[reason])
    line = first_line(prepared, cut, capsys, monkeypatch)
    assert "going on after epoch 1 of" in line
    if reason != "a history of 0 epochs":  # which counts as one of the epoch that has been completed
        assert reason in line and "last.pth: " in line


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_state_is_named(damage, prepared, cut, capsys, monkeypatch):
    content = bytearray((cut / "last.pth").read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 8
    (cut / "last.pth").write_bytes({"cut": content[:-9000], "empty": b""}.get(damage, content))
    line = first_line(prepared, cut, capsys, monkeypatch)
    assert "going on after epoch 1 of" in line and "last.pth: " in line


def test_a_completed_epochs_state_is_removed(prepared, stopped, cut, capsys):
    """As after a kill between the two."""
    go_on(prepared, cut, capsys)
    shutil.copy(stopped / "last.pth", cut)
    line = go_on(prepared, cut, capsys, epochs=3)
    assert "after epoch 2 of" in line and "last.pth" not in line
    assert not (cut / "last.pth").exists() and not (cut / "earlier_1").exists()


def test_before_the_first_checkpoint_a_state_must_fit(prepared, tmp_path, monkeypatch, capsys):
    settings = small_settings(prepared, tmp_path, **OPTIONS)
    interrupt(monkeypatch, train.train, settings, 3)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"cannot go on with seed 9 \(was 123\)"):
        go_on(prepared, tmp_path, capsys, seed=9)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    train.train(settings)  # a new start moves it away
    assert (tmp_path / "earlier_1" / "last.pth").is_file() and not (tmp_path / "last.pth").exists()


def test_going_back_moves_the_state_away(prepared, cut, capsys):
    line = go_on(prepared, cut, capsys, resume=False, checkpoint=str(cut / "checkpoint_epoch_1.pth"))
    assert "after epoch 1 of" in line and (cut / "earlier_1" / "last.pth").is_file()


# --- when it is written -------------------------------------------------------------------------------------


def test_the_clock_decides(prepared, tmp_path, monkeypatch):
    """Every 0.1 minutes, of steps that take 2 seconds: after every third of eight."""
    clock, written = itertools.count(0, 2), []
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    now, step, save = [0.0], Run.step, loop.save_checkpoint

    def timed(*arguments):
        step(*arguments)
        now[0] = next(clock) + 2.0

    def recorded(path, content):
        save(path, content)
        written.append((content["progress"]["epoch"], content["progress"]["steps"]))

    monkeypatch.setattr(Run, "step", timed)
    monkeypatch.setattr(loop, "save_checkpoint", recorded)
    train.train(small_settings(prepared, tmp_path / "a", **OPTIONS, save_every=0.1))
    assert written == [(1, 3), (1, 6), (2, 1), (2, 4), (2, 7)] and not (tmp_path / "a" / "last.pth").exists()
    written.clear()
    train.train(small_settings(prepared, tmp_path / "b", **OPTIONS, save_every=0))
    assert not written


def test_a_full_disk_does_not_end_the_training(prepared, whole, tmp_path, monkeypatch, capsys):
    def fail(path, _):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(loop, "save_checkpoint", fail)
    train.train(small_settings(prepared, tmp_path / "a", **OPTIONS, epochs=1, save_every=1e-9))
    assert "(No space left on device); the training goes on" in capsys.readouterr().out
    told = interrupt(
        monkeypatch, train.train, small_settings(prepared, tmp_path / "a", **OPTIONS, resume=True), 2
    )
    assert "epoch 2 is not saved in" in told and "No space left" in told
    assert not (tmp_path / "a" / "last.pth").exists()


def test_a_second_signal_ends_at_once(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "SAME_SIGNAL", 0.0)
    settings, backward, calls = small_settings(prepared, tmp_path, **OPTIONS), Run.backward, []

    def impatient(*arguments):
        backward(*arguments)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        calls.append(1)

    monkeypatch.setattr(Run, "backward", impatient)
    with pytest.raises(KeyboardInterrupt):
        train.train(settings)
    assert not calls and not (tmp_path / "last.pth").exists()
    handlers = {signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    assert handlers == {signal.default_int_handler, signal.SIG_DFL}


def test_in_another_thread_there_are_no_signals_to_note(prepared, tmp_path):
    thread = threading.Thread(
        target=train.train, args=[small_settings(prepared, tmp_path, **OPTIONS, epochs=1)]
    )
    thread.start()
    thread.join()
    assert len(read_history(tmp_path)) == 1


# --- what a script says -------------------------------------------------------------------------------------


def end(process: subprocess.Popen, state: Path, number: int, group: bool = False) -> tuple[str, str]:
    """Send the signal when there is a state; return what was printed."""
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    (os.killpg if group else os.kill)(process.pid, number)
    return process.communicate(timeout=120)


def assert_ended(process: subprocess.Popen, err: str, status: int) -> None:
    """With this exit status, and one line that says how to go on."""
    lines = [line for line in err.splitlines() if line.startswith("interrupted: ")]
    assert process.returncode == status and "Traceback" not in err, err
    assert len(lines) == 1 and "last.pth" in lines[0] and "go on with --resume" in lines[0], err


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_script_says_how_to_go_on(number, status, prepared, whole, tmp_path):
    settings = small_settings(prepared, tmp_path / "run", **OPTIONS, save_every=1e-9)
    settings = replace(settings, workers=2)
    process = start("train.py", settings)
    # Ctrl-C goes to the loader's processes too
    _, err = end(process, tmp_path / "run" / "last.pth", number, group=number == signal.SIGINT)
    assert_ended(process, err, status)
    train.train(replace(settings, resume=True, workers=0))
    assert_same(read_history(whole), read_history(tmp_path / "run"))
