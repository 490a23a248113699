"""Gates without comparisons: in the portable runtime `where` and `gt` cost 20 to 50 times a multiplication."""

from __future__ import annotations

import torch
from torch import Tensor

STEEP = 1e38
"""Maps every normal positive float32 above 1."""


def is_positive(x: Tensor) -> Tensor:
    """1.0 where non-negative `x` is positive, 0.0 where it is zero."""
    return 1 - torch.relu(1 - x * STEEP)


def relu_backward(grad: Tensor, output: Tensor) -> Tensor:
    """`grad` where ReLU's `output` is positive, else 0."""
    return grad * is_positive(output)
