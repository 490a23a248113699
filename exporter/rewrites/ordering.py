"""Sorting, and what is found by it, by the runtime's `topk`: it has no `sort`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from frostline.exporter.rewrites.arrangement import Arranger, Value

aten = torch.ops.aten


def _sort(arrange: Arranger, x: Value, axis: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    if not x.dim():
        return arrange.plain(x), torch.zeros((), dtype=torch.int64)
    return aten.topk(arrange.plain(x), x.shape[axis], axis, descending, True)


def _stable_sort(
    arrange: Arranger, x: Value, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    tensor = arrange.plain(x)
    if not stable or not tensor.dim() or tensor.shape[dim] < 2:
        return _sort(arrange, x, dim, descending)
    return _in_order(tensor.movedim(dim, -1), descending, dim)


def _in_order(x: Tensor, descending: bool, axis: int) -> tuple[Tensor, Tensor]:
    """Sorted along the last axis, equal values in the order they are in; moved to an axis.

    Each value's rank is counted: how many are before it.
    """
    ours, theirs = x.unsqueeze(-1), x.unsqueeze(-2)
    count = x.shape[-1]
    earlier = torch.ones(count, count).tril(-1)
    first = (theirs > ours) if descending else (theirs < ours)
    rank = (first.float() + (theirs == ours).float() * earlier).sum(-1)
    # Row by row the place whose rank that is.
    chosen = (rank.unsqueeze(-2) == torch.arange(count).float().unsqueeze(-1)).float()
    places = (chosen * torch.arange(count).float()).sum(-1).long()
    return torch.gather(x, -1, places).movedim(-1, axis), places.movedim(-1, axis)


def _smallest(
    arrange: Arranger, x: Value, k: int, axis: int = -1, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """The `k`-th smallest value along an axis, and its place."""
    values, places = aten.topk(arrange.plain(x), k, axis, False, True)
    last = (aten.slice_copy(each, axis, k - 1, k) for each in (values, places))
    found, place = last if keepdim else (each.squeeze(axis) for each in last)
    return found, place


def _median(arrange: Arranger, x: Value, axis: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _smallest(arrange, x, (x.shape[axis] + 1) // 2, axis, keepdim)


def _median_of_all(arrange: Arranger, x: Value) -> Tensor:
    return _median(arrange, arrange.plain(x).reshape(-1), 0)[0]


def _cumulative_product(arrange: Arranger, x: Value, axis: int, *, dtype: Any = None) -> Tensor:
    tensor = arrange.plain(x).to(dtype)
    places = [aten.slice_copy(tensor, axis, place, place + 1) for place in range(tensor.shape[axis])]
    for place in range(1, len(places)):
        places[place] = places[place - 1] * places[place]
    return torch.cat(places, axis)


REWRITES: dict[Any, Callable[..., Any]] = {
    aten.cumprod.default: _cumulative_product,
    aten.kthvalue.default: _smallest,
    aten.median.default: _median_of_all,
    aten.median.dim: _median,
    aten.sort.default: _sort,
    aten.sort.stable: _stable_sort,
}
