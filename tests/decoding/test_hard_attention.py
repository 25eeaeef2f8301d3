"""Hard attention: its gradient is that of the paper's formula, both forms agree, a training goes on."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_one_line, read_history, small_settings

import models
import train
from captioning.captioners.attention import Captioner
from captioning.data.prepared import UNK
from captioning.decoding import fused_decoder, plain_decoder
from captioning.decoding.beam_search import beam_search
from captioning.training import hard_attention
from captioning.training.hard_attention import BASELINE, HardAttention
from captioning.training.losses import CrossEntropy
from captioning.training.optimization import Run
from captioning.weights.checkpoints import load_checkpoint, save_checkpoint
from models import DecoderWithAttention, draw_locations
from tests.fake_cuda import CudaTensor, FakeCuda, backward, to_cuda
from utils import UserError

FORMS = {"fused": fused_decoder.caption_logits, "plain": plain_decoder.caption_logits}
VOCABULARY = 12


def make_decoder(encoder_dim: int = 6, vocabulary: int = VOCABULARY) -> DecoderWithAttention:
    decoder = DecoderWithAttention(5, 4, 7, vocabulary, encoder_dim, dropout=0)
    for parameter in decoder.parameters():
        parameter.data.mul_(3)  # attention far from uniform
    return decoder


def make_settings(**options) -> train.Settings:
    return train.Settings(**{"attention": "hard", "dropout": 0, "alpha_c": 0.3} | options)


def make_objective(decoder, baseline: float | None = None, **options) -> CrossEntropy:
    history = [] if baseline is None else [{"epoch": 1, BASELINE: baseline}]
    objective = CrossEntropy(None, decoder, make_settings(**options), Run.start("no"), {UNK: 0}, 0.0, history)
    return objective


def make_captions(images: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.randint(3, 8, (images, group))
    captions = torch.randint(1, VOCABULARY, (images, group, 9))
    return captions * (torch.arange(9) < lengths.unsqueeze(2)), lengths


# --- the locations ------------------------------------------------------------------------------------------


def test_locations_are_samples_of_alpha():
    alpha = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    count = 100_000
    drawn = draw_locations(alpha.expand(count, 5), torch.empty(count, 5).exponential_())
    assert torch.equal(drawn.sum(dim=1), torch.ones(count)) and torch.equal(drawn, drawn.round())
    error = (alpha * (1 - alpha) / count).sqrt()
    assert ((drawn.mean(dim=0) - alpha).abs() <= 4 * error).all()
    assert draw_locations(alpha, torch.ones(1)).tolist() == [1, 0, 0, 0, 0]
    assert torch.equal(draw_locations(alpha, torch.full((5,), torch.inf)), alpha)


def test_half_of_the_captions_look_at_the_expected_value():
    hard = HardAttention(make_settings(), Run.start("no"))
    noise = hard.draw_noise(torch.zeros(4000, 3))
    assert noise.shape == (4000, 2, 196)
    expected = noise.isinf().flatten(1)
    assert torch.equal(expected.any(dim=1), expected.all(dim=1))  # all words of a caption, or none
    assert expected[:, 0].float().mean() == pytest.approx(0.5, abs=0.04)


# --- its gradient -------------------------------------------------------------------------------------------


def enumerated_loss(decoder, grid, caption: list[int], settings) -> torch.Tensor:
    """The loss per word whose gradient one caption's samples have in the mean, from all location sequences.

    Half of it is with sampled locations: the paper's L_s = sum_s p(s) log p(y | s), and the entropy along
    each sequence; the other half is soft attention.
    """
    pixels, steps = models.ENCODED_SIZE**2, len(caption) - 1
    sequences = list(itertools.product(range(pixels), repeat=steps))
    noise = torch.ones(len(sequences) + 1, steps, pixels, dtype=grid.dtype)
    for row, sequence in enumerate(sequences):
        noise[row, range(steps), list(sequence)] = 1e-30  # this location is drawn
    noise[-1] = torch.inf
    count = len(noise)
    captions = torch.tensor([caption]).expand(count, -1)
    encodings = models.pool_grid(grid).expand(count, -1, -1, -1)
    logits, *_, alphas, order = decoder(encodings, captions, torch.full((count, 1), len(caption)), noise)
    assert torch.equal(order, torch.arange(count))
    targets = captions[:, 1:].unsqueeze(2)
    log_likelihoods = logits.log_softmax(dim=2).gather(2, targets).sum(dim=(1, 2))
    locations = torch.tensor(sequences).unsqueeze(2)
    probabilities = alphas[:-1].gather(2, locations).prod(dim=1).squeeze(1)
    assert float(probabilities.detach().sum()) == pytest.approx(1, abs=1e-9)
    entropies = -(alphas * alphas.log()).sum(dim=(1, 2))
    sampled = (probabilities * log_likelihoods[:-1]).sum()
    sampled = sampled + settings.lambda_e * (probabilities.detach() * entropies[:-1]).sum()
    soft = log_likelihoods[-1] + settings.lambda_e * entropies[-1]
    penalties = ((1 - alphas.sum(dim=1)) ** 2).mean(dim=1)
    penalty = (probabilities.detach() * penalties[:-1]).sum() / 2 + penalties[-1] / 2
    return -(sampled + soft) / 2 / steps + settings.alpha_c * penalty


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("caption", [[1, 2], [1, 5, 2]], ids=["one word", "two words"])
def test_the_mean_gradient_is_the_enumerated_one(monkeypatch, fused, caption):
    """On a grid of 2 x 2, in units of the mean's standard error; each caption is many draws of one."""
    for module in (models, fused_decoder, hard_attention):
        monkeypatch.setattr(module, "ENCODED_SIZE", 2)
    decoder = make_decoder().double()
    decoder.attention.full_att.weight.data.div_(5)  # no location so rare that it is never drawn
    decoder.fc.weight.data.mul_(6)  # it matters which one is
    grid = torch.randn(1, 2, 2, 6, dtype=torch.float64) * 3
    grid.requires_grad_()
    objective = make_objective(decoder, baseline=-4.0, fused=fused, lambda_r=1, lambda_e=0.2)
    leaves = {**dict(decoder.named_parameters()), "grid": grid}
    leaves.pop("attention.full_att.bias")  # the softmax does not depend on it
    batches, draws = 60, 400
    captions = torch.tensor([caption]).expand(1, draws, -1)
    lengths = torch.full((1, draws), len(caption))
    monkeypatch.setattr("captioning.training.losses.encode", lambda *_: grid)
    gradients = []
    for _ in range(batches):
        objective.start_step(lengths.numpy())
        loss = objective([0], grid, captions, lengths)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(leaves.values()))]))
    gradients = torch.stack(gradients)
    mean, error = gradients.mean(dim=0), gradients.std(dim=0) / batches**0.5
    loss = enumerated_loss(decoder, grid, caption, objective.settings)
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(leaves.values()))])
    deviations = (mean - exact) / error.clamp(min=1e-12)
    assert deviations.abs().max() < 5  # of some 500 entries
    assert deviations.square().mean() < 1.5
    for name in ("lambda_r", "lambda_e"):  # each term shows: without it the gradient is another one
        other = make_objective(decoder, baseline=-4.0, fused=fused, lambda_r=1, lambda_e=0.2)
        setattr(other.settings, name, 0)
        other.start_step(lengths.numpy())
        loss = sum(other([0], grid, captions, lengths) for _ in range(20)) / 20
        without = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(leaves.values()))])
        assert ((without - exact) / error.clamp(min=1e-12)).abs().max() > 8, name


@pytest.mark.parametrize("side, group", [(2, 1), (8, 3), (14, 2)])
def test_fused_equals_plain(monkeypatch, side, group):
    """Logits, alphas, and all gradients of the whole loss, the encoder's too, with the same noise."""
    decoder = make_decoder().double()
    grid = (torch.rand(3, side, side, 6, dtype=torch.float64) * 4).requires_grad_()
    captions, lengths = make_captions(3, group)
    monkeypatch.setattr("captioning.training.losses.encode", lambda *_: grid)
    results = []
    for fused in (True, False):
        objective = make_objective(decoder, baseline=-9.0, fused=fused)
        torch.manual_seed(6)
        objective.start_step(lengths.numpy())
        decoder.zero_grad()
        grid.grad = None
        loss = objective([0, 1, 2], grid, captions, lengths)
        loss.backward()
        objective.finish_step()
        gradients = {name: p.grad for name, p in decoder.named_parameters()} | {"grid": grid.grad}
        results.append((loss, objective.hard.baseline, gradients))
    (loss, baseline, fused), (plain_loss, plain_baseline, plain) = results
    torch.testing.assert_close(loss, plain_loss)
    torch.testing.assert_close(baseline, plain_baseline)
    assert baseline != -9
    assert fused.pop("attention.full_att.bias") is None
    for name, gradient in fused.items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_tokens_come_with_their_alphas(form):
    decoder, grid = make_decoder().double(), torch.rand(2, 8, 8, 6, dtype=torch.float64)
    captions, lengths = make_captions(2, 2)
    captions, lengths = captions.flatten(0, 1), lengths.flatten()
    noise = torch.empty(4, 8, 196, dtype=torch.float64).exponential_()
    noise[2] = torch.inf
    found = FORMS[form](decoder, grid, captions, lengths, noise=noise)
    encodings = models.pool_grid(grid).repeat_interleave(2, dim=0)
    _, _, steps, alphas, order = decoder(encodings, captions, lengths.unsqueeze(1), noise)
    assert len(found.alphas) == sum(steps)
    row_of = order.argsort()
    torch.testing.assert_close(found.alphas, alphas[row_of[found.captions], found.steps])
    soft = FORMS[form](decoder, grid, captions, lengths)
    is_soft = found.captions == 2
    torch.testing.assert_close(found.logits[is_soft], soft.logits[is_soft])
    assert not torch.allclose(found.logits[~is_soft], soft.logits[~is_soft], atol=1e-3)


def test_an_edit_of_the_hard_form_is_refused(monkeypatch):
    decoder = make_decoder(encoder_dim=32)
    fused_decoder.require_same_as_plain(decoder)
    monkeypatch.setattr(models, "draw_locations", lambda alpha, noise: alpha)
    with pytest.raises(UserError, match="--fused False"):
        fused_decoder.require_same_as_plain(decoder)


def test_an_alpha_of_zero_gives_finite_gradients():
    """As where the softmax underflows; -inf is the energy of a location that is never looked at."""
    energies = torch.tensor([[0.0, -torch.inf, 1.0, -200.0]], requires_grad=True)
    hard = HardAttention(make_settings(), Run.start("no"), [{BASELINE: -1.0}])
    logits, targets = torch.zeros(1, 3), torch.tensor([1])
    alphas = energies.softmax(dim=1)
    zero = torch.zeros(1, dtype=torch.long)
    found = fused_decoder.TokenLogits(logits, targets, alphas, zero, zero, alphas)
    hard.gradient_of_locations(found, torch.tensor([[[0.1, 0.5, 1.0, 0.7]]])).backward()
    assert energies.grad.isfinite().all() and energies.grad[0, 0] != 0


# --- the baseline -------------------------------------------------------------------------------------------


def test_the_baseline_is_a_moving_average():
    hard = HardAttention(make_settings(lambda_e=0.0), Run.start("no"))
    assert hard.report() == {}
    expected = None
    for step in range(4):
        logits, targets = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
        owners = torch.tensor([0, 1, 2, 0, 1, 0])
        steps = torch.tensor([0, 0, 0, 1, 1, 2])
        alphas = torch.rand(6, 4).softmax(dim=1).requires_grad_()
        found = fused_decoder.TokenLogits(logits, targets, alphas, owners, steps, alphas)
        noise = torch.rand(3, 3, 4)
        noise[1] = torch.inf
        gradients = hard.gradient_of_locations(found, noise)
        (d_alphas,) = torch.autograd.grad(gradients, alphas)
        assert d_alphas.any() == (step > 0)  # the first step has no baseline
        assert not d_alphas[owners == 1].any()
        hard.update_baseline()
        log_probs = logits.log_softmax(dim=1)[range(6), targets]
        mean = sum(float(log_probs[owners == caption].sum()) for caption in (0, 2)) / 2
        expected = mean if expected is None else 0.9 * expected + 0.1 * mean
        assert hard.report()[BASELINE] == pytest.approx(expected, abs=1e-5)
    hard.update_baseline()  # a step in which no caption was sampled
    assert hard.report()[BASELINE] == pytest.approx(expected, abs=1e-5)


# --- on CUDA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_a_training_step_on_cuda(monkeypatch, precision):
    """The host never waits for the device; gradients are the CPU's."""
    decoder, grid = make_decoder(32), torch.rand(3, 8, 8, 32) * 2
    captions, lengths = make_captions(3, 2)
    noise = torch.empty(6, 8, 196).exponential_()
    noise[::2] = torch.inf
    objective = make_objective(decoder, baseline=-9.0)
    monkeypatch.setattr("captioning.training.losses.encode", lambda encoder, images, device: images)
    monkeypatch.setattr(HardAttention, "draw_noise", lambda hard, captions: noise)
    objective.start_step(lengths.numpy())
    objective([0, 1, 2], grid, captions, lengths).backward()
    plain = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    with FakeCuda() as cuda:
        monkeypatch.undo()
        monkeypatch.setattr("captioning.training.losses.encode", lambda encoder, images, device: images)
        on_device = SimpleNamespace(device=torch.device("cuda", 0), state=Run.start("no").state)
        moved = to_cuda(decoder)
        objective = CrossEntropy(None, moved, make_settings(), on_device, {UNK: 0}, 0.0, [{BASELINE: -9.0}])
        drawn = objective.hard.draw_noise(captions.flatten(0, 1))
        assert drawn.shape == noise.shape and drawn.device.type == "cuda"
        monkeypatch.setattr(HardAttention, "draw_noise", lambda hard, captions: CudaTensor(noise))
        objective.start_step(lengths.numpy())
        cuda.waits.clear()
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            loss = objective([0, 1, 2], CudaTensor(grid), captions, lengths)
        found = backward(loss)
        objective.finish_step()
        assert not cuda.waits, cuda.waits
    names = {parameter: name for name, parameter in moved.named_parameters()}
    ours = {names[leaf]: gradient.numbers for leaf, gradient in found.items()}
    assert objective.hard.baseline.numbers != -9
    for name, gradient in plain.items():
        if precision == torch.float32:
            torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
        else:  # in low precision some other locations are drawn
            cosine = F.cosine_similarity(ours[name].flatten(), gradient.flatten(), dim=0)
            assert cosine > 0.5, (name, cosine)


# --- decoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_decoding_by_the_maximum(fused):
    """A caption's log-probability is that of feeding it while looking at the maxima of alpha."""
    decoder, grid = make_decoder().eval(), torch.rand(4, 8, 8, 6) * 3
    start, end = VOCABULARY - 2, VOCABULARY - 1
    options = {"beam_size": 3, "max_steps": 6, "keep_alphas": True, "fused": fused}
    expectation = beam_search([decoder], [grid], start, end, **options)
    decoder.takes_maximum = True
    for i, found in enumerate(beam_search([decoder], [grid], start, end, **options)):
        words = [start, *found.words, *[end] * found.finished]
        noise = torch.ones(1, len(words) - 1, 196)
        encoding = models.pool_grid(grid[i : i + 1])
        logits, *_, alphas, _ = decoder(encoding, torch.tensor([words]), torch.tensor([[len(words)]]), noise)
        log_probs = logits[0].log_softmax(dim=1)[range(len(words) - 1), words[1:]]
        assert found.score == pytest.approx(float(log_probs.detach().sum()), abs=1e-4)
        torch.testing.assert_close(found.alphas, alphas[0, : len(found.words)])  # not the maxima
        assert found.score != pytest.approx(expectation[i].score, abs=1e-3)


def test_an_ensemble_of_a_hard_and_a_soft_model():
    hard, soft, grid = make_decoder().eval(), make_decoder().eval(), torch.rand(3, 8, 8, 6) * 3
    hard.takes_maximum = True
    results = [
        beam_search(
            [hard, soft], [grid, grid], VOCABULARY - 2, VOCABULARY - 1, max_steps=6, keep_alphas=True,
            fused=fused,
        )
        for fused in (True, False)
    ]  # fmt: skip
    assert [h.words for h in results[0]] == [h.words for h in results[1]]
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours.alphas, plain.alphas)
        assert ours.score == pytest.approx(plain.score, abs=1e-4)


# --- training -----------------------------------------------------------------------------------------------


def hard_settings(prepared, output, **options):
    return small_settings(prepared, output, **{"attention": "hard"} | options)


@pytest.mark.parametrize("fused", [True, False])
def test_a_resumed_training_is_the_uninterrupted_one(prepared, tmp_path, fused):
    sizes = {"attention_dim": 8, "decoder_dim": 16, "emb_dim": 8}
    options = {"fused": fused} | sizes
    train.train(hard_settings(prepared, tmp_path / "a", **options))
    train.train(hard_settings(prepared, tmp_path / "b", **options, epochs=1))
    first = str(tmp_path / "b" / "checkpoint_epoch_1.pth")
    train.train(small_settings(prepared, tmp_path / "b", **sizes, checkpoint=first))  # it knows what it is
    a, b = (load_checkpoint(tmp_path / name / "checkpoint_epoch_2.pth") for name in "ab")
    assert b["settings"]["attention"] == "hard"
    for name, tensor in a["decoder"].items():
        torch.testing.assert_close(b["decoder"][name], tensor, msg=name)
    baselines = [line[BASELINE] for line in read_history(tmp_path / "a")]
    assert baselines == [line[BASELINE] for line in b["history"]]
    assert baselines[0] < baselines[1] < 0  # captions become likelier


def test_a_checkpoint_knows_how_it_captions(prepared, tmp_path):
    train.train(hard_settings(prepared, tmp_path, hard_decoding="maximum", epochs=1))
    assert Captioner.load(tmp_path / "best_checkpoint.pth").decoders[0].takes_maximum
    train.train(hard_settings(prepared, tmp_path / "other", hard_decoding="expectation", epochs=1))
    assert not Captioner.load(tmp_path / "other").decoders[0].takes_maximum
    weights = load_checkpoint(tmp_path / "best_checkpoint.pth")["decoder"]
    assert weights.keys() == DecoderWithAttention(2, 2, 2, 2, 2).state_dict().keys()


def test_self_critical_training_goes_on_from_hard_attention(prepared, tmp_path):
    train.train(hard_settings(prepared, tmp_path, epochs=2, self_critical_after=1))
    first, second = load_checkpoint(tmp_path / "checkpoint_epoch_2.pth")["history"]
    assert BASELINE in first and "train_reward" in second and BASELINE not in second


def test_what_does_not_fit_is_refused(prepared, models, tmp_path, monkeypatch, capsys, run_main):
    both = ["--data_folder", prepared, "--output_folder", tmp_path / "out"]
    for arguments, parts in (
        (["--hard_decoding", "maximum"], ["--attention hard"]),
        (["--attention", "hard", "--hard_decoding", "maximum", "--self_critical_after", 1],
         ["without --self_critical_after"]),
        (["--attention", "firm"], ["--attention"]),
        (["--lambda_r", "-1"], ["--lambda_r"]),
        (["--checkpoint", models / "best_checkpoint.pth", "--epochs", 9, "--attention", "hard"],
         ["--attention hard", "was trained with soft"]),
    ):  # fmt: skip
        assert_one_line(run_main(train, *both, *arguments), *parts)


def test_a_checkpoint_without_the_setting_is_soft(prepared, models, tmp_path, run_main):
    checkpoint = load_checkpoint(models / "best_checkpoint.pth")
    for name in ("attention", "hard_decoding", "lambda_r", "lambda_e"):
        del checkpoint["settings"][name]
    save_checkpoint(tmp_path / "old.pth", checkpoint)
    assert not Captioner.load(tmp_path / "old.pth").decoders[0].takes_maximum
    both = ["--data_folder", prepared, "--output_folder", tmp_path / "out", "--epochs", 9]
    refused = run_main(train, *both, "--checkpoint", tmp_path / "old.pth", "--attention", "hard")
    assert_one_line(refused, "--attention hard", "was trained with soft")
