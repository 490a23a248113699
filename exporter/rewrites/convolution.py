"""Convolution and its backward as matrix products over shifted slices.

ExecuTorch's portable convolution runs at about 0.6 GFLOP/s on one x86 thread while `mm` in the same runtime reaches
about 65 GFLOP/s, so both directions are written as pad, slice, cat and one product for each group of channels.
The functions take and return NCHW-like tensors with any number of spatial axes.

Axes are moved with the copying variants: the runtime has no strides, so a moved axis is a copy there, and saying so
here keeps every tensor contiguous and each following reshape free.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

aten = torch.ops.aten


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """`aten.convolution`: `x` (N, C, *spatial), `weight` (O, C / groups, *kernel) to (N, O, *output).

    Transposed convolution is left to the runtime's own kernel.
    """
    if transposed:
        return NotImplemented
    columns, output = _columns(x, weight.shape[2:], stride, padding, dilation, groups)
    product = torch.bmm(_weight_rows(weight, groups), columns)
    y = aten.transpose_copy(product.reshape(weight.shape[0], x.shape[0], *output), 0, 1)
    return y if bias is None else y + bias.reshape(1, -1, *[1] * len(output))


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`aten.convolution_backward`: gradients of input, weight and bias, each only where `output_mask` asks."""
    if transposed:
        return NotImplemented
    grad_rows = aten.transpose_copy(grad, 0, 1).reshape(groups, weight.shape[0] // groups, -1)
    grad_x = grad_weight = grad_bias = None
    if output_mask[0]:
        spread = torch.bmm(_weight_rows(weight, groups).transpose(1, 2), grad_rows)
        grad_x = _scatter(
            spread, x.shape, grad.shape[2:], weight.shape[2:], stride, padding, dilation, groups
        )
    if output_mask[1]:
        columns, _ = _columns(x, weight.shape[2:], stride, padding, dilation, groups)
        rows = torch.bmm(grad_rows, columns.transpose(1, 2))
        kernel_first = rows.reshape(weight.shape[0], *weight.shape[2:], weight.shape[1])
        grad_weight = aten.permute_copy(kernel_first, [0, grad.dim() - 1, *range(1, grad.dim() - 1)])
    if output_mask[2]:
        grad_bias = grad.sum([0, *range(2, grad.dim())])
    return grad_x, grad_weight, grad_bias


def _weight_rows(weight: Tensor, groups: int) -> Tensor:
    """`weight` (O, C / groups, *kernel) as (groups, O / groups, taps * C / groups)."""
    kernel_first = aten.permute_copy(weight, [0, *range(2, weight.dim()), 1])
    return kernel_first.reshape(groups, weight.shape[0] // groups, -1)


def _columns(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, list[int]]:
    """Every window of `x` as a column, (groups, taps * C / groups, N * output), and the output's spatial shape."""
    n, c, *spatial = x.shape
    output = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(spatial, kernel, stride, padding, dilation, strict=True)
    ]
    padded = aten.transpose_copy(x, 0, 1)
    if any(padding):
        padded = aten.constant_pad_nd(padded, [p for p in reversed(padding) for _ in range(2)], 0.0)
    taps = []
    for offsets in itertools.product(*(range(k) for k in kernel)):
        tap = padded
        for axis, (offset, size, s, d) in enumerate(zip(offsets, output, stride, dilation, strict=True), 2):
            tap = aten.slice_copy(tap, axis, offset * d, offset * d + (size - 1) * s + 1, s)
        taps.append(tap.reshape(groups, c // groups, n * math.prod(output)))
    return (torch.cat(taps, 1) if len(taps) > 1 else taps[0]), output


def _scatter(
    spread: Tensor,
    x_shape: Sequence[int],
    output: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Add every column's gradient back onto the input pixels it was read from; returns (N, C, *spatial)."""
    n, c, *spatial = x_shape
    padded = [size + 2 * p for size, p in zip(spatial, padding, strict=True)]
    taps = spread.reshape(groups, math.prod(kernel), c // groups, n, *output)
    total: Tensor | None = None
    for index, offsets in enumerate(itertools.product(*(range(k) for k in kernel))):
        tap = aten.select_copy(taps, 1, index).reshape(c, n, *output)
        for axis, s in enumerate(stride, 2):
            tap = _spread_axis(tap, axis, s)
        margins: list[int] = []
        for axis in reversed(range(len(kernel))):
            before = offsets[axis] * dilation[axis]
            margins += [before, padded[axis] - before - tap.shape[2 + axis]]
        tap = aten.constant_pad_nd(tap, margins, 0.0) if any(margins) else tap
        total = tap if total is None else total + tap
    assert total is not None
    for axis, (size, p) in enumerate(zip(spatial, padding, strict=True), 2):
        total = aten.slice_copy(total, axis, p, p + size) if p else total
    return aten.transpose_copy(total, 0, 1)


def _spread_axis(x: Tensor, axis: int, stride: int) -> Tensor:
    """`x` with `stride - 1` zeros put between neighbours along `axis`."""
    if stride == 1:
        return x
    size = x.shape[axis]
    margins = [0, 0] * (x.dim() - axis - 1) + [0, stride - 1]
    shape = [*x.shape[:axis], size * stride, *x.shape[axis + 1 :]]
    widened = aten.constant_pad_nd(x.unsqueeze(axis + 1), margins, 0.0).reshape(shape)
    return aten.slice_copy(widened, axis, 0, (size - 1) * stride + 1)
