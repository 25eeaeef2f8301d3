"""Equation 4 computed image by image: the values and gradients of `models.Attention.energies`, faster.

Automatic differentiation would keep relu(att1 + att2) of all images, captions, pixels and units at each step.
Here one image's stays in a CPU's cache, and is computed again in the backward pass. A formula that was
changed in models.py runs as it stands there.
"""

import copy
from contextlib import suppress

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from models import ENCODED_SIZE, Attention, DecoderWithAttention


class Energies(Function):
    @staticmethod
    def forward(ctx, att1: Tensor, att2: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(att1, att2, weight)
        ctx.size = 1 if att1.device.type == "cpu" else len(att1)  # images at a time
        energies = att1.new_empty(*att2.shape[:2], att1.shape[1])
        hidden = att1.new_empty(ctx.size, att2.shape[1], *att1.shape[1:])
        tensors = att1.unsqueeze(1), att2.unsqueeze(2), energies
        for pixels, captions, out in zip(*(tensor.split(ctx.size) for tensor in tensors)):
            torch.add(pixels, captions, out=hidden)
            torch.mv(hidden.relu_().flatten(0, 2), weight, out=out.view(-1))
        return energies.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_energies: Tensor) -> tuple[Tensor, ...]:
        att1, att2, weight = ctx.saved_tensors
        positive = att1.new_empty(ctx.size, att2.shape[1], *att1.shape[1:])  # 1 where att1 + att2 > 0, else 0
        # d_energies * positive * weight is the gradient of att1 + att2; without the weight, for now,
        d_att1, d_att2 = torch.empty_like(att1), torch.empty_like(att2)  # summed over captions; over pixels
        d_weight = torch.zeros_like(positive[:, 0])
        tensors = att1, -att2.unsqueeze(2), d_energies.unsqueeze(3), d_att1, d_att2.unsqueeze(2)
        for pixels, captions, d_block, d_pixels, d_captions in zip(*(t.split(ctx.size) for t in tensors)):
            torch.gt(pixels.unsqueeze(1), captions, out=positive)
            torch.matmul(d_block.mT, positive, out=d_captions)
            torch.mul(positive[:, 0], d_block[:, 0], out=d_pixels)
            for caption in range(1, att2.shape[1]):
                d_pixels.addcmul_(positive[:, caption], d_block[:, caption])
            d_weight.addcmul_(d_pixels, pixels)  # relu(x) is x where x > 0
            d_pixels.mul_(weight)
        d_weight = d_weight.sum(dim=(0, 1)) + (d_att2 * att2).sum(dim=(0, 1))
        return d_att1, d_att2.mul_(weight), d_weight, d_energies.sum().view(1)


class FastEnergies(Attention):
    def energies(self, att1: Tensor, att2: Tensor) -> Tensor:
        weight, bias = (p.to(att1.dtype) for p in (self.full_att.weight[0], self.full_att.bias))
        with torch.autocast(att1.device.type, enabled=False):
            return Energies.apply(att1, att2.to(att1.dtype), weight, bias)


def use_fast_energies(decoder: DecoderWithAttention) -> bool:
    """Let a decoder compute its energies as above, if they are those of its own class; return whether they
    are. Its parameters, their names and its results stay the same."""
    own = type(decoder.attention)
    if issubclass(own, FastEnergies):
        return True
    fast = type(f"Fast{own.__name__}", (FastEnergies, own), {})
    with suppress(Exception):  # whatever in a changed attention does not let them be compared
        pairs = [zip(*(probe(decoder.attention, c, mode) for c in (fast, own))) for mode in (True, False)]
        if all(a.shape == b.shape and torch.allclose(a, b, 1e-7, 1e-7) for p in pairs for a, b in p):
            decoder.attention.__class__ = fast
    return isinstance(decoder.attention, fast)


@torch.inference_mode(False)  # gradients are computed, also where no_grad holds
def probe(attention: Attention, form: type[Attention], training: bool) -> list[Tensor]:
    """The energies of a copy as another class, for random weights and inputs of several sizes, and all their
    gradients; in double precision. Numbers that may start without effect, as a temperature's 1, are moved."""
    attention = copy.deepcopy(attention).cpu().train(training)
    attention.__class__ = form
    for module in attention.modules():
        vars(module).update({k: v + 0.5 for k, v in vars(module).items() if type(v) is float})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        weights = [torch.nn.init.normal_(t) for t in [*attention.parameters(), *attention.buffers()]]
        attention, scale = attention.double(), torch.tensor([0.1, 1.0, 50.0]).double().view(3, 1, 1)
        shapes = [(3, n, attention.encoder_att.out_features) for n in (ENCODED_SIZE**2, 4)]
        inputs = [(scale * torch.randn(shape).double()).requires_grad_() for shape in shapes]
        energies = attention.energies(*inputs)
        (energies * torch.randn_like(energies)).sum().backward()
    return [energies, *(torch.zeros(0) if t.grad is None else t.grad for t in inputs + weights)]
