"""What is made faster by hand: the formulae's values and gradients; a changed formula runs as it stands."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import random_captions
from test_beam_search import plain_beam_search
from torch import nn

from captioning.decoding.beam_search import beam_search
from captioning.decoding.fast_energies import Energies, FastEnergies, use_fast_energies
from captioning.decoding.sampling import sample_captions
from captioning.decoding.teacher_forcing import token_logits
from models import Attention, DecoderWithAttention, HardAttention, pool_grid
from tests.reference import TextbookAttention, TextbookDecoder

START, END, VOCABULARY = 38, 39, 40
SIZES = (16, 16, 24, VOCABULARY, 32)


def make_decoder(attention=Attention) -> DecoderWithAttention:
    return DecoderWithAttention(*SIZES, dropout=0.0, attention=attention)


def spread(decoder: DecoderWithAttention) -> None:
    """Weights with which attention is far from uniform and captions end."""
    for name, parameter in decoder.named_parameters():
        parameter.data.mul_(3).add_(0.3 * torch.randn_like(parameter) if name.startswith("attention") else 0)
    decoder.fc.bias.data[END] = 0.5


# --- the energies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images, captions, pixels", [(1, 1, 1), (3, 1, 4), (2, 5, 3), (4, 2, 6)])
def test_gradients_of_the_energies(images, captions, pixels):
    att1, att2, weight, bias = inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((images, pixels, 5), (images, captions, 5), (5,), (1,))
    ]
    expected = torch.relu(att1[:, None] + att2[:, :, None]) @ weight + bias
    torch.testing.assert_close(Energies.apply(*inputs), expected)
    assert torch.autograd.gradcheck(Energies.apply, inputs)


def test_gradients_at_the_kink_and_of_a_part():
    """Where att1 + att2 is 0 the slope is torch's, 0; the weights may be frozen, the inputs a view."""
    att1, att2 = torch.zeros(2, 9, 4), torch.zeros(2, 6, 4)
    att1[:, ::2] = torch.randn(2, 5, 4)
    weight, bias = torch.randn(4), torch.zeros(1)
    slope = torch.randn(2, 3, 9)
    gradients = []
    for form in (Energies.apply, lambda a, b, w, c: torch.relu(a[:, None] + b[:, :, None]) @ w + c):
        leaves = att1.clone().requires_grad_(), att2.clone().requires_grad_()
        energies = form(leaves[0], leaves[1][:, ::2], weight, bias)
        gradients.append(torch.autograd.grad(energies, leaves, slope))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs)


# --- where they are used ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("attention", [Attention, HardAttention, partial(HardAttention, takes_maximum=True)])
def test_the_papers_attention_gets_them(attention, mode, monkeypatch):
    """Nothing else of the decoder changes, nor do torch's random numbers, those of a GPU too."""
    decoder = make_decoder(attention)
    own, before = type(decoder.attention), {name: v.clone() for name, v in decoder.state_dict().items()}
    attributes, random_state = dict(vars(decoder.attention)), torch.get_rng_state()
    monkeypatch.setattr(torch, "manual_seed", None)  # which would seed a GPU
    with mode():
        assert use_fast_energies(decoder)
        assert use_fast_energies(decoder)  # it knows that it has them
    assert torch.equal(torch.get_rng_state(), random_state)
    assert isinstance(decoder.attention, FastEnergies) and isinstance(decoder.attention, own)
    assert vars(decoder.attention) == attributes and decoder.training
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, before[name])


class Tanh(Attention):
    def energies(self, att1, att2):
        return self.full_att(torch.tanh(att1.unsqueeze(1) + att2.unsqueeze(2))).squeeze(3)

    def plain(self, hidden):
        return self.full_att(torch.tanh(hidden))


class Gelu(Attention):
    def energies(self, att1, att2):
        return self.full_att(F.gelu(att1.unsqueeze(1) + att2.unsqueeze(2))).squeeze(3)

    def plain(self, hidden):
        return self.full_att(F.gelu(hidden))


class Leaky(Attention):
    def energies(self, att1, att2):
        return self.full_att(F.leaky_relu(att1.unsqueeze(1) + att2.unsqueeze(2), 0.01)).squeeze(3)

    def plain(self, hidden):
        return self.full_att(F.leaky_relu(hidden, 0.01))


class Dropout(Attention):
    def energies(self, att1, att2):
        hidden = F.relu(att1.unsqueeze(1) + att2.unsqueeze(2))
        return self.full_att(F.dropout(hidden, 0.1, self.training)).squeeze(3)

    def plain(self, hidden):
        return self.full_att(F.dropout(F.relu(hidden), 0.1, self.training))


class LayerNorm(Attention):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.norm = nn.LayerNorm(self.full_att.in_features)

    def energies(self, att1, att2):
        return self.full_att(F.relu(self.norm(att1.unsqueeze(1) + att2.unsqueeze(2)))).squeeze(3)

    def plain(self, hidden):
        return self.full_att(F.relu(self.norm(hidden)))


class Temperature(Attention):
    def __init__(self, *sizes, temperature=1.0):
        super().__init__(*sizes)
        self.temperature = temperature

    def energies(self, att1, att2):
        return super().energies(att1, att2) / self.temperature

    def plain(self, hidden):
        return self.full_att(F.relu(hidden)) / self.temperature


class Bias(Attention):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.bias = nn.Parameter(torch.zeros(self.full_att.in_features))

    def energies(self, att1, att2):
        return self.full_att(F.relu(att1.unsqueeze(1) + att2.unsqueeze(2) + self.bias)).squeeze(3)

    def plain(self, hidden):
        return self.full_att(F.relu(hidden + self.bias))


class PixelBias(Attention):
    """With a number of pixels in it: 14 x 14."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.bias = nn.Parameter(torch.zeros(196, 1))

    def energies(self, att1, att2):
        return super().energies(att1, att2) + self.bias[:, 0]

    def plain(self, hidden):
        return self.full_att(F.relu(hidden)) + self.bias


class Sparse(Attention):
    """Only the 20 pixels of highest energy count."""

    def energies(self, att1, att2):
        energies = super().energies(att1, att2)
        least = energies.topk(min(20, energies.shape[2])).values[:, :, -1:]
        return energies.masked_fill(energies < least, -1e9)

    def plain(self, hidden):
        energies = self.full_att(F.relu(hidden))
        return energies.masked_fill(energies < energies.topk(20, dim=1).values[:, -1:], -1e9)


CHANGES = {
    change.__name__: change for change in (Tanh, Gelu, Leaky, Dropout, LayerNorm, Bias, PixelBias, Sparse)
}
CHANGES |= {f"Temperature {value}": partial(Temperature, temperature=value) for value in (1.01, 2.0, 1.0)}


class PlainAttention(TextbookAttention):
    """The textbook's attention with the energies of a changed one, `plain` in it."""

    def __init__(self, changed: Attention):
        super().__init__(SIZES[4], SIZES[2], SIZES[0])
        self.changed = [changed]  # in a list it is no submodule
        self.load_state_dict(changed.state_dict(), strict=False)

    def forward(self, pixels, hidden):
        (changed,) = self.changed
        queries = changed.decoder_att(hidden)[:, None]
        alpha = changed.plain(changed.encoder_att(pixels) + queries).squeeze(2).softmax(dim=1)
        return (alpha[:, :, None] * pixels).sum(dim=1), alpha


def plain_decoder(decoder: DecoderWithAttention) -> TextbookDecoder:
    """The textbook's decoder with the decoder's own weights and the changed formula."""
    textbook = TextbookDecoder(*SIZES)
    for name, module in decoder.named_children():
        if name not in ("attention", "dropout", "decode_step"):
            setattr(textbook, name, module)
    for name, parameter in decoder.decode_step.named_parameters():
        setattr(textbook.decode_step, name, parameter)
    textbook.attention = PlainAttention(decoder.attention)
    return textbook


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_formula_is_what_trains_searches_and_samples(name):
    """Refused as a new model has it; compared with the changed formula written in plain."""
    decoder = make_decoder(CHANGES[name])
    own = type(decoder.attention)
    assert not use_fast_energies(decoder) and type(decoder.attention) is own
    spread(decoder)
    if name == "Temperature 1.0":
        decoder.attention.temperature = 1.5  # as a training may do that begins with the paper's formula
    plain, names = plain_decoder(decoder), [name for name, _ in decoder.named_parameters()]
    grid = torch.rand(3, 8, 8, 32) * 3
    captions, lengths = random_captions(3, 2, START - 1, 8)

    def gradients(loss) -> dict[str, torch.Tensor]:
        found = torch.autograd.grad(loss, list(decoder.parameters()), materialize_grads=True)
        return dict(zip(names, found))

    def assert_same(ours, theirs) -> None:
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-4, msg=name)

    # training, one caption at a time, so that a dropout draws the same numbers in both
    for n in range(3):
        torch.manual_seed(n)
        tokens = token_logits(decoder, grid[n : n + 1], captions[n : n + 1, :1], lengths[n : n + 1, :1])
        ours = gradients(F.cross_entropy(tokens.logits, tokens.targets))
        torch.manual_seed(n)
        logits, *_ = plain(pool_grid(grid[n : n + 1]), captions[n, :1], lengths[n, :1])
        theirs = gradients(F.cross_entropy(logits[0], captions[n, 0, 1 : lengths[n, 0]]))
        assert_same(ours, theirs)
        assert all(gradient.any() for name, gradient in theirs.items() if name != "attention.full_att.bias")

    decoder.eval()
    tokens = token_logits(decoder, grid, captions, lengths)
    copies = pool_grid(grid).repeat_interleave(2, dim=0)
    logits, *_ = plain(copies, captions.flatten(0, 1), lengths.flatten())
    order = lengths.flatten().sort(descending=True).indices.argsort()
    logits = logits[order][tokens.packing.captions, tokens.packing.steps]
    torch.testing.assert_close(tokens.logits, logits, atol=1e-5, rtol=1e-5)
    assert_same(*(gradients(F.cross_entropy(values, tokens.targets)) for values in (tokens.logits, logits)))

    with torch.no_grad():
        found = beam_search([decoder], [grid], START, END, 3, max_steps=8)
        for image, hypothesis in zip(pool_grid(grid).flatten(1, 2), found):
            words, score = plain_beam_search(plain, image, 3, 8)
            assert hypothesis.words == words and hypothesis.score == pytest.approx(score, abs=1e-4)
        for n, own in enumerate(sample_captions([decoder], [grid], START, END, range(3), 2, max_steps=8)):
            for h in own:
                words = torch.tensor([START, *h.words, *[END] * h.finished])
                logits, *_ = plain(pool_grid(grid[n : n + 1]), words[None], torch.tensor([len(words)]))
                log_probs = logits[0].log_softmax(dim=1).gather(1, words[1:, None])[:, 0]
                assert h.log_probs == pytest.approx(log_probs.tolist(), abs=1e-4)

    # the change shows, but for a dropout in evaluation: the paper's formula gives something else
    original = make_decoder()
    original.load_state_dict(decoder.state_dict(), strict=False)
    others = token_logits(original, grid, captions, lengths).logits
    assert name == "Dropout" or not torch.allclose(others, tokens.logits, atol=1e-4)


class DotProduct(nn.Module):
    """Another attention, which has no energies."""

    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)

    def forward(self, encoder_out, att1, decoder_hidden):
        scores = self.decoder_att(decoder_hidden) @ att1.mT / math.sqrt(att1.shape[2])
        alpha = scores.softmax(dim=2)
        return alpha @ encoder_out, alpha


class Uniform(Attention):
    """The paper's energies, mixed with a uniform distribution."""

    def forward(self, encoder_out, att1, decoder_hidden):
        energies = self.energies(att1, self.decoder_att(decoder_hidden))
        alpha = 0.5 * energies.softmax(dim=2) + 0.5 / energies.shape[2]
        return alpha @ encoder_out, alpha


@pytest.mark.parametrize("attention, fast", [(DotProduct, False), (Uniform, True)])
def test_a_changed_forward_runs_as_it_is(attention, fast):
    decoder = make_decoder(attention).eval()
    assert use_fast_energies(decoder) == fast
    spread(decoder)
    pixels, hidden = torch.rand(2, 196, 32), torch.randn(2, 3, 24)
    att1 = decoder.attention.encoder_att(pixels)
    context, alpha = decoder.attention(pixels, att1, hidden)
    queries = decoder.attention.decoder_att(hidden)
    if attention is DotProduct:
        expected = torch.einsum("npa,nga->ngp", att1, queries).div(4).softmax(dim=2)
    else:
        energies = decoder.attention.full_att(F.relu(att1[:, None] + queries[:, :, None])).squeeze(3)
        expected = (energies.softmax(dim=2) + 1 / 196) / 2
    torch.testing.assert_close(alpha, expected)
    torch.testing.assert_close(context, torch.einsum("ngp,npd->ngd", expected, pixels))
    found = beam_search([decoder], [torch.rand(2, 8, 8, 32)], START, END, 3, max_steps=6, keep_alphas=True)
    assert all(h.alphas.shape == (len(h.words), 196) for h in found)
