"""The captioning scripts as users run them on a folder: killed, in several processes, on single images."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TWO_PROCESSES
from folder_images import add_unreadable_files, make_images
from PIL import Image

import caption
import caption_from_checkpoint
import direct_caption
from captioning.captioners.blip import tiny_captioner
from captioning.command_line import parse_settings
from captioning.data.images import read_image, walk_images
from captioning.data.submissions import read_submission
from captioning.folders.journal import Journal
from captioning.folders.plan import FolderOptions
from utils import UserError


class Script:
    """A captioning script on the models of the tests, with an output beside the images."""

    def __init__(self, name: str, models, folder, output):
        model = {"caption.py": "--model", "caption_from_checkpoint.py": "--checkpoint"}.get(name)
        given = [model, models / "best_checkpoint.pth"]
        if model is None:
            given = ["--model_path", models, "--checks", "none"]  # its weights are random
        given += ["--test_folder", folder, "--output_csv", output, "--batch_size", "2", "--workers", "1"]
        self.arguments = [str(ROOT / name), *map(str, given)]

    def start(self, launcher=(sys.executable,)) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*launcher, *self.arguments],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def blip_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip")
    torch.manual_seed(0)
    tiny_captioner(["a red circle on grass", "two blue squares on gravel"]).save(folder)
    return folder


@pytest.fixture(scope="module")
def photos(demo, tmp_path_factory):
    """140 small images, so that a run lasts long enough to be killed."""
    folder = tmp_path_factory.mktemp("photos") / "a" / "b" / "photos"
    folder.mkdir(parents=True)
    paths = walk_images(demo / "train" / "train").names
    for number in range(140):
        image = read_image(demo / "train" / "train" / paths[number % len(paths)], 48)
        Image.fromarray(np.roll(image.transpose(1, 2, 0), number, axis=1)).save(folder / f"p{number}.png")
    return folder


def wait_for(condition, process) -> None:
    while not condition() and process.poll() is None:
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["caption.py", "caption_from_checkpoint.py", "direct_caption.py"])
def test_scripts_survive_kills(name, models, blip_model, photos, tmp_path):
    model = blip_model if name == "direct_caption.py" else models
    whole = Script(name, model, photos, tmp_path / "whole.csv").start()
    assert whole.wait() == 0, whole.stderr.read()
    output = tmp_path / "killed.csv"
    journal = Journal(output)
    ends = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    for end in ends:
        before = journal.count()
        process = Script(name, model, photos, output).start()
        wait_for(lambda: journal.count() > before, process)  # noqa: B023
        process.send_signal(end)
        out, err = process.communicate()
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[end], err
        assert "Traceback" not in err and not output.exists() and journal.count() > before
        assert (end == signal.SIGKILL) == ("the same command goes on" not in err)
    process = Script(name, model, photos, output).start()
    out, err = process.communicate()
    assert process.returncode == 0 and f"going on: {journal.count()}" not in out and "going on: " in out, err
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes() and not journal.files()


# --- several processes --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["caption.py", "caption_from_checkpoint.py", "direct_caption.py"])
def test_two_processes_give_the_file_of_one(name, models, blip_model, photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    add_unreadable_files(folder)
    model = blip_model if name == "direct_caption.py" else models
    results = []
    for count, launcher in ((1, (sys.executable,)), (2, TWO_PROCESSES)):
        output = tmp_path / f"{count}.csv"
        process = Script(name, model, folder, output).start(launcher)
        out, err = process.communicate()
        assert process.returncode == 1 and "11 without a caption" in out, err  # 1: there are bad files
        assert 5 < err.count("no caption: ") <= 11  # of each process five at most, and how many more
        assert out.count("images captioned") == 1
        results.append(output.read_bytes())
    assert results[0] == results[1]
    assert not list(tmp_path.glob("*.journal-*"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_killed_process_ends_the_run_with_one_line(rank, models, photos, tmp_path):
    script = Script("caption.py", models, photos, tmp_path / "out.csv")
    journal = Journal(tmp_path / "out.csv")
    launcher = script.start(TWO_PROCESSES)
    wait_for(lambda: journal.path(1).exists() and journal.count(), launcher)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for child in children:
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), signal.SIGKILL)
    _, err = launcher.communicate()
    assert launcher.returncode == 1 and err.count("the same command goes on from there") == 1, err
    process = script.start(TWO_PROCESSES)
    out, err = process.communicate()
    assert process.returncode == 0 and "going on: " in out, err
    process = Script("caption.py", models, photos, tmp_path / "whole.csv").start()
    assert process.wait() == 0
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, part",
    [
        ("caption.py --test_folder nowhere", "nowhere"),
        ("caption.py --beam_size 0", "--beam_size"),
        ("eval.py --submission a.csv --references nowhere.csv", "nowhere.csv"),
        ("train.py --data_folder nowhere", "nowhere"),
        ("train_model.py --annotations nowhere.csv --image_folder .", "nowhere.csv"),
    ],
)
def test_wrong_input_is_printed_once(command, part, tmp_path):
    script, *rest = command.split()
    process = subprocess.run(
        [*TWO_PROCESSES, str(ROOT / script), *rest], capture_output=True, text=True, cwd=tmp_path
    )
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1 and len(lines) == 1 and part in lines[0], process.stderr


# --- the scripts --------------------------------------------------------------------------------------------


def test_scripts_have_the_same_names_for_a_folder():
    for script in (caption_from_checkpoint, direct_caption):
        settings = script.Settings(sidecars=True, sidecar_extension="caption")
        assert FolderOptions.of(settings, "x.csv").output_csv is None
        assert FolderOptions.of(script.Settings(), "x.csv").output_csv == "x.csv"
        with pytest.raises(UserError, match="--sidecars"):
            script.Settings(prefix="x")


def test_scripts_import_nothing_that_takes_seconds():
    code = "import sys, caption, caption_from_checkpoint, direct_caption; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"transformers", "torchvision", "matplotlib", "skimage", "nltk"} & set(result.stdout.split())


# --- single images ------------------------------------------------------------------------------------------


def test_a_figure_of_each_image(models, blip_model, demo, tmp_path, monkeypatch, capsys):
    first, second = (demo / "test" / "test" / f"test_000{i}.jpg" for i in (1, 2))
    (tmp_path / "b").mkdir()
    same_name = shutil.copy(second, tmp_path / "b" / first.name)
    monkeypatch.chdir(tmp_path)
    images = (str(first), str(same_name))
    assert caption.main(caption.Settings(images=images, model=str(models / "best_checkpoint.pth"))) == 0
    attention = capsys.readouterr()
    assert direct_caption.main(direct_caption.Settings(images=images, model_path=str(blip_model))) == 0
    names = ["attention_test_0001.png", "attention_test_0001_2.png"]
    for printed in (attention, capsys.readouterr()):
        assert [line.split(": ")[0] for line in printed.out.splitlines()] == list(images)
        assert [line.removeprefix("figure: ") for line in printed.err.splitlines()] == names
    assert sorted(os.listdir(tmp_path)) == [*names, "b"] and np.ptp(read_image(names[1])) > 100
    with pytest.raises(UserError, match="--figure names the figure of one image"):
        caption.Settings(images=images, figure="x.png")
    with pytest.raises(UserError, match=r"nowhere\.jpg: no such image"):
        direct_caption.main(direct_caption.Settings(images=("nowhere.jpg",)))


def test_plain_arguments_may_stand_anywhere():
    for arguments in ("a.jpg b.jpg --show --beam_size 2", "a.jpg --beam_size 2 --show b.jpg"):
        settings = parse_settings(caption.Settings, arguments.split())
        assert settings.images == ("a.jpg", "b.jpg") and settings.show and settings.beam_size == 2
    assert parse_settings(caption.Settings, []).images == ()
    settings = parse_settings(caption.Settings, ["--show", "False", "a.jpg", "--img", "b.jpg"])
    assert settings.images == ("a.jpg", "b.jpg") and not settings.show


@pytest.mark.slow
def test_the_documented_commands_run_as_written(models, blip_model, tmp_path):
    """The first block of docs/folders.md, in a folder that has photos/ and the two models."""
    text = (ROOT / "docs" / "folders.md").read_text(encoding="utf-8")
    commands = re.search(r"(?:^    .+\n)+", text, flags=re.MULTILINE)[0].splitlines()
    assert len(commands) == 4
    for script in ("caption.py", "caption_from_checkpoint.py", "direct_caption.py"):
        (tmp_path / script).symlink_to(ROOT / script)
    (tmp_path / "output_models").symlink_to(models)
    (tmp_path / "blip_finetuned_model").symlink_to(blip_model)
    make_images(make_images(tmp_path / "photos", 3) / "holiday", 2)
    (tmp_path / "bin").mkdir()
    for name, module in (("python", ""), ("torchrun", "-m torch.distributed.run")):
        any_caption = 'case "$1" in direct_caption.py) set -- "$@" --checks none;; esac'  # random weights
        (tmp_path / "bin" / name).write_text(
            f'#!/bin/sh\n{any_caption}\nexec {sys.executable} {module} "$@"\n'
        )
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    for command in commands:
        result = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0 and "images captioned" in result.stdout, result.stderr
    assert [row[0] for row in read_submission(tmp_path / "captions.csv")] == ["img0", "img1", "img2"]
    assert len(read_submission(tmp_path / "captions.jsonl")) == 5
    assert (tmp_path / "photos" / "img0.txt").read_text().startswith("ohwx style, ")
