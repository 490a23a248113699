"""What the tests of the ONNX engine share: functions run by ONNX Runtime, and compared with PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from frostline.device_runtime.onnx_program import OnnxProgram
from frostline.exporter.onnx_lowering import lower_to_onnx
from frostline.exporter.rewrites.onnxruntime import rewrite_for_onnxruntime
from frostline.exporter.training_step import TracedProgram

Function = Callable[..., Any]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def in_onnx(function: Function, *arguments: Tensor) -> list[Tensor]:
    """What ONNX Runtime makes of a function of tensors."""
    with torch.backends.mkldnn.flags(enabled=False):
        graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    names = [f"input{index}" for index in range(len(arguments))]
    program = TracedProgram(rewrite_for_onnxruntime(graph, arguments), names, [])
    wanted = function(*(argument.clone() for argument in arguments))
    count = 1 if isinstance(wanted, Tensor) else len(wanted)
    loaded = OnnxProgram(lower_to_onnx(program, arguments, [f"result{i}" for i in range(count)]), "test")
    outputs = {name: np.zeros(shape, dtype) for name, (shape, dtype) in loaded.outputs.items()}
    held = {n: np.ascontiguousarray(a.numpy()) for n, a in zip(names, arguments, strict=True)}
    loaded.run({name: held[name] for name in loaded.inputs}, outputs)
    return [torch.from_numpy(outputs[f"result{index}"]) for index in range(count)]


def with_gradients(function: Function, floating: Sequence[int]) -> Function:
    """A function's results, and the gradients of those arguments, of a sum that is weighted differently everywhere."""

    def both(*given: Tensor) -> list[Tensor]:
        leaves = [a.detach().requires_grad_() if i in floating else a for i, a in enumerate(given)]
        with torch.enable_grad():
            made = function(*leaves)
            results = [made] if isinstance(made, Tensor) else list(made)
            depending = [y for y in results if y.requires_grad]
            total = sum((y * _weights(y)).sum() for y in depending)
            wanted = [leaves[i] for i in floating] if depending else []
            gradients = torch.autograd.grad(total, wanted, allow_unused=True) if depending else []
        # Programs return what devices hold: numbers in float32 and int64.
        return [*(_held(y.detach()) for y in results), *(g for g in gradients if g is not None)]

    return both


def _held(y: Tensor) -> Tensor:
    return y if y.is_floating_point() or y.dtype == torch.int64 else y.to(torch.int64)


def _weights(y: Tensor) -> Tensor:
    return (torch.arange(y.numel(), dtype=y.dtype) % 17 - 8).reshape(y.shape)


def check(function: Function, *arguments: Tensor, tolerance: float = 2e-5) -> None:
    """Results and gradients are PyTorch's in float64; those of floating-point arguments."""
    both = with_gradients(function, [index for index, a in enumerate(arguments) if a.is_floating_point()])
    want = both(*(a.double() if a.is_floating_point() else a.clone() for a in arguments))
    got = in_onnx(both, *arguments)
    for index, (have, expected) in enumerate(zip(got, want, strict=True)):
        assert have.shape == expected.shape, f"result {index}: {have.shape} in place of {expected.shape}"
        alike = have.double().isfinite() == expected.isfinite()
        assert alike.all(), f"result {index}: not finite where PyTorch is"
        finite = expected.isfinite()
        have, expected = have.double()[finite], expected.double()[finite]
        if expected.numel():
            error = float((have - expected).abs().max()) / max(float(expected.abs().max()), 1.0)
            assert error < tolerance, f"result {index}: off by {error:.1e}"
