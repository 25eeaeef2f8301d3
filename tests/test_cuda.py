"""On a CUDA device: what training and captioning give is what the CPU gives. Skipped where there is none."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from captioning.captioners.attention import Captioner
from captioning.decoding.fast_energies import use_fast_energies
from captioning.decoding.teacher_forcing import token_logits
from captioning.folders.run import HalvingCaptioner
from captioning.training.optimization import Run
from models import DecoderWithAttention
from tests.conftest import ROOT, small_settings
from utils import UserError, read_json

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def as_on_the_cpu(monkeypatch):
    """as_on_the_cpu(work): what `work()` gives where no GPU is found."""

    def run(work):
        with monkeypatch.context() as patch:
            for module in ("captioning.training.loop", "captioning.weights.checkpoints"):
                patch.setattr(f"{module}.pick_device", lambda *names: torch.device("cpu"))
            return work()

    return run


@pytest.mark.parametrize("mixed_precision, tolerance", [("no", 1e-4), ("bf16", 1e-2)])
@pytest.mark.parametrize("fine_tune", [False, True])
def test_a_training_has_the_cpus_losses(
    prepared, tmp_path, as_on_the_cpu, mixed_precision, tolerance, fine_tune
):
    """Without dropout, whose random numbers differ; at a rate at which rounding is not magnified."""
    options = {"dropout": 0.0, "decoder_lr": 1e-4, "encoder_lr": 1e-6, "fine_tune_encoder": fine_tune}
    options["mixed_precision"] = mixed_precision
    on_cpu = small_settings(prepared, tmp_path / "cpu", **options)
    expected = as_on_the_cpu(lambda: train.train(on_cpu))
    found = train.train(small_settings(prepared, tmp_path / "cuda", **options))
    for name in ("train_loss", "val_loss"):
        assert found[name] == pytest.approx(expected[name], rel=tolerance), name


def test_search_finds_the_cpus_captions(models, prepared, as_on_the_cpu):
    checkpoint = models / "best_checkpoint.pth"
    on_cpu = as_on_the_cpu(lambda: Captioner.load(checkpoint))
    on_cuda = Captioner.load(checkpoint)
    assert next(on_cuda.decoders[0].parameters()).is_cuda
    images = torch.randint(0, 256, (8, 3, on_cpu.image_size, on_cpu.image_size), dtype=torch.uint8)
    for beam_size in (1, 3, 5):
        assert on_cuda.caption_prepared(images, beam_size) == on_cpu.caption_prepared(images, beam_size)


def test_mixed_precision_survives_an_overflow():
    run = Run.start("fp16")
    decoder = DecoderWithAttention(16, 16, 24, 40, 32).to(run.device)
    assert use_fast_energies(decoder)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-3, fused=True)
    captions, lengths = torch.randint(1, 39, (2, 2, 8)), torch.tensor([[8, 7], [5, 3]])
    grid = torch.rand(2, 8, 8, 32, device=run.device)
    scales = []
    for factor in (1.0, 1e38, 1.0):  # the second step's gradients overflow
        before = {name: value.clone() for name, value in decoder.state_dict().items()}
        with run.autocast():
            tokens = token_logits(decoder, grid, captions, lengths)
            loss = F.cross_entropy(tokens.logits, tokens.targets) * factor
        run.backward(loss)
        run.reduce_gradients(optimizer)
        run.clip_gradients(optimizer, 5.0, "value")
        run.step(optimizer)
        same = all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
        assert same == (factor > 1)  # that step is left out
        scales.append(run.scaler.get_scale())
    assert scales[1] < scales[0]
    assert all(value.isfinite().all() for value in decoder.state_dict().values())


def test_a_full_memory_halves_the_batch():
    sizes = []

    def caption(images: torch.Tensor, ids: list[str]) -> list[str]:
        if len(images) > 3:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")  # raises torch.OutOfMemoryError
        sizes.append(len(images))
        return [str(int(image)) for image in images.cuda()]

    captions = HalvingCaptioner(caption, 8)([torch.tensor(number) for number in range(8)], [*"abcdefgh"])
    assert captions == [str(number) for number in range(8)] and max(sizes) == 2


def test_a_resumed_training_goes_on_as_if_never_stopped(prepared, tmp_path):
    whole = train.train(small_settings(prepared, tmp_path / "whole", epochs=3))
    train.train(small_settings(prepared, tmp_path / "parts", epochs=2))
    parts = train.train(small_settings(prepared, tmp_path / "parts", epochs=3, resume=True))
    assert parts["epoch"] == whole["epoch"]
    assert parts["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-4)


def test_two_trainings_share_a_gpu(prepared, tmp_path):
    sizes = ["--emb_dim", "16", "--attention_dim", "16", "--decoder_dim", "32", "--epochs", "1"]
    command = [sys.executable, str(ROOT / "train.py"), "--data_folder", str(prepared), *sizes]
    command += ["--encoder_name", "efficientnet_lite0", "--workers", "0", "--output_folder"]
    running = [subprocess.Popen([*command, str(tmp_path / name)], cwd=ROOT) for name in ("a", "b")]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    first, second = (Path(tmp_path / name / "history.csv").read_text().splitlines() for name in ("a", "b"))
    assert first[0] == second[0] and len(first) == len(second) == 2


def test_more_processes_than_gpus(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(UserError, match="as many processes as there are GPUs"):
        train.train(small_settings(prepared, tmp_path))


def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--device", "cuda"]
    assert subprocess.run(command, cwd=tmp_path, timeout=600).returncode == 0
    assert read_json(tmp_path / "gpu_benchmark.json")["device"] == torch.cuda.get_device_name()
