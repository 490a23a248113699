"""Sliding windows as one strided slice for each position in the window, and their transpose.

Axes are moved and cut with the copying variants of the operators: the runtime has no strides, so each is a copy there,
and saying so here keeps every tensor contiguous and each following reshape free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

aten = torch.ops.aten


def pad(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
    """`x` with margins around its last axes, one entry of `before` and `after` for each of them."""
    margins = [m for pair in zip(reversed(before), reversed(after), strict=True) for m in pair]
    return aten.constant_pad_nd(x, margins, value) if any(margins) else x


def slice_taps(
    padded: Tensor,
    kernel: Sequence[int],
    output: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Iterator[Tensor]:
    """For each position in the window, the elements of `padded` (..., *spatial) it sees, each (..., *output).

    A tap is cut when it is asked for: memory is planned in the order of the graph. Positions that share a row of the
    window share its cut, which leaves a smaller graph.
    """
    if not kernel:
        yield padded
        return
    for row in slice_axis(padded, padded.dim() - len(kernel), kernel[0], output[0], stride[0], dilation[0]):
        yield from slice_taps(row, kernel[1:], output[1:], stride[1:], dilation[1:])


def slice_axis(
    x: Tensor, axis: int, kernel: int, output: int, stride: int, dilation: int
) -> Iterator[Tensor]:
    """For each position in a window along one axis, the `output` elements of `x` it sees."""
    for begin in range(0, kernel * dilation, dilation):
        whole = output == x.shape[axis]
        yield x if whole else aten.slice_copy(x, axis, begin, begin + (output - 1) * stride + 1, stride)


def add_taps(
    taps: Iterable[Tensor],
    spatial: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The transpose of `slice_taps`: each tap added back where it was cut from, (..., *spatial)."""
    taps = iter(taps)
    if not kernel:
        return next(taps)
    total: Tensor | None = None
    for begin in range(0, kernel[0] * dilation[0], dilation[0]):
        row = add_taps(taps, spatial[1:], kernel[1:], stride[1:], dilation[1:])
        axis = row.dim() - len(kernel)
        row = _spread(row, axis, stride[0])
        rest = [0] * (len(kernel) - 1)
        placed = pad(row, [begin, *rest], [spatial[0] - begin - row.shape[axis], *rest])
        total = placed if total is None else total + placed
    assert total is not None
    return total


def crop(x: Tensor, before: Sequence[int], spatial: Sequence[int]) -> Tensor:
    """The part of `x` (..., *padded) that begins at `before` and has shape `spatial` in its last axes."""
    first = x.dim() - len(spatial)
    for axis, (begin, size) in enumerate(zip(before, spatial, strict=True), first):
        if (begin, size) != (0, x.shape[axis]):
            x = aten.slice_copy(x, axis, begin, begin + size)
    return x


def window_count(
    spatial: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    margins: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """How many windows fit along each axis, with `margins` on either side."""
    axes = zip(spatial, kernel, stride, margins, dilation, strict=True)
    return [(size + 2 * m - d * (k - 1) - 1) // s + 1 for size, k, s, m, d in axes]


def _spread(x: Tensor, axis: int, stride: int) -> Tensor:
    """`x` with `stride - 1` zeros put between neighbours along `axis`."""
    if stride == 1:
        return x
    size = x.shape[axis]
    margins = [0, 0] * (x.dim() - axis - 1) + [0, stride - 1]
    shape = [*x.shape[:axis], size * stride, *x.shape[axis + 1 :]]
    widened = aten.constant_pad_nd(x.unsqueeze(axis + 1), margins, 0.0).reshape(shape)
    return aten.slice_copy(widened, axis, 0, (size - 1) * stride + 1)
