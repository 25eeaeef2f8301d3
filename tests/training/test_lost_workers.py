"""A process that loads batches is killed, as the system does where memory is full: one line, nothing lost."""

import itertools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT, TWO_PROCESSES, as_arguments, assert_one_line, small_settings, without_progress
from interrupted_training import OPTIONS, assert_same_training
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import datasets
import train
from captioning.training.optimization import Run
from utils import UserError

RESNET = {"encoder_name": "resnet18", "encoder_weights": "none", "encoder_lr": 1e-4}
SMALL = {"workers": 2, "batch_size": 4, "dropout": 0.5}


@pytest.fixture(autouse=True)
def look_often(monkeypatch):
    """torch's loader looks after its workers every five seconds while it waits."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


def kill_worker(number: int = signal.SIGKILL) -> None:
    newest = max(child.pid for child in multiprocessing.active_children())
    os.kill(newest, number)


def kill_in_call(patch, owner, name: str, count: int, number: int = signal.SIGKILL) -> None:
    """Within this call of `owner.name`, counted from 1, a worker is killed."""
    function, calls = getattr(owner, name), itertools.count(1)

    def counted(*arguments, **options):
        if next(calls) == count:
            kill_worker(number)
        return function(*arguments, **options)

    patch.setattr(owner, name, counted)


def train_until_killed(monkeypatch, settings, *call, **options) -> str:
    """What the user is told."""
    datasets.kill_children()  # of trainings that other tests have interrupted
    with monkeypatch.context() as patch, pytest.raises(UserError) as raised:
        kill_in_call(patch, *call, **options)
        train.train(settings)
    assert not multiprocessing.active_children()
    return str(raised.value)


CASES = {  # settings, and the step in which a worker is killed: of 8 an epoch
    "cross-entropy": ({"epochs": 1}, 2),
    "accumulated, augmented": (
        {**RESNET, "epochs": 1, "batch_size": 2, "fine_tune_encoder": True, "augment": True,
         "grad_accumulation": 2}, 3
    ),
    "self-critical": ({"self_critical_after": 1, "average_weights": 0.9, "patience": 0}, 10),
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "," in n else n for n in CASES])
def test_a_training_ends_after_the_step_and_goes_on(name, prepared, tmp_path, monkeypatch):
    options, step = CASES[name]
    whole, cut = (small_settings(prepared, tmp_path / run, **SMALL | options) for run in ("whole", "cut"))
    train.train(whole)
    told = train_until_killed(monkeypatch, cut, Run, "step", step)
    assert "killed by signal 9, likely because memory is full: give fewer --workers (0: none)" in told
    assert f"steps in {tmp_path / 'cut' / 'last.pth'}; go on with --resume" in told and "\n" not in told
    train.train(replace(cut, resume=True))
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_a_death_in_the_validation_ends_the_run_after_it(prepared, tmp_path, monkeypatch):
    whole, cut = (
        small_settings(prepared, tmp_path / run, **SMALL | {"batch_size": 1}) for run in ("whole", "cut")
    )
    train.train(whole)
    told = train_until_killed(monkeypatch, cut, train, "token_logits", 1)  # the validation's first
    assert f"epoch 1 is complete in {tmp_path / 'cut'}/; go on with --resume" in told
    train.train(replace(cut, resume=True))
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


def test_a_death_in_the_last_validation_loses_nothing(prepared, tmp_path, monkeypatch):
    settings = small_settings(prepared, tmp_path, **SMALL | {"batch_size": 1, "epochs": 1})
    with monkeypatch.context() as patch:
        kill_in_call(patch, train, "token_logits", 1)
        assert train.train(settings)["epoch"] == 1


def test_a_death_between_two_epochs(prepared, tmp_path, monkeypatch):
    settings = small_settings(prepared, tmp_path, **SMALL)
    told = train_until_killed(monkeypatch, settings, train, "evaluate", 1)
    assert "epoch 2 is saved after " in told or "epoch 1 is complete" in told  # as soon as it is noticed


def test_the_command_says_one_line(prepared, tmp_path, monkeypatch, run_main):
    kill_in_call(monkeypatch, Run, "step", 2, number=signal.SIGBUS)
    result = run_main(train, *as_arguments(small_settings(prepared, tmp_path, **SMALL)))
    assert_one_line(without_progress(result), "signal 7", "shared memory (/dev/shm)", "last.pth", "--resume")


@pytest.mark.slow
def test_all_processes_of_a_training_end_together(prepared, tmp_path):
    """A worker of the second process is killed; the first one saves the state of both."""
    code = (
        "import multiprocessing, os, signal, sys; sys.argv[0] = 'train.py'; import train\n"
        "from captioning.command_line import run_script; from captioning.training.optimization import Run\n"
        "step = Run.step\n"
        "def kill(run, optimizer):\n"
        "    if run.state.process_index == 1 and not hasattr(run, 'killed'):\n"
        "        run.killed = os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)\n"
        "    return step(run, optimizer)\n"
        "if not train.__dict__.get('whole'): Run.step = kill\n"
        "run_script(train.main, train.Settings)\n"
    )
    script = tmp_path / "killed.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    cut, whole = (small_settings(prepared, tmp_path / run, **SMALL | OPTIONS) for run in ("cut", "whole"))
    ended = []
    for file, settings in (
        (ROOT / "train.py", whole),
        (script, cut),
        (ROOT / "train.py", replace(cut, resume=True)),
    ):
        command = [*TWO_PROCESSES, str(file), *as_arguments(settings)]
        ended.append(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300))
    assert [result.returncode == 0 for result in ended] == [True, False, True], ended
    assert ended[1].stderr.count("error: a process that loads batches was killed by signal 9") == 1
    assert "Traceback" not in ended[1].stderr.partition("error: ")[0]
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


# --- open files ---------------------------------------------------------------------------------------------


def test_too_few_open_files_are_said_at_once(prepared, tmp_path):
    """With 32 of them the training waited for ever."""
    settings = small_settings(prepared, tmp_path / "models", workers=2)
    command = [sys.executable, "train.py", *as_arguments(settings)]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, preexec_fn=limit_open_files
    )
    assert_one_line(without_progress(result), "only 32 files", "ulimit -n", "--workers")


def limit_open_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))


def test_a_soft_limit_of_open_files_is_raised():
    limit = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/dev/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 10, hard))
        datasets.require_open_files(100)
        assert in_use + 100 <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] < soft
        with pytest.raises(UserError, match="ulimit -n"):
            datasets.require_open_files(hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
