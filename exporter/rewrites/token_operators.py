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
