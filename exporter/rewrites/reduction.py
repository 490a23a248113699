"""Sums and broadcasts over any axes, as sums over rows and products with ones.

Summing rows is among the fastest operators of the portable runtime; summing along the last axis is five times slower than
a product with a column of ones, and repeating a value along it forty times slower than one with a row of ones. Adding or
multiplying broadcast tensors is fast where the axes can be seen as (rows, columns) or (samples, rows, columns).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

Kind = TypeVar("Kind")


def sum_over(x: Tensor, axes: Sequence[int]) -> Tensor:
    """The sum of floating-point `x` over `axes`, which are kept with length 1."""
    shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    groups = _groups(x.shape, [axis in axes for axis in range(x.dim())])
    while any(reduced for reduced, _ in groups):
        last = max(index for index, (reduced, _) in enumerate(groups) if reduced)
        before, after = (math.prod(size for _, size in part) for part in (groups[:last], groups[last + 1 :]))
        x = _sum_middle(x.reshape(before, groups[last][1], after))
        groups = [*groups[:last], *groups[last + 1 :]]
    return x.reshape(shape)


def _sum_middle(x: Tensor) -> Tensor:
    before, _, after = x.shape
    if after == 1:
        return sum_rows(x.reshape(x.shape[:2]))
    return x.reshape(x.shape[1:]).sum(0) if before == 1 else x.sum(1)


def sum_rows(x: Tensor) -> Tensor:
    """The sum of each row of `x` (M, D): (M, 1)."""
    return torch.mm(x, torch.ones(x.shape[1], 1, dtype=x.dtype, device=x.device))


def expanded(x: Tensor, shape: Sequence[int]) -> Tensor:
    """`x`, of as many axes, repeated to `shape`."""
    groups = _groups(shape, [size != full for size, full in zip(x.shape, shape, strict=True)])
    if groups and groups[-1][0]:
        width = groups[-1][1]
        rows = torch.mm(x.reshape(-1, 1), torch.ones(1, width, dtype=x.dtype, device=x.device))
        x = rows.reshape([size for repeated, size in groups[:-1] if not repeated] + [width])
        groups = [*groups[:-1], (False, width)]
    sizes = [1 if repeated else size for repeated, size in groups]
    return x.reshape(sizes).expand([size for _, size in groups]).reshape(shape)


def broadcast(function: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
    """`function(a, b)` elementwise, with neighbouring axes that are broadcast alike as one."""
    if a.shape == b.shape or not a.dim() or not b.dim() or a.numel() == 1 or b.numel() == 1:
        return function(a, b)
    shape = torch.broadcast_shapes(a.shape, b.shape)
    sizes = [[1] * (len(shape) - x.dim()) + list(x.shape) for x in (a, b)]
    kinds = [(p != full, q != full) for p, q, full in zip(*sizes, shape, strict=True)]
    groups = _groups(shape, kinds)
    views = [x.reshape(_sizes_of(groups, side)) for side, x in enumerate((a, b))]
    return function(*views).reshape(shape)


def _sizes_of(groups: Sequence[tuple[tuple[bool, bool], int]], side: int) -> list[int]:
    sizes = [1 if repeated[side] else size for repeated, size in groups]
    # A row is added faster when it has one axis only.
    return sizes[1:] if len(sizes) > 1 and sizes[0] == 1 and groups[0][0][side] else sizes


def _groups(shape: Sequence[int], kinds: Sequence[Kind]) -> list[tuple[Kind, int]]:
    """Neighbouring axes of one kind as one, those of length 1 left out."""
    axes = [(kind, size) for kind, size in zip(kinds, shape, strict=True) if size != 1]
    return [(kind, math.prod(size for _, size in run)) for kind, run in groupby(axes, lambda axis: axis[0])]
