"""Turning tensors, by cheaper means than the runtime's `permute`.

The portable `permute` and `transpose` move 300 million values a second, one at a time. Two things are faster. While the
last axis stays last, an axis is moved by cutting it into slices and laying these side by side elsewhere: runs of values
are copied whole. And `linear` reads its second factor transposed, so a product with the identity brings the last axis to
the front, 90 billion operations a second. Which of them together are the cheapest is searched for; small tensors are
permuted after all.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

Order = tuple[int, ...]
Move = tuple[Literal["cut", "rotate", "permute"], int, int]
"""Cut the axis at one position and lay the slices side by side at another; bring the last axis to the front; permute."""

# Nanoseconds, on one thread of an x86 server.
_CALL = 1000.0
_PERMUTED_VALUE = 3.2
_CUT_VALUE = 0.3
_CUT_RUN = 10.0
_MULTIPLICATION = 0.025
_WIDEST = 64
"""Wider axes are rotated in parts: the wider the identity, the more operations."""
_PART = 32
"""About how wide."""


def permuted(x: Tensor, axes: Sequence[int]) -> Tensor:
    """`x.permute(axes)` as a contiguous tensor."""
    shape = [x.shape[axis] for axis in axes]
    sizes, order = _split_last(*_merged(x.shape, axes))
    if order == tuple(range(len(order))):
        return x.reshape(shape)
    moves = _cheapest(sizes, order, x.is_floating_point())
    if moves[0][0] == "permute":
        return aten.permute_copy(x, list(axes))
    held = x.reshape(sizes)
    for kind, source, target in moves:
        held = _rotated(held) if kind == "rotate" else _moved(held, source, target)
    return held.reshape(shape)


def transposed(matrices: Tensor) -> Tensor:
    """The last two axes swapped."""
    return permuted(matrices, [*range(matrices.dim() - 2), matrices.dim() - 1, matrices.dim() - 2])


def _moved(x: Tensor, source: int, target: int) -> Tensor:
    rest = [*x.shape[:source], *x.shape[source + 1 :]]
    # A view costs nothing in the runtime, `unsqueeze` a call.
    shape = [*rest[:target], 1, *rest[target:]]
    parts = (aten.select_copy(x, source, index) for index in range(x.shape[source]))
    return torch.cat([part.reshape(shape) for part in parts], target)


def _rotated(x: Tensor) -> Tensor:
    """(..., L) as (L, ...)."""
    rows = x.reshape(-1, x.shape[-1])
    # Traced as `mm` of a transpose, and joined to `linear` like every other.
    return torch.mm(_identity(x), rows.t()).reshape(x.shape[-1], *x.shape[:-1])


def _identity(x: Tensor) -> Tensor:
    """The identity as wide as the last axis of `x`, from what the runtime is fast at: each row is one place behind."""
    width = x.shape[-1]
    ones = torch.ones(width, 1, dtype=x.dtype, device=x.device)
    return F.pad(ones, [0, width]).reshape(-1)[: width * width].reshape(width, width)


def _merged(shape: Sequence[int], axes: Sequence[int]) -> tuple[tuple[int, ...], Order]:
    """The same permutation of fewer axes: those of length 1 left out, neighbours that stay together as one."""
    runs: list[list[int]] = []
    for axis in (axis for axis in axes if shape[axis] != 1):
        between = range(runs[-1][-1] + 1, axis) if runs else range(0)
        follows = bool(runs) and runs[-1][-1] < axis and all(shape[other] == 1 for other in between)
        if follows:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    by_source = sorted(runs)
    sizes = tuple(math.prod(shape[axis] for axis in run) for run in by_source)
    return sizes, tuple(by_source.index(run) for run in runs)


def _split_last(sizes: tuple[int, ...], order: Order) -> tuple[tuple[int, ...], Order]:
    """The same permutation with a wide last axis as two."""
    last = len(sizes) - 1
    if not sizes or sizes[last] <= _WIDEST or order[last] == last:
        return sizes, order
    divisors = [width for width in range(_PART // 2, _WIDEST + 1) if sizes[last] % width == 0]
    if not divisors:
        return sizes, order
    part = min(divisors, key=lambda width: abs(width - _PART))
    split = [(last, last + 1) if axis == last else (axis,) for axis in order]
    return (*sizes[:last], sizes[last] // part, part), tuple(axis for group in split for axis in group)


@lru_cache(maxsize=1024)
def _cheapest(sizes: tuple[int, ...], goal: Order, floating: bool) -> list[Move]:
    """The moves that take axes of these sizes to the order `goal` at the lowest cost (Dijkstra)."""
    start: Order = tuple(range(len(sizes)))
    queue: list[tuple[float, Order, list[Move]]] = [(0.0, start, [])]
    seen: set[Order] = set()
    while queue:
        cost, order, moves = heapq.heappop(queue)
        if order == goal:
            return moves
        if order in seen:
            continue
        seen.add(order)
        for move, after, price in _moves(sizes, order, goal, floating):
            heapq.heappush(queue, (cost + price, after, [*moves, move]))
    raise AssertionError("permuting reaches every order")


def _moves(
    sizes: tuple[int, ...], order: Order, goal: Order, floating: bool
) -> Iterator[tuple[Move, Order, float]]:
    """What can be done next, the order it leads to and what it costs."""
    count, last = math.prod(sizes), len(order) - 1
    if order == tuple(range(len(sizes))):
        yield ("permute", 0, 0), goal, _CALL + count * _PERMUTED_VALUE
    if floating and sizes[order[last]] <= _WIDEST:
        price = 2 * _CALL + count * sizes[order[last]] * _MULTIPLICATION
        yield ("rotate", last, 0), (order[last], *order[:last]), price
    for source in range(last):
        rest = order[:source] + order[source + 1 :]
        for target in range(last):
            after = (*rest[:target], order[source], *rest[target:])
            run = math.prod(sizes[axis] for axis in order[max(source, target) + 1 :])
            price = _CALL * (1 + sizes[order[source]]) + count * (_CUT_VALUE + _CUT_RUN / run)
            if target != source:
                yield ("cut", source, target), after, price
