"""Attention by scaled dot products, and its backward, as batched matrix products.

The portable `bmm` is as fast as `mm`, but needs its factors as they lie in memory: transposes are made of the narrow
operands, (T, d), never of the (T, T) weights. Those are not kept for the backward pass but computed anew from the logarithm
of their sums, as flash attention does: they would take more memory than all else a layer keeps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from frostline.exporter.rewrites.reduction import broadcast, sum_rows
from frostline.exporter.rewrites.turning import transposed

MASKED = -1e30
"""Added where a position may not look: its exponential is zero."""


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from `query` (N, H, T, d) to `key` (N, H, S, d): output (N, H, T, e), logarithm of the sums (N, H, T).

    `value` is (N, H, S, e); `mask` is added to the products and broadcasts to (N, H, T, S).
    """
    products = _products(query, key, mask, causal, scale)
    largest = torch.amax(products, 2, keepdim=True)
    if mask is not None:
        # A position that may look nowhere, as one of padding, gets zeros: minus infinity less itself is no number.
        largest = torch.clamp(largest, min=torch.finfo(products.dtype).min)
    powers = torch.exp(products - largest)
    sums = _row_sums(powers)
    if mask is not None:
        # The largest power is 1 otherwise.
        sums = torch.clamp(sums, min=1.0)
    output = torch.bmm(powers, _matrices(value)) / sums
    logarithms = largest + torch.log(sums)
    return output.reshape(*query.shape[:3], -1), logarithms.reshape(query.shape[:3])


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logarithms: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from the output and the logarithms of the forward pass."""
    products = _products(query, key, mask, causal, scale)
    weights = torch.exp(products - logarithms.reshape(*products.shape[:2], 1))
    grads, keys, queries = _matrices(grad), _matrices(key), _matrices(query)
    turned_grads = transposed(grads)
    grad_value = transposed(torch.bmm(turned_grads, weights))
    slope = torch.bmm(grads, transposed(_matrices(value))) - _row_sums(grads * _matrices(output))
    grad_products = weights * slope
    grad_query = torch.bmm(grad_products, keys) * scale
    grad_key = transposed(torch.bmm(transposed(queries), grad_products)) * scale
    return grad_query.reshape(query.shape), grad_key.reshape(key.shape), grad_value.reshape(value.shape)


def _products(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """What the weights are the softmax of, (N * H, T, S)."""
    n, heads, t, _ = query.shape
    products = torch.bmm(_matrices(query) * scale, transposed(_matrices(key)))
    if causal:
        ahead = 1 - torch.tril(torch.ones(t, key.shape[2], dtype=query.dtype, device=query.device))
        products = broadcast(torch.add, products, ahead * MASKED)
    if mask is not None:
        split = products.reshape(n, heads, t, -1)
        products = broadcast(torch.add, split, mask).reshape(products.shape)
    return products


def _row_sums(x: Tensor) -> Tensor:
    """(B, T, S) to (B, T, 1)."""
    return sum_rows(x.reshape(-1, x.shape[2])).reshape(*x.shape[:2], 1)


def _matrices(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[2:])
