"""docs/change_the_model.md works: its blocks, applied to a copy of the repository, give a model that learns,
and that everything else takes as it is."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PAGE = ROOT / "docs" / "change_the_model.md"


def blocks(section: str) -> list[str]:
    """The blocks of changed lines in a section of the page."""
    (text,) = re.findall(
        rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    return re.findall(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def apply(block: str, source: str) -> str:
    """The source with a block's lines changed; its old lines must be there once."""
    lines = block.splitlines(keepends=True)
    assert all(line[0] in " +-" for line in lines)
    old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
    assert source.count(old) == 1, f"not in models.py, or more than once:\n{old}"
    return source.replace(old, new)


def altered_copy(section: str, folder: Path) -> Path:
    """A copy of the repository with the changes of a section."""
    for name in ("captioning", "metrics"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    source = (ROOT / "models.py").read_text("utf-8")
    for block in blocks(section):
        source = apply(block, source)
    (folder / "models.py").write_text(source, "utf-8")
    return folder


def run(folder: Path, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_changes_are_small_and_of_one_file():
    for section in ("A second LSTM layer", "Another attention", "A second input of the LSTM"):
        assert 1 <= len(blocks(section)) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("section, other_energies", [
    ("A second LSTM layer", False), ("Another attention", True), ("A second input of the LSTM", False)
])  # fmt: skip
def test_a_changed_decoder_is_taken_by_everything(prepared, demo, tmp_path, section, other_energies):
    copy = altered_copy(section, tmp_path)
    shutil.copy(ROOT / "tests" / "changed_model.py", copy)
    image = next((demo / "test" / "test").iterdir())
    checked = run(copy, "changed_model.py", prepared, image)
    assert checked.returncode == 0, checked.stderr
    (line,) = re.findall(
        r"^    (the attention formula was changed.*)$", PAGE.read_text("utf-8"), re.MULTILINE
    )
    for output in ("whole", "hard"):
        assert (line in (copy / output / "train.log").read_text("utf-8")) == other_energies

    results = json.loads((copy / "results.json").read_text("utf-8"))
    assert results["losses"][-1] < results["losses"][0] - 0.2
    assert results["resumed"]
    for way in ("greedy", "beam", "ensemble", "samples"):
        for caption in results[way]:
            assert caption["found"] == pytest.approx(caption["forced"], abs=1e-4), way
            if way == "greedy":  # every word has the highest logit
                assert caption["below_best"] < 1e-5
        assert max(len(caption["found"]) for caption in results[way]) > 3
    assert (copy / "figure.png").read_bytes().startswith(b"\x89PNG")
    (scores,) = json.loads((copy / "scores.json").read_text("utf-8"))["scores"]
    assert scores["images"] == 8 and scores["CIDEr"] > 0
    assert (copy / "gallery" / "index.html").is_file()


def test_an_encoder_is_one_entry(tmp_path):
    copy = altered_copy("Another encoder", tmp_path)
    checked = run(copy, "-c", (
        "import torch\n"
        "from captioning.weights.pretrained import fold_batch_norms\n"
        "from captioning.weights.pretrained import build_encoder\n"
        "from models import Encoder\n"
        "images = torch.randn(2, 3, 64, 64)\n"
        "plain = Encoder('regnet_y_400mf')\n"
        "encoding = plain(images)\n"
        "assert encoding.shape == (2, 14, 14, plain.dim), encoding.shape\n"
        "torch.testing.assert_close(fold_batch_norms(plain)(images), encoding, rtol=1e-3, atol=1e-4)\n"
        "encoder = build_encoder('regnet_y_400mf', 'none')\n"
        "encoder.fine_tune()\n"
        "trained = [name for name, p in encoder.named_parameters() if p.requires_grad]\n"
        "print(*sorted({'.'.join(name.split('.')[:3]) for name in trained}))\n"
    ))  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.split() == [f"network.1.block{n}" for n in (2, 3, 4)]
