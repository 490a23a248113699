"""Max and average pooling over channels-last windows.

The portable kernel of max pooling's backward adds into memory it never clears, so in a planned arena it returns what was
there before; and comparing, selecting and taking maxima cost fifteen times an addition. Here maxima and their places are
found with subtraction, multiplication and ReLU. Where values may be `far` apart they are selected by products with 1 and 0,
which loses none and takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor

from frostline.exporter.rewrites.activation import is_positive
from frostline.exporter.rewrites.reduction import expanded
from frostline.exporter.rewrites.resampling import adaptive_spans
from frostline.exporter.rewrites.windows import Windows

aten = torch.ops.aten

LOWEST = -1e30
"""Fills the margin: below every activation, and far enough from the limit that a difference of two stays finite."""


def max_pool(x: Tensor, windows: Windows, *, far: bool = False) -> Tensor:
    """The largest value in each window of `x` (N, *spatial, C), within one rounding: (N, *output, C)."""
    taps = windows.cut(x, LOWEST)
    largest = next(taps)
    for tap in taps:
        largest = _larger(largest, tap, far=far or windows.has_margins)
    return largest


def max_pool_backward(grad: Tensor, x: Tensor, windows: Windows, *, far: bool = False) -> Tensor:
    """Hand `grad` (N, *output, C) to the first of the largest values in each window."""
    return windows.add(grad * claim for claim in _winners(x, windows, far))


def max_pool_places(x: Tensor, windows: Windows, *, far: bool = False) -> Tensor:
    """The place of the first of the largest values in each window, counted over the pixels: int64 (N, *output, C)."""
    places = windows.cut(_numbered(windows.spatial, x.dtype))
    return _sum_of_products(_winners(x, windows, far), places).long()


def _winners(x: Tensor, windows: Windows, far: bool) -> list[Tensor]:
    """For each place in the windows 1.0 where it holds the first of the largest values, else 0.0: (N, *output, C)."""
    return _claims(list(windows.cut(x, LOWEST)), far=far or windows.has_margins)


def _last_of(wins: Sequence[Tensor]) -> list[Tensor]:
    """1.0 for the last of some ones, 0.0 for the others."""
    claims, free = [wins[-1]], 1 - wins[-1]
    for won in reversed(wins[:-1]):
        claims.append(won * free)
        free = free - claims[-1]
    return claims[::-1]


def _either(first: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`a` where `first` is 1, `b` where it is 0: adding what a value rises by would lose it against `LOWEST`."""
    return a * first + b * (1 - first)


def whole_max(x: Tensor) -> Tensor:
    """The largest of all places of `x` (N, *spatial, C): (N, C)."""
    return torch.amax(x.reshape(x.shape[0], -1, x.shape[-1]), 1)


def whole_max_places(x: Tensor) -> Tensor:
    """The place of one of the largest, counted over the pixels: int64 (N, C)."""
    return torch.argmax(x.reshape(x.shape[0], -1, x.shape[-1]), 1)


def whole_max_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Hand `grad` (N, C) to that place of `x`."""
    places = whole_max_places(x).unsqueeze(1)
    zeros = torch.zeros_like(x).reshape(x.shape[0], -1, x.shape[-1])
    return zeros.scatter(1, places, grad.unsqueeze(1)).reshape(x.shape)


def adaptive_max_pool(x: Tensor, output: Sequence[int], *, far: bool = False) -> Tensor:
    """The largest value in each of the nearly equal spans of `x` (N, *spatial, C): (N, *output, C)."""
    for axis, count in enumerate(output, 1):
        x = torch.cat([_largest(span, far) for span in _spans(x, axis, count)], axis)
    return x


def adaptive_max_pool_backward(grad: Tensor, x: Tensor, *, far: bool = False) -> Tensor:
    """Hand `grad` (N, *output, C) to the largest values of `x` (N, *spatial, C); among equal ones to one of them."""
    stages = [x]
    for axis, count in enumerate(grad.shape[1:-2], 1):
        stages.append(torch.cat([_largest(span, far) for span in _spans(stages[-1], axis, count)], axis))
    for axis in reversed(range(1, x.dim() - 1)):
        grad = _adaptive_axis_backward(grad, stages[axis - 1], axis, far)
    return grad


def adaptive_max_pool_places(x: Tensor, output: Sequence[int], *, far: bool = False) -> Tensor:
    """The places of those values, counted over the pixels: int64 (N, *output, C)."""
    places = _numbered(x.shape[1:-1], x.dtype)
    for axis, count in enumerate(output, 1):
        spans = list(zip(_spans(x, axis, count), _spans(places, axis, count), strict=True))
        places = torch.cat(
            [_sum_of_products(_claims(values, far=far), numbers) for values, numbers in spans], axis
        )
        x = torch.cat([_largest(values, far) for values, _ in spans], axis)
    return places.long()


def _numbered(spatial: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The pixels counted (1, *spatial, 1): whole numbers, which float32 holds exactly for images below 2**24 pixels."""
    return torch.arange(math.prod(spatial), dtype=dtype).reshape(1, *spatial, 1)


def _sum_of_products(factors: Iterable[Tensor], others: Iterable[Tensor]) -> Tensor:
    return reduce(add, (a * b for a, b in zip(factors, others, strict=True)))


def _adaptive_axis_backward(grad: Tensor, x: Tensor, axis: int, far: bool) -> Tensor:
    """The same along one axis."""
    size, count = x.shape[axis], grad.shape[axis]
    shares: list[list[Tensor]] = [[] for _ in range(size)]
    spans = zip(adaptive_spans(size, count), _spans(x, axis, count), strict=True)
    for index, ((begin, _), places) in enumerate(spans):
        given = aten.slice_copy(grad, axis, index, index + 1)
        for place, claim in enumerate(_claims(places, far=far), begin):
            shares[place].append(given * claim)
    return torch.cat([reduce(add, parts) for parts in shares], axis)


def _claims(places: Sequence[Tensor], *, far: bool) -> list[Tensor]:
    """1.0 for the first of the largest values, 0.0 for the others."""
    largest, wins = places[0], [torch.ones_like(places[0])]
    for place in places[1:]:
        rise = torch.relu(place - largest)
        wins.append(is_positive(rise))
        largest = _either(wins[-1], place, largest) if far else largest + rise
    return _last_of(wins)


def _spans(x: Tensor, axis: int, count: int) -> list[list[Tensor]]:
    places = [aten.slice_copy(x, axis, place, place + 1) for place in range(x.shape[axis])]
    return [places[begin:end] for begin, end in adaptive_spans(x.shape[axis], count)]


def _largest(values: Sequence[Tensor], far: bool) -> Tensor:
    return reduce(partial(_larger, far=far), values)


def _larger(a: Tensor, b: Tensor, *, far: bool) -> Tensor:
    rise = torch.relu(b - a)
    return _either(is_positive(rise), b, a) if far else a + rise


def average_pool(x: Tensor, windows: Windows, share: Tensor | float | None = None) -> Tensor:
    """The sum of each window of `x` (N, *spatial, C) times its `share`, by default one of as many pixels as it sees.

    Other shares are those of `shares_of_pool`. Returns (N, *output, C).
    """
    return _shared(reduce(add, windows.cut(x)), 1 / windows.taps if share is None else share)


def average_pool_backward(grad: Tensor, windows: Windows, share: Tensor | float | None = None) -> Tensor:
    """Hand each window's share of `grad` (N, *output, C) to every pixel it saw."""
    shared = _shared(grad, 1 / windows.taps if share is None else share)
    return windows.add(shared for _ in range(windows.taps))


def shares_of_pool(
    x: Tensor,
    windows: Windows,
    padding: Sequence[int],
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor | float:
    """One over the pixels PyTorch counts in each window over `x` (N, *spatial, C), (1, *output, 1) where they differ.

    Windows that reach beyond the padding, as they may by rounding up, count fewer.
    """
    if divisor is not None:
        return 1 / divisor
    margins = list(padding) if len(padding) == len(windows.spatial) else list(padding) * len(windows.spatial)
    counted = margins if count_include_pad else [0] * len(margins)
    if windows.before == counted and all(a <= c for a, c in zip(windows.after, counted, strict=True)):
        return 1 / windows.taps
    ones = torch.ones(1, *windows.spatial, 1, dtype=x.dtype, device=x.device)
    # Pixels of the padding that count are ones, those behind it zeros.
    rims = [rim for margin in reversed(counted) for rim in (margin, margin)]
    ones = F.pad(ones, [0, 0, *rims], value=1.0)
    before = [b - c for b, c in zip(windows.before, counted, strict=True)]
    after = [a - c for a, c in zip(windows.after, counted, strict=True)]
    spatial = [size + 2 * c for size, c in zip(windows.spatial, counted, strict=True)]
    around = replace(windows, spatial=spatial, before=before, after=after)
    return 1 / reduce(add, around.cut(ones))


def _shared(x: Tensor, share: Tensor | float) -> Tensor:
    if isinstance(share, float):
        return x * share
    by_channel = expanded(share, [1, *x.shape[1:]])
    return (x.reshape(x.shape[0], -1) * by_channel.reshape(-1)).reshape(x.shape)


def windows_of_pool(
    spatial: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Windows:
    """The windows of ATen's pooling arguments, which may be shortened to one entry or none."""
    axes = len(spatial)

    def each(values: Sequence[int]) -> Sequence[int]:
        return values if len(values) == axes else list(values) * axes

    steps = stride if len(stride) else kernel
    return Windows.over(
        spatial, each(kernel), each(steps), each(padding), each(dilation), ceil_mode=ceil_mode
    )
