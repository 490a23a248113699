"""Losses: negative log-likelihood and squared error, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

MEAN, SUM = 1, 2
"""ATen's numbers of the reductions; 0 is none."""


def nll_loss(
    scores: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignored: int
) -> tuple[Tensor, Tensor]:
    """The negative of each row's score of its class, and the classes' total weight.

    `scores` is (M, classes), `target` (M,) int64, `weight` (classes,).
    """
    classes, weights = _weighted(scores, target, weight, ignored)
    losses = -torch.gather(scores, 1, classes.unsqueeze(1)).reshape(-1) * weights
    total = weights.sum()
    if reduction == MEAN:
        return losses.sum() / total, total
    return (losses.sum(), total) if reduction == SUM else (losses, scores.new_zeros(()))


def nll_loss_backward(
    grad: Tensor,
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignored: int,
    total: Tensor,
) -> Tensor:
    """The gradient (M, classes) of the scores."""
    classes, weights = _weighted(scores, target, weight, ignored)
    shares = weights * grad / total if reduction == MEAN else weights * grad
    return torch.zeros_like(scores).scatter(1, classes.unsqueeze(1), -shares.unsqueeze(1))


def mse_loss(x: Tensor, target: Tensor, reduction: int) -> Tensor:
    """The squared error of two tensors of one shape."""
    difference = x - target
    squares = difference * difference
    if reduction == MEAN:
        return squares.sum() / x.numel()
    return squares.sum() if reduction == SUM else squares


def mse_loss_backward(grad: Tensor, x: Tensor, target: Tensor, reduction: int) -> Tensor:
    """The gradient of `x`."""
    return (x - target) * (grad * (2 / x.numel() if reduction == MEAN else 2))


def _weighted(scores: Tensor, target: Tensor, weight: Tensor | None, ignored: int) -> tuple[Tensor, Tensor]:
    """A class that exists for each row, and the row's weight, 0 where the target is `ignored`."""
    counted = target != ignored
    classes = target * counted
    weights = counted.to(scores.dtype)
    return classes, weights if weight is None else weights * torch.index_select(weight, 0, classes)
