"""A training that was interrupted within an epoch ends as one that was not: bit for bit, on the CPU."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, blip_settings, read_history, small_settings

import train
import train_model
from captioning import interruption, validation
from captioning.command_line import make_settings, parse_settings
from captioning.engine import Run
from captioning.resume import OF_THIS_RUN
from utils import Terminated, UserError

TIMES = ("seconds", "captions_per_second")
RESNET = {"encoder_name": "resnet18", "encoder_weights": "none", "encoder_lr": 1e-4}


def assert_same(one, other, name="it") -> None:
    """Nested dictionaries and lists with the same tensors, bit for bit, and the same values."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            if key not in TIMES:
                assert_same(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), name
        for index, pair in enumerate(zip(one, other)):
            assert_same(*pair, f"{name}[{index}]")
    else:
        assert one == other, name


def assert_same_training(whole: Path, resumed: Path) -> None:
    """The same files; the same weights, states of the optimizer, history and captions."""
    names = [sorted(file.name for file in folder.iterdir()) for folder in (whole, resumed)]
    assert names[0] == names[1]
    for file in whole.glob("*.pth"):
        contents = [torch.load(folder / file.name, weights_only=True) for folder in (whole, resumed)]
        for content in contents:
            for setting in OF_THIS_RUN & content["settings"].keys():
                del content["settings"][setting]
        assert_same(*contents, file.name)
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (resumed / file.name).read_bytes()
    assert_same(read_history(whole), read_history(resumed))
    logs = [(folder / "train.log").read_text().splitlines() for folder in (whole, resumed)]
    captions = [[line for line in log if line.startswith("    train_")] for log in logs]
    assert captions[0] == captions[1] and captions[0]


@contextmanager
def signal_in_step(monkeypatch, count: int, number: int = signal.SIGTERM):
    """Within the training's step of this number, counted from 1 over all epochs, comes a signal."""
    step, calls = Run.step, itertools.count(1)

    def counted(*arguments):
        step(*arguments)
        if next(calls) == count:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", counted)
        yield


def interrupt(monkeypatch, run, settings, step: int, number: int = signal.SIGTERM) -> str:
    """Train until the signal comes in this step; return what the user is told."""
    ending = Terminated if number == signal.SIGTERM else KeyboardInterrupt
    with signal_in_step(monkeypatch, step, number), pytest.raises(ending) as raised:
        run(settings)
    assert type(raised.value) is ending
    return str(raised.value)


CASES = {  # settings, and the steps in which the training is interrupted: of 4 an epoch, or 2
    "frozen, in the first epoch": ({}, [1]),
    "twice": ({"lr_schedule": "cosine", "warmup": 0.2}, [6, 1]),
    "after the last step": ({"decay_after": 1}, [8]),
    "augmented": ({**RESNET, "fine_tune_encoder": True, "augment": True, "workers": 2}, [6]),
    "accumulated": ({"grad_accumulation": 2, "grad_clip_by": "norm"}, [3]),
    "fine-tuned later": ({**RESNET, "fine_tune_encoder": True, "fine_tune_after": 1}, [7]),
    "averaged, with sampled and dropped words": (
        {"average_weights": 0.9, "scheduled_sampling": 0.5, "word_dropout": 0.2, "cached_views": 2}, [7]
    ),
    "self-critical, in its first epoch": (
        {"self_critical_after": 1, "average_weights": 0.9, "patience": 0, "embedding_dropout": 0.1}, [6]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_training_goes_on_in_mid_epoch(name, prepared, tmp_path, monkeypatch):
    options, steps = CASES[name]
    options = {"dropout": 0.5, "batch_size": 8, **options}
    whole, cut = (small_settings(prepared, tmp_path / run, **options) for run in ("whole", "cut"))
    train.train(whole)
    for number, step in enumerate(steps):
        told = interrupt(monkeypatch, train.train, replace(cut, resume=number > 0), step)
        assert "last.pth" in told and "--resume" in told
    random_use = torch.rand(3)  # between the two runs
    assert len(random_use) == 3
    train.train(replace(cut, resume=True))
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


def test_blip_goes_on_in_mid_epoch(demo, tmp_path, monkeypatch):
    options = {"augment": True, "captions_per_image": 2, "grad_accumulation": 2}
    whole, cut = (blip_settings(demo, tmp_path / run, **options) for run in ("whole", "cut"))
    train_model.train(whole)
    interrupt(monkeypatch, train_model.train, cut, 1)
    interrupt(monkeypatch, train_model.train, replace(cut, resume=True), 3)
    train_model.train(replace(cut, resume=True))
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


def test_a_signal_in_the_validation_keeps_the_epochs_training(prepared, whole, tmp_path, monkeypatch, capsys):
    settings = small_settings(prepared, tmp_path / "cut", **OPTIONS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="8 of its 8 steps") as raised:
        patch.setattr(validation, "caption_scores", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        train.train(settings)
    assert "epoch 1 is saved after" in str(raised.value)
    interrupt(monkeypatch, train.train, replace(settings, resume=True), 1)  # that of epoch 2
    assert "in epoch 1 after 8 of its 8 steps, from" in capsys.readouterr().out
    train.train(replace(settings, resume=True))
    assert_same_training(whole, tmp_path / "cut")


def test_a_signal_after_an_epochs_checkpoint(prepared, whole, tmp_path, monkeypatch):
    settings = small_settings(prepared, tmp_path / "cut", **OPTIONS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="epoch 1 is complete in"):
        patch.setattr(train.Monitor, "report_epoch", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        train.train(settings)
    assert not (tmp_path / "cut" / "last.pth").exists()
    train.train(replace(settings, resume=True))
    assert_same(read_history(whole), read_history(tmp_path / "cut"))


# --- which state is gone on from ----------------------------------------------------------------------------

OPTIONS = {"dropout": 0.5, "batch_size": 4}


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """Two epochs of eight steps."""
    output = tmp_path_factory.mktemp("whole")
    train.train(small_settings(prepared, output, **OPTIONS))
    return output


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
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    now, step, save = [0.0], Run.step, interruption.save_checkpoint

    def timed(*arguments):
        step(*arguments)
        now[0] = next(clock) + 2.0

    def recorded(path, content):
        save(path, content)
        written.append((content["progress"]["epoch"], content["progress"]["steps"]))

    monkeypatch.setattr(Run, "step", timed)
    monkeypatch.setattr(interruption, "save_checkpoint", recorded)
    train.train(small_settings(prepared, tmp_path / "a", **OPTIONS, save_every=0.1))
    assert written == [(1, 3), (1, 6), (2, 1), (2, 4), (2, 7)] and not (tmp_path / "a" / "last.pth").exists()
    written.clear()
    train.train(small_settings(prepared, tmp_path / "b", **OPTIONS, save_every=0))
    assert not written


def test_a_full_disk_does_not_end_the_training(prepared, whole, tmp_path, monkeypatch, capsys):
    def fail(path, _):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(interruption, "save_checkpoint", fail)
    train.train(small_settings(prepared, tmp_path / "a", **OPTIONS, epochs=1, save_every=1e-9))
    assert "(No space left on device); the training goes on" in capsys.readouterr().out
    told = interrupt(
        monkeypatch, train.train, small_settings(prepared, tmp_path / "a", **OPTIONS, resume=True), 2
    )
    assert "epoch 2 is not saved in" in told and "No space left" in told
    assert not (tmp_path / "a" / "last.pth").exists()


def test_a_second_signal_ends_at_once(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(interruption, "SAME_SIGNAL", 0.0)
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


# --- the scripts --------------------------------------------------------------------------------------------


def start(script: str, settings, *launcher: str) -> subprocess.Popen:
    command = [sys.executable, *launcher, str(ROOT / script)]
    command += [f"--{name}={value}" for name, value in asdict(settings).items()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)


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


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "train_model.py"])
def test_two_processes_go_on_in_mid_epoch(script, prepared, demo, tmp_path):
    """SIGTERM to the launcher, which passes it on; then to its processes too, so that they get it twice."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")

    def settings(run: str, **options):
        if script == "train.py":
            return small_settings(prepared, tmp_path / run, **OPTIONS, **options)
        return blip_settings(demo, tmp_path / run, **options)

    process = start(script, settings("whole"), *launcher)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    last = tmp_path / "cut" / "last.pth"
    for to_all in (False, True):
        cut = settings("cut", save_every=1e-9, resume=last.exists())
        if last.exists():
            os.utime(last, (0, 0))
        process = start(script, cut, *launcher)
        while process.poll() is None and not (last.exists() and last.stat().st_mtime > 1):
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for receiver in (process.pid, *map(int, children if to_all else ())):
            os.kill(receiver, signal.SIGTERM)
        out, err = process.communicate(timeout=300)
        assert err.count("interrupted: epoch") == 1 and last.exists(), err
        assert "Traceback" not in err.partition("interrupted: epoch")[0], err  # the launcher has its own
    process = start(script, settings("cut", resume=True), *launcher)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "going on in epoch" in out, err
    assert_same_training(tmp_path / "whole", tmp_path / "cut")
    files = {file.name for file in (tmp_path / "cut").iterdir()}
    assert "last.pth" not in files and not any(name.endswith(".partial") for name in files)


@pytest.mark.slow
def test_the_pipeline_goes_on_by_itself(demo, tmp_path, monkeypatch, capsys):
    import run_pipeline

    def pipeline(folder: Path) -> run_pipeline.Settings:
        values = {"annotations": demo / "train.csv", "image_folder": demo / "train" / "train"}
        values |= {"data_folder": tmp_path / "data", "output_folder": folder / "models"}
        options = [f"--{name}={value}" for name, value in values.items()]
        options += ["--image_size=64", "--min_word_freq=1", "--encoder_name=efficientnet_lite0"]
        options += ["--emb_dim=32", "--attention_dim=32", "--decoder_dim=64", "--epochs=2", "--workers=1"]
        options += ["--batch_size=8"]
        return parse_settings(run_pipeline.Settings, options)

    monkeypatch.chdir(tmp_path)  # where there are no images to caption
    run_pipeline.main(pipeline(tmp_path / "whole"))
    for step in (1, 6):
        interrupt(monkeypatch, run_pipeline.main, pipeline(tmp_path / "cut"), step)
    capsys.readouterr()
    run_pipeline.main(pipeline(tmp_path / "cut"))
    assert "going on in epoch 2 after" in capsys.readouterr().out
    assert_same_training(tmp_path / "whole" / "models", tmp_path / "cut" / "models")
    run_pipeline.main(pipeline(tmp_path / "cut"))
    assert "up to date, skipped" in capsys.readouterr().out
