"""Rewrites of operators on tokens and tables: matrix products, attention, layer norm, embeddings, softmax, losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from frostline.exporter.rewrites import attention, embedding, loss, normalization, softmax, turning
from frostline.exporter.rewrites.arrangement import Arranger, Permuted, Value, inverse, permuted

aten = torch.ops.aten


def _matrix_product(arrange: Arranger, a: Value, b: Value) -> Value:
    # A second factor that is held transposed may stay so.
    if isinstance(b, Permuted) and b.axes == (1, 0):
        return torch.mm(arrange.plain(a), b.tensor.t())
    if isinstance(a, Permuted) and a.axes == (1, 0):
        # The gradient of a weight: of the two factors and the product, the smaller ones are turned.
        plain = arrange.plain(b)
        if a.tensor.numel() > plain.numel() + a.shape[0] * b.shape[1]:
            return Permuted(torch.mm(turning.transposed(plain), a.tensor), (1, 0))
    return torch.mm(arrange.plain(a), arrange.plain(b))


def _matrix_product_with_bias(
    arrange: Arranger, bias: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """The portable `addmm` is ten times slower than its `mm`."""
    product = arrange.plain(_matrix_product(arrange, a, b))
    product = product if alpha == 1 else product * alpha
    return product + (arrange.plain(bias) if beta == 1 else arrange.plain(bias) * beta)


def _batched_product_with_bias(
    arrange: Arranger, bias: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    product = torch.bmm(arrange.plain(a), arrange.plain(b))
    product = product if alpha == 1 else product * alpha
    return product + (arrange.plain(bias) if beta == 1 else arrange.plain(bias) * beta)


def _layer_norm(
    arrange: Arranger,
    x: Value,
    normalized: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Any:
    return normalization.layer_norm(arrange.plain(x), len(normalized), weight, bias, eps)


def _layer_norm_backward(
    arrange: Arranger,
    grad: Value,
    x: Value,
    normalized: Sequence[int],
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: Sequence[bool],
) -> Any:
    return normalization.layer_norm_backward(
        arrange.plain(grad), arrange.plain(x), len(normalized), mean, scale, weight, output_mask
    )


def _attention(
    arrange: Arranger,
    query: Value,
    key: Value,
    value: Value,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    attn_mask: Value | None = None,
    scale: float | None = None,
) -> Any:
    if dropout:
        return NotImplemented
    return attention.attention(
        arrange.plain(query),
        arrange.plain(key),
        arrange.plain(value),
        arrange.plain(attn_mask),
        causal,
        _scale(query, scale),
    )


def _attention_backward(
    arrange: Arranger,
    grad: Value,
    query: Value,
    key: Value,
    value: Value,
    output: Value,
    logarithms: Tensor,
    dropout: float,
    causal: bool,
    *,
    attn_mask: Value | None = None,
    scale: float | None = None,
) -> Any:
    if dropout:
        return NotImplemented
    return attention.attention_backward(
        arrange.plain(grad),
        arrange.plain(query),
        arrange.plain(key),
        arrange.plain(value),
        arrange.plain(output),
        arrange.plain(logarithms),
        arrange.plain(attn_mask),
        causal,
        _scale(query, scale),
    )


def _scale(query: Value, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def _embedding_backward(
    arrange: Arranger, grad: Value, indices: Tensor, count: int, padding: int, scale_by_frequency: bool
) -> Any:
    if scale_by_frequency:
        return NotImplemented
    return embedding.embedding_backward(arrange.plain(grad), indices, count, padding)


def _embedding_bag(
    arrange: Arranger,
    table: Value,
    indices: Tensor,
    offsets: Tensor,
    scale_by_frequency: bool = False,
    mode: int = embedding.SUM,
    sparse: bool = False,
    per_sample: Tensor | None = None,
    whole: bool = False,
    padding: int = -1,
) -> Any:
    rows = arrange.plain(table)
    weights = _in_bags(indices, offsets, whole, per_sample, padding, rows.dtype)
    # For the backward pass: what is in which bag, in place of each index's bag.
    if mode == embedding.MAX:
        found, largest = embedding.largest_of_bags(rows, indices, weights)
        return found, weights, weights.sum(1), largest
    found, sizes = embedding.embedding_bag(rows, indices, weights, mode)
    return found, weights, sizes, indices


def _in_bags(
    indices: Tensor,
    offsets: Tensor,
    whole: bool,
    per_sample: Tensor | None,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    weights = embedding.bags(offsets, indices.shape[0], whole, dtype)
    if padding >= 0:
        weights = weights * (indices != padding).to(dtype)
    return weights if per_sample is None else weights * per_sample


def _embedding_bag_backward(
    arrange: Arranger,
    grad: Value,
    indices: Tensor,
    offsets: Tensor,
    weights: Tensor,
    sizes: Tensor,
    maxima: Tensor,
    count: int,
    scale_by_frequency: bool,
    mode: int,
    sparse: bool,
    per_sample: Tensor | None,
    padding: int = -1,
) -> Any:
    if scale_by_frequency:
        return NotImplemented
    bags = arrange.plain(grad)
    if mode == embedding.MAX:
        filled = bags * torch.clamp(sizes, max=1.0).reshape(-1, 1)
        return torch.zeros(count, bags.shape[1], dtype=bags.dtype).scatter_add(0, maxima, filled)
    if mode == embedding.MEAN:
        bags = bags / torch.clamp(sizes, min=1.0).reshape(-1, 1)
    return embedding.embedding_backward(torch.mm(weights.t(), bags), indices, count, -1)


def _per_sample_weights_backward(
    arrange: Arranger,
    grad: Value,
    table: Value,
    indices: Tensor,
    offsets: Tensor,
    weights: Tensor,
    mode: int,
    padding: int = -1,
) -> Tensor:
    rows = torch.index_select(arrange.plain(table), 0, indices)
    within = embedding.bags(offsets, indices.shape[0], False, rows.dtype)
    products = (rows * torch.mm(within.t(), arrange.plain(grad))).sum(1)
    return products if padding < 0 else products * (indices != padding).to(rows.dtype)


def _weight_norm_backward(
    arrange: Arranger, grad: Value, direction: Value, size: Value, norms: Value, axis: int
) -> Any:
    held = arrange.plain(grad), arrange.plain(direction), arrange.plain(size), arrange.plain(norms)
    return normalization.weight_norm_backward(*held, axis % direction.dim())


def _trilinear(
    arrange: Arranger,
    a: Value,
    b: Value,
    c: Value,
    expand_a: Sequence[int],
    expand_b: Sequence[int],
    expand_c: Sequence[int],
    summed: Sequence[int],
    unroll: int = 1,
) -> Tensor:
    """The product of three tensors, axes added to each, summed over some."""
    factors = []
    for value, added in ((a, expand_a), (b, expand_b), (c, expand_c)):
        factor = arrange.plain(value)
        for axis in sorted(added):
            factor = factor.unsqueeze(axis)
        factors.append(factor)
    product = factors[0] * factors[1] * factors[2]
    return product.sum(list(summed)) if summed else product


def _distances_backward(
    arrange: Arranger, grad: Value, a: Value, b: Value, p: float, distances: Value
) -> Any:
    """From `grad` (..., M, N) of the distances between points `a` (..., M, D) and `b` (..., N, D): that of `a`."""
    if p not in (1.0, 2.0):
        return NotImplemented
    difference = arrange.plain(a).unsqueeze(-2) - arrange.plain(b).unsqueeze(-3)
    if p == 1.0:
        return (arrange.plain(grad).unsqueeze(-1) * torch.sign(difference)).sum(-2)
    between = arrange.plain(distances)
    # Where two points are one, PyTorch takes 0.
    share = arrange.plain(grad) / torch.where(between == 0, torch.ones_like(between), between)
    return (share.unsqueeze(-1) * difference).sum(-2)


def _along_last(function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Softmax with its axis turned to be the last, if it is not held so already."""

    def rewrite(arrange: Arranger, x: Value, axis: int, half_to_float: bool) -> Any:
        order = _with_last(x.dim(), axis)
        return permuted(function(arrange(x, order)), inverse(order))

    return rewrite


def _along_last_backward(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def rewrite(arrange: Arranger, grad: Value, output: Value, axis: int, dtype: torch.dtype) -> Any:
        order = _with_last(output.dim(), axis)
        return permuted(function(arrange(grad, order), arrange(output, order)), inverse(order))

    return rewrite


def _with_last(axes: int, last: int) -> list[int]:
    return [*(axis for axis in range(axes) if axis != last % axes), last % axes]


def _nll_loss(
    arrange: Arranger, scores: Value, target: Tensor, weight: Tensor | None, reduction: int, ignored: int
) -> Any:
    if scores.dim() == 1:
        return NotImplemented
    losses, total = loss.nll_loss(_by_class(arrange, scores), target.reshape(-1), weight, reduction, ignored)
    return losses.reshape(target.shape if losses.dim() else ()), total


def _nll_loss_backward(
    arrange: Arranger,
    grad: Tensor,
    scores: Value,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignored: int,
    total: Tensor,
) -> Any:
    if scores.dim() == 1:
        return NotImplemented
    grads = grad.reshape(-1) if grad.dim() else grad
    rows = _by_class(arrange, scores)
    grad_rows = loss.nll_loss_backward(grads, rows, target.reshape(-1), weight, reduction, ignored, total)
    order = _with_last(scores.dim(), 1)
    return permuted(grad_rows.reshape([scores.shape[axis] for axis in order]), inverse(order))


def _by_class(arrange: Arranger, scores: Value) -> Tensor:
    return arrange(scores, _with_last(scores.dim(), 1)).reshape(-1, scores.shape[1])


def _mse_loss(arrange: Arranger, x: Value, target: Value, reduction: int = loss.MEAN) -> Any:
    if x.shape != target.shape:
        return NotImplemented
    return loss.mse_loss(arrange.plain(x), arrange.plain(target), reduction)


def _mse_loss_backward(arrange: Arranger, grad: Value, x: Value, target: Value, reduction: int) -> Any:
    if x.shape != target.shape:
        return NotImplemented
    return loss.mse_loss_backward(arrange.plain(grad), arrange.plain(x), arrange.plain(target), reduction)


REWRITES: dict[Any, Callable[..., Any]] = {
    aten._log_softmax.default: _along_last(softmax.log_softmax),
    aten._log_softmax_backward_data.default: _along_last_backward(softmax.log_softmax_backward),
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
    aten._softmax.default: _along_last(softmax.softmax),
    aten._softmax_backward_data.default: _along_last_backward(softmax.softmax_backward),
    aten._cdist_backward.default: _distances_backward,
    aten._embedding_bag.default: _embedding_bag,
    aten._embedding_bag_forward_only.default: _embedding_bag,
    aten._embedding_bag_backward.default: _embedding_bag_backward,
    aten._embedding_bag_per_sample_weights_backward.default: _per_sample_weights_backward,
    aten._trilinear.default: _trilinear,
    aten._weight_norm_interface_backward.default: _weight_norm_backward,
    aten.addmm.default: _matrix_product_with_bias,
    aten.baddbmm.default: _batched_product_with_bias,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.mm.default: _matrix_product,
    aten.mse_loss.default: _mse_loss,
    aten.mse_loss_backward.default: _mse_loss_backward,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.nll_loss_backward.default: _nll_loss_backward,
    aten.nll_loss_forward.default: _nll_loss,
    aten.nll_loss2d_backward.default: _nll_loss_backward,
    aten.nll_loss2d_forward.default: _nll_loss,
}
