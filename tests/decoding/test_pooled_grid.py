"""A pooled grid is the tensor of its pixels, whatever is done with it."""

import pytest
import torch
import torch.nn.functional as F

from captioning.decoding.pooled_grid import PooledGrid, encoder_out_of
from models import pool_grid

OPERATIONS = {
    "projection": lambda x, w: F.linear(x, w.weights, w.bias),
    "projection by name": lambda x, w: F.linear(input=x, weight=w.weights, bias=w.bias),
    "projection without bias": lambda x, w: F.linear(x, w.weights),
    "module": lambda x, w: w.module(x),
    "context": lambda x, w: w.alpha @ x,
    "context, torch.matmul": lambda x, w: torch.matmul(w.alpha, x),
    "context by name": lambda x, w: torch.matmul(input=w.alpha, other=x),
    "context, one alpha for all": lambda x, w: w.alpha[:1] @ x,
    "context of one caption": lambda x, w: w.alpha[0, 0] @ x,
    "context, four dimensions": lambda x, w: w.alpha.unsqueeze(0) @ x,
    "bmm": lambda x, w: torch.bmm(w.alpha, x),
    "einsum": lambda x, w: torch.einsum("ngp,npd->ngd", w.alpha, x),
    "as the tutorial": lambda x, w: (x * w.alpha[:, 0].unsqueeze(2)).sum(dim=1),
    "product from the right": lambda x, w: x @ w.weights.T,
    "keys": lambda x, w: w.queries @ x.mT,
    "dot products": lambda x, w: F.scaled_dot_product_attention(w.queries, x, x),
    "mean": lambda x, w: x.mean(dim=1, keepdim=True),
    "largest": lambda x, w: x.amax(dim=1),
    "images": lambda x, w: w.alpha[:2] @ x[:2],
    "images by index": lambda x, w: w.alpha[[2, 0]] @ x[torch.tensor([2, 0])],
    "images by mask": lambda x, w: w.alpha[[0, 2]] @ x[torch.tensor([True, False, True])],
    "images twice": lambda x, w: x[torch.tensor([[0, 1], [2, 2]])],
    "an image": lambda x, w: x[torch.tensor(1)] + x[1],
    "some pixels": lambda x, w: x[:, 3:9, :2],
    "pixels by mask": lambda x, w: x[w.alpha[:, 0] > 0.5],
    "normalized": lambda x, w: F.layer_norm(x, x.shape[2:]),
    "arithmetic": lambda x, w: 1 - x / 2 + x.abs(),
    "in place": lambda x, w: x.mul(2).add_(x),
    "cat": lambda x, w: torch.cat([x, x + 1], dim=1),
    "reshaped": lambda x, w: x.view(len(x), 14, x.size(1) // 14, -1).permute(0, 3, 1, 2),
    "as double": lambda x, w: x.double().unsqueeze(1),
    "unbound": lambda x, w: torch.stack([image.sum() for image in x]),
}  # fmt: skip


class Weights(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weights, self.bias = torch.nn.Parameter(torch.randn(5, 6)), torch.nn.Parameter(torch.randn(5))
        self.alpha = torch.nn.Parameter(torch.rand(3, 4, 196))
        self.queries = torch.nn.Parameter(torch.randn(3, 4, 6))
        self.module = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))


@pytest.mark.parametrize("name", OPERATIONS)
def test_it_is_the_tensor_of_its_pixels(name):
    """Values and gradients, the grid's too."""
    weights, grid = Weights(), torch.randn(3, 8, 8, 6, requires_grad=True)
    results = []
    for pixels in (encoder_out_of(grid), pool_grid(grid).flatten(1, 2)):
        values = OPERATIONS[name](pixels, weights)
        assert type(values) is torch.Tensor
        slope = torch.linspace(-1, 1, values.numel(), dtype=values.dtype).view(values.shape)
        leaves = [grid, *weights.parameters()]
        gradients = torch.autograd.grad(values, leaves, slope, allow_unused=True, materialize_grads=True)
        results.append([values, *gradients])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_its_shape_and_kind():
    grid = torch.rand(3, 8, 8, 6, dtype=torch.float64)
    pixels, expected = encoder_out_of(grid), pool_grid(grid).flatten(1, 2)
    assert type(pixels) is PooledGrid and type(pixels[1:]) is PooledGrid
    assert pixels.shape == expected.shape and pixels[1:].shape == expected[1:].shape
    assert (pixels.dtype, pixels.device, len(pixels)) == (expected.dtype, expected.device, 3)
    assert pixels.dim() == pixels.ndim == 3 and not pixels.requires_grad
    assert encoder_out_of(grid.requires_grad_()).requires_grad


@pytest.mark.parametrize("height, width", [(14, 14), (16, 14), (20, 10)])
def test_a_grid_that_is_not_enlarged_is_a_plain_tensor(height, width):
    grid = torch.rand(2, height, width, 6)
    assert type(encoder_out_of(grid)) is torch.Tensor
    assert torch.equal(encoder_out_of(grid), pool_grid(grid).flatten(1, 2))


def test_what_changes_it_in_place_is_refused():
    """It would change a copy."""
    pixels = encoder_out_of(torch.rand(2, 8, 8, 6))
    for change in (lambda: pixels.mul_(2), lambda: pixels.zero_(), lambda: torch.relu_(pixels)):
        with pytest.raises(TypeError, match="in place"):
            change()
    with pytest.raises(TypeError, match="in place"):
        pixels[0] = 1
