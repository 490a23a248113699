"""Activations and products of several tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def shrink_backward(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    """The gradient of hard and of soft shrinking, which both let pass what is larger than a threshold."""
    return grad * (torch.abs(x) > threshold).to(grad.dtype)


def prelu_backward(grad: Tensor, x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a leaky ReLU and of its slopes."""
    negative = (x < 0).to(grad.dtype)
    below = grad * negative
    return grad + below * (slope - 1), below * x


def rrelu(
    x: Tensor,
    noise: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A leaky ReLU of the mean slope, and the noise: what is random while training is drawn before."""
    if training:
        return NotImplemented
    return aten.leaky_relu(x, (lower + upper) / 2), noise


def trilinear(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    absent_a: Sequence[int],
    absent_b: Sequence[int],
    absent_c: Sequence[int],
    summed: Sequence[int],
    unroll: int = 1,
) -> Tensor:
    """The product of three tensors, each without some of the axes, summed over some."""
    axes = range(a.dim() + len(absent_a))
    letters = [
        "".join(chr(ord("a") + axis) for axis in axes if axis not in without)
        for without in (absent_a, absent_b, absent_c, summed)
    ]
    return torch.einsum(f"{letters[0]},{letters[1]},{letters[2]}->{letters[3]}", a, b, c)


def ndtri(x: Tensor) -> Tensor:
    """The inverse of the normal distribution's cumulative function."""
    return torch.erfinv(2 * x - 1) * 2**0.5


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten._prelu_kernel_backward.default: prelu_backward,
    aten._trilinear.default: trilinear,
    aten.hardshrink_backward.default: shrink_backward,
    aten.rrelu_with_noise_functional.default: rrelu,
    aten.softshrink_backward.default: shrink_backward,
    aten.special_ndtri.default: ndtri,
}
