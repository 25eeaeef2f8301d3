"""Batch norms folded into the convolutions before them: the same encoder, faster."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from models import Encoder


class FoldedConv(nn.Conv2d):
    """A convolution with the batch norm that follows it folded in; state_dict keys do not change. The
    convolution must have no bias.

    With fixed statistics the result is the same, and so are all gradients; one pass over the activations is
    saved.
    """

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self.norms
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        bias = norm.bias - norm.running_mean * scale
        if hasattr(self, "static_padding"):  # the lite EfficientNets'
            x = self.static_padding(x)
        return self._conv_forward(x, self.weight * scale.view(-1, 1, 1, 1), bias)


def fold_batch_norms(encoder: Encoder) -> Encoder:
    """Fold each batch norm that follows a convolution without a bias into it; weights in channels-last order,
    which convolutions prefer. Changes the encoder, and returns it."""
    for module in encoder.network.modules():
        for conv, norm in itertools.pairwise(module.children()):
            if isinstance(conv, nn.Conv2d) and conv.bias is None and isinstance(norm, nn.BatchNorm2d):
                conv.__class__ = FoldedConv
                conv.norms = (norm,)  # in a tuple it is no submodule a second time
                norm.forward = nn.Identity().forward
    encoder.network.to(memory_format=torch.channels_last)
    return encoder
