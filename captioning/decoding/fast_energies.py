"""Equation 4 computed image by image: the values and gradients of `models.Attention.energies`, faster.

Automatic differentiation would keep relu(att1 + att2) of every step, (batch_size, num_captions, num_pixels,
attention_dim) numbers. Here they are made for one image at a time, so that they stay in a CPU's cache, and
made again in the backward pass. A formula that was changed in models.py runs as it stands there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from models import Attention, DecoderWithAttention


class Energies(Function):
    @staticmethod
    def forward(ctx, att1: Tensor, att2: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(att1, att2, weight)
        ctx.block = 1 if att1.device.type == "cpu" else len(att1)  # images at a time
        hidden = att1.new_empty(ctx.block, att2.shape[1], *att1.shape[1:])
        energies = att1.new_empty(*att2.shape[:2], att1.shape[1])
        tensors = att1.unsqueeze(1), att2.unsqueeze(2), energies
        for pixels, captions, out in zip(*(tensor.split(ctx.block) for tensor in tensors)):
            torch.add(pixels, captions, out=hidden)
            torch.matmul(hidden.relu_(), weight, out=out)
        return energies.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_energies: Tensor) -> tuple[Tensor, ...]:
        att1, att2, weight = ctx.saved_tensors
        positive = att1.new_empty(
            ctx.block, att2.shape[1], *att1.shape[1:]
        )  # 1 where att1 + att2 > 0, else 0
        # d_energies * positive * weight is the gradient of att1 + att2; without the weight, for now,
        d_att1, d_att2 = torch.empty_like(att1), torch.empty_like(att2)  # summed over captions; over pixels
        d_weight = torch.zeros_like(positive[:, 0])
        tensors = att1, -att2.unsqueeze(2), d_energies.unsqueeze(3), d_att1, d_att2.unsqueeze(2)
        for pixels, captions, d_block, d_pixels, d_captions in zip(*(t.split(ctx.block) for t in tensors)):
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
    try:
        for training in (True, False):
            torch.testing.assert_close(probe(fast, training), probe(own, training), rtol=1e-7, atol=1e-7)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError):
        return False
    decoder.attention.__class__ = fast
    return True


def probe(form: type[Attention], training: bool) -> list[Tensor]:
    """The energies of a small attention with random weights and inputs, and the gradients of all of these, in
    double precision; inputs of several sizes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention = form(4, 4, 16).double().train(training)
        sizes = torch.tensor([0.1, 1.0, 50.0]).double().view(3, 1, 1)
        inputs = [sizes * torch.randn(3, n, 16).double() for n in (5, 4)]
        tensors = [*inputs, *attention.parameters(), *attention.buffers()]
        for tensor in tensors[2:]:
            torch.nn.init.normal_(tensor)
        energies = attention.energies(*(tensor.requires_grad_() for tensor in inputs))
        (energies * torch.randn_like(energies)).sum().backward()
    return [energies, *(torch.zeros_like(t) if t.grad is None else t.grad for t in tensors)]
