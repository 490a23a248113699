"""Convolution and its backward as matrix products over channels-last windows.

ExecuTorch's portable convolution runs at about 0.6 GFLOP/s on one x86 thread, while `mm` in the same runtime reaches 90.
With pixels as rows (N * pixels, C) and weights held as (O, *kernel, C), each place in the kernel is one product of what
it sees with its own (O, C) weights, in all three directions without turning the weights:

    forward          mm(x_tap, w_tap transposed)  (M, C) by (O, C), as one `linear`
    input gradient   mm(grad, w_tap)              (M, O) by (O, C)
    weight gradient  mm(grad transposed, x_tap)   (O, M) by (M, C)

The products of the places are summed, so no buffer of all windows (im2col) is needed. Where there are few windows beside
many weights, as in a network's last layers, or few channels, as in its first, the windows are laid side by side instead
and one product does for all places.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from frostline.exporter.rewrites.windows import Windows

aten = torch.ops.aten

NARROW = 16
"""Fewer input channels than this and windows are laid side by side."""


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolve channels-last `x` (N, *spatial, C) with `weight` (O, *kernel, C / groups): (N, *output, O)."""
    windows = Windows.over(x.shape[1:-1], weight.shape[1:-1], stride, padding, dilation)
    if _is_depthwise(x, weight, groups):
        y = reduce(add, (tap * w for tap, w in zip(windows.cut(x), _depthwise_taps(weight), strict=True)))
    else:
        side_by_side = _is_side_by_side(x, windows, weight)
        taps = _tap_rows(windows, x, groups, side_by_side)
        weights = _weight_taps(weight, groups, side_by_side)
        y = reduce(add, (_product(tap, w) for tap, w in zip(taps, weights, strict=True)))
        y = _from_rows(y, [x.shape[0], *windows.output], groups)
    return y if bias is None else y + bias


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of channels-last input (N, *spatial, C), weight (O, *kernel, C / groups) and bias (O,).

    Each only where `output_mask` asks; `grad` is (N, *output, O).
    """
    windows = Windows.over(x.shape[1:-1], weight.shape[1:-1], stride, padding, dilation)
    backward = _depthwise_backward if _is_depthwise(x, weight, groups) else _dense_backward
    grad_x, grad_weight = backward(windows, grad, x, weight, groups, output_mask)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if output_mask[2] else None
    return grad_x, grad_weight, grad_bias


def _dense_backward(
    windows: Windows, grad: Tensor, x: Tensor, weight: Tensor, groups: int, output_mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    rows = _to_rows(grad, groups)
    side_by_side = _is_side_by_side(x, windows, weight)
    grad_x = grad_weight = None
    if output_mask[0]:
        spread = (_matrix_product(rows, w) for w in _weight_taps(weight, groups, side_by_side))
        pixels = [x.shape[0], *windows.output]
        grad_x = windows.add(_split_places(spread, weight.shape[-1], pixels, groups))
    if output_mask[1]:
        across = aten.transpose_copy(rows, -1, -2)
        taps = [_matrix_product(across, tap) for tap in _tap_rows(windows, x, groups, side_by_side)]
        grad_weight = _concatenated(taps).reshape(weight.shape)
    return grad_x, grad_weight


def _depthwise_backward(
    windows: Windows, grad: Tensor, x: Tensor, weight: Tensor, groups: int, output_mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    grad_x = grad_weight = None
    if output_mask[0]:
        grad_x = windows.add(grad * w for w in _depthwise_taps(weight))
    if output_mask[1]:
        sums = [(grad * tap).reshape(-1, groups).sum(0, keepdim=True) for tap in windows.cut(x)]
        grad_weight = aten.t_copy(torch.cat(sums, 0)).reshape(weight.shape)
    return grad_x, grad_weight


def _is_depthwise(x: Tensor, weight: Tensor, groups: int) -> bool:
    return groups > 1 and groups == x.shape[-1] == weight.shape[0]


def _is_side_by_side(x: Tensor, windows: Windows, weight: Tensor) -> bool:
    count = x.shape[0] * math.prod(windows.output)
    return weight.shape[-1] < NARROW or count <= weight.shape[0]


def _depthwise_taps(weight: Tensor) -> Iterator[Tensor]:
    """`weight` (C, *kernel, 1) as (C,) for each place in the kernel."""
    places = aten.t_copy(weight.reshape(weight.shape[0], -1))
    return (aten.select_copy(places, 0, index) for index in range(places.shape[0]))


def _weight_taps(weight: Tensor, groups: int, side_by_side: bool) -> Iterator[Tensor]:
    """`weight` as (O, C) for each place in the kernel, or as (O, places * C) at once.

    With groups, (groups, O / groups, ...).
    """
    split = (groups, weight.shape[0] // groups) if groups > 1 else (weight.shape[0],)
    rows = weight.reshape(*split, -1)
    return iter([rows]) if side_by_side else _split(rows, weight.shape[-1])


def _tap_rows(windows: Windows, x: Tensor, groups: int, side_by_side: bool) -> Iterator[Tensor]:
    """What each place in the kernel sees, as rows, or side by side."""
    rows = (_to_rows(tap, groups) for tap in windows.cut(x))
    return iter([_concatenated(list(rows))]) if side_by_side else rows


def _split_places(spread: Iterator[Tensor], width: int, pixels: list[int], groups: int) -> Iterator[Tensor]:
    """What each place in the kernel hands back to the pixels it saw, (N, *output, C)."""
    return (_from_rows(part, pixels, groups) for rows in spread for part in _split(rows, width))


def _split(rows: Tensor, width: int) -> Iterator[Tensor]:
    """`rows` (..., places * width) in parts of `width` columns."""
    count = rows.shape[-1] // width
    if count == 1:
        return iter([rows])
    return (aten.slice_copy(rows, -1, index * width, (index + 1) * width) for index in range(count))


def _concatenated(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _to_rows(x: Tensor, groups: int) -> Tensor:
    """(N, *spatial, C) as (M, C), or with groups as (groups, M, C / groups)."""
    if groups == 1:
        return x.reshape(-1, x.shape[-1])
    return aten.transpose_copy(x.reshape(-1, groups, x.shape[-1] // groups), 0, 1)


def _from_rows(rows: Tensor, pixels: list[int], groups: int) -> Tensor:
    """The inverse of `_to_rows`."""
    rows = aten.transpose_copy(rows, 0, 1) if groups > 1 else rows
    return rows.reshape(*pixels, -1)


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """(M, C) by (O, C) to (M, O), or a batch of them."""
    return torch.mm(rows, weight.t()) if rows.dim() == 2 else torch.bmm(rows, weight.transpose(1, 2))


def _matrix_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b) if a.dim() == 2 else torch.bmm(a, b)
