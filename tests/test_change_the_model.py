"""docs/change_the_model.md works: its blocks, applied to a copy of the repository, give a model that learns
and whose search agrees with its teacher forcing."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, assert_one_line, read_history

PAGE = ROOT / "docs" / "change_the_model.md"
SIZES = ["--emb_dim", 64, "--attention_dim", 32, "--decoder_dim", 128, "--dropout", 0]

# runs in the copy, on its models.py: greedy captions and beams of the validation images against `forward`
CHECK = """
import json, sys
import h5py, torch
from captioning.decoding.beam_search import beam_search
from captioning.captioners.attention import load_models
from captioning.data.features import encode_images
from models import pool_grid

checkpoint, data_folder = sys.argv[1:]
encoder, decoder, word_map = load_models(checkpoint, checkpoint)
assert decoder.fused is False  # the checkpoint remembers it
start, end = word_map["<start>"], word_map["<end>"]
images = torch.from_numpy(h5py.File(f"{data_folder}/val_images.hdf5")["images"][:6])
grid = encode_images(encoder, images)

def log_probs_of(words, encoding):
    with torch.inference_mode():
        captions, lengths = torch.tensor([[start, *words]]), torch.tensor([[len(words) + 1]])
        return decoder(encoding, captions, lengths)[0][0].log_softmax(dim=1)

results = []
for beam_size in (1, 3):
    found = beam_search([decoder], [grid], start, end, beam_size, max_steps=20, fused=decoder.fused)
    for i, own in enumerate(found):
        words = own.words + [end] * own.finished
        log_probs = log_probs_of(words, pool_grid(grid[i : i + 1]))
        chosen = log_probs[range(len(words)), words]
        result = {"beam_size": beam_size, "words": len(own.words), "score": own.score}
        below_best = log_probs.amax(dim=1) - chosen
        result |= {"forward": float(chosen.sum()), "below_best": float(below_best.max())}
        results.append(result)
print(json.dumps(results))
"""


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


@pytest.mark.slow
@pytest.mark.parametrize("section", ["A second LSTM layer", "Another attention"])
def test_an_altered_decoder_trains_and_searches(prepared, tmp_path, section):
    copy = altered_copy(section, tmp_path)
    command = ["train.py", "--data_folder", prepared, "--encoder_name", "efficientnet_lite0", "--workers", 0]
    command += [*SIZES, "--epochs", 4, "--batch_size", 2, "--decoder_lr", 5e-3, "--alpha_c", 0.1]
    refused = run(copy, *command)
    assert_one_line(refused, "the decoder of models.py was changed", "give --fused False")
    assert refused.stderr.strip() in PAGE.read_text("utf-8")

    trained = run(copy, *command, "--fused", "False")
    assert trained.returncode == 0, trained.stderr
    losses = [line["train_loss"] for line in read_history(copy / "output_models")]
    assert losses[-1] < losses[0] - 0.2

    checked = run(copy, "-c", CHECK, "output_models/best_checkpoint.pth", prepared)
    assert checked.returncode == 0, checked.stderr
    results = json.loads(checked.stdout)
    assert max(result["words"] for result in results) > 3
    for result in results:
        assert result["score"] == pytest.approx(result["forward"], abs=1e-4)
        if result["beam_size"] == 1:  # greedy: every word has the highest logit
            assert result["below_best"] < 1e-5


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
