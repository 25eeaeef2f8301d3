"""The logits of all tokens of a batch of captions, where the ground-truth tokens are fed.

`token_logits` runs `DecoderWithAttention.teacher_forcing` and computes all logits in one product after the
last step. On a CPU, weight gradients too are computed in one product: autograd would compute them at every
step and add them up, 21 MB each time for an LSTM of width 512. `encoder_out_of` gives the pixels that the
decoder looks at, here and in the search, in a form that is faster to compute with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, Variable
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from models import ENCODED_SIZE, DecoderWithAttention, pool_grid
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


# --- a grid of 8 x 8 cells as 14 x 14 pixels ----------------------------------------------------------------
# At 256 pixels an encoder's grid has 64 cells, and each of the 196 pixels is a mean of some of them: pooling
# is a matrix whose rows sum to one. So what is linear in the pixels is computed from the cells, a third of
# the numbers: attention's projection is pooled after its linear layer, and a context is a sum over cells.

MATMUL = (Tensor.__matmul__, Tensor.matmul, torch.matmul)
METADATA = (Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.__len__)


def encoder_out_of(grid: Tensor) -> Tensor:
    """An encoder's grid (N, h, w, encoder_dim) -> what the decoder looks at, (N, 196, encoder_dim)."""
    height, width = grid.shape[1:3]
    if height * width >= ENCODED_SIZE**2:
        return pool_grid(grid).flatten(1, 2)
    cells = torch.eye(height * width, dtype=grid.dtype, device=grid.device).view(-1, height, width, 1)
    return PooledGrid(grid.flatten(1, 2), pool_grid(cells).flatten(1).T.contiguous())


class PooledGrid(Tensor):
    """The pixels (N, P, D) = pooling (P, C) @ cells (N, C, D). It stands for their tensor: an operation that
    is not known here runs on the pixels."""

    @staticmethod
    def __new__(cls, cells: Tensor, pooling: Tensor) -> PooledGrid:
        shape = len(cells), len(pooling), cells.shape[2]
        return Tensor._make_wrapper_subclass(cls, shape, dtype=cells.dtype, device=cells.device)

    def __init__(self, cells: Tensor, pooling: Tensor):
        self.cells, self.pooling = cells, pooling

    def pool(self, values: Tensor) -> Tensor:
        """Values of the cells (N, C, X) -> of the pixels (N, P, X)."""
        return self.pooling.to(values.dtype).expand(len(values), -1, -1) @ values

    @classmethod
    def __torch_function__(cls, function, types, args: tuple = (), kwargs: dict[str, Any] | None = None):
        if function in METADATA:
            return super().__torch_function__(function, types, args, kwargs)
        first, second = (*args, None, None)[:2]
        if function is F.linear and type(first) is cls and not kwargs:
            return first.pool(F.linear(first.cells, *args[1:]))
        if function in MATMUL and type(second) is cls and type(first) is not cls and first.dim() == 3:
            return first @ second.pooling.to(first.dtype) @ second.cells
        is_of_images = isinstance(second, slice) or (isinstance(second, Tensor) and second.dim() == 1)
        if function is Tensor.__getitem__ and is_of_images:
            return cls(first.cells[second], first.pooling)
        name = function.__name__
        if type(first) is cls and (name == "__setitem__" or re.fullmatch("[^_].*_", name)):
            raise TypeError(f"{name}: the pixels of a grid cannot be changed in place; make new ones")
        return cls.__torch_dispatch__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args: tuple = (), kwargs: dict[str, Any] | None = None):
        pixels = tree_map(lambda a: a.pool(a.cells) if type(a) is cls else a, (args, kwargs or {}))
        return function(*pixels[0], **pixels[1])
