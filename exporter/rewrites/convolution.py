"""Convolution and its backward as matrix products over shifted slices.

ExecuTorch's portable convolution runs at about 0.6 GFLOP/s on one x86 thread while `mm` in the same runtime reaches
about 65 GFLOP/s, so both directions are written as pad, slice, cat and one batched product, over the groups of
channels, for each position along the kernel's first axis. Laying out all positions at once would be one product, but
a program is planned around its largest moment, and that would be it: nine times the input for a 3×3 kernel, twice.

The functions take and return NCHW-like tensors with any number of spatial axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from frostline.exporter.rewrites.windows import add_taps, crop, pad, slice_axis, window_count

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
    output = window_count(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    product: Tensor | None = None
    columns = _columns(x, weight.shape[2:], output, stride, padding, dilation, groups)
    for slab, part in zip(_weight_slabs(weight, groups), columns, strict=True):
        partial = torch.bmm(slab, part)
        product = partial if product is None else product + partial
    assert product is not None
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
    kernel, output = weight.shape[2:], grad.shape[2:]
    grad_rows = aten.transpose_copy(grad, 0, 1).reshape(groups, weight.shape[0] // groups, -1)
    grad_x = grad_weight = grad_bias = None
    if output_mask[0]:
        taps = _gradient_taps(grad_rows, weight, (x.shape[1], x.shape[0], *output), groups)
        padded = [size + 2 * p for size, p in zip(x.shape[2:], padding, strict=True)]
        total = crop(add_taps(taps, padded, kernel, stride, dilation), padding, x.shape[2:])
        grad_x = aten.transpose_copy(total, 0, 1)
    if output_mask[1]:
        columns = _columns(x, kernel, output, stride, padding, dilation, groups)
        rows = _concatenated([torch.bmm(grad_rows, part.transpose(1, 2)) for part in columns], 2)
        kernel_first = rows.reshape(weight.shape[0], *kernel, weight.shape[1])
        grad_weight = aten.permute_copy(kernel_first, [0, grad.dim() - 1, *range(1, grad.dim() - 1)])
    if output_mask[2]:
        grad_bias = grad.sum([0, *range(2, grad.dim())])
    return grad_x, grad_weight, grad_bias


def _weight_slabs(weight: Tensor, groups: int) -> Iterator[Tensor]:
    """`weight` (O, C / groups, *kernel) as (groups, O / groups, taps * C / groups) for each position along axis 0."""
    kernel_first = aten.permute_copy(weight, [0, *range(2, weight.dim()), 1])
    rows = kernel_first.reshape(groups, weight.shape[0] // groups, -1)
    width = rows.shape[2] // weight.shape[2]
    for index in range(weight.shape[2]):
        whole = weight.shape[2] == 1
        yield rows if whole else aten.slice_copy(rows, 2, index * width, (index + 1) * width)


def _columns(
    x: Tensor,
    kernel: Sequence[int],
    output: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Iterator[Tensor]:
    """The windows of `x` as columns, (groups, taps * C / groups, N * output), for each position along axis 0."""
    n, c = x.shape[:2]
    padded = pad(aten.transpose_copy(x, 0, 1), padding, padding)
    windows = padded.reshape(groups, c // groups, n, *padded.shape[2:])
    axes = list(zip(itertools.count(3), kernel, output, stride, dilation, strict=False))
    # The last axis first, so that the rows come out in the order of the kernel's axes.
    for axis in reversed(axes[1:]):
        windows = _concatenated(list(slice_axis(windows, *axis)), 1)
    for slab in slice_axis(windows, *axes[0]):
        yield slab.reshape(groups, -1, n * math.prod(output))


def _gradient_taps(grad_rows: Tensor, weight: Tensor, shape: Sequence[int], groups: int) -> Iterator[Tensor]:
    """What each position of the kernel hands back to the pixels it read: `shape` (C, N, *output)."""
    taps = math.prod(weight.shape[3:])
    for slab in _weight_slabs(weight, groups):
        spread = torch.bmm(slab.transpose(1, 2), grad_rows).reshape(groups, taps, weight.shape[1], -1)
        for index in range(taps):
            tap = spread if taps == 1 else aten.select_copy(spread, 1, index)
            yield tap.reshape(shape)


def _concatenated(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
