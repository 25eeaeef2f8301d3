"""`pick_device` on machines with and without GPUs, which are pretended; how a process leaves the others."""

from dataclasses import dataclass

import pytest
import torch
from torch import distributed

from captioning import command_line
from captioning.command_line import parse_settings
from utils import Device, UserError, pick_device


@dataclass
class Example:
    device: Device = "auto"  # where to compute


@pytest.fixture
def machine(monkeypatch):
    """machine(gpus, mps): from then on PyTorch finds so many CUDA devices, and Apple's or not."""

    def pretend(gpus: int, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return pretend


@pytest.mark.parametrize("gpus, mps, device", [(0, False, "cpu"), (2, False, "cuda:0"), (0, True, "mps")])
def test_auto_takes_the_fastest_that_is_there(machine, gpus, mps, device):
    machine(gpus, mps)
    assert pick_device() == pick_device("auto") == torch.device(device)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there(machine, name):
    machine(0)
    with pytest.raises(UserError, match=rf"--device {name}: .*it has cpu"):
        pick_device(name)


def test_each_process_has_its_own_gpu(machine, monkeypatch):
    machine(2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 3 finds 2 GPUs"):
        pick_device()


def test_the_setting():
    assert parse_settings(Example, ["--device", "mps"]).device == "mps"
    with pytest.raises(UserError, match="tpu"):
        parse_settings(Example, ["--device", "tpu"])


def test_no_script_waits_for_gloos_destructor(monkeypatch):
    """It joins a thread that may be waiting for Python's lock, which the destructor holds."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "destroy_process_group", lambda: pytest.fail("destroyed"))
            assert command_line._leave_processes(failed=False)
    finally:
        distributed.destroy_process_group()
    assert not command_line._leave_processes(failed=False)
