"""Ctrl-C and SIGTERM once a script is at work: a line and the right exit status, never a traceback."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

from captioning import command_line


def start(*command, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, **pipes, **options)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@dataclass
class Settings:
    seed: int = 0  # nothing is random


def lose_exception() -> None:
    class Destroyed:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    Destroyed()
    for _ in range(100):  # the work would go on for long
        time.sleep(0.1)
    raise AssertionError("the signal was lost")


def turn_exception_into_another() -> None:
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    except KeyboardInterrupt:
        raise ImportError("as a module of C code does") from None


@pytest.mark.parametrize("work", [lose_exception, turn_exception_into_another])
def test_an_interrupt_is_never_lost(work, monkeypatch, capsys, keep_signals):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as ended:
        command_line.run_script(lambda settings: work(), Settings)
    assert ended.value.code == 130
    printed = capsys.readouterr().err
    assert printed.strip() == "interrupted: finished files are kept, unfinished ones are removed"


@pytest.mark.slow
@on_linux
def test_loader_workers_end_with_a_killed_training(prepared, tmp_path):
    options = ("--data_folder", prepared, "--output_folder", tmp_path, "--encoder_name", "efficientnet_lite0")
    options += ("--workers", 3, "--fine_tune_encoder", "--batch_size", 2, "--epochs", 1000)
    training = start("train.py", *options)
    children = Path(f"/proc/{training.pid}/task/{training.pid}/children")
    while len(workers := children.read_text().split()) < 3:
        assert training.poll() is None, training.communicate()
        time.sleep(0.05)
    time.sleep(1)  # they are reading batches
    training.kill()
    training.communicate()
    deadline = time.monotonic() + 2
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
