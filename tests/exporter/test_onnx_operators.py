"""Each operator alone: what ONNX Runtime makes of it in float32, against PyTorch in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from frostline.exporter.executorch_lowering import UnsupportedOperators
from frostline.exporter.onnxruntime_target import ONNXRUNTIME
from frostline.exporter.rewrites.onnxruntime import rewrite_for_onnxruntime
from frostline.exporter.training_step import TracedProgram
from tests.exporter.onnx_programs import Function, check, draw, in_onnx

aten = torch.ops.aten


TOKENS = torch.tensor([[1, 4, 2, 1], [0, 3, 3, 2]])

ELEMENTWISE: dict[str, Function] = {
    "add": lambda x, y: torch.add(x, y, alpha=0.5),
    "add number": lambda x, y: x * y + 3,
    "broadcast": lambda x, y: x * y[:, :1] - y[0],
    "clamp": lambda x, y: torch.clamp(x * y, -0.3, 0.6),
    "divide": lambda x, y: x / (y * y + 1),
    "elu": lambda x, y: F.elu(x * y),
    "exp": lambda x, y: torch.exp(x) + torch.expm1(y) + torch.log1p(y * y),
    "gelu": lambda x, y: F.gelu(x * y),
    "gelu tanh": lambda x, y: F.gelu(x * y, approximate="tanh"),
    "hard sigmoid": lambda x, y: F.hardsigmoid(3 * x * y),
    "hard swish": lambda x, y: F.hardswish(3 * x * y),
    "hard tanh": lambda x, y: F.hardtanh(x * y, -0.5, 0.5),
    "leaky relu": lambda x, y: F.leaky_relu(x * y, 0.2),
    "maximum": lambda x, y: torch.maximum(x, y) - torch.minimum(x, 2 * y),
    "mish": lambda x, y: F.mish(x * y),
    "power": lambda x, y: x**2 + (y * y + 1) ** 1.5 + x**3,
    "relu": lambda x, y: F.relu(x * y),
    "relu6": lambda x, y: F.relu6(4 * x * y),
    "roots": lambda x, y: torch.sqrt(x * x + 1) * torch.rsqrt(y * y + 1),
    "sigmoid": lambda x, y: torch.sigmoid(x) * torch.tanh(y),
    "silu": lambda x, y: F.silu(x * y),
    "sine": lambda x, y: torch.sin(x) + torch.cos(y),
    "softplus": lambda x, y: F.softplus(x * y),
    "where": lambda x, y: torch.where(x > y, x * 2, y * y),
    "comparisons": lambda x, y: (x <= y) * x + (x != y) * y + ((x >= 0) & ~(y < 0)) * x * y,
}

ARRANGING: dict[str, Function] = {
    "cat": lambda x, y: torch.cat([x, y * 2, x], 1),
    "expand": lambda x, y: x[:, :1].expand(4, 6) * y,
    "flip": lambda x, y: torch.flip(x, [0, 1]) * y,
    "index select": lambda x, y: x.index_select(1, torch.tensor([3, 0, 3])) * y[:, :3],
    "pad": lambda x, y: F.pad(x * y, (1, 2, 0, 3), value=0.5),
    "pad by less than nothing": lambda x, y: F.pad(x * y, (-1, 2, 1, -1)),
    "permute": lambda x, y: (x.t() @ y).reshape(2, 3, 6).permute(2, 0, 1),
    "repeat": lambda x, y: x.repeat(2, 3) * y.repeat(2, 3),
    "select": lambda x, y: x[1] * y[-1] + x[2],
    "slice": lambda x, y: x[1:3, ::2] * y[:2, 1:4],
    "split": lambda x, y: torch.cat(
        [a * b for a, b in zip(x.split(4, 1), y.split([4, 2], 1), strict=True)], 1
    ),
    "squeeze": lambda x, y: (x.unsqueeze(1) * y.unsqueeze(0)).sum(0, keepdim=True).squeeze(0),
    "stack": lambda x, y: torch.stack([x, y], 1).unbind(0)[2] * 2,
}

REDUCING: dict[str, Function] = {
    "largest": lambda x, y: torch.amax(x * y, 1) + torch.amin(x, 1),
    "log softmax": lambda x, y: F.log_softmax(x * y, 0),
    "mean": lambda x, y: (x * y).mean(0) + x.mean(),
    "mean of one": lambda x, y: (x * y)[:1].mean(0, keepdim=True),
    "products": lambda x, y: F.linear(x, y, x[:, 0]) + torch.baddbmm(x[None, :, :4], x[None], y.t()[None])[0],
    "softmax": lambda x, y: F.softmax(x * y, 1),
    "sum": lambda x, y: (x * y).sum(1, keepdim=True) + y.sum(),
    "variance": lambda x, y: torch.var(x * y, 0) + torch.var(y, 0, correction=0),
}


@pytest.mark.parametrize("name", [*ELEMENTWISE, *ARRANGING, *REDUCING])
def test_operators_of_two_matrices(name: str) -> None:
    function = {**ELEMENTWISE, **ARRANGING, **REDUCING}[name]
    check(function, draw(4, 6), draw(4, 6).roll(1, 0) + 0.1)


@st.composite
def convolutions(drawn: Any) -> tuple[Any, ...]:
    spatial = drawn(st.integers(1, 2))

    def each(low: int, high: int) -> list[int]:
        return [drawn(st.integers(low, high)) for _ in range(spatial)]

    kernel, stride, padding, dilation = each(1, 3), each(1, 3), each(0, 2), each(1, 2)
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [drawn(st.integers(max(1, r - 2 * p), r + 4)) for r, p in zip(reach, padding, strict=True)]
    groups = drawn(st.integers(1, 3))
    channels, outputs = (groups * drawn(st.integers(1, 3)) for _ in range(2))
    return channels, outputs, size, kernel, stride, padding, dilation, groups


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions(), st.booleans())
def test_any_convolution(geometry: tuple[Any, ...], biased: bool) -> None:
    channels, outputs, size, kernel, *moved, groups = geometry
    x, weight = draw(2, channels, *size), draw(outputs, channels // groups, *kernel)
    bias = [draw(outputs)] if biased else []

    def convolve(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        extra = [0] * len(size)
        return aten.convolution(x, weight, bias[0] if bias else None, *moved, False, extra, groups)

    check(convolve, x, weight, *bias)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "extra", "dilation", "groups"),
    [
        (5, 3, 1, 1, 0, 1, 1),
        (4, 2, 2, 0, 0, 1, 1),
        (4, 3, 2, 1, 1, 1, 2),
        (3, 2, 3, 0, 2, 1, 1),
        (4, 3, 1, 0, 1, 2, 1),
    ],
)
def test_transposed_convolutions(
    size: int, kernel: int, stride: int, padding: int, extra: int, dilation: int, groups: int
) -> None:
    def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv_transpose2d(x, weight, bias, stride, padding, extra, groups, dilation)

    check(convolve, draw(2, 4, size, size), draw(4, 6 // groups, kernel, kernel), draw(6))


def test_a_large_kernel_over_small_images() -> None:
    """There the images are turned around in place of the kernel."""
    check(lambda x, w: F.conv2d(x, w, padding=1), draw(1, 24, 2, 2), draw(20, 24, 3, 3))


IMAGES: dict[str, Function] = {
    "adaptive average": lambda x: F.adaptive_avg_pool2d(x, 2),
    "average": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "global mean": lambda x: F.adaptive_avg_pool2d(x, 1),
    "group norm": lambda x: F.group_norm(x, 2, x[0, :, 0, 0], x[0, :, 1, 0]),
    "batch norm": lambda x: F.batch_norm(x, None, None, x[0, :, 0, 0], x[0, :, 1, 0], training=True),
    "layer norm": lambda x: F.layer_norm(x, [6], x[0, 0, 0], x[0, 0, 1]),
    "largest": lambda x: F.max_pool2d(x, 2),
    "largest of what overlaps": lambda x: F.max_pool2d(x, 3, 2, 1),
    "unaffine norm": lambda x: F.group_norm(x, 4) + F.layer_norm(x, [6, 6]),
}


@pytest.mark.parametrize("function", IMAGES.values(), ids=IMAGES)
def test_images(function: Function) -> None:
    check(function, draw(3, 4, 6, 6), tolerance=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal: bool) -> None:
    query, key, value = (draw(2, 3, 5, 4) * scale for scale in (1, 2, 3))
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), query, key, value)


def test_attention_with_a_mask() -> None:
    query, key, value = (draw(2, 3, 5, 4) * scale for scale in (1, 2, 3))
    check(F.scaled_dot_product_attention, query, key, value, draw(5, 5))


@pytest.mark.parametrize("padding", [None, 3])
def test_embeddings(padding: int | None) -> None:
    check(lambda tokens, table: F.embedding(tokens, table, padding), TOKENS, draw(6, 3))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses(reduction: str) -> None:
    target = torch.tensor([1, 0, 2])
    check(lambda x, y: F.cross_entropy(x, y, reduction=reduction), draw(3, 4), target)
    check(lambda x, y: F.mse_loss(x, y, reduction=reduction), draw(3, 4), draw(3, 4) * 2)


def test_gathering_and_scattering() -> None:
    places = torch.tensor([[0, 2, 1], [2, 2, 0]])
    check(lambda x: torch.gather(x, 0, places) * 2, draw(3, 3))
    check(lambda x: torch.zeros(3, 3, dtype=x.dtype).scatter(0, places, x) * 2, draw(2, 3))
    check(lambda x: torch.zeros(3, 3, dtype=x.dtype).scatter_add(0, places, x), draw(2, 3))


def test_whole_numbers() -> None:
    def count(x: Tensor, y: Tensor) -> Sequence[Tensor]:
        return [(x.argmax(1) == y).sum(), x.argmax(), torch.arange(4) * 2, (x > 0).to(torch.int64)]

    x, y = draw(4, 6), torch.tensor([1, 0, 2, 5])
    for got, want in zip(in_onnx(count, x, y), count(x, y), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_statistics_of_batch_norm_are_new_values() -> None:
    def normalise(x: Tensor, mean: Tensor, variance: Tensor) -> Sequence[Tensor]:
        mean, variance = mean.clone(), variance.clone()
        y = F.batch_norm(x, mean, variance, training=True, momentum=0.3)
        return [y, mean, variance]

    x, mean, variance = draw(3, 4, 5, 5), draw(4), draw(4) ** 2
    got, want = in_onnx(normalise, x, mean, variance), normalise(x, mean, variance)
    for each, expected in zip(got, want, strict=True):
        torch.testing.assert_close(each, expected, atol=1e-5, rtol=1e-5)


def test_what_onnx_cannot_say_is_named() -> None:
    with pytest.raises(UnsupportedOperators, match=r"aten\.lgamma: ONNX has no operator for it"):
        in_onnx(lambda x: torch.lgamma(x), draw(3))


def test_what_onnx_runtime_has_no_kernel_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names nodes, which are not the model's."""
    monkeypatch.setattr("frostline.exporter.onnx_lowering.IN_SINGLE_PRECISION", set())
    x = draw(3)
    graph = make_fx(lambda x: [torch.erf(x.double()).float()], tracing_mode="fake")(x)
    program = TracedProgram(rewrite_for_onnxruntime(graph, [x]), ["x"], [])
    with pytest.raises(UnsupportedOperators) as raised:
        ONNXRUNTIME.lower(program, {"x": x}, ["y"])
    assert str(raised.value) == "aten.erf: ONNX Runtime says: Could not find an implementation for Erf(13)"
