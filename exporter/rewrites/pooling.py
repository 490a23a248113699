"""Max and average pooling over channels-last windows.

The portable kernel of max pooling's backward adds into memory it never clears, so in a planned arena it returns what was
there before; and comparing, selecting and taking maxima cost fifteen times an addition. Here maxima and their places are
found with subtraction, multiplication and ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from frostline.exporter.rewrites.activation import is_positive
from frostline.exporter.rewrites.windows import Windows

LOWEST = -1e30
"""Fills the margin: below every activation, and far enough from the limit that a difference of two stays finite."""


def max_pool(x: Tensor, windows: Windows) -> Tensor:
    """The largest value in each window of `x` (N, *spatial, C), within one rounding: (N, *output, C)."""
    taps = windows.cut(x, LOWEST)
    largest = next(taps)
    for tap in taps:
        rise = torch.relu(tap - largest)
        largest = _either(is_positive(rise), tap, largest) if windows.has_margins else largest + rise
    return largest


def max_pool_backward(grad: Tensor, x: Tensor, windows: Windows) -> Tensor:
    """Hand `grad` (N, *output, C) to the first of the largest values in each window."""
    taps = windows.cut(x, LOWEST)
    largest = next(taps)
    claims = [torch.ones_like(largest)]
    for tap in taps:
        rise = torch.relu(tap - largest)
        wins = is_positive(rise)
        claims = [claim - claim * wins for claim in claims]
        claims.append(wins)
        largest = _either(wins, tap, largest) if windows.has_margins else largest + rise
    return windows.add(grad * claim for claim in claims)


def _either(first: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`a` where `first` is 1, `b` where it is 0: adding what a value rises by would lose it against `LOWEST`."""
    return a * first + b * (1 - first)


def average_pool(x: Tensor, windows: Windows) -> Tensor:
    """The mean of each window of `x` (N, *spatial, C), margins counted as zeros: (N, *output, C)."""
    return reduce(add, windows.cut(x)) * (1 / windows.taps)


def average_pool_backward(grad: Tensor, windows: Windows) -> Tensor:
    """Hand each window's share of `grad` (N, *output, C) to every pixel it saw."""
    share = grad * (1 / windows.taps)
    return windows.add(share for _ in range(windows.taps))


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
