from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from frostline.exporter.rewrites import activation
from frostline.exporter.rewrites.executorch import rewrite_for_executorch
from tests.exporter.rewriting import gradients, names, rewritten

ACTIVATIONS: dict[str, nn.Module] = {
    "leaky relu": nn.LeakyReLU(0.1),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(-0.5, 1.5),
    "elu": nn.ELU(0.7),
    "selu": nn.SELU(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "softplus": nn.Softplus(1.5),
    "softplus beyond a threshold": nn.Softplus(2.0, 0.5),
    "gelu": nn.GELU(),
    "gelu tanh": nn.GELU("tanh"),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "prelu": nn.PReLU(dtype=torch.float64),
    "prelu by channel": nn.PReLU(3, dtype=torch.float64),
}

# The tail of the normal distribution is approximated, softplus switches to the input beyond a threshold, and PyTorch
# divides by 6 in single precision.
TOLERANCE = {"gelu": 4e-7, "softplus": 1e-7, "hardsigmoid": 4e-7}


def _values(dtype: torch.dtype = torch.float64) -> Tensor:
    """From far below every bend to far above, none exactly at one."""
    return (torch.linspace(-30, 30, 2 * 3 * 40 * 5, dtype=dtype) ** 3 / 900 + 0.0123).reshape(2, 3, 40, 5)


@pytest.mark.parametrize("held", [False, True], ids=["plain", "channels last"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str, held: bool) -> None:
    module = ACTIVATIONS[name]
    x = _values().movedim(1, -1).contiguous() if held else _values()

    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x.permute(0, 3, 1, 2) if held else x)

    function = gradients(Placed(), x)
    tensors = [x, *(p.detach() for p in module.parameters())]
    tolerance = TOLERANCE.get(name, 1e-12)
    torch.testing.assert_close(
        _run_rewritten(function, tensors), function(*tensors), atol=tolerance, rtol=tolerance
    )


def _run_rewritten(function: Any, tensors: list[Tensor]) -> list[Tensor]:
    graph = rewrite_for_executorch(make_fx(function, tracing_mode="fake")(*tensors), tensors)
    slow = {"where", "gt", "lt", "le", "ge", "erf", "tanh", "gelu", "log1p", "logical_and", "pow"}
    assert not names(graph) & slow
    assert not [name for name in names(graph) if name.endswith("_backward")]
    result: list[Tensor] = graph(*tensors)
    return result


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_float32_is_within_rounding(name: str) -> None:
    module = ACTIVATIONS[name].float() if name.startswith("prelu") else ACTIVATIONS[name]
    x = _values(torch.float32)
    tensors = [x, *(p.detach() for p in module.parameters())]
    got = _run_rewritten(gradients(module, x), tensors)
    module = module.double()
    want = gradients(module, x)(*(tensor.double() for tensor in tensors))
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "function", [activation.gelu, activation.gelu_tanh, activation.silu, activation.mish]
)
def test_slopes_are_those_of_the_values(function: Any, dtype: torch.dtype) -> None:
    x = torch.linspace(-6, 6, 401, dtype=dtype) + 1e-3
    leaf = x.double().requires_grad_()
    step = 1e-4
    want = (function(leaf.detach() + step)[0] - function(leaf.detach() - step)[0]) / (2 * step)
    torch.testing.assert_close(function(x)[1].double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["relu6", "gelu", "silu", "hardswish"])
def test_what_the_backward_pass_needs_is_computed_once(name: str) -> None:
    """Neither an exponential nor a clip is taken twice."""
    module = ACTIVATIONS[name]

    def step(x: Tensor) -> Any:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            y = module(leaf * 2)
            z = (y * y).sum()
        return y, torch.autograd.grad(z, leaf)

    graph = rewritten(step, torch.randn(3, 4))
    used = [node.target.overloadpacket.__name__ for node in graph.graph.nodes if node.op == "call_function"]
    assert sum(used.count(slow) for slow in ("exp", "sigmoid", "hardtanh")) <= 1


@pytest.mark.parametrize(
    "module", [nn.ReLU(True), nn.ReLU6(True), nn.SiLU(True), nn.Hardswish(True)], ids=str
)
def test_activations_in_place(module: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), module, nn.Conv2d(3, 2, 1)).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    rewritten(gradients(model, x), x, *(p.detach() for p in model.parameters()))
