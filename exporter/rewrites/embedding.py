"""The backward of a table of embeddings.

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
