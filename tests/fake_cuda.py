"""A pretended CUDA device for machines without one, and a count of what makes the host wait for it.

    with FakeCuda() as cuda:
        decoder = to_cuda(decoder)
        logits = decoder(values.to("cuda"))
    logits.numbers                     # the numbers, on the CPU
    cuda.waits                        # Counter: operation -> how often the host waited for the device

Each operation runs twice: under torch's FakeTensorMode, which knows the rules of devices and types and raises
where they are broken, and on the CPU, which gives the numbers. So code takes its way for CUDA, with results.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from contextlib import ExitStack, nullcontext
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

CUDA = torch.device("cuda", 0)
NEEDS_A_DRIVER = torch.__version__ < "2.10" and not torch.cuda.is_available()
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)  # the host reads from the device


class CudaTensor(torch.Tensor):
    """Says that it is on a CUDA device; `numbers` holds its numbers on the CPU."""

    @staticmethod
    def __new__(cls, values: Tensor) -> CudaTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=CUDA,
        )

    def __init__(self, values: Tensor):
        self.numbers = values

    def tolist(self) -> list:
        return self.cpu().tolist()  # torch's own refuses subclasses

    def __repr__(self) -> str:
        return f"CudaTensor({self.numbers})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func}: a pretended CUDA tensor outlived its FakeCuda")


class FakeCuda(TorchDispatchMode):
    """Pretend a CUDA device while the mode is on.

    Attributes:
        waits: operations for which the host waited until the device had done all that went before.
        copies: copies from the host to the device, by whether the host's memory was "pinned" or "pageable";
            from pageable memory the driver may wait too.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.pinned: list[Tensor] = []
        self.stack = ExitStack()

    def __enter__(self) -> FakeCuda:
        if NEEDS_A_DRIVER:
            pytest.skip("torch before 2.10 asks the CUDA driver, which is not there, for a stream")
        self.stack.enter_context(self.fake)
        self.stack.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        self.stack.enter_context(patch("torch.cuda.is_bf16_supported", lambda: True))
        self.stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # kernels that the CPU has too
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self.stack.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            return self.dispatch(func, args, kwargs or {})  # inference tensors could not be wrapped

    def dispatch(self, func, args, kwargs):
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
        if name in ("pin_memory", "_pin_memory"):
            with _disable_current_modes():
                self.pinned.append(args[0].clone())
            return self.pinned[-1]
        inputs = [value for value in tree_flatten(given)[0] if isinstance(value, Tensor)]
        on_device = any(isinstance(value, CudaTensor) for value in inputs)
        if not on_device and CUDA.type not in [getattr(value, "type", None) for value in given.values()]:
            with _disable_current_modes():
                return func(*args, **kwargs)
        try:
            expected = func(*as_fake(args), **as_fake(kwargs))
        except NEEDS_VALUES:
            self.waits[name] += 1
            with _disable_current_modes():
                result = func(*on_cpu(args), **on_cpu(kwargs))  # a number, or as many as the values say
            return tree_map_only(Tensor, CudaTensor, result)
        self.count_copies(name, inputs, expected, bool(given.get("non_blocking")))
        with _disable_current_modes():
            if name in ("to", "_to_copy"):
                result = on_cpu(given["self"]).to(expected.dtype, copy=True)
            elif name in ("_softmax", "_log_softmax") and args[2]:  # CUDA alone goes from float16 to float32
                values, dim, _ = on_cpu(args)
                result = func(values.float(), dim, False)
            elif name.endswith("softmax_backward_data") and args[3] != args[0].dtype:  # and back
                result = func(*on_cpu(args[:3]), args[0].dtype).to(args[3])
            else:
                result = func(*on_cpu(args), **on_cpu(kwargs))
        if any(value.alias_info and value.alias_info.is_write for value in func._schema.returns):
            written = [a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
            return given[written[0]] if len(written) == 1 else tuple(given[name] for name in written)
        values, structure = tree_flatten(result)
        outputs = []
        for value, fake in zip(values, tree_flatten(expected)[0], strict=True):
            if isinstance(value, Tensor):
                assert value.dtype == fake.dtype, f"{name}: {fake.dtype} on CUDA, {value.dtype} on the CPU"
                value = CudaTensor(value) if fake.device.type == "cuda" else value
            outputs.append(value)
        return tree_unflatten(outputs, structure)

    def count_copies(self, name: str, inputs: list[Tensor], expected, non_blocking: bool) -> None:
        outputs = [value.device.type for value in tree_flatten(expected)[0] if isinstance(value, Tensor)]
        from_host = [v for v in inputs if not isinstance(v, CudaTensor) and v.dim() > 0]
        if "cpu" in outputs and any(isinstance(value, CudaTensor) for value in inputs):
            self.waits[f"{name} to the host"] += 1
        elif from_host and "cuda" in outputs:  # an index on the CPU, say, is copied too
            if not non_blocking:
                self.waits[f"{name} to the device"] += 1
            for value in from_host:
                self.copies["pinned" if any(value is p for p in self.pinned) else "pageable"] += 1


def as_fake(tree):
    """The tensors as FakeTensorMode's, which have no values."""

    def convert(value: Tensor) -> Tensor:
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)

    return tree_map_only(Tensor, convert, tree)


def on_cpu(tree):
    """The tensors' values, and the CPU in place of a CUDA device."""
    tree = tree_map_only(CudaTensor, lambda value: value.numbers, tree)
    return tree_map_only(torch.device, lambda device: torch.device("cpu"), tree)


def to_cuda(module: nn.Module) -> nn.Module:
    """A copy of the module on the pretended device."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = nn.Parameter(CudaTensor(parameter.detach().clone()), parameter.requires_grad)
                part._parameters[name] = moved
        for name, buffer in part._buffers.items():
            part._buffers[name] = CudaTensor(buffer.clone())
    return module


def backward(loss: Tensor) -> dict[Tensor, Tensor]:
    """The gradient by each leaf, in place of `loss.backward()`, whose engine wants a real device.

    Calls the nodes of the graph by hand, those that came last first.
    """
    uses, seen, stack = Counter(), {loss.grad_fn}, [loss.grad_fn]
    while stack:
        for node, _ in stack.pop().next_functions:
            uses[node] += node is not None
            if node is not None and node not in seen:
                seen.add(node)
                stack.append(node)
    gradients: dict = defaultdict(dict)  # node -> number of its output -> gradient
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    leaves, ready = {}, [loss.grad_fn]
    while ready:
        node = ready.pop()
        given = gradients.pop(node, {})
        if hasattr(node, "variable"):
            leaves[node.variable] = given.get(0)
            continue
        arguments = [given.get(number) for number in range(max(given, default=0) + 1)]
        if hasattr(node, "_forward_cls"):  # of a torch.autograd.Function, whose arguments are not all tensors
            for number, output in enumerate(
                node._input_metadata
            ):  # zero where the loss does not depend on it
                if number not in given:
                    given[number] = torch.zeros(output.shape, dtype=output.dtype, device=CUDA)
            arguments = [given[number] for number in sorted(given)]
            results = [r for r, needed in zip(node.apply(*arguments), node.needs_input_grad) if needed]
        else:
            results = node(*arguments)
            results = results if isinstance(results, tuple) else (results,)
            results = [r for r, (parent, _) in zip(results, node.next_functions) if parent is not None]
        parents = [(parent, number) for parent, number in node.next_functions if parent is not None]
        for (parent, number), result in zip(parents, results, strict=True):
            if result is not None:
                forward = parent._input_metadata[number]  # the engine sums over what was broadcast
                result = result.sum_to_size(forward.shape).to(forward.dtype)
                earlier = gradients[parent].get(number)
                gradients[parent][number] = result if earlier is None else earlier + result
            uses[parent] -= 1
            if uses[parent] == 0:
                ready.append(parent)
    return leaves
