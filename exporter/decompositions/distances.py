"""Norms, distances, and weights that are held as length and direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def vector_norm(
    x: Tensor,
    order: float = 2,
    axes: Sequence[int] | int | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The norm of `x` along axes, of all of it without."""
    x = x if dtype is None else x.to(dtype)
    over = list(range(x.dim())) if axes is None or axes == [] else axes
    over = [over] if isinstance(over, int) else list(over)
    sizes = torch.abs(x)
    if order == math.inf:
        return torch.amax(sizes, over, keepdim)
    if order == -math.inf:
        return torch.amin(sizes, over, keepdim)
    if order == 0:
        return (x != 0).to(x.dtype).sum(over, keepdim)
    if order == 1:
        return sizes.sum(over, keepdim)
    if order == 2:
        return torch.sqrt((x * x).sum(over, keepdim))
    return torch.pow(torch.pow(sizes, order).sum(over, keepdim), 1 / order)


def cdist(a: Tensor, b: Tensor, order: float, mode: int | None = None) -> Tensor:
    """Distances (..., P, R) between rows of `a` (..., P, d) and of `b` (..., R, d)."""
    return vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), order, -1)


def cdist_backward(grad: Tensor, a: Tensor, b: Tensor, order: float, distances: Tensor) -> Tensor:
    """The gradient of `a`."""
    difference = a.unsqueeze(-2) - b.unsqueeze(-3)
    return (grad.unsqueeze(-1) * _slope(difference, distances.unsqueeze(-1), order)).sum(-2)


def euclidean_distances(a: Tensor, b: Tensor) -> Tensor:
    """`cdist` of order 2."""
    return cdist(a, b, 2.0)


def pdist(x: Tensor, order: float = 2) -> Tensor:
    """Distances between any two rows of `x` (n, d)."""
    first, second = _pairs(x)
    return vector_norm(x.index_select(0, first) - x.index_select(0, second), order, -1)


def pdist_backward(grad: Tensor, x: Tensor, order: float, distances: Tensor) -> Tensor:
    """The gradient of `x`."""
    first, second = _pairs(x)
    difference = x.index_select(0, first) - x.index_select(0, second)
    given = grad[:, None] * _slope(difference, distances[:, None], order)
    return aten.index_add(aten.index_add(torch.zeros_like(x), 0, first, given), 0, second, -given)


def _pairs(x: Tensor) -> list[Tensor]:
    return list(torch.triu_indices(len(x), len(x), 1))


def _slope(difference: Tensor, distance: Tensor, order: float) -> Tensor:
    """How a distance changes with the difference that it is of, zero where it is zero."""
    if order == 0:
        return torch.zeros_like(difference)
    if order == 1:
        return torch.sign(difference)
    if order == math.inf:
        return torch.sign(difference) * (torch.abs(difference) == distance).to(difference.dtype)
    far = distance != 0
    divisor = torch.where(far, distance, 1.0)
    if order == 2:
        return difference / divisor
    shares = torch.pow(torch.abs(difference) / divisor, order - 1)
    return torch.where(far & (difference != 0), torch.sign(difference) * shares, 0.0)


def weight_norm(direction: Tensor, length: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """A weight of given length along all axes but one, and the norms of its direction."""
    norms = torch.sqrt((direction * direction).sum(_others(direction, axis), keepdim=True))
    return direction * (length / norms), norms


def weight_norm_backward(
    grad: Tensor, direction: Tensor, length: Tensor, norms: Tensor, axis: int
) -> tuple[Tensor, Tensor]:
    """The gradients of direction and length."""
    along = (grad * direction).sum(_others(direction, axis), keepdim=True) / norms
    return (length / norms) * (grad - direction * (along / norms)), along


def _others(x: Tensor, axis: int) -> list[int]:
    return [each for each in range(x.dim()) if each != axis % x.dim()]


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten._cdist_backward.default: cdist_backward,
    aten._cdist_forward.default: cdist,
    aten._euclidean_dist.default: euclidean_distances,
    aten._pdist_backward.default: pdist_backward,
    aten._pdist_forward.default: pdist,
    aten._weight_norm_interface.default: weight_norm,
    aten._weight_norm_interface_backward.default: weight_norm_backward,
    aten.linalg_vector_norm.default: vector_norm,
}
