"""Bags of embeddings, and the backward of tables of them.

Looking rows up is fast in the portable runtime; adding gradients into rows takes one call of an index function for each
value. A small table's gradient is a product with the one-hot indices instead, which need only be scattered.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDEST = 384
"""Beyond this many rows the product costs more than adding value by value."""


def embedding_backward(grad: Tensor, indices: Tensor, count: int, padding: int) -> Tensor:
    """The gradient (count, D) of the table from `grad` (..., D) of the rows at `indices` (...) int64.

    Row `padding` gets none; negative: there is no such row.
    """
    rows, places = grad.reshape(-1, grad.shape[-1]), indices.reshape(1, -1)
    if padding >= 0:
        rows = rows * (places != padding).to(grad.dtype).reshape(-1, 1)
    if count > WIDEST:
        table = torch.zeros(count, rows.shape[1], dtype=grad.dtype, device=grad.device)
        return table.scatter_add(0, places.reshape(-1, 1).expand(rows.shape), rows)
    zeros = torch.zeros(count, rows.shape[0], dtype=grad.dtype, device=grad.device)
    return torch.mm(zeros.scatter(0, places, 1.0), rows)


SUM, MEAN, MAX = 0, 1, 2
"""ATen's numbers of what a bag is."""

OUTSIDE = 1e30
"""How far rows of other bags are put below those of a bag."""


def bags(offsets: Tensor, count: int, whole: bool, dtype: torch.dtype) -> Tensor:
    """Which of `count` indices are in which bag, ones and zeros (bags, count).

    Bags begin at `offsets` (bags,) int64; the last is the end of the last bag where they are the `whole`.
    """
    places = torch.arange(count)
    behind = (places >= offsets.reshape(-1, 1)).to(dtype)
    ends = behind[1:] if whole else torch.cat([behind[1:], torch.zeros(1, count, dtype=dtype)])
    return behind[: ends.shape[0]] - ends


def embedding_bag(table: Tensor, indices: Tensor, weights: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    """The sums or means (bags, D) of rows of `table`, and how many rows each bag has.

    `indices` is (T,) int64; `weights` (bags, T) how much of each row is in each bag, 1 or 0 but for sums.
    """
    sizes = weights.sum(1)
    total = torch.mm(weights, torch.index_select(table, 0, indices))
    return total if mode == SUM else total / torch.clamp(sizes, min=1.0).reshape(-1, 1), sizes


def largest_of_bags(table: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The largest values (bags, D) of the rows in each bag, 0 in empty ones, and which rows of `table` they are from."""
    rows = torch.index_select(table, 0, indices)
    lowered = rows.unsqueeze(0) + (weights - 1).unsqueeze(2) * OUTSIDE
    filled = torch.clamp(weights.sum(1), max=1.0).reshape(-1, 1)
    places = torch.argmax(lowered, 1)
    largest = torch.index_select(indices, 0, places.reshape(-1)).reshape(places.shape)
    return torch.amax(lowered, 1) * filled, largest
