"""The logits of all tokens of a batch of captions, where the ground-truth tokens are fed.

`token_logits` runs `DecoderWithAttention.teacher_forcing` and computes all logits in one product after the
last step. So are, on a CPU, the gradients of the weights that each step uses: automatic differentiation would
compute them at every step and add them up, 21 MB each time for an LSTM of width 512.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, Variable
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from captioning.decoding.pooled_grid import encoder_out_of
from models import DecoderWithAttention
from utils import copy_to_device


class PackedCaptions:
    """The captions of a batch as `DecoderWithAttention.teacher_forcing` takes them, and the order of their
    tokens, packed as in `torch.nn.utils.rnn.PackedSequence`: the first token of every caption, then the
    second of those that have one, and so on, captions by descending length.

    Args:
        decode_lengths: (N, G), tokens to feed of each caption, at least 1; on the CPU.

    Attributes:
        image_order: (N,) the images by their longest caption.
        caption_order: (N, G) indices in the N * G captions of the batch: those of the images in that order,
            each image's by length.
        decode_lengths: (N, G), in that order; on the CPU.
        captions, steps: (W,) each token's caption, as an index in the batch, and its step; on the CPU.
    """

    def __init__(self, decode_lengths: Tensor):
        self.image_order = decode_lengths.amax(dim=1).argsort(descending=True, stable=True)
        lengths, order = decode_lengths[self.image_order].sort(dim=1, descending=True, stable=True)
        self.caption_order = self.image_order.unsqueeze(1) * lengths.shape[1] + order
        self.decode_lengths, self.by_length = lengths, lengths.flatten().argsort(descending=True, stable=True)
        self.batch_sizes = [int((lengths > step).sum()) for step in range(int(lengths.max()))]
        sorted_indices = self.caption_order.flatten()[self.by_length]
        self.captions = torch.cat([sorted_indices[:size] for size in self.batch_sizes])
        self.steps = torch.arange(len(self.batch_sizes)).repeat_interleave(torch.tensor(self.batch_sizes))

    def sort(self, values: Tensor) -> Tensor:
        """Values of all captions (N, G, ...) -> the same in `caption_order`."""
        return values.flatten(0, 1)[self.caption_order.to(values.device)]

    def pack(self, steps: Sequence[Tensor]) -> Tensor:
        """(n, g, X) of each step -> (W, X)."""
        places, start = [], 0
        for values, size in zip(steps, self.batch_sizes):
            image = torch.div(self.by_length[:size], self.decode_lengths.shape[1], rounding_mode="floor")
            place_in_image = self.by_length[:size] % self.decode_lengths.shape[1]
            places.append(start + image * values.shape[1] + place_in_image)
            start += values.shape[0] * values.shape[1]
        (index,) = copy_to_device([torch.cat(places)], steps[0].device)
        return torch.cat([values.flatten(0, 1) for values in steps])[index]


class TokenLogits(NamedTuple):
    """The logits of all tokens of a batch of captions, packed as `packing` says."""

    logits: Tensor  # (W, V)
    targets: Tensor  # (W,) the ground-truth tokens that they should predict
    captions: Tensor  # (W,) each token's caption, as an index in the batch's N * G
    alphas: Tensor  # (W, P)
    packing: PackedCaptions

    def coverage(self) -> Tensor:
        """(N * G, P), the alphas summed over each caption's tokens."""
        count = self.packing.decode_lengths.numel()
        return self.alphas.new_zeros(count, self.alphas.shape[1]).index_add(0, self.captions, self.alphas)


def token_logits(
    decoder: DecoderWithAttention,
    grid: Tensor,
    captions: Tensor,
    lengths: Tensor,
    fed: Tensor | None = None,
    draw_locations: Callable[[PackedCaptions], AbstractContextManager] | None = None,
) -> TokenLogits:
    """The logits of all tokens but `<start>` when the ground-truth tokens are fed.

    Args:
        grid: (N, h, w, D), of the images. On its device everything is computed.
        captions: word indices (N, G, L), on the CPU.
        lengths: (N, G), on the CPU, `<start>` and `<end>` counted.
        fed: words (N, G, L) to feed in place of those of `captions`.
        draw_locations: gives the context in which hard attention draws the locations that it looks at.
    """
    packing = PackedCaptions(lengths - 1)
    fed = packing.sort(captions if fed is None else fed)
    targets = captions.flatten(0, 1)[packing.captions, packing.steps + 1]
    image_order, caption_of, fed, targets = copy_to_device(
        [packing.image_order, packing.captions, fed, targets], grid.device
    )
    encoder_out = encoder_out_of(grid[image_order])
    with CollectedWeightGradients(), draw_locations(packing) if draw_locations else nullcontext():
        hidden, alphas = decoder.teacher_forcing(encoder_out, fed, packing.decode_lengths)
    logits = decoder.logits(packing.pack(hidden))
    return TokenLogits(logits, targets, caption_of, packing.pack(alphas), packing)


# --- gradients of weights -----------------------------------------------------------------------------------


class _Linear(Function):
    """F.linear; its backward pass leaves the weight's gradient to `_Collect`, by a note in `uses`."""

    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, bias: Tensor, uses: list) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.uses = uses
        return F.linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        inputs, weight = ctx.saved_tensors
        if not ctx.uses:  # what `_Collect` does not take in this backward pass is not for the next one
            Variable._execution_engine.queue_callback(ctx.uses.clear)
        ctx.uses.append((inputs.flatten(0, -2), d_outputs.flatten(0, -2)))
        return d_outputs @ weight if ctx.needs_input_grad[0] else None, None, None, None


class _Collect(Function):
    """A weight and its bias, unchanged; their backward pass comes after that of all their uses."""

    @staticmethod
    def forward(ctx, weight: Tensor, bias: Tensor, uses: list) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.uses = uses
        return weight.view_as(weight), bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, *_: None) -> tuple[Tensor | None, Tensor | None, None]:
        if not ctx.uses:  # no loss depends on them
            return None, None, None
        inputs, d_outputs = (torch.cat(values) for values in zip(*ctx.uses))
        ctx.uses.clear()
        return d_outputs.mT @ inputs, d_outputs.sum(dim=0), None


class CollectedWeightGradients(TorchFunctionMode):
    """In this context, on a CPU, linear layers get their gradients in one product; the values are the same.

    with CollectedWeightGradients():
        ...  # the forward pass of a recurrence of linear layers
    """

    def __init__(self):
        super().__init__()
        self.collected: dict[tuple[Tensor, Tensor], tuple[Tensor, Tensor, list]] = {}  # by weight and bias

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and len(args) == 3 and not kwargs and self.is_for(*args):
            inputs, *layer = args
            if tuple(layer) not in self.collected:
                uses: list = []
                self.collected[tuple(layer)] = (*_Collect.apply(*layer, uses), uses)
            return _Linear.apply(inputs, *self.collected[tuple(layer)])
        return function(*args, **(kwargs or {}))

    def is_for(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        if type(inputs) is not Tensor or inputs.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        return torch.is_grad_enabled() and weight.is_leaf and weight.requires_grad and bias is not None
