"""What makes teacher forcing fast changes no value: the pooled grid, the collected gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captioning.decoding.teacher_forcing import CollectedWeightGradients, PooledGrid, encoder_out_of
from models import LSTMCell, pool_grid

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


# --- the gradients of weights -------------------------------------------------------------------------------


class Recurrence(nn.Module):
    """An LSTM with a linear layer before and after it, and one that no loss depends on."""

    def __init__(self):
        super().__init__()
        self.before, self.cell, self.after = nn.Linear(3, 5), LSTMCell(5, 4), nn.Linear(4, 2)
        self.idle, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)
        self.no_bias = nn.Linear(4, 4, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(T, N, G, 3) -> (T, N, G, 2), fewer captions at every step."""
        h = c = inputs.new_zeros(*inputs.shape[1:3], 4)
        outputs = []
        for step, values in enumerate(inputs):
            n = len(values) - step // 2
            h, c = self.cell(self.before(values[:n]), (self.no_bias(h[:n]), c[:n]))
            self.idle(h)
            outputs.append(self.after(h).sum(dim=0))
        return torch.stack(outputs)


@pytest.fixture
def recurrence() -> Recurrence:
    return Recurrence().double()


def make_inputs() -> torch.Tensor:
    return torch.randn(5, 4, 2, 3, dtype=torch.float64, requires_grad=True)


def assert_gradients_are_plain(module: nn.Module, run) -> None:
    """`run(forward)` calls `forward` and goes back as it likes; it returns more gradients to compare."""

    def collected(*inputs):
        with CollectedWeightGradients():
            return module(*inputs)

    results = []
    for forward in (module, collected):
        module.zero_grad()
        others = run(forward)
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        results.append(gradients | dict(enumerate(others or [])))
    plain, ours = results
    assert {name for name, gradient in ours.items() if gradient is None} == {
        name for name, gradient in plain.items() if gradient is None
    }
    for name, gradient in plain.items():
        if gradient is not None:
            torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-6, msg=str(name))


def test_collected_gradients_are_those_of_plain_autograd(recurrence):
    inputs = make_inputs()

    def run(forward):
        outputs = forward(inputs)
        outputs.square().sum().backward()
        gradient, inputs.grad = inputs.grad, None
        return outputs, gradient

    assert_gradients_are_plain(recurrence, run)
    assert recurrence.idle.weight.grad is None and recurrence.unused.weight.grad is None
    assert recurrence.cell.weight_hh.grad.any()


def test_two_passes_in_one_backward(recurrence):
    inputs = make_inputs(), make_inputs()
    assert_gradients_are_plain(
        recurrence,
        lambda forward: (forward(inputs[0]).square().sum() * forward(inputs[1])[0].sum()).backward(),
    )


def test_gradients_of_several_batches_add_up(recurrence):
    batches = [make_inputs() for _ in range(3)]

    def run(forward):
        for batch in batches:
            forward(batch).square().sum().backward()

    assert_gradients_are_plain(recurrence, run)


def test_frozen_weights_and_biases_get_no_gradients(recurrence):
    recurrence.cell.weight_hh.requires_grad_(False)
    recurrence.before.bias.requires_grad_(False)
    recurrence.after.requires_grad_(False)
    inputs = make_inputs().detach()
    assert_gradients_are_plain(recurrence, lambda forward: forward(inputs).square().sum().backward())
    assert recurrence.cell.bias_hh.grad.any() and recurrence.before.weight.grad.any()
    assert recurrence.cell.weight_hh.grad is None and recurrence.before.bias.grad is None


def test_a_weight_with_two_biases_and_biases_that_are_computed():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.one, self.two = (nn.Parameter(torch.randn(s)) for s in ((3, 3), (3,), (3,)))

        def forward(self, inputs):
            values = F.linear(inputs, self.weight, self.one)
            return F.linear(F.linear(values, self.weight, self.two), self.weight, 2 * self.one)

    inputs = torch.randn(4, 3)
    module = Shared()

    def run(forward):
        outputs = forward(inputs)
        outputs.square().sum().backward()
        return [outputs]

    assert_gradients_are_plain(module, run)


def test_a_gradient_of_the_inputs_alone_leaves_nothing_behind(recurrence):
    """As for a map of what a word depends on; then the weights' gradients, twice, from the same graph."""
    inputs = make_inputs()

    def run(forward):
        outputs = forward(inputs)
        (gradient,) = torch.autograd.grad(outputs[4].sum(), inputs, retain_graph=True)
        outputs[:2].square().sum().backward(retain_graph=True)
        outputs.square().sum().backward()
        inputs.grad = None
        return [gradient]

    assert_gradients_are_plain(recurrence, run)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_collected(recurrence, mode):
    inputs = make_inputs()
    with mode():
        expected = recurrence(inputs)
        with CollectedWeightGradients() as context:
            assert torch.equal(recurrence(inputs), expected)
    assert not context.collected


def test_under_autocast_nothing_is_collected():
    module, inputs = Recurrence(), make_inputs().float()

    def run(forward):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = forward(inputs.detach().requires_grad_())
        outputs.float().square().sum().backward()

    assert_gradients_are_plain(module, run)
