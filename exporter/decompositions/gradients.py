"""Gradients of operators that have a decomposition forward only: by autograd, through that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions

aten = torch.ops.aten


def grid_sampler_backward(
    grad: Tensor,
    x: Tensor,
    grid: Tensor,
    interpolation: int,
    padding: int,
    align_corners: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of images and of the places that are read from them."""
    sample = get_decompositions([aten.grid_sampler_2d])[aten.grid_sampler_2d.default]
    with torch.enable_grad():
        leaves = x.detach().requires_grad_(), grid.detach().requires_grad_()
        y = sample(*leaves, interpolation, padding, align_corners)
    found = torch.autograd.grad(y, leaves, grad, allow_unused=True)
    # The nearest pixel does not change with the place.
    gradients = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
    return gradients[0], gradients[1]


GRADIENTS: dict[Any, Callable[..., Any]] = {aten.grid_sampler_2d_backward.default: grid_sampler_backward}
"""To be called where autograd is on: not from a table of decompositions, which is used below it."""
