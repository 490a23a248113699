"""Group and batch normalization, forward and backward, in the operators the portable runtime executes fast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, size: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`aten.native_group_norm` of `x` (N, C, *spatial): output, mean (N, groups), 1 / deviation (N, groups)."""
    rows = x.reshape(n * groups, -1)
    mean = rows.mean(1, keepdim=True)
    centred = rows - mean
    scale = torch.rsqrt((centred * centred).mean(1, keepdim=True) + eps)
    y = (centred * scale).reshape(x.shape)
    channel = [1, c] + [1] * (x.dim() - 2)
    if weight is not None:
        y = y * weight.reshape(channel)
    if bias is not None:
        y = y + bias.reshape(channel)
    return y, mean.reshape(n, groups), scale.reshape(n, groups)


def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    n: int,
    c: int,
    size: int,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`aten.native_group_norm_backward`, from the statistics of the forward pass."""
    rows, row_scale = (n * groups, -1), scale.reshape(-1, 1)
    normalized = (x.reshape(rows) - mean.reshape(-1, 1)) * row_scale
    channel = (n, c, -1)
    grad_x = grad_weight = grad_bias = None
    if output_mask[0]:
        scaled = grad if weight is None else grad * weight.reshape(1, c, *[1] * (x.dim() - 2))
        grad_x = _standardized_backward(scaled.reshape(rows), normalized, row_scale, 1).reshape(x.shape)
    if output_mask[1]:
        grad_weight = (grad.reshape(channel) * normalized.reshape(channel)).sum(2).sum(0)
    if output_mask[2]:
        grad_bias = grad.reshape(channel).sum(2).sum(0)
    return grad_x, grad_weight, grad_bias


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`aten._native_batch_norm_legit` of `x` (N, C, *spatial): output, mean (C,), 1 / deviation (C,).

    In training the running statistics are updated in place, the variance unbiased, as PyTorch does.
    """
    axes = [0, *range(2, x.dim())]
    channel = [1, -1] + [1] * (x.dim() - 2)
    if training:
        mean = x.mean(axes)
        centred = x - mean.reshape(channel)
        variance = (centred * centred).mean(axes)
        count = x.numel() // x.shape[1]
        if running_mean is not None and running_var is not None:
            unbiased = momentum * count / max(count - 1, 1)
            running_mean.copy_(running_mean * (1 - momentum) + mean * momentum)
            running_var.copy_(running_var * (1 - momentum) + variance * unbiased)
    else:
        assert running_mean is not None and running_var is not None
        mean, variance = running_mean, running_var
        centred = x - mean.reshape(channel)
    scale = torch.rsqrt(variance + eps)
    y = centred * (scale if weight is None else scale * weight).reshape(channel)
    if bias is not None:
        y = y + bias.reshape(channel)
    empty = x.new_empty((0,))
    return (y, mean, scale) if training else (y, empty, empty)


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    training: bool,
    eps: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`aten.native_batch_norm_backward`; outside training the statistics are constants."""
    axes = [0, *range(2, x.dim())]
    channel = [1, -1] + [1] * (x.dim() - 2)
    if not training:
        assert running_mean is not None and running_var is not None
        mean, scale = running_mean, torch.rsqrt(running_var + eps)
    assert mean is not None and scale is not None
    normalized = (x - mean.reshape(channel)) * scale.reshape(channel)
    grad_bias, grad_weight = grad.sum(axes), (grad * normalized).sum(axes)
    slope = (scale if weight is None else scale * weight).reshape(channel)
    grad_x = grad
    if training:
        count = x.numel() // x.shape[1]
        grad_x = grad - (grad_bias / count).reshape(channel)
        grad_x = grad_x - normalized * (grad_weight / count).reshape(channel)
    return (
        grad_x * slope if output_mask[0] else None,
        grad_weight if output_mask[1] else None,
        grad_bias if output_mask[2] else None,
    )


def _standardized_backward(grad: Tensor, normalized: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Gradient through `(x - mean) * scale` taken over `axis`, where mean and scale depend on `x`."""
    mean_grad = grad.mean(axis, keepdim=True)
    mean_product = (grad * normalized).mean(axis, keepdim=True)
    return (grad - mean_grad - normalized * mean_product) * scale
