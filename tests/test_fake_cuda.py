"""What the code does on CUDA, on a pretended device.

A tensor on the wrong device or of the wrong type raises, the numbers are the CPU's, and the host waits for
the device as seldom as docs/gpu.md says.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import random_captions
from torch import Tensor

from captioning.data.features import encode_images
from captioning.decoding import teacher_forcing
from captioning.decoding.beam_search import beam_search
from captioning.decoding.fast_energies import use_fast_energies
from captioning.decoding.options import WordRules
from captioning.decoding.sampling import sample_captions
from captioning.training.losses import sample_inputs
from captioning.training.optimization import Run
from captioning.training.reinforce import Reward, SelfCritical, draw_samples
from models import DecoderWithAttention, Encoder, normalize_images
from tests.fake_cuda import CUDA, CudaTensor, FakeCuda, backward, to_cuda
from train import Settings

VOCABULARY, START, END = 40, 38, 39
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_decoder(encoder_dim: int = 32, fast: bool = True) -> DecoderWithAttention:
    decoder = DecoderWithAttention(16, 16, 24, VOCABULARY, encoder_dim, dropout=0).eval()
    assert not fast or use_fast_energies(decoder)
    for parameter in decoder.parameters():
        parameter.data.mul_(3)  # attention far from uniform
    decoder.fc.bias.data[END] = -3  # captions of various lengths
    return decoder


def caption_loss(decoder, grid: Tensor, captions: Tensor, lengths: Tensor) -> Tensor:
    tokens = teacher_forcing.token_logits(decoder, grid, captions, lengths)
    return F.cross_entropy(tokens.logits, tokens.targets) + ((1 - tokens.coverage()) ** 2).mean()


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder("resnet18")
    for name, parameter in encoder.named_parameters():
        if name.endswith("bn2.weight"):
            parameter.data.fill_(0.2)  # untrained, its values would grow from block to block
    return encoder


def gradients_of(*modules) -> dict[str, Tensor]:
    return {name: p.grad for m in modules for name, p in m.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], plain: dict[str, Tensor], precision: str) -> None:
    assert set(ours) == set(plain)
    for name, gradient in plain.items():
        if precision == "float32":
            torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
        elif name != "attention.full_att.bias":  # the softmax does not depend on it
            cosine = F.cosine_similarity(ours[name].flatten(), gradient.flatten(), dim=0)
            assert cosine > 0.9, name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("trainable", [False, True])
def test_training_step(encoder, precision, trainable):
    """Images to gradients. The host waits for the constants of `normalize_images` alone."""
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    captions, lengths = random_captions(2, 3, START - 1, 9)
    decoder = make_decoder(encoder.dim)
    encoder.fine_tune(trainable)
    encoder.zero_grad()
    caption_loss(decoder, encoder.grid(normalize_images(images)), captions, lengths).backward()
    dtype = PRECISIONS[precision]
    with FakeCuda() as cuda:
        moved = images.pin_memory().to(CUDA, non_blocking=True)
        models = to_cuda(encoder), to_cuda(decoder)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            if trainable:
                grid = models[0].grid(normalize_images(moved))
            else:
                grid = encode_images(models[0], moved).clone()
            loss = caption_loss(models[1], grid.float(), captions, lengths)
        found = backward(loss)
    assert sum(cuda.waits.values()) == 2, cuda.waits  # mean and deviation
    names = {parameter: name for model in models for name, parameter in model.named_parameters()}
    ours = {names[leaf]: gradient.numbers for leaf, gradient in found.items()}
    assert any(name.startswith("network") for name in ours) == trainable
    assert_same_gradients(ours, gradients_of(encoder, decoder), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("fast", [True, False])
def test_a_training_step_on_features_never_waits(precision, fast):
    decoder, grid = make_decoder(fast=fast), torch.rand(3, 8, 8, 32)
    captions, lengths = random_captions(3, 5, START - 1, 9)
    caption_loss(decoder, grid.requires_grad_(), captions, lengths).backward()
    dtype = PRECISIONS[precision]
    with FakeCuda() as cuda:
        moved, on_device = to_cuda(decoder), CudaTensor(grid.detach()).requires_grad_()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = caption_loss(moved, on_device, captions, lengths)
        found = backward(loss)
    assert not cuda.waits and cuda.copies == {"pinned": 3}
    names = {parameter: name for name, parameter in moved.named_parameters()} | {on_device: "grid"}
    ours = {names[leaf]: gradient.numbers for leaf, gradient in found.items()}
    assert_same_gradients(ours, gradients_of(decoder) | {"grid": grid.grad}, precision)


def test_scheduled_sampling_waits_for_the_drawn_words():
    decoder, grid, lengths = make_decoder(), torch.rand(3, 8, 8, 32), torch.tensor([[4, 6], [9, 3], [5, 5]])
    captions = torch.randint(1, START, (3, 2, 9))
    with FakeCuda() as cuda:
        fed = sample_inputs(to_cuda(decoder), CudaTensor(grid), captions, lengths, 0.5)
    assert fed.shape == captions.shape and not fed.equal(captions) and sum(cuda.waits.values()) == 1
    assert "pageable" not in cuda.copies


@pytest.mark.parametrize("beam_size", [1, 5])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("members", [1, 2])
def test_search_waits_once_a_step(beam_size, fast, members):
    decoder, grid = make_decoder(fast=fast), torch.rand(8, 8, 8, 32) * 3
    rules = WordRules((3, 4), no_repeat_ngram=2, min_length=2, unfinished=(5, 6))
    options = {"max_steps": 12, "rules": rules}
    expected = beam_search([decoder] * members, [grid] * members, START, END, beam_size, **options)
    steps = max(len(hypothesis.words) for hypothesis in expected)
    with FakeCuda() as cuda:
        models, grids = [to_cuda(decoder)] * members, [CudaTensor(grid)] * members
        found = beam_search(models, grids, START, END, beam_size, **options)
    assert [hypothesis.words for hypothesis in found] == [hypothesis.words for hypothesis in expected]
    assert [h.log_probs for h in found] == [pytest.approx(h.log_probs, abs=1e-5) for h in expected]
    assert steps > 2 and sum(cuda.waits.values()) <= steps + 1, cuda.waits
    assert "pageable" not in cuda.copies


def test_sampling_waits_once_in_four_steps():
    decoder, grid = make_decoder(), torch.rand(8, 8, 8, 32) * 3
    rules = WordRules((3, 4), no_repeat_ngram=2, min_length=2, unfinished=(5, 6))
    options = {"samples": 3, "max_steps": 9, "top_p": 0.9, "rules": rules}
    expected = sample_captions([decoder], [grid], START, END, range(8), **options)
    with FakeCuda() as cuda:
        found = sample_captions([to_cuda(decoder)], [CudaTensor(grid)], START, END, range(8), **options)
    assert [[h.words for h in own] for own in found] == [[h.words for h in own] for own in expected]
    assert sum(cuda.waits.values()) <= 9 // 4 + 3, cuda.waits  # and words, log-probabilities, which are stuck
    assert "pageable" not in cuda.copies


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_search_under_autocast_with_attention(dtype):
    decoder, grid = make_decoder(), torch.rand(4, 8, 8, 32)
    with FakeCuda(), torch.autocast("cuda", dtype):
        found = beam_search(
            [to_cuda(decoder)], [CudaTensor(grid)], START, END, 3, max_steps=6, keep_alphas=True
        )
    assert all(hypothesis.alphas.shape == (len(hypothesis.words), 196) for hypothesis in found)


def test_samples_on_the_device_are_the_cpus():
    """The host waits once in four steps, and for the result."""
    decoder, grid, uniforms = make_decoder(), torch.rand(5, 8, 8, 32), torch.rand(5, 3, 14)
    decoder.fc.bias.data[END] = 2.0  # some end early, some not at all
    expected = draw_samples(decoder, grid, uniforms, START, END)
    steps = int(expected[1].max()) - 1
    assert steps > 8
    with FakeCuda() as cuda:
        found = draw_samples(to_cuda(decoder), CudaTensor(grid), uniforms, START, END)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert sum(cuda.waits.values()) <= -(-steps // 4) + 1, cuda.waits
    assert "pageable" not in cuda.copies


@pytest.mark.parametrize("precision", PRECISIONS)
def test_self_critical_loss(precision):
    """Samples, rewards and the loss, with its gradients, in full and half precision."""
    words = [f"word{index}" for index in range(START)]
    word_map = {word: index for index, word in enumerate([*words, "<start>", "<end>"])}
    reward = Reward([[words[1:6], words[3:9]], [words[2:5]]])
    decoder, grid = make_decoder(), torch.rand(2, 8, 8, 32)
    decoder.fc.bias.data[END] = 1.0
    lengths, dtype = torch.full((2, 1), 6), PRECISIONS[precision]

    def loss_of(model, images):
        run = Run.start("no")
        run.device = images.device
        settings = Settings(dropout=0.0)
        objective = SelfCritical(None, model, settings, run, word_map, reward, 9, epoch=1)
        objective.start_step(lengths.numpy())
        return objective([1, 0], images, torch.zeros(2, 1, 6).long(), lengths)

    plain = loss_of(decoder, grid)
    plain.backward()
    with FakeCuda() as cuda:
        model = to_cuda(decoder)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = loss_of(model, CudaTensor(grid))
        assert loss.dtype == torch.float32
        found = backward(loss)
    assert sum(cuda.waits.values()) <= 9 // 4 + 2, cuda.waits  # and for the captions, and the rewards
    names = {parameter: name for name, parameter in model.named_parameters()}
    gradients = {names[leaf]: gradient.numbers for leaf, gradient in found.items()}
    assert plain.item() != 0 and {"fc.weight", "attention.encoder_att.weight"} <= set(gradients)
    for name, parameter in decoder.named_parameters():
        if precision == "float32":
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)
        elif name in gradients:  # other samples may be drawn in lower precision
            assert gradients[name].isfinite().all(), name


def test_a_tensor_left_on_the_cpu_raises(monkeypatch):
    decoder, grid, (captions, lengths) = (
        make_decoder(),
        torch.rand(2, 8, 8, 32),
        random_captions(2, 2, START - 1, 9),
    )
    monkeypatch.setattr(teacher_forcing, "copy_to_device", lambda tensors, device: list(tensors))
    with FakeCuda(), pytest.raises(RuntimeError, match=r"cuda:0.*cpu|cpu.*cuda:0"):
        teacher_forcing.token_logits(to_cuda(decoder), CudaTensor(grid), captions, lengths)


def test_a_tensor_of_the_wrong_type_raises():
    with FakeCuda(), pytest.raises(RuntimeError, match="dtype"):
        F.linear(CudaTensor(torch.ones(2, 3)), CudaTensor(torch.ones(4, 3, dtype=torch.bfloat16)))
