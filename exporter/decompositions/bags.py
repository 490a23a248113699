"""Bags of embeddings: the sum, mean or maximum of the rows of a table that lie between two offsets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from frostline.exporter.decompositions.indexing import index_copy

aten = torch.ops.aten

SUM, MEAN, MAX = range(3)


def embedding_bag(
    table: Tensor,
    rows: Tensor,
    offsets: Tensor,
    by_frequency: bool = False,
    mode: int = SUM,
    sparse: bool = False,
    weights: Tensor | None = None,
    ends_given: bool = False,
    padding: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bags (B, d) of a table's rows, the bag of each row, the sizes of the bags, and the rows of the maxima (B, d)."""
    bags = offsets.numel() - int(ends_given)
    places = torch.arange(rows.numel())
    bag = (offsets[:bags, None] <= places).sum(0) - 1
    counted = _counted(rows, padding)
    sizes = aten.index_add(torch.zeros(bags, dtype=torch.int64), 0, bag, counted.to(torch.int64))
    found = table.index_select(0, rows)
    if mode == MAX:
        largest, places = _largest(found, bag, counted, bags)
        return largest, bag, sizes, rows.index_select(0, places.reshape(-1)).reshape(places.shape)
    found = found * counted.to(found.dtype)[:, None]
    if weights is not None:
        found = found * weights[:, None]
    total = aten.index_add(torch.zeros(bags, table.shape[1], dtype=table.dtype), 0, bag, found)
    if mode == MEAN:
        total = total / _divisors(sizes, total)[:, None]
    return total, bag, sizes, sizes


def _counted(rows: Tensor, padding: int) -> Tensor:
    return torch.ones_like(rows, dtype=torch.bool) if padding < 0 else rows != padding


def _divisors(sizes: Tensor, like: Tensor) -> Tensor:
    """Empty bags are zeros, whatever they are divided by."""
    return torch.clamp(sizes, min=1).to(like.dtype)


def _largest(found: Tensor, bag: Tensor, counted: Tensor, bags: int) -> tuple[Tensor, Tensor]:
    """The largest values of each bag, zeros in empty ones, and the first places that hold them."""
    count, width = found.shape
    into = bag[:, None].expand(count, width)
    seen = torch.where(counted[:, None], found, -math.inf)
    lowest = torch.full([bags, width], -math.inf, dtype=found.dtype)
    largest = aten.scatter_reduce(lowest, 0, into, seen, "amax")
    holds = seen == largest.index_select(0, bag)
    places = torch.where(holds, torch.arange(count)[:, None], count - 1)
    last = torch.full([bags, width], count - 1, dtype=torch.int64)
    first = aten.scatter_reduce(last, 0, into, places, "amin")
    return torch.where(largest == -math.inf, 0.0, largest), first


def embedding_bag_backward(
    grad: Tensor,
    rows: Tensor,
    bag: Tensor,
    sizes: Tensor,
    largest: Tensor,
    count: int,
    by_frequency: bool,
    mode: int,
    weights: Tensor | None,
    padding: int = -1,
) -> Tensor:
    """The gradient of the table, (count, d)."""
    if mode == MAX:
        filled = grad * (sizes > 0).to(grad.dtype)[:, None]
        return aten.scatter_add(torch.zeros(count, grad.shape[1], dtype=grad.dtype), 0, largest, filled)
    if mode == MEAN:
        grad = grad / _divisors(sizes, grad)[:, None]
    handed = grad.index_select(0, bag)
    if weights is not None:
        handed = handed * weights[:, None]
    return aten.embedding_dense_backward(handed, rows, count, padding, by_frequency)


def embedding_bag_gradient(
    grad: Tensor,
    rows: Tensor,
    offsets: Tensor,
    bag: Tensor,
    sizes: Tensor,
    largest: Tensor,
    count: int,
    by_frequency: bool,
    mode: int,
    sparse: bool,
    weights: Tensor | None,
    padding: int = -1,
) -> Tensor:
    """The same, as autograd asks for it."""
    return embedding_bag_backward(
        grad, rows, bag, sizes, largest, count, by_frequency, mode, weights, padding
    )


def embedding_renorm(table: Tensor, rows: Tensor, largest: float, order: float) -> Tensor:
    """A table whose rows that are looked up are no longer than `largest`."""
    found = table.index_select(0, rows.reshape(-1))
    norms = torch.linalg.vector_norm(found, order, 1, keepdim=True)
    shortened = torch.where(norms > largest, largest / (norms + 1e-7), 1.0)
    return index_copy(table, 0, rows.reshape(-1), found * shortened)


def weights_backward(
    grad: Tensor, table: Tensor, rows: Tensor, offsets: Tensor, bag: Tensor, mode: int, padding: int = -1
) -> Tensor:
    """The gradient of the weights that the rows of a sum have."""
    products = (grad.index_select(0, bag) * table.index_select(0, rows)).sum(1)
    return products * _counted(rows, padding).to(products.dtype)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten._embedding_bag.default: embedding_bag,
    aten._embedding_bag_backward.default: embedding_bag_gradient,
    aten._embedding_bag_dense_backward.default: embedding_bag_backward,
    aten._embedding_bag_forward_only.default: embedding_bag,
    aten._embedding_bag_per_sample_weights_backward.default: weights_backward,
    aten.embedding_renorm.default: embedding_renorm,
}
