"""What the tests of rewrites share: graphs traced, rewritten, compared and run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from frostline.device_runtime.executorch_engine import ExecuTorchProgram
from frostline.exporter.executorch_lowering import lower_portable
from frostline.exporter.rewrites.executorch import rewrite_for_executorch


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def rewritten(
    function: Callable[..., Any], *tensors: Tensor, tolerance: float | None = None
) -> fx.GraphModule:
    """The rewritten graph of `function`, found to give the results of the original."""
    graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
    result = rewrite_for_executorch(graph, tensors)
    want = graph(*(tensor.clone() for tensor in tensors))
    got = result(*(tensor.clone() for tensor in tensors))
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    return result


def rewritten_operator(operator: Callable[..., Any], *arguments: Any, **options: Any) -> fx.GraphModule:
    """The same of one operator; what is no tensor is part of the graph."""

    def function(*tensors: Tensor) -> Any:
        remaining = iter(tensors)
        return operator(*(next(remaining) if isinstance(a, Tensor) else a for a in arguments), **options)

    return rewritten(function, *(a for a in arguments if isinstance(a, Tensor)))


def targets(graph: fx.GraphModule) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def names(graph: fx.GraphModule) -> set[str]:
    return {target.overloadpacket.__name__ for target in targets(graph)}


def turns(graph: fx.GraphModule) -> list[fx.Node]:
    """What is turned by `permute`."""
    return [node.args[0] for node in graph.graph.nodes if node.target is torch.ops.aten.permute_copy.default]


def gradients(model: nn.Module, x: Tensor) -> Callable[..., list[Tensor]]:
    """A function of a model's input and parameters: output and gradients, of a sum weighted differently everywhere."""
    keys = [name for name, _ in model.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> list[Tensor]:
        leaves = {name: value.detach().requires_grad_() for name, value in zip(keys, parameters, strict=True)}
        inputs = [x.detach().requires_grad_()] if x.is_floating_point() else []
        with torch.enable_grad():
            y = torch.func.functional_call(model, leaves, (inputs[0] if inputs else x,))
            # Whole numbers, so that every dtype has the same.
            weights = (torch.remainder(torch.arange(y.numel(), dtype=y.dtype) * 7, 17) - 8).reshape(y.shape)
            total = (y * weights).sum()
        return [y, *torch.autograd.grad(total, [*inputs, *leaves.values()])]

    return function


def run(graph: nn.Module, arguments: Sequence[Tensor]) -> list[Tensor]:
    """What the ExecuTorch runtime makes of a graph."""
    program = ExecuTorchProgram(lower_portable(graph, arguments).content, "test")
    return [value.clone() for value in program.run(tuple(arguments))]
