"""benchmarks/gpu.py at its tiny size: every configuration runs, and agrees with the textbook."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_everything_is_measured_on_the_cpu(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "gpu_benchmark.json").read_text())
    assert found["device"] == "cpu" and not found["errors"] and not found["skipped"]
    assert found["seconds"] < 300  # on an idle machine under 60
    sections = {row["section"] for row in found["results"]}
    assert sections == {
        "frozen",
        "self_critical",
        "trainable",
        "profile",
        "evaluation",
        "jpeg_folder",
        "blip",
    }
    assert sum(row["section"] == "profile" for row in found["results"]) == 10
    for row in found["results"]:
        rates = [value for key, value in row.items() if key.endswith("_per_s")]
        assert all(rate > 0 for rate in rates) and (rates or row["section"] in ("profile", "trainable"))


def test_a_failure_is_one_line_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    def broken(bench, data) -> None:
        """A section that fails."""
        raise ValueError("first line\nsecond line")

    def whole(bench, data) -> None:
        """A section that does not."""
        bench.add("whole", name="value", captions_per_s=1.0)

    for section in ("self_critical", "trainable", "profile", "evaluation", "jpeg_folder", "blip"):
        monkeypatch.setattr(gpu, section, whole)
    monkeypatch.setattr(gpu, "frozen", broken)
    monkeypatch.setattr(gpu, "Data", lambda *arguments: True)
    output = tmp_path / "results.json"
    assert gpu.main(gpu.Settings(tiny=True, device="cpu", output=str(output))) == 1
    found = json.loads(output.read_text())
    assert found["errors"] == ["broken: ValueError: first line"] and len(found["results"]) == 6
    assert "failed: broken: ValueError: first line" in capsys.readouterr().out
    assert gpu.main(gpu.Settings(tiny=True, device="cpu", output=str(output), minutes=0)) == 0
    assert json.loads(output.read_text())["skipped"] == ["data"]


def test_results_that_differ_are_a_failure(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu
    import torch

    bench = gpu.Bench(gpu.Settings(), torch.device("cpu"))
    bench.require("the loss", 1e-5, 1e-4)
    for difference in (1e-3, float("nan")):
        with pytest.raises(ValueError, match="the loss differs"):
            bench.require("the loss", difference, 1e-4)
