from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from frostline.exporter.rewrites import convolution, linear, normalization, pooling
from frostline.exporter.rewrites.executorch import REWRITES

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
    "1-D": Geometry(3, 4, (11,), (3,), (2,), (1,), (2,)),
    "3-D": Geometry(2, 4, (5, 4, 6), (3, 1, 2), (2, 1, 2), (1, 0, 1), (1, 1, 2), groups=2),
}


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _check_convolution(geometry: Geometry, bias: bool, mask: Sequence[bool]) -> None:
    x = _draw(geometry.batch, geometry.channels, *geometry.size)
    weight = _draw(geometry.outputs, geometry.channels // geometry.groups, *geometry.kernel)
    arguments = (x, weight, _draw(geometry.outputs) if bias else None, *geometry.settings)
    want = aten.convolution(*arguments)
    torch.testing.assert_close(convolution.convolution(*arguments), want)

    backward = (torch.randn_like(want), x, weight, [geometry.outputs], *geometry.settings, list(mask))
    _assert_masked(convolution.convolution_backward(*backward), aten.convolution_backward(*backward), mask)


def _assert_masked(got: Sequence[Tensor | None], want: Sequence[Tensor | None], mask: Sequence[bool]) -> None:
    assert [gradient is not None for gradient in got] == list(mask)
    for ours, theirs, asked in zip(got, want, mask, strict=True):
        if asked:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_convolution(geometry: Geometry, bias: bool) -> None:
    _check_convolution(geometry, bias, (True, True, True))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_convolution_gives_the_gradients_asked_for(mask: tuple[bool, bool, bool]) -> None:
    _check_convolution(GEOMETRIES["groups"], bias=True, mask=mask)


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
        channels=groups * draw(st.integers(1, 2)),
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


def test_transposed_convolution_is_left_alone() -> None:
    x, weight = _draw(1, 2, 4, 4), _draw(2, 3, 3, 3)
    geometry = ([1, 1], [0, 0], [1, 1], True, [0, 0], 1)
    assert convolution.convolution(x, weight, None, *geometry) is NotImplemented
    grad = _draw(1, 3, 6, 6)
    backward = convolution.convolution_backward(grad, x, weight, None, *geometry, [True] * 3)
    assert backward is NotImplemented


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
    x = 2 * _draw(*shape) + 3
    weight, bias = (_draw(c), _draw(c)) if affine else (None, None)
    sizes = (n, c, torch.Size(spatial).numel(), groups)
    want = aten.native_group_norm(x, weight, bias, *sizes, 1e-5)
    got = normalization.group_norm(x, weight, bias, *sizes, 1e-5)
    torch.testing.assert_close(got, want)

    backward = (_draw(*shape), x, want[1], want[2], weight, *sizes, list(mask))
    _assert_masked(
        normalization.group_norm_backward(*backward), aten.native_group_norm_backward(*backward), mask
    )


@pytest.mark.parametrize("rewritten", [aten.native_batch_norm.default, aten._native_batch_norm_legit.default])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 2)], ids=str)
def test_batch_norm(
    shape: tuple[int, ...], affine: bool, training: bool, rewritten: Callable[..., Any]
) -> None:
    x, channels = 2 * _draw(*shape) + 3, shape[1]
    weight, bias = (_draw(channels), _draw(channels)) if affine else (None, None)
    want_mean, want_variance = _draw(channels), _draw(channels) ** 2 + 0.5
    mean, variance = want_mean.clone(), want_variance.clone()
    want = rewritten(x, weight, bias, want_mean, want_variance, training, 0.3, 1e-5)
    got = REWRITES[rewritten](x, weight, bias, mean, variance, training, 0.3, 1e-5)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close((mean, variance), (want_mean, want_variance))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_batch_norm_backward(affine: bool, training: bool, mask: tuple[bool, bool, bool]) -> None:
    x, weight = 2 * _draw(2, 3, 4, 5) + 3, _draw(3) if affine else None
    running = (_draw(3), _draw(3) ** 2 + 0.5)
    _, mean, scale = aten.native_batch_norm(x, weight, None, *running, training, 0.3, 1e-5)
    arguments = (torch.randn_like(x), x, weight, *running, mean, scale, training, 1e-5, list(mask))
    _assert_masked(
        normalization.batch_norm_backward(*arguments), aten.native_batch_norm_backward(*arguments), mask
    )


def test_batch_norm_without_running_statistics() -> None:
    arguments = (_draw(2, 3, 4, 5), _draw(3), _draw(3), None, None, True, 0.1, 1e-5)
    torch.testing.assert_close(normalization.batch_norm(*arguments), aten.native_batch_norm(*arguments))


def test_batch_norm_of_one_value_a_channel_keeps_its_variance_finite() -> None:
    mean, variance = torch.zeros(2), torch.ones(2)
    normalization.batch_norm(torch.ones(1, 2), None, None, mean, variance, True, 0.1, 1e-5)
    torch.testing.assert_close((mean, variance), (torch.full((2,), 0.1), torch.full((2,), 0.9)))


@pytest.mark.parametrize("alpha", [1, 0.5])
@pytest.mark.parametrize("beta", [1, 2.5, 0])
@pytest.mark.parametrize("bias", [(5,), (1, 5), (3, 5)], ids=str)
def test_addmm(alpha: float, beta: float, bias: tuple[int, ...]) -> None:
    arguments = (_draw(*bias), _draw(3, 4), _draw(4, 5))
    got = linear.addmm(*arguments, alpha=alpha, beta=beta)
    torch.testing.assert_close(got, aten.addmm(*arguments, alpha=alpha, beta=beta))


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ([2, 2], [], [0, 0], [1, 1]),
        ([3], [2], [1], [1]),
        ([3, 2], [2, 1], [1, 0], [1, 2]),
        ([2, 2], [3, 3], [0, 0], [1, 1]),
    ],
)
def test_max_pool(
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ties: bool, ceil_mode: bool
) -> None:
    x = _draw(2, 3, 7, 8)
    x = (2 * x).round() if ties else x
    arguments = (kernel, stride, padding, dilation, ceil_mode)
    want, indices = aten.max_pool2d_with_indices(x, *arguments)
    got, unused = pooling.max_pool2d(x, *arguments)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    torch.testing.assert_close(
        pooling.max_pool2d_backward(grad, x, *arguments, unused),
        aten.max_pool2d_with_indices_backward(grad, x, *arguments, indices),
    )
