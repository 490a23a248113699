"""Group, batch and layer normalization, forward and backward, on channels-last tensors and tokens.

Written as sums over pixels, which give one value a channel, and per-channel factors: multiplying by a row, adding one
and summing over rows are among the fastest operators of the portable runtime.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from frostline.exporter.rewrites.reduction import sum_rows


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize `x` (N, *spatial, C): output, mean (N, groups), 1 / deviation (N, groups)."""
    rows = _pixels(x)
    mean = _group_mean(rows.sum(1), groups, rows.shape[1])
    centred = rows - _by_channel(mean, rows)
    scale = torch.rsqrt(_group_mean((centred * centred).sum(1), groups, rows.shape[1]) + eps)
    factor = _by_channel(scale, rows)
    y = centred * (factor if weight is None else factor * weight)
    return (y if bias is None else y + bias).reshape(x.shape), mean, scale


def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input (N, *spatial, C), weight (C,) and bias (C,), from the statistics of the forward pass."""
    rows, grads = _pixels(x), _pixels(grad)
    centred = rows - _by_channel(mean, rows)
    grad_sum = grads.sum(1)
    product_sum = (grads * centred).sum(1)
    spread_scale = _by_channel(scale, rows)
    grad_x = grad_weight = grad_bias = None
    if output_mask[0]:
        weighted = (grad_sum, product_sum) if weight is None else (grad_sum * weight, product_sum * weight)
        grad_mean = _by_channel(_group_mean(weighted[0], groups, rows.shape[1]) * scale, rows)
        slope = _by_channel(_group_mean(weighted[1], groups, rows.shape[1]) * scale * scale * scale, rows)
        factor = spread_scale if weight is None else spread_scale * weight
        grad_x = (grads * factor - centred * slope - grad_mean).reshape(x.shape)
    if output_mask[1]:
        grad_weight = (product_sum * spread_scale.reshape(product_sum.shape)).sum(0)
    if output_mask[2]:
        grad_bias = grad_sum.sum(0)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Normalize `x` (N, *spatial, C): output, mean (C,), 1 / deviation (C,), and the running statistics after it.

    In training these are moved towards the batch's, whose variance is taken unbiased, as PyTorch does.
    """
    rows = x.reshape(-1, x.shape[-1])
    if training:
        count = rows.shape[0]
        mean = rows.sum(0) / count
        centred = rows - mean
        variance = (centred * centred).sum(0) / count
        if running_mean is not None and running_var is not None:
            unbiased = momentum * count / max(count - 1, 1)
            running_mean = running_mean * (1 - momentum) + mean * momentum
            running_var = running_var * (1 - momentum) + variance * unbiased
    else:
        assert running_mean is not None and running_var is not None
        mean, variance = running_mean, running_var
        centred = rows - mean
    scale = torch.rsqrt(variance + eps)
    y = centred * (scale if weight is None else scale * weight)
    y = (y if bias is None else y + bias).reshape(x.shape)
    empty = x.new_empty((0,))
    return (y, *((mean, scale) if training else (empty, empty)), running_mean, running_var)


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
    """Gradients of input (N, *spatial, C), weight (C,) and bias (C,); outside training the statistics are constants."""
    if not training:
        assert running_mean is not None and running_var is not None
        mean, scale = running_mean, torch.rsqrt(running_var + eps)
    assert mean is not None and scale is not None
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
    centred = rows - mean
    grad_bias = grads.sum(0)
    grad_weight = (grads * centred).sum(0) * scale
    factor = scale if weight is None else scale * weight
    grad_x = grads * factor
    if training:
        count = rows.shape[0]
        grad_x = grad_x - centred * (grad_weight * scale * factor / count) - grad_bias * factor / count
    return (
        grad_x.reshape(x.shape) if output_mask[0] else None,
        grad_weight if output_mask[1] else None,
        grad_bias if output_mask[2] else None,
    )


def layer_norm(
    x: Tensor, axes: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize the last `axes` axes of `x`: output, mean and 1 / deviation, of the shape of `x` with those axes 1."""
    rows = _tokens(x, axes)
    mean = sum_rows(rows) / rows.shape[1]
    centred = rows - mean
    scale = torch.rsqrt(sum_rows(centred * centred) / rows.shape[1] + eps)
    y = centred * scale
    y = y if weight is None else y * weight.reshape(-1)
    y = y if bias is None else y + bias.reshape(-1)
    shape = [*x.shape[:-axes], *[1] * axes]
    return y.reshape(x.shape), mean.reshape(shape), scale.reshape(shape)


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    axes: int,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, from the statistics of the forward pass."""
    rows, grads, scale = _tokens(x, axes), _tokens(grad, axes), scale.reshape(-1, 1)
    normal = (rows - mean.reshape(-1, 1)) * scale
    product = grads * normal
    grad_x = grad_weight = grad_bias = None
    if output_mask[0]:
        # The weight is part of the sums' products.
        share = (torch.ones_like(rows[:1]) if weight is None else weight).reshape(-1, 1) / rows.shape[1]
        weighted = grads if weight is None else grads * weight.reshape(-1)
        slope = normal * torch.mm(product, share)
        grad_x = ((weighted - torch.mm(grads, share) - slope) * scale).reshape(x.shape)
    if output_mask[1]:
        grad_weight = product.sum(0).reshape(x.shape[-axes:])
    if output_mask[2]:
        grad_bias = grads.sum(0).reshape(x.shape[-axes:])
    return grad_x, grad_weight, grad_bias


def weight_norm_backward(
    grad: Tensor, direction: Tensor, size: Tensor, norms: Tensor, axis: int
) -> tuple[Tensor, Tensor]:
    """Gradients of a weight's direction and of its sizes along `axis`, from that of `size * direction / norms`."""
    others = [each for each in range(direction.dim()) if each != axis]
    product = (grad * direction).sum(others, keepdim=True)
    share = product / (norms * norms)
    return (size / norms) * (grad - direction * share), product / norms


def _tokens(x: Tensor, axes: int) -> Tensor:
    """`x` as (tokens, the product of its last `axes` axes)."""
    return x.reshape(-1, math.prod(x.shape[-axes:]))


def _pixels(x: Tensor) -> Tensor:
    """(N, *spatial, C) as (N, pixels, C)."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _group_mean(sums: Tensor, groups: int, pixels: int) -> Tensor:
    """Means over each group from the sums over pixels, (N, C) to (N, groups)."""
    width = sums.shape[1] // groups
    return sums.reshape(sums.shape[0], groups, width).sum(2) / (width * pixels)


def _by_channel(values: Tensor, rows: Tensor) -> Tensor:
    """(N, groups) repeated for the channels of each group of `rows` (N, pixels, C): (N, 1, C)."""
    n, groups = values.shape
    width = rows.shape[2] // groups
    return values.reshape(n, groups, 1).expand(n, groups, width).reshape(n, 1, rows.shape[2])
