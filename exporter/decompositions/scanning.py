"""Running products, sums of exponentials and extremes along an axis, in as many steps as the length has binary digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

Several = Sequence[Tensor]


def _scanned(
    values: Several, axis: int, neutral: Sequence[float], combine: Callable[[Several, Several], Several]
) -> Several:
    """Combine each place with all before it: first with one, then with two more, then with four."""
    step, length = 1, values[0].shape[axis] if values[0].dim() else 1
    while step < length:
        earlier = [_delayed(each, axis, step, n) for each, n in zip(values, neutral, strict=True)]
        values = combine(earlier, values)
        step *= 2
    return values


def _delayed(x: Tensor, axis: int, step: int, neutral: float) -> Tensor:
    """Each place of an axis holds what stood `step` places before it."""
    shape = list(x.shape)
    shape[axis] = step
    return torch.cat(
        [torch.full(shape, neutral, dtype=x.dtype), x.narrow(axis, 0, x.shape[axis] - step)], axis
    )


def cumprod(x: Tensor, axis: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """The product of each place of an axis and all before it."""
    numbers = x if dtype is None else x.to(dtype)
    return _scanned([numbers], axis, [1], lambda earlier, own: [earlier[0] * own[0]])[0]


def logcumsumexp(x: Tensor, axis: int) -> Tensor:
    """The logarithm of the sum of the exponentials of each place of an axis and all before it."""
    return _scanned([x], axis, [-math.inf], lambda earlier, own: [_added(earlier[0], own[0])])[0]


def _added(a: Tensor, b: Tensor) -> Tensor:
    """The logarithm of the sum of two exponentials."""
    largest = torch.maximum(a, b)
    # Of two that are both minus infinity too.
    shift = torch.where(largest == -math.inf, 0.0, largest)
    return shift + torch.log(torch.exp(a - shift) + torch.exp(b - shift))


def _running(further: Callable[[Tensor, Tensor], Tensor], neutral: float) -> Callable[..., Any]:
    """The extreme of each place of an axis and all before it, and the last place that holds it."""

    def combine(earlier: Several, own: Several) -> Several:
        taken = further(earlier[0], own[0])
        return [torch.where(taken, old, new) for old, new in zip(earlier, own, strict=True)]

    def scan(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        if x.dim() == 0:
            return x.clone(), torch.zeros([], dtype=torch.int64)
        shape = [1] * x.dim()
        shape[axis] = -1
        places = torch.arange(x.shape[axis]).reshape(shape).expand(x.shape)
        values, found = _scanned([x, places], axis, [neutral, 0], combine)
        return values, found

    return scan


cummax = _running(torch.gt, -math.inf)
cummin = _running(torch.lt, math.inf)

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.cummax.default: cummax,
    aten.cummin.default: cummin,
    aten.cumprod.default: cumprod,
    aten.logcumsumexp.default: logcumsumexp,
}
