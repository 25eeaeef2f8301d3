"""A grid of 8 x 8 cells, pooled to 14 x 14 pixels where it has to be.

At 256 pixels an encoder's grid has 64 cells, and each of the 196 pixels is a mean of some of them: pooling is
a matrix whose rows sum to one. So what is linear in the pixels is computed from the cells, a third of the
numbers: attention's projection is pooled after its linear layer, and a context is a sum over cells. To its
user a `PooledGrid` is the tensor of the pixels: any other operation runs on the pixels themselves.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from models import ENCODED_SIZE, pool_grid

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
    """The pixels (N, P, D) = pooling (P, C) @ cells (N, C, D)."""

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
