"""All that is printed goes through utils.say and utils.tell: no name moves the cursor or forges a line."""

import ast
import io
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
from conftest import ROOT
from fuzz_inputs import HOSTILE
from PIL import Image

from captioning import command_line
from captioning.report.figures import draw_attention, draw_captions, draw_maps
from utils import say, tell

OURS = [*ROOT.glob("*.py"), *(ROOT / "captioning").rglob("*.py")]


def test_nothing_else_prints():
    for file in OURS:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            printing = name in ("print", "tqdm.write", "progress.write", "bar.write", "sys.stdout.write")
            inside = file.name == "utils.py" and name == "tqdm.write"
            assert inside or not printing, f"{file.name}, line {node.lineno}: use utils.say or utils.tell"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_line_is_a_line(text, capsys):
    say(f"written to {text}x")
    tell(f"left out: {text}x")
    printed = capsys.readouterr()
    for line in (printed.out, printed.err):
        assert line.endswith("x\n") and line[:-1].isprintable() and line.isascii()


@dataclass
class Settings:
    name: str = "x"  # printed


def test_letters_that_the_terminal_lacks_are_escaped(monkeypatch, keep_signals):
    """Under LANG=C, or on an old Windows console."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(SystemExit) as ended:
        command_line.run_script(lambda settings: say(f"a cat on grün, {settings.name} 犬"), Settings)
    assert not ended.value.code
    assert stream.buffer.getvalue() == rb"a cat on gr\xfcn, x \u72ac" + b"\n"


@pytest.mark.parametrize("text", ["\x1b[2J", "\x9b31m", "a\rb", "a\nb", "\x07", "犬", "$x^{"])
def test_a_figure_says_in_one_line_what_its_font_lacks(text, tmp_path, capsys):
    """matplotlib itself prints a line for each character, with the character."""
    picture, maps = np.zeros((8, 8, 3), np.uint8), np.ones((2, 4, 4))
    Image.fromarray(picture).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # between matplotlib and its parser; never shown
        draw_attention(tmp_path / "1.png", tmp_path / "a.png", ["a", text], maps, f"{text}\nx")
        draw_captions(tmp_path / "2.png", [(str(tmp_path / "a.png"), text, text, [text])])
        draw_maps(tmp_path / "3.png", {text: maps[0]})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (3 if text == "犬" else 0) and all(line.isprintable() for line in lines)
    assert all("lacks 1 character of its text" in line for line in lines)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_pipe_that_is_closed_ends_a_script_quietly(name, monkeypatch, keep_signals):
    """As `eval.py ... | head -1` does; the exit status is a shell's for SIGPIPE."""
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w", encoding="utf-8")
    monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr("sys.argv", ["script.py"])
    printed = []

    def write(settings) -> None:
        for line in range(1000):
            (say if name == "stdout" else tell)(f"line {line}")
            stream.flush()
            printed.append(line)
            if line == 2:
                os.close(reading)

    with pytest.raises(SystemExit) as ended:
        command_line.run_script(write, Settings)
    assert ended.value.code == 141 and printed == [0, 1, 2]
    stream.close()  # what was left to be written disturbs nobody


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["make_demo_data.py --help", "eval.py --compare scores.csv scores.csv"])
def test_a_script_before_head(arguments, unbuffered, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    script, *arguments = arguments.split()
    lines = "".join(f"{number},0.{number}\n" for number in range(9))
    (tmp_path / "scores.csv").write_text(f"image_id,CIDEr\n{lines}")
    command = [sys.executable, str(ROOT / script), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as process:
        process.stdout.close()
        printed = process.stderr.read()
    swallowed = (0,) if unbuffered and arguments == ["--help"] else ()  # by the argparse of newer Pythons
    assert printed == "" and process.returncode in (141, *swallowed)


def test_a_broken_pipe_of_another_kind_is_shown(keep_signals, monkeypatch):
    def fail(_) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(BrokenPipeError):
        command_line.run_script(fail, Settings)


FULL = "this machine's memory is full"


@pytest.mark.parametrize(
    "error, words",
    [
        (MemoryError(), FULL),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            FULL,
        ),
        (RuntimeError("can't start new thread"), FULL),
        (OSError(12, "Cannot allocate memory"), FULL),
        (ImportError("libx.so: failed to map segment from shared object"), FULL),
        (OSError(28, "No space left on device", "a.csv"), "No space left on device: a.csv"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_of_the_machine_gets_one_line(error, words, capsys, keep_signals, monkeypatch):
    def fail(_) -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(SystemExit) as ended:
        command_line.run_script(fail, Settings)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and printed.startswith(f"error: {words}") and printed.count("\n") == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ImportError("no module x"), ValueError("x")], ids=str
)
def test_what_is_of_the_program_is_shown(error, keep_signals, monkeypatch):
    def fail(_) -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(type(error)):
        command_line.run_script(fail, Settings)
