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
from functools import partial, reduce
from operator import add

import torch
from torch import Tensor

from frostline.exporter.rewrites.arrangement import Deferred, Tiled, TiledGradient
from frostline.exporter.rewrites.turning import permuted, transposed
from frostline.exporter.rewrites.windows import Windows

aten = torch.ops.aten

NARROW = 16
"""Fewer input channels than this and windows are laid side by side."""


Kernel = Tensor | Tiled
"""(O, *kernel, C / groups), whole or in tiles."""


def convolution(
    x: Tensor,
    weight: Kernel,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolve channels-last `x` (N, *spatial, C) with `weight` (O, *kernel, C / groups): (N, *output, O)."""
    windows = Windows.over(x.shape[1:-1], weight.shape[1:-1], stride, padding, dilation)
    y = _correlate(windows, x, weight, groups)
    return y if bias is None else y + bias


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Kernel,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | TiledGradient | None, Tensor | None]:
    """Gradients of channels-last input (N, *spatial, C), weight (O, *kernel, C / groups) and bias (O,).

    Each only where `output_mask` asks; `grad` is (N, *output, O).
    """
    windows = Windows.over(x.shape[1:-1], weight.shape[1:-1], stride, padding, dilation)
    grad_x = _spread(windows, grad, weight, groups) if output_mask[0] else None
    grad_weight: Tensor | TiledGradient | None = None
    if output_mask[1]:
        grad_weight = (
            _tiled_gradient(windows, grad, x, weight)
            if isinstance(weight, Tiled)
            else _weight_gradient(windows, grad, x, weight, groups)
        )
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if output_mask[2] else None
    return grad_x, grad_weight, grad_bias


def transposed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """The transpose of a convolution, applied to channels-last `x` (N, *spatial, C): (N, *output, O).

    `weight` is (C, *kernel, O / groups).
    """
    windows = _transposed_windows(x, weight, stride, padding, dilation, output_padding)
    y = _spread(windows, x, weight, groups)
    return y if bias is None else y + bias


def transposed_convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of channels-last input (N, *spatial, C), weight (C, *kernel, O / groups) and bias (O,).

    Each only where `output_mask` asks; `grad` is (N, *output, O).
    """
    windows = _transposed_windows(x, weight, stride, padding, dilation, output_padding)
    grad_x = _correlate(windows, grad, weight, groups) if output_mask[0] else None
    grad_weight = _weight_gradient(windows, x, grad, weight, groups) if output_mask[1] else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if output_mask[2] else None
    return grad_x, grad_weight, grad_bias


def _transposed_windows(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
) -> Windows:
    """The windows over the output that the pixels of `x` spread to."""
    axes = zip(x.shape[1:-1], weight.shape[1:-1], stride, padding, dilation, output_padding, strict=True)
    spatial = [(size - 1) * s - 2 * p + d * (k - 1) + extra + 1 for size, k, s, p, d, extra in axes]
    return Windows.over(spatial, weight.shape[1:-1], stride, padding, dilation, output=x.shape[1:-1])


def _correlate(windows: Windows, x: Tensor, weight: Kernel, groups: int) -> Tensor:
    """What each window over `x` (N, *spatial, C) gives: (N, *output, O)."""
    if isinstance(weight, Tensor) and _is_depthwise(weight, groups):
        # As rows: a row is multiplied three times as fast by tensors of two axes as by those of four.
        pairs = zip(windows.cut(x), _depthwise_taps(weight), strict=True)
        y = reduce(add, (tap.reshape(-1, groups) * w for tap, w in pairs))
        return y.reshape(x.shape[0], *windows.output, groups)
    side_by_side = _is_side_by_side(x, windows, weight)
    taps = _tap_rows(windows, x, groups, side_by_side)
    weights = _weight_taps(weight, groups, side_by_side)
    y = reduce(add, (_product(tap, w) for tap, w in zip(taps, weights, strict=True)))
    return _from_rows(y, [x.shape[0], *windows.output], groups)


def _spread(windows: Windows, grad: Tensor, weight: Kernel, groups: int) -> Tensor:
    """The transpose of `_correlate`, from `grad` (N, *output, O) to (N, *spatial, C)."""
    if isinstance(weight, Tensor) and _is_depthwise(weight, groups):
        rows = grad.reshape(-1, groups)
        return windows.add((rows * w).reshape(grad.shape) for w in _depthwise_taps(weight))
    rows = _to_rows(grad, groups)
    side_by_side = _is_side_by_side(grad, windows, weight)
    spread = (_matrix_product(rows, w) for w in _weight_taps(weight, groups, side_by_side))
    pixels = [grad.shape[0], *windows.output]
    return windows.add(_split_places(spread, weight.shape[-1], pixels, groups))


def _weight_gradient(windows: Windows, grad: Tensor, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """The gradient (O, *kernel, C / groups), from those of the windows, (N, *output, O), and what they see."""
    if _is_depthwise(weight, groups):
        rows = grad.reshape(-1, groups)
        sums = [(rows * tap.reshape(-1, groups)).sum(0, keepdim=True) for tap in windows.cut(x)]
        return aten.t_copy(torch.cat(sums, 0)).reshape(weight.shape)
    rows = _to_rows(grad, groups)
    taps = _tap_rows(windows, x, groups, _is_side_by_side(x, windows, weight))
    if windows.taps == 1 and grad.numel() > x.numel() + weight.numel():
        # Of the two factors and the product, the smaller ones are turned.
        across = [transposed(_matrix_product(transposed(tap), rows)) for tap in taps]
        return _concatenated(across).reshape(weight.shape)
    turned = transposed(rows)
    return _concatenated([_matrix_product(turned, tap) for tap in taps]).reshape(weight.shape)


def _tiled_gradient(windows: Windows, grad: Tensor, x: Tensor, weight: Tiled) -> TiledGradient:
    """The same in tiles: each is computed where the optimizer asks for it, and gone before the next one is."""
    turned = transposed(_to_rows(grad, 1))
    seen = windows.taps_of(x)

    def gradient(index: int) -> Tensor:
        return torch.mm(turned, _to_rows(seen(index), 1))

    return TiledGradient([Deferred(partial(gradient, i)) for i in range(windows.taps)], weight.kernel)


def _is_depthwise(weight: Tensor, groups: int) -> bool:
    return groups > 1 and groups == weight.shape[0] and weight.shape[-1] == 1


def _is_side_by_side(x: Tensor, windows: Windows, weight: Kernel) -> bool:
    if isinstance(weight, Tiled):
        return False
    count = x.shape[0] * math.prod(windows.output)
    return weight.shape[-1] < NARROW or count <= weight.shape[0]


def _depthwise_taps(weight: Tensor) -> Iterator[Tensor]:
    """`weight` (C, *kernel, 1) as (C,) for each place in the kernel."""
    places = aten.t_copy(weight.reshape(weight.shape[0], -1))
    return (aten.select_copy(places, 0, index) for index in range(places.shape[0]))


def _weight_taps(weight: Kernel, groups: int, side_by_side: bool) -> Iterator[Tensor]:
    """`weight` as (O, C) for each place in the kernel, or as (O, places * C) at once.

    With groups, (groups, O / groups, ...).
    """
    if isinstance(weight, Tiled):
        return iter(weight.tiles)
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
    # Cut along the axis before the last, where whole runs are copied.
    places = rows.reshape(*rows.shape[:-1], count, width)
    return (aten.select_copy(places, -2, index) for index in range(count))


def _concatenated(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _to_rows(x: Tensor, groups: int) -> Tensor:
    """(N, *spatial, C) as (M, C), or with groups as (groups, M, C / groups)."""
    if groups == 1:
        return x.reshape(-1, x.shape[-1])
    return permuted(x.reshape(-1, groups, x.shape[-1] // groups), [1, 0, 2])


def _from_rows(rows: Tensor, pixels: list[int], groups: int) -> Tensor:
    """The inverse of `_to_rows`."""
    rows = permuted(rows, [1, 0, 2]) if groups > 1 else rows
    return rows.reshape(*pixels, -1)


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """(M, C) by (O, C) to (M, O), or a batch of them."""
    return torch.mm(rows, weight.t()) if rows.dim() == 2 else torch.bmm(rows, weight.transpose(1, 2))


def _matrix_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b) if a.dim() == 2 else torch.bmm(a, b)
