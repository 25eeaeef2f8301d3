"""Hard attention: its loss and gradient are those of the paper's formula, a training goes on."""

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_one_line, random_captions, read_history, small_settings

import models
import train
from captioning.captioners.attention import Captioner
from captioning.data.prepared import UNK
from captioning.decoding.beam_search import beam_search
from captioning.decoding.fast_energies import use_fast_energies
from captioning.decoding.teacher_forcing import PackedCaptions, TokenLogits, token_logits
from captioning.training.losses import CrossEntropy
from captioning.training.optimization import Run
from captioning.training.reinforce import BASELINE, LocationLoss
from captioning.weights.checkpoints import load_checkpoint, save_checkpoint
from models import Attention, DecoderWithAttention, HardAttention
from tests.fake_cuda import CudaTensor, FakeCuda, backward, to_cuda

VOCABULARY = 12


def make_decoder(encoder_dim: int = 6, attention=HardAttention, fast: bool = False) -> DecoderWithAttention:
    decoder = DecoderWithAttention(5, 4, 7, VOCABULARY, encoder_dim, dropout=0, attention=attention)
    for parameter in decoder.parameters():
        parameter.data.mul_(3)  # attention far from uniform
    assert not fast or use_fast_energies(decoder)
    return decoder


def make_settings(**options) -> train.Settings:
    return train.Settings(**{"attention": "hard", "dropout": 0, "alpha_c": 0.3} | options)


def make_objective(decoder, baseline: float | None = None, **options) -> CrossEntropy:
    history = [] if baseline is None else [{"epoch": 1, BASELINE: baseline}]
    settings, run = make_settings(**options), Run.start("no")
    return CrossEntropy(None, decoder, settings, run, {UNK: 0}, hard=LocationLoss(settings, run, history))


def plain_decoding(decoder, grid, caption: list[int], look) -> tuple[torch.Tensor, torch.Tensor]:
    """One image's caption by the formulae: log-probabilities (R, T) of its words and alphas (R, T, P).

    `look(step, alpha)` gives what of each location a word sees, (R, P), from alpha, (R, P) or (1, P).
    """
    pixels, attention = models.pool_grid(grid).flatten(1, 2), decoder.attention  # (1, P, D)
    h, c = decoder.init_h(pixels.mean(dim=1)), decoder.init_c(pixels.mean(dim=1))
    log_probs, alphas = [], []
    for step, (word, target) in enumerate(itertools.pairwise(caption)):
        hidden = attention.encoder_att(pixels) + attention.decoder_att(h).unsqueeze(1)
        alpha = attention.full_att(torch.relu(hidden)).squeeze(2).softmax(dim=1)
        context = look(step, alpha) @ pixels[0]
        embedding = decoder.embedding.weight[word].expand(len(context), -1)
        inputs = torch.cat([embedding, torch.sigmoid(decoder.f_beta(h)) * context], dim=1)
        h, c = decoder.decode_step(inputs, (h.expand(len(context), -1), c.expand(len(context), -1)))
        log_probs.append(decoder.fc(h).log_softmax(dim=1)[:, target])
        alphas.append(alpha.expand(len(context), -1))
    return torch.stack(log_probs, dim=1), torch.stack(alphas, dim=1)


def at_the_maximum(step: int, alpha: torch.Tensor) -> torch.Tensor:
    return F.one_hot(alpha.argmax(dim=1), alpha.shape[1]).to(alpha)


def at_the_expected_value(step: int, alpha: torch.Tensor) -> torch.Tensor:
    return alpha


# --- the locations ------------------------------------------------------------------------------------------


def test_locations_are_samples_of_alpha():
    alpha, count = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]), 100_000
    alphas, attention = alpha.expand(2, count // 2, 5), HardAttention(2, 2, 2)
    with attention.sampling(torch.zeros(2, count // 2, 1, dtype=torch.bool)) as samples:
        looked_at = attention.look(alphas)
    assert len(samples) == 1 and torch.equal(samples[0], looked_at)
    drawn = looked_at.flatten(0, 1)
    assert torch.equal(drawn.sum(dim=1), torch.ones(count)) and torch.equal(drawn, drawn.round())
    error = (alpha * (1 - alpha) / count).sqrt()
    assert ((drawn.mean(dim=0) - alpha).abs() <= 4 * error).all()


def test_what_a_word_looks_at_outside_of_training():
    alphas = torch.rand(2, 3, 5).softmax(dim=2)
    assert Attention(2, 2, 2).look(alphas) is alphas and HardAttention(2, 2, 2).look(alphas) is alphas
    looked_at = HardAttention(2, 2, 2, takes_maximum=True).look(alphas)
    assert torch.equal(looked_at.argmax(dim=2), alphas.argmax(dim=2)) and looked_at.sum() == 6
    attention = HardAttention(2, 2, 2)
    with attention.sampling(torch.ones(4, 6, 1, dtype=torch.bool)):  # of more captions, those that go on
        assert torch.equal(attention.look(alphas), alphas)
    with pytest.raises(KeyError), attention.sampling(torch.zeros(2, 3, 1, dtype=torch.bool)):
        raise KeyError
    assert attention.look(alphas) is alphas


@pytest.mark.parametrize("fast", [True, False])
def test_half_of_the_captions_look_at_the_expected_value(fast):
    """All words of a caption, or none; a token's alpha is not what it looks at."""
    decoder, grid = make_decoder(fast=fast).double(), torch.rand(60, 2, 2, 6, dtype=torch.float64) * 4
    captions, lengths = random_captions(60, 6, VOCABULARY - 1, 8)
    hard = LocationLoss(make_settings(), Run.start("no"))
    found = token_logits(decoder, grid, captions, lengths, None, partial(hard.draw_locations, decoder))
    soft = token_logits(decoder, grid, captions, lengths)
    same = (found.logits - soft.logits).abs().amax(dim=1) < 1e-9
    assert torch.equal(same, ~hard.is_sampled[found.captions])
    assert hard.is_sampled.float().mean() == pytest.approx(0.5, abs=0.1)
    torch.testing.assert_close(found.alphas[same], soft.alphas[same])
    torch.testing.assert_close(found.alphas.sum(dim=1), torch.ones(len(same), dtype=torch.float64))
    assert ((found.alphas > 0) & (found.alphas < 1)).any(dim=1).all()
    assert torch.equal(hard.locations.sum(dim=1), torch.ones(len(same)))


# --- its gradient -------------------------------------------------------------------------------------------


def enumerated_loss(decoder, grid, caption: list[int], settings) -> torch.Tensor:
    """The loss per word whose gradient one caption's samples have in the mean, from all location sequences.

    Half of it is with sampled locations: the paper's L_s = sum_s p(s) log p(y | s), and the entropy along
    each sequence; the other half is soft attention.
    """
    pixels, steps = models.ENCODED_SIZE**2, len(caption) - 1
    sequences = torch.tensor(list(itertools.product(range(pixels), repeat=steps)))  # (R, T)
    locations = F.one_hot(sequences, pixels).to(grid)
    log_probs, alphas = plain_decoding(decoder, grid, caption, lambda step, alpha: locations[:, step])
    probabilities = (alphas * locations).sum(dim=2).prod(dim=1)
    assert float(probabilities.detach().sum()) == pytest.approx(1, abs=1e-9)
    soft_log_probs, soft_alphas = plain_decoding(decoder, grid, caption, at_the_expected_value)

    def entropies(alphas):
        return -(alphas * alphas.log()).sum(dim=(1, 2))

    def penalties(alphas):
        return ((1 - alphas.sum(dim=1)) ** 2).mean(dim=1)

    sampled = (probabilities * log_probs.sum(dim=1)).sum()
    sampled = sampled + settings.lambda_e * (probabilities.detach() * entropies(alphas)).sum()
    soft = soft_log_probs.sum() + settings.lambda_e * entropies(soft_alphas).sum()
    penalty = (probabilities.detach() * penalties(alphas)).sum() + penalties(soft_alphas).sum()
    return -(sampled + soft) / 2 / steps + settings.alpha_c * penalty / 2


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("caption", [[1, 2], [1, 5, 2]], ids=["one word", "two words"])
def test_the_mean_gradient_is_the_enumerated_one(monkeypatch, fast, caption):
    """On a grid of 2 x 2, in units of the mean's standard error; each caption is many draws of one."""
    monkeypatch.setattr(models, "ENCODED_SIZE", 2)
    decoder = make_decoder(fast=fast).double()
    decoder.attention.full_att.weight.data.div_(5)  # no location so rare that it is never drawn
    decoder.fc.weight.data.mul_(6)  # it matters which one is
    grid = torch.randn(1, 2, 2, 6, dtype=torch.float64) * 3
    grid.requires_grad_()
    objective = make_objective(decoder, baseline=-4.0, lambda_r=1, lambda_e=0.2)
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
        other = make_objective(decoder, baseline=-4.0, lambda_r=1, lambda_e=0.2)
        setattr(other.settings, name, 0)
        other.start_step(lengths.numpy())
        loss = sum(other([0], grid, captions, lengths) for _ in range(20)) / 20
        without = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(leaves.values()))])
        assert ((without - exact) / error.clamp(min=1e-12)).abs().max() > 8, name


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("side, group", [(2, 2), (8, 3), (14, 1)])
def test_the_loss_is_that_of_its_formula_one_caption_at_a_time(monkeypatch, side, group, fast):
    """With the locations that were drawn: the loss, all gradients, the encoder's too, and the baseline."""
    decoder = make_decoder(fast=fast).double()
    grid = (torch.rand(3, side, side, 6, dtype=torch.float64) * 4).requires_grad_()
    captions, lengths = random_captions(3, group, VOCABULARY - 1, 8)
    monkeypatch.setattr("captioning.training.losses.encode", lambda *_: grid)
    objective = make_objective(decoder, baseline=-9.0, lambda_r=0.7, lambda_e=0.2)
    torch.manual_seed(4)
    objective.start_step(lengths.numpy())
    loss = objective([0, 1, 2], grid, captions, lengths)
    loss.backward()
    hard, packing = objective.hard, PackedCaptions(lengths - 1)
    gradients = {name: p.grad for name, p in decoder.named_parameters()} | {"grid": grid.grad}
    decoder.zero_grad()
    grid.grad = None

    words, expected, penalty, sampled = int((lengths - 1).sum()), 0.0, 0.0, []
    for caption in range(3 * group):
        n, g = divmod(caption, group)
        locations = hard.locations[packing.captions == caption]  # (T, P), step by step
        is_sampled = bool(hard.is_sampled[caption])
        look = (lambda step, alpha: locations[step : step + 1]) if is_sampled else at_the_expected_value  # noqa: B023
        tokens = captions[n, g, : lengths[n, g]].tolist()
        log_probs, alphas = plain_decoding(decoder, grid[n : n + 1], tokens, look)
        expected = expected - log_probs.sum()
        penalty = penalty + ((1 - alphas.sum(dim=1)) ** 2).mean()
        terms = -0.2 * (alphas * alphas.log()).sum()
        if is_sampled:
            sampled.append(float(log_probs.detach().sum()))
            terms = terms + 0.7 * (sampled[-1] + 9.0) * (alphas[0] * locations).sum(dim=1).log().sum()
        expected = expected - terms + terms.detach()  # which has a gradient, and no value
    assert 0 < len(sampled) < 3 * group
    expected = expected / words + 0.3 * penalty / (3 * group)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    plain = {name: p.grad for name, p in decoder.named_parameters()} | {"grid": grid.grad}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-6, msg=name)
    objective.finish_step()
    assert float(hard.baseline) == pytest.approx(0.9 * -9 + 0.1 * sum(sampled) / len(sampled), abs=1e-5)


def make_tokens(logits, targets, alphas, lengths: list[int]) -> TokenLogits:
    """Tokens of one caption an image, with so many each."""
    packing = PackedCaptions(torch.tensor(lengths).unsqueeze(1))
    return TokenLogits(logits, targets, packing.captions, alphas, packing)


def test_an_alpha_of_zero_gives_finite_gradients():
    """As where the softmax underflows; -inf is the energy of a location that is never looked at."""
    energies = torch.tensor([[0.0, -torch.inf, 1.0, -200.0]], requires_grad=True)
    hard = LocationLoss(make_settings(), Run.start("no"), [{BASELINE: -1.0}])
    tokens = make_tokens(torch.zeros(1, 3), torch.tensor([1]), energies.softmax(dim=1), [1])
    hard.locations, hard.is_sampled = torch.tensor([[0.0, 0.0, 1.0, 0.0]]), torch.tensor([True])
    hard.gradient_of_locations(tokens).backward()
    assert energies.grad.isfinite().all() and energies.grad[0, 0] != 0


# --- the baseline -------------------------------------------------------------------------------------------


def test_the_baseline_is_a_moving_average():
    hard = LocationLoss(make_settings(lambda_e=0.0), Run.start("no"))
    assert hard.report() == {}
    expected = None
    for step in range(4):
        logits, targets = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
        alphas = torch.rand(6, 4).softmax(dim=1).requires_grad_()
        tokens = make_tokens(logits, targets, alphas, [3, 2, 1])
        hard.locations = F.one_hot(torch.randint(4, (6,)), 4).float()
        hard.is_sampled = torch.tensor([True, False, True])
        (d_alphas,) = torch.autograd.grad(hard.gradient_of_locations(tokens), alphas)
        assert d_alphas.any() == (step > 0)  # the first step has no baseline
        assert not d_alphas[tokens.captions == 1].any()
        hard.update_baseline()
        log_probs = logits.log_softmax(dim=1)[range(6), targets]
        mean = sum(float(log_probs[tokens.captions == caption].sum()) for caption in (0, 2)) / 2
        expected = mean if expected is None else 0.9 * expected + 0.1 * mean
        assert hard.report()[BASELINE] == pytest.approx(expected, abs=1e-5)
    hard.update_baseline()  # a step in which no caption was sampled
    assert hard.report()[BASELINE] == pytest.approx(expected, abs=1e-5)


# --- on CUDA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fast", [True, False])
def test_a_training_step_on_cuda(monkeypatch, precision, fast):
    """The host never waits for the device; gradients are the CPU's."""
    decoder, grid = make_decoder(32, fast=fast), torch.rand(3, 8, 8, 32) * 2
    captions, lengths = random_captions(3, 2, VOCABULARY - 1, 8)
    monkeypatch.setattr("captioning.training.losses.encode", lambda encoder, images, device: images)
    objective = make_objective(decoder, baseline=-9.0)
    objective.start_step(lengths.numpy())
    torch.manual_seed(1)
    objective([0, 1, 2], grid, captions, lengths).backward()
    assert 0 < objective.hard.is_sampled.sum() < 6
    plain = {name: p.grad for name, p in decoder.named_parameters()}
    with FakeCuda() as cuda:
        on_device = SimpleNamespace(device=torch.device("cuda", 0), state=Run.start("no").state)
        moved = to_cuda(decoder)
        settings = make_settings()
        hard = LocationLoss(settings, on_device, [{BASELINE: -9.0}])
        objective = CrossEntropy(None, moved, settings, on_device, {UNK: 0}, hard=hard)
        objective.start_step(lengths.numpy())
        cuda.waits.clear()
        torch.manual_seed(1)  # the pretended device draws the CPU's numbers
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            loss = objective([0, 1, 2], CudaTensor(grid), captions, lengths)
        found = backward(loss)
        objective.finish_step()
        assert not cuda.waits, cuda.waits
        assert "pageable" not in cuda.copies
    names = {parameter: name for name, parameter in moved.named_parameters()}
    ours = {names[leaf]: gradient.numbers for leaf, gradient in found.items()}
    assert objective.hard.baseline.numbers != -9
    for name, gradient in plain.items():
        if precision == torch.float32:
            torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
        elif name != "attention.full_att.bias":  # in low precision some other locations are drawn
            cosine = F.cosine_similarity(ours[name].flatten(), gradient.flatten(), dim=0)
            assert cosine > 0.5, (name, cosine)


# --- decoding -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("fast", [True, False])
def test_decoding_by_the_maximum(fast):
    """A caption's log-probability is that of feeding it while looking at the maxima of alpha."""
    decoder = make_decoder(attention=partial(HardAttention, takes_maximum=True), fast=fast).eval()
    grid, start, end = torch.rand(4, 8, 8, 6) * 3, VOCABULARY - 2, VOCABULARY - 1
    options = {"beam_size": 3, "max_steps": 6, "keep_alphas": True}
    for i, found in enumerate(beam_search([decoder], [grid], start, end, **options)):
        words = [start, *found.words, *[end] * found.finished]
        log_probs, alphas = plain_decoding(decoder, grid[i : i + 1], words, at_the_maximum)
        assert found.log_probs == pytest.approx(log_probs[0].tolist(), abs=1e-4)
        torch.testing.assert_close(found.alphas, alphas[0, : len(found.words)])  # not the maxima
        expectation, _ = plain_decoding(decoder, grid[i : i + 1], words, at_the_expected_value)
        assert found.score != pytest.approx(float(expectation.sum()), abs=1e-3)


@torch.no_grad()
def test_an_ensemble_of_a_hard_and_a_soft_model():
    hard = make_decoder(attention=partial(HardAttention, takes_maximum=True), fast=True).eval()
    soft, grid = make_decoder(attention=Attention, fast=True).eval(), torch.rand(3, 8, 8, 6) * 3
    start, end = VOCABULARY - 2, VOCABULARY - 1
    found = beam_search([hard, soft], [grid, grid], start, end, max_steps=6, keep_alphas=True)
    for i, h in enumerate(found):
        words = [start, *h.words, *[end] * h.finished]
        members = [
            plain_decoding(hard, grid[i : i + 1], words, at_the_maximum),
            plain_decoding(soft, grid[i : i + 1], words, at_the_expected_value),
        ]
        log_probs, alphas = (torch.cat(values) for values in zip(*members))
        assert h.log_probs == pytest.approx(log_probs.exp().mean(dim=0).log().tolist(), abs=1e-4)
        torch.testing.assert_close(h.alphas, alphas.mean(dim=0)[: len(h.words)])


# --- training -----------------------------------------------------------------------------------------------


def hard_settings(prepared, output, **options):
    return small_settings(prepared, output, **{"attention": "hard"} | options)


def test_a_resumed_training_is_the_uninterrupted_one(prepared, tmp_path):
    sizes = {"attention_dim": 8, "decoder_dim": 16, "emb_dim": 8}
    train.train(hard_settings(prepared, tmp_path / "a", **sizes))
    train.train(hard_settings(prepared, tmp_path / "b", **sizes, epochs=1))
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
    assert Captioner.load(tmp_path / "best_checkpoint.pth").decoders[0].attention.takes_maximum
    train.train(hard_settings(prepared, tmp_path / "other", hard_decoding="expectation", epochs=1))
    assert not Captioner.load(tmp_path / "other").decoders[0].attention.takes_maximum
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


def test_a_checkpoint_without_the_setting_is_soft(models, tmp_path):
    checkpoint = load_checkpoint(models / "best_checkpoint.pth")
    for name in ("attention", "hard_decoding", "lambda_r", "lambda_e"):
        del checkpoint["settings"][name]
    save_checkpoint(tmp_path / "old.pth", checkpoint)
    assert not isinstance(Captioner.load(tmp_path / "old.pth").decoders[0].attention, HardAttention)
