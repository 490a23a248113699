from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from frostline.exporter.cutting import cut
from frostline.exporter.executorch_target import EXECUTORCH
from frostline.exporter.models.lookup import build_model
from frostline.exporter.optimizer import SGD
from frostline.exporter.rewrites import activation, convolution, normalization, pooling
from frostline.exporter.rewrites.executorch import rewrite_for_executorch
from frostline.exporter.rewrites.windows import Windows
from frostline.exporter.stage import build_stage
from frostline.exporter.training_step import initial_state, trace_evaluation, trace_training_step

aten = torch.ops.aten

MASKS = list(product([True, False], repeat=3))


@dataclass(frozen=True)
class Geometry:
    channels: int
    outputs: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    batch: int = 2

    @property
    def settings(self) -> tuple[Any, ...]:
        return (self.stride, self.padding, self.dilation, False, (0,) * len(self.kernel), self.groups)

    @property
    def ours(self) -> tuple[Any, ...]:
        return (self.stride, self.padding, self.dilation, self.groups)

    @property
    def windows(self) -> Windows:
        return Windows.over(self.size, self.kernel, self.stride, self.padding, self.dilation)


def _square(size: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> Geometry:
    return Geometry(4, 6, (size,) * 2, (kernel,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2)


GEOMETRIES = {
    "3x3": _square(7, 3, padding=1),
    "no padding": _square(7, 3),
    "stride 2": _square(8, 3, stride=2, padding=1),
    "stride 2, odd input": _square(9, 3, stride=2, padding=1),
    "stride leaves a rest": _square(9, 2, stride=3),
    "stride over kernel": _square(8, 1, stride=3),
    "dilation": _square(9, 3, padding=2, dilation=2),
    "dilation and stride": _square(10, 3, stride=2, padding=2, dilation=2),
    "wide padding": _square(4, 3, padding=3),
    "kernel covers input": _square(5, 5),
    "1x1": _square(5, 1),
    "1x1 stride 2": _square(6, 1, stride=2),
    "1x1 padded": _square(4, 1, padding=1),
    "groups": replace(_square(6, 3, padding=1), groups=2),
    "groups, stride 2": replace(_square(7, 3, stride=2, padding=1), groups=2),
    "depthwise": replace(_square(6, 3, padding=1), outputs=4, groups=4),
    "depthwise with multiplier": replace(_square(6, 3, stride=2), outputs=8, groups=4),
    "asymmetric": Geometry(3, 5, (8, 6), (1, 5), (2, 1), (0, 2), (1, 1)),
    "asymmetric everything": Geometry(4, 2, (9, 11), (3, 2), (2, 3), (1, 0), (1, 3), groups=2),
    "one sample": replace(_square(6, 3, padding=1), batch=1),
    "wide": replace(_square(7, 3, padding=1), channels=16),
    "wide, stride 2": replace(_square(9, 3, stride=2, padding=1), channels=17),
    "wide, dilation": replace(_square(9, 3, padding=2, dilation=2), channels=16),
    "wide, 1x1": replace(_square(5, 1), channels=20),
    "wide, groups": replace(_square(6, 3, stride=2, padding=1), channels=32, groups=2),
    "wide, depthwise": replace(_square(6, 3, padding=1), channels=16, outputs=16, groups=16),
    "wide, 1-D": Geometry(16, 4, (11,), (3,), (2,), (1,), (2,)),
    "wide, 3-D": Geometry(16, 3, (5, 4, 6), (3, 1, 2), (2, 1, 2), (1, 0, 1), (1, 1, 2)),
    "wide, fewer windows than outputs": replace(_square(2, 3, padding=1), channels=16, outputs=12),
    "wide, one window": replace(_square(3, 3), channels=16, batch=1),
    "wide groups, one window": replace(_square(3, 3), channels=32, groups=2, batch=1),
    "1-D": Geometry(3, 4, (11,), (3,), (2,), (1,), (2,)),
    "3-D": Geometry(2, 4, (5, 4, 6), (3, 1, 2), (2, 1, 2), (1, 0, 1), (1, 1, 2), groups=2),
}


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _held(x: Tensor) -> Tensor:
    """An image or a kernel with its channels last."""
    return x.movedim(1, -1).contiguous()


def _turned(held: Tensor | None) -> Tensor | None:
    return None if held is None else held.movedim(-1, 1)


def _rewritten(function: Callable[..., Any], *tensors: Tensor) -> fx.GraphModule:
    """The rewritten graph of `function`, found to give the results of the original."""
    graph = make_fx(function, tracing_mode="fake")(*tensors)
    rewritten = rewrite_for_executorch(graph, tensors)
    want = graph(*(tensor.clone() for tensor in tensors))
    torch.testing.assert_close(rewritten(*(tensor.clone() for tensor in tensors)), want)
    return rewritten


def _rewritten_operator(operator: Callable[..., Any], *arguments: Any) -> fx.GraphModule:
    """The same of one operator; what is no tensor is part of the graph."""

    def function(*tensors: Tensor) -> Any:
        remaining = iter(tensors)
        return operator(*(next(remaining) if isinstance(a, Tensor) else a for a in arguments))

    return _rewritten(function, *(a for a in arguments if isinstance(a, Tensor)))


def _targets(graph: fx.GraphModule) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def _check_convolution(geometry: Geometry, bias: bool, mask: Sequence[bool]) -> None:
    x = _draw(geometry.batch, geometry.channels, *geometry.size)
    weight = _draw(geometry.outputs, geometry.channels // geometry.groups, *geometry.kernel)
    b = _draw(geometry.outputs) if bias else None
    want = aten.convolution(x, weight, b, *geometry.settings)
    y = convolution.convolution(_held(x), _held(weight), b, *geometry.ours)
    torch.testing.assert_close(_turned(y), want)

    grad = torch.randn_like(want)
    held = (_held(grad), _held(x), _held(weight))
    grad_x, grad_weight, grad_bias = convolution.convolution_backward(*held, *geometry.ours, mask)
    backward = (grad, x, weight, [geometry.outputs], *geometry.settings, list(mask))
    _assert_masked(
        (_turned(grad_x), _turned(grad_weight), grad_bias), aten.convolution_backward(*backward), mask
    )


def _assert_masked(got: Sequence[Tensor | None], want: Sequence[Tensor | None], mask: Sequence[bool]) -> None:
    assert [gradient is not None for gradient in got] == list(mask)
    for ours, theirs, asked in zip(got, want, mask, strict=True):
        if asked:
            torch.testing.assert_close(ours, theirs)


def _check_interpreted_convolution(geometry: Geometry, bias: bool, mask: Sequence[bool]) -> None:
    x = _draw(geometry.batch, geometry.channels, *geometry.size)
    weight = _draw(geometry.outputs, geometry.channels // geometry.groups, *geometry.kernel)
    grad = _draw(geometry.batch, geometry.outputs, *geometry.windows.output)
    forward = (x, weight, _draw(geometry.outputs) if bias else None, *geometry.settings)
    backward = (grad, x, weight, [geometry.outputs], *geometry.settings, list(mask))
    for operator, arguments in [
        (aten.convolution.default, forward),
        (aten.convolution_backward.default, backward),
    ]:
        assert operator not in _targets(_rewritten_operator(operator, *arguments))


@pytest.mark.parametrize("check", [_check_convolution, _check_interpreted_convolution])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_convolution(geometry: Geometry, bias: bool, check: Callable[..., None]) -> None:
    check(geometry, bias, (True, True, True))


@pytest.mark.parametrize("check", [_check_convolution, _check_interpreted_convolution])
@pytest.mark.parametrize("geometry", ["groups", "wide", "depthwise"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_convolution_gives_the_gradients_asked_for(
    mask: tuple[bool, bool, bool], geometry: str, check: Callable[..., None]
) -> None:
    check(GEOMETRIES[geometry], True, mask)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    axes = draw(st.integers(1, 3))

    def several(low: int, high: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * axes))

    kernel, dilation, padding = several(1, 3), several(1, 2), several(0, 2)
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = tuple(draw(st.integers(max(1, r - 2 * p), r + 5)) for r, p in zip(reach, padding, strict=True))
    groups = draw(st.integers(1, 3))
    return Geometry(
        channels=groups * draw(st.sampled_from([1, 2, 16])),
        outputs=groups * draw(st.integers(1, 2)),
        size=size,
        kernel=kernel,
        stride=several(1, 3),
        padding=padding,
        dilation=dilation,
        groups=groups,
        batch=draw(st.integers(1, 2)),
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(geometries(), st.booleans())
def test_any_convolution(geometry: Geometry, bias: bool) -> None:
    _check_convolution(geometry, bias, (True, True, True))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(geometries(), st.booleans())
def test_any_interpreted_convolution(geometry: Geometry, bias: bool) -> None:
    _check_interpreted_convolution(geometry, bias, (True, True, True))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(geometries())
def test_adding_windows_is_the_transpose_of_cutting_them(geometry: Geometry) -> None:
    windows = geometry.windows
    x = _draw(geometry.batch, *geometry.size, geometry.channels)
    cuts = list(windows.cut(x))
    ys = [_draw(geometry.batch, *windows.output, geometry.channels) for _ in range(windows.taps)]
    assert [tap.shape for tap in cuts] == [y.shape for y in ys]
    inner = sum(((tap * y).sum() for tap, y in zip(cuts, ys, strict=True)), torch.zeros((), dtype=x.dtype))
    torch.testing.assert_close(inner, (x * windows.add(ys)).sum())


@dataclass(frozen=True)
class Transposed(Geometry):
    output_padding: tuple[int, ...] = ()

    @property
    def moved(self) -> tuple[Any, ...]:
        extra = self.output_padding or (0,) * len(self.kernel)
        return (self.stride, self.padding, self.dilation, extra, self.groups)


def _transposed(size: int, kernel: int, stride: int = 1, padding: int = 0, extra: int = 0) -> Transposed:
    pair = (size,) * 2, (kernel,) * 2, (stride,) * 2, (padding,) * 2, (1, 1)
    return Transposed(4, 6, *pair, output_padding=(extra,) * 2)


TRANSPOSED = {
    "3x3": _transposed(5, 3, padding=1),
    "stride 2": _transposed(4, 2, stride=2),
    "stride 2, output padding": _transposed(4, 3, stride=2, padding=1, extra=1),
    "stride over kernel": _transposed(3, 2, stride=3, extra=2),
    "1x1": _transposed(4, 1),
    "dilation over stride": replace(_transposed(4, 3, extra=1), dilation=(2, 2)),
    "groups": replace(_transposed(4, 3, stride=2, padding=1, extra=1), groups=2),
    "depthwise": replace(_transposed(4, 3, stride=2, padding=1), outputs=4, groups=4),
    "wide": replace(_transposed(4, 3, stride=2, padding=1), channels=20, outputs=18),
    "one pixel": replace(_transposed(1, 4), channels=20, outputs=18, batch=1),
    "1-D": Transposed(3, 4, (7,), (4,), (2,), (1,), (1,)),
    "3-D": Transposed(2, 4, (3, 2, 4), (3, 1, 2), (2, 1, 2), (1, 0, 1), (1, 1, 2), 2, 2, (1, 0, 1)),
}


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("geometry", TRANSPOSED.values(), ids=TRANSPOSED)
def test_transposed_convolution(geometry: Transposed, bias: bool, mask: tuple[bool, bool, bool]) -> None:
    x = _draw(geometry.batch, geometry.channels, *geometry.size)
    weight = _draw(geometry.channels, geometry.outputs // geometry.groups, *geometry.kernel)
    b = _draw(geometry.outputs) if bias else None
    stride, padding, dilation, extra, groups = geometry.moved
    rest = (stride, padding, dilation, True, extra, groups)
    want = aten.convolution(x, weight, b, *rest)
    y = convolution.transposed_convolution(_held(x), _held(weight), b, *geometry.moved)
    torch.testing.assert_close(_turned(y), want)

    grad = torch.randn_like(want)
    held = (_held(grad), _held(x), _held(weight))
    got = convolution.transposed_convolution_backward(*held, *geometry.moved, mask)
    backward = (grad, x, weight, [geometry.outputs], *rest, list(mask))
    gradients = aten.convolution_backward(*backward)
    _assert_masked((_turned(got[0]), _turned(got[1]), got[2]), gradients, mask)
    if all(mask):
        for operator, arguments in [
            (aten.convolution.default, (x, weight, b, *rest)),
            (aten.convolution_backward.default, backward),
        ]:
            assert operator not in _targets(_rewritten_operator(operator, *arguments))


# Without a weight and a bias PyTorch asks for no gradient of theirs.
@pytest.mark.parametrize(
    ("affine", "mask"),
    [(affine, mask) for affine in (True, False) for mask in MASKS if affine or not any(mask[1:])],
    ids=str,
)
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 6, 5, 4), 3), ((3, 4, 7), 1), ((2, 4, 3, 2, 2), 4), ((2, 6), 2)], ids=str
)
def test_group_norm(shape: tuple[int, ...], groups: int, affine: bool, mask: tuple[bool, bool, bool]) -> None:
    n, c, *spatial = shape
    x, grad = 2 * _draw(*shape) + 3, _draw(*shape)
    weight, bias = (_draw(c), _draw(c)) if affine else (None, None)
    sizes = (n, c, math.prod(spatial), groups)
    forward = (x, weight, bias, *sizes, 1e-5)
    want = aten.native_group_norm(*forward)
    y, *statistics = normalization.group_norm(_held(x), weight, bias, groups, 1e-5)
    torch.testing.assert_close((_turned(y), *statistics), want)

    got = normalization.group_norm_backward(
        _held(grad), _held(x), want[1], want[2], weight, groups, list(mask)
    )
    backward = (grad, x, want[1], want[2], weight, *sizes, list(mask))
    _assert_masked((_turned(got[0]), got[1], got[2]), aten.native_group_norm_backward(*backward), mask)

    for operator, arguments in [
        (aten.native_group_norm.default, forward),
        (aten.native_group_norm_backward.default, backward),
    ]:
        assert operator not in _targets(_rewritten_operator(operator, *arguments))


BATCH_NORMS = [aten.native_batch_norm.default, aten._native_batch_norm_legit.default]


@pytest.mark.parametrize("rewritten", BATCH_NORMS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 2)], ids=str)
def test_batch_norm(
    shape: tuple[int, ...], affine: bool, training: bool, rewritten: Callable[..., Any]
) -> None:
    x, channels = 2 * _draw(*shape) + 3, shape[1]
    weight, bias = (_draw(channels), _draw(channels)) if affine else (None, None)
    running = _draw(channels), _draw(channels) ** 2 + 0.5
    theirs = [value.clone() for value in running]
    want = rewritten(x, weight, bias, *theirs, training, 0.3, 1e-5)
    y, mean, scale, *ours = normalization.batch_norm(_held(x), weight, bias, *running, training, 0.3, 1e-5)
    torch.testing.assert_close((_turned(y), mean, scale), want)
    torch.testing.assert_close(ours, theirs)

    def interpreted(x: Tensor, mean: Tensor, variance: Tensor, *weights: Tensor) -> Any:
        mean, variance = mean.clone(), variance.clone()
        affine_weights = weights or (None, None)
        return rewritten(x, *affine_weights, mean, variance, training, 0.3, 1e-5), mean, variance

    weights = [value for value in (weight, bias) if value is not None]
    assert rewritten not in _targets(_rewritten(interpreted, x, *running, *weights))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_batch_norm_backward(affine: bool, training: bool, mask: tuple[bool, bool, bool]) -> None:
    x, weight = 2 * _draw(2, 3, 4, 5) + 3, _draw(3) if affine else None
    running = (_draw(3), _draw(3) ** 2 + 0.5)
    _, *statistics = aten.native_batch_norm(x, weight, None, *running, training, 0.3, 1e-5)
    grad = torch.randn_like(x)
    rest = (weight, *running, *statistics, training, 1e-5, list(mask))
    got = normalization.batch_norm_backward(_held(grad), _held(x), *rest)
    want = aten.native_batch_norm_backward(grad, x, *rest)
    _assert_masked((_turned(got[0]), got[1], got[2]), want, mask)

    operator = aten.native_batch_norm_backward.default

    def asked_for(*arguments: Any) -> list[Tensor]:
        return [g for g, asked in zip(operator(*arguments), mask, strict=True) if asked]

    assert operator not in _targets(_rewritten_operator(asked_for, grad, x, *rest))


def test_batch_norm_without_running_statistics() -> None:
    x, rest = _draw(2, 3, 4, 5), (_draw(3), _draw(3), None, None, True, 0.1, 1e-5)
    y, mean, scale, *_ = normalization.batch_norm(_held(x), *rest)
    torch.testing.assert_close((_turned(y), mean, scale), aten.native_batch_norm(x, *rest))


def test_batch_norm_of_one_value_a_channel_keeps_its_variance_finite() -> None:
    before = torch.zeros(2), torch.ones(2)
    *_, mean, variance = normalization.batch_norm(torch.ones(1, 2), None, None, *before, True, 0.1, 1e-5)
    torch.testing.assert_close((mean, variance), (torch.full((2,), 0.1), torch.full((2,), 0.9)))


@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", "plain"])
@pytest.mark.parametrize("alpha", [1, 0.5])
@pytest.mark.parametrize("beta", [1, 2.5, 0])
@pytest.mark.parametrize("bias", [(5,), (1, 5), (3, 5)], ids=str)
def test_addmm(alpha: float, beta: float, bias: tuple[int, ...], transposed: bool) -> None:
    def product(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return aten.addmm(bias, a, aten.t(b) if transposed else b, alpha=alpha, beta=beta)

    targets = _targets(
        _rewritten(product, _draw(*bias), _draw(3, 4), _draw(5, 4) if transposed else _draw(4, 5))
    )
    assert (aten.linear.default in targets) == transposed
    assert (aten.mm.default in targets) != transposed
    assert not {aten.addmm.default, aten.t.default, aten.permute_copy.default} & set(targets)


@pytest.mark.parametrize(
    ("product", "shapes", "targets"),
    [
        (lambda a, b: aten.mm(a, b), ((3, 4), (4, 5)), [aten.mm.default]),
        (lambda a, b: aten.mm(a, aten.t(b)), ((3, 4), (5, 4)), [aten.linear.default]),
        (lambda a, b: aten.mm(a, aten.permute(b, [1, 0])), ((3, 4), (5, 4)), [aten.linear.default]),
        (lambda a, b: aten.mm(a, aten.transpose(b, -2, -1)), ((3, 4), (5, 4)), [aten.linear.default]),
        (lambda a, b: aten.mm(a, aten.t(aten.t(b))), ((3, 4), (4, 5)), [aten.mm.default]),
        (lambda a, b: aten.mm(aten.t(a), b), ((4, 3), (4, 5)), [aten.permute_copy.default, aten.mm.default]),
        # A row turned is still the same values in the same order.
        (lambda a, b: aten.mm(aten.t(a), b), ((1, 3), (1, 5)), [aten.view.default, aten.mm.default]),
    ],
)
def test_matrix_products(
    product: Callable[..., Any], shapes: tuple[tuple[int, ...], ...], targets: list[Any]
) -> None:
    assert _targets(_rewritten(product, *(_draw(*shape) for shape in shapes))) == targets


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ([2, 2], [], [0, 0], [1, 1]),
        ([2, 2], [2, 2], [1, 1], [1, 1]),
        ([3], [2], [1], [1]),
        ([3, 2], [2, 1], [1, 0], [1, 2]),
        ([2, 2], [3, 3], [0, 0], [1, 1]),
    ],
)
def test_max_pool(
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ties: bool, ceil_mode: bool
) -> None:
    # Lowered, so that nothing in the margins could pass for a maximum.
    x = _draw(2, 3, 7, 8) - 3
    x = (2 * x).round() if ties else x
    arguments = (kernel, stride, padding, dilation, ceil_mode)
    want, indices = aten.max_pool2d_with_indices(x, *arguments)
    windows = pooling.windows_of_pool(x.shape[2:], *arguments)
    torch.testing.assert_close(_turned(pooling.max_pool(_held(x), windows)), want)
    grad = torch.randn_like(want)
    torch.testing.assert_close(
        _turned(pooling.max_pool_backward(_held(grad), _held(x), windows)),
        aten.max_pool2d_with_indices_backward(grad, x, *arguments, indices),
    )

    def step(x: Tensor, grad: Tensor) -> Any:
        y, indices = aten.max_pool2d_with_indices(x, *arguments)
        return y, aten.max_pool2d_with_indices_backward(grad, x, *arguments, indices)

    assert not any("pool" in str(target) for target in _targets(_rewritten(step, x, grad)))


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize("divisor", [None, 3])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        ([2, 2], [2, 2], [0, 0]),
        ([2, 2], [], [0, 0]),
        ([3], [2], [1]),
        ([3, 2], [2, 1], [1, 0]),
        ([2, 2], [3, 3], [0, 0]),
        ([4, 3], [3, 2], [2, 1]),
    ],
)
def test_average_pool(
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    divisor: int | None,
    count_include_pad: bool,
    ceil_mode: bool,
) -> None:
    x = _draw(2, 3, 7, 8)
    arguments = (kernel, stride, padding, ceil_mode, count_include_pad, divisor)
    want = aten.avg_pool2d(x, *arguments)
    grad = torch.randn_like(want)
    windows = pooling.windows_of_pool(x.shape[2:], kernel, stride, padding, ceil_mode=ceil_mode)
    share = pooling.shares_of_pool(_held(x), windows, padding, count_include_pad, divisor)
    torch.testing.assert_close(_turned(pooling.average_pool(_held(x), windows, share)), want)
    torch.testing.assert_close(
        _turned(pooling.average_pool_backward(_held(grad), windows, share)),
        aten.avg_pool2d_backward(grad, x, *arguments),
    )

    def step(x: Tensor, grad: Tensor) -> Any:
        return aten.avg_pool2d(x, *arguments), aten.avg_pool2d_backward(grad, x, *arguments)

    assert not [target for target in _targets(_rewritten(step, x, grad)) if "pool" in str(target)]


def _pooled(pool: Callable[[Tensor], Tensor], *shape: int) -> None:
    """Pooling of an image and its gradient reach the graph without an operator of that name."""

    def step(x: Tensor) -> Any:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            y = pool(leaf)
            total = (y * y).sum()
        return y, torch.autograd.grad(total, leaf)

    targets = _targets(_rewritten(step, _draw(*shape)))
    assert not [target for target in targets if "pool" in str(target) or "upsample" in str(target)]


@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize(
    ("size", "output"),
    [((7, 8), 1), ((7, 8), (3, 5)), ((6, 8), (3, 2)), ((4, 4), 7), ((5,), 2), ((4, 5, 6), (2, 2, 3))],
    ids=str,
)
def test_adaptive_pool(size: tuple[int, ...], output: Any, kind: str) -> None:
    pool = getattr(F, f"adaptive_{kind}_pool{len(size)}d")
    _pooled(lambda x: pool(x, output), 2, 3, *size)


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.avg_pool1d(x, 3, 2, 1),
        lambda x: F.max_pool1d(x, 3, 2, 1),
        lambda x: F.max_pool1d(x, 2),
        lambda x: F.interpolate(x, scale_factor=2),
    ],
)
def test_pools_of_series(pool: Callable[[Tensor], Tensor]) -> None:
    _pooled(pool, 2, 3, 9)


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.avg_pool3d(x, 2, 2, 1, count_include_pad=False),
        lambda x: F.max_pool3d(x, 2, 1),
        lambda x: F.max_pool3d(x, 3, 2, 1, ceil_mode=True),
    ],
)
def test_pools_of_volumes(pool: Callable[[Tensor], Tensor]) -> None:
    _pooled(pool, 2, 3, 4, 5, 3)


@pytest.mark.parametrize("options", [{"size": (7, 3)}, {"scale_factor": 2}, {"scale_factor": 1.7}], ids=str)
@pytest.mark.parametrize("mode", ["nearest", "bilinear", "aligned"])
def test_enlarging(mode: str, options: dict[str, Any]) -> None:
    kind: dict[str, Any] = (
        {"mode": mode} if mode != "aligned" else {"mode": "bilinear", "align_corners": True}
    )
    _pooled(lambda x: F.interpolate(x, **kind, **options), 2, 3, 4, 5)


def test_equal_values_share_no_gradient() -> None:
    x, grad = torch.ones(1, 5, 5, 1), _draw(1, 3, 2, 1).float()
    spread = pooling.adaptive_max_pool_backward(grad, x)
    torch.testing.assert_close(spread.sum(), grad.sum())
    assert (spread != 0).sum() <= grad.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gate_opens_above_zero(dtype: torch.dtype) -> None:
    tiny = torch.finfo(torch.float32).tiny
    x = torch.tensor([0.0, -0.0, tiny, 1e-20, 0.5, 1.0, 3e8, 1e38], dtype=dtype)
    assert activation.is_positive(x).tolist() == [0.0, 0.0, *[1.0] * 6]


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relu_backward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    want = aten.threshold_backward(grad, torch.relu(x), 0)
    assert torch.equal(activation.relu_backward(grad, torch.relu(x)), want)

    def step(x: Tensor, grad: Tensor) -> Tensor:
        return aten.threshold_backward(grad, aten.relu(x), 0)

    assert aten.threshold_backward.default not in _targets(_rewritten(step, x, grad))


def test_backward_of_another_threshold() -> None:
    arguments = _draw(2, 3, 4, 5), _draw(2, 3, 4, 5)
    graph = _rewritten_operator(aten.threshold_backward.default, *arguments, 0.5)
    torch.testing.assert_close(graph(*arguments), aten.threshold_backward(*arguments, 0.5))


def _image(x: Tensor) -> Tensor:
    """The same values, held with the channels last."""
    return aten.permute(aten.clone(aten.permute(x, [0, 2, 3, 1])), [0, 3, 1, 2])


def _turns(graph: fx.GraphModule) -> list[Any]:
    """What the images that `graph` turns come from."""
    return [node.args[0] for node in graph.graph.nodes if node.target is aten.permute_copy.default]


@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("axes", [[2, 3], [-1, -2], [2], [1, 2, 3], [0], [3, 0]], ids=str)
def test_means(axes: list[int], keepdim: bool) -> None:
    graph = _rewritten(lambda x: aten.mean(x, axes, keepdim), _draw(2, 3, 4, 5))
    assert aten.mean.dim not in _targets(graph)
    held = _rewritten(lambda x: aten.mean(aten.permute(x, [0, 3, 1, 2]), axes, keepdim), _draw(2, 4, 5, 3))
    assert len(_turns(held)) <= 1


@pytest.mark.parametrize("size", [[2, 3, 4, 5], [2, 3, 1, 1], [2, 3, 1, 5]], ids=str)
def test_the_gradient_of_a_mean_over_pixels_is_held_with_channels_last(size: list[int]) -> None:
    def step(grad: Tensor, held: Tensor) -> Tensor:
        spread = aten.div(aten.expand(aten.view(grad, [2, 3, 1, 1]), size), 20)
        return aten.mul(spread, aten.permute(held, [0, 3, 1, 2])).permute([0, 2, 3, 1])

    assert not _turns(_rewritten(step, _draw(2, 3), _held(_draw(*size))))


@pytest.mark.parametrize(
    ("shape", "size"), [((3, 1, 1), [2, 3, 4, 5]), ((1, 3, 1, 1), [2, 3, 4, 5]), ((2, 1), [2, 3])]
)
def test_other_expansions_are_left_alone(shape: tuple[int, ...], size: list[int]) -> None:
    graph = _rewritten(lambda x: aten.mul(aten.expand(x, size), 2), _draw(*shape))
    assert aten.expand.default in _targets(graph)


BINARY = {"add": aten.add.Tensor, "sub": aten.sub.Tensor, "mul": aten.mul.Tensor, "div": aten.div.Tensor}


@pytest.mark.parametrize("operator", BINARY.values(), ids=BINARY)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    "other",
    [(2, 3, 4, 5), (1, 3, 1, 1), (2, 3, 1, 1), (2, 1, 4, 5), (1, 1, 1, 1), (), (5,), (3, 1, 1)],
    ids=str,
)
def test_elementwise_of_held_and_plain_arguments(
    other: tuple[int, ...], swapped: bool, operator: Callable[..., Any]
) -> None:
    def step(x: Tensor, y: Tensor) -> Tensor:
        return operator(y, _image(x)) if swapped else operator(_image(x), y)

    _rewritten(step, _draw(2, 3, 4, 5), _draw(*other).abs() + 1)


def test_elementwise_of_two_orders() -> None:
    def step(x: Tensor, y: Tensor) -> Tensor:
        return aten.add(_image(x), aten.transpose(aten.mul(y, 2), -1, -2), alpha=3)

    _rewritten(step, _draw(2, 3, 4, 5), _draw(2, 3, 5, 4))


def test_elementwise_of_one_argument_twice() -> None:
    _rewritten(lambda x: aten.mul(_image(x), _image(x)) - aten.neg(_image(x)), _draw(2, 3, 4, 5))


def test_an_image_is_turned_once_for_all_its_readers() -> None:
    def step(x: Tensor) -> Any:
        pooled = aten.avg_pool2d(x, [1, 1])
        return aten.relu(pooled), aten.sigmoid(pooled), aten.mean(x, [2, 3]), aten.avg_pool2d(x, [2, 2])

    graph = _rewritten(step, _draw(2, 3, 4, 4))
    (x,) = graph.graph.find_nodes(op="placeholder")
    assert _turns(graph).count(x) == 1


@pytest.mark.parametrize(
    ("shape", "axes", "free"),
    [
        ((2, 1, 4, 5), [0, 2, 3, 1], True),
        ((2, 3, 1, 1), [0, 2, 3, 1], True),
        ((1, 3, 1, 1), [3, 1, 0, 2], True),
        ((2, 3, 4, 5), [0, 1, 2, 3], True),
        ((2, 3, 1, 5), [0, 2, 3, 1], False),
        ((2, 3, 4, 5), [0, 2, 3, 1], False),
    ],
)
def test_only_long_axes_cost_a_turn(shape: tuple[int, ...], axes: list[int], free: bool) -> None:
    graph = _rewritten(lambda x: aten.permute(x, axes), _draw(*shape))
    assert (aten.permute_copy.default not in _targets(graph)) == free


def test_a_view_of_a_held_image_is_that_of_the_model() -> None:
    def step(x: Tensor) -> Tensor:
        return aten.view(aten.relu(aten.avg_pool2d(x, [2, 2])), [2, -1])

    graph = _rewritten(step, _draw(2, 3, 4, 4))
    assert len(_turns(graph)) == 2
    assert len(_turns(_rewritten(step, _draw(2, 3, 2, 2)))) == 1


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_residual_stage_is_never_turned(index: int, norm: str) -> None:
    options = {"width": 16, "channels": 1, "input_size": 8, "norm": norm}
    spec = build_model("resnet10", options, seed=0)
    stage = build_stage(cut(spec.module, 2, torch.zeros(2, *spec.input_shape)), index, seed=0)
    optimizer = SGD(momentum=0.9)
    state = initial_state(stage, optimizer, layout=EXECUTORCH.layout(stage.model))
    x, y = torch.zeros(4, *stage.input_shape), torch.zeros(4, dtype=torch.int64)
    training = trace_training_step(stage, optimizer, state, x, y, rewrite_for_executorch).graph_module
    evaluation = trace_evaluation(stage, state, x, rewrite_for_executorch).graph_module
    for graph in (training, evaluation):
        turned = [node for node in _turns(graph) if node.meta["val"].dim() == 4]
        assert [node.op for node in turned] in ([], ["placeholder"])
        assert all(node.meta["val"].shape == x.shape for node in turned)
        names = {str(target) for target in _targets(graph)}
        refused = (
            "aten.where",
            "aten.gt",
            "aten.native_",
            "aten.convolution",
            "aten.threshold",
            "aten.addmm",
        )
        assert not [name for name in names if name.startswith(refused)]
        assert "aten.linear.default" in names
