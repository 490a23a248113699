"""Softmax and its logarithm along the last axis.

The portable kernels take an exponential twice and walk the axis one value at a time. The sums are products with ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from frostline.exporter.rewrites.reduction import sum_rows


def softmax(x: Tensor) -> Tensor:
    """Softmax of `x` (..., D) along its last axis."""
    rows = _rows(x)
    powers = torch.exp(rows - torch.amax(rows, 1, keepdim=True))
    return (powers / sum_rows(powers)).reshape(x.shape)


def softmax_backward(grad: Tensor, output: Tensor) -> Tensor:
    """The gradient of the input from that of the output."""
    product = _rows(grad) * _rows(output)
    return (product - _rows(output) * sum_rows(product)).reshape(grad.shape)


def log_softmax(x: Tensor) -> Tensor:
    """The logarithm of softmax of `x` (..., D) along its last axis."""
    rows = _rows(x)
    lowered = rows - torch.amax(rows, 1, keepdim=True)
    return (lowered - torch.log(sum_rows(torch.exp(lowered)))).reshape(x.shape)


def log_softmax_backward(grad: Tensor, output: Tensor) -> Tensor:
    """The gradient of the input from that of the output."""
    rows = _rows(grad)
    return (rows - torch.exp(_rows(output)) * sum_rows(rows)).reshape(grad.shape)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
