"""Activations and their slopes, without comparisons.

In the portable runtime `where` and `gt` cost 20 to 50 times a multiplication, `tanh` and `erf` 50 times, an exponential
or a sigmoid ten times. Gates are found with ReLU, and where the slope needs what the activation has computed already, it
is computed with it and kept in place of the input: no more memory, and a backward pass of one multiplication.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

STEEP = 1e38
"""Maps every normal positive float32 above 1."""

# Mills' ratio of the normal distribution, (1 - cdf) / pdf, as a ratio of polynomials in x >= 0, lowest power first:
# within 1e-8 of the tail once multiplied by the pdf.
_MILLS_ABOVE = (1.253314161, 0.4623933282, 0.08706549141, -0.0003693829828)
_MILLS_BELOW = (1.0, 1.166822632, 0.5004372714, 0.0816492569)

_TANH_CUBE = 0.044715


def is_positive(x: Tensor) -> Tensor:
    """1.0 where non-negative `x` is positive, 0.0 where it is zero."""
    return 1 - torch.relu(1 - x * STEEP)


def relu_backward(grad: Tensor, output: Tensor) -> Tensor:
    """`grad` where ReLU's `output` is positive, else 0."""
    return grad * is_positive(output)


def leaky_relu_backward(grad: Tensor, x: Tensor, slope: float) -> Tensor:
    """`grad` where `x`, or the output, is positive, `slope` times it elsewhere."""
    return grad * (is_positive(torch.relu(x)) * (1 - slope) + slope)


def prelu(x: Tensor, weight: Tensor) -> Tensor:
    """`x` where it is positive, `weight` times it elsewhere."""
    above = torch.relu(x)
    return above + (x - above) * weight


def prelu_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and, before it is summed to its shape, of `weight`."""
    above = torch.relu(x)
    gate = is_positive(above)
    return grad * (gate + (1 - gate) * weight), grad * (x - above)


def clip_backward(grad: Tensor, output: Tensor, low: float, high: float) -> Tensor:
    """`grad` where the output of clipping lies strictly between the limits, else 0."""
    return grad * _is_between(output, low, high)


def elu_backward(
    grad: Tensor, alpha: float, scale: float, input_scale: float, of_output: bool, x: Tensor
) -> Tensor:
    """The gradient of `scale * (x if x > 0 else alpha * (exp(input_scale * x) - 1))`, `x` its input or its output."""
    gate = is_positive(torch.relu(x))
    below = x - torch.relu(x)
    if of_output:
        slope = (below + scale * alpha) * input_scale
    else:
        slope = torch.exp(below * input_scale) * (scale * alpha * input_scale)
    return grad * (gate * scale + (1 - gate) * slope)


def shrink_backward(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    """`grad` where `x` is further from zero than the threshold, else 0."""
    return grad * is_positive(torch.relu(torch.abs(x) - threshold))


def hard_sigmoid(x: Tensor) -> Tensor:
    """The ramp from 0 at -3 to 1 at 3."""
    return _ramp(x) * (1 / 6)


def hard_sigmoid_backward(grad: Tensor, x: Tensor) -> Tensor:
    """`grad` / 6 on the ramp, else 0."""
    return grad * _is_between(_ramp(x), 0, 6) * (1 / 6)


def hard_swish(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` times its hard sigmoid, and the slope."""
    ramp = _ramp(x)
    return x * ramp * (1 / 6), (ramp + x * _is_between(ramp, 0, 6)) * (1 / 6)


def sigmoid_backward(grad: Tensor, output: Tensor) -> Tensor:
    """From the output."""
    return grad * (output - output * output)


def tanh(x: Tensor) -> Tensor:
    """By the sigmoid, six times faster."""
    return torch.sigmoid(x * 2) * 2 - 1


def tanh_backward(grad: Tensor, output: Tensor) -> Tensor:
    """From the output."""
    return grad * (1 - output * output)


def silu(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` times its sigmoid, and the slope."""
    share = torch.sigmoid(x)
    y = x * share
    return y, share + y - y * share


def mish(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` times the tanh of its softplus, and the slope."""
    # From 20 on the tanh is 1, and the square stays finite.
    power = torch.exp(x - torch.relu(x - 20))
    square = power * (power + 2)
    share = square / (square + 2)
    return x * share, share + x * (1 - share * share) * (power / (power + 1))


def exp2(x: Tensor) -> Tensor:
    """2 to the power of `x`."""
    return torch.exp(x * math.log(2))


def hypot(a: Tensor, b: Tensor) -> Tensor:
    """The length of a hypotenuse."""
    return torch.sqrt(a * a + b * b)


WITHIN_ROUNDING = 16.0
"""Where softplus is the input itself in float32: exp(-16) is 1e-7."""


def softplus(x: Tensor, beta: float, threshold: float) -> Tensor:
    """log(1 + exp(beta * x)) / beta; the input itself where `beta * x` is beyond a threshold."""
    curve = torch.relu(x) + torch.log(torch.exp(torch.abs(x) * -beta) + 1) * (1 / beta)
    if threshold >= WITHIN_ROUNDING:
        return curve
    return curve + (x - curve) * is_positive(torch.relu(x * beta - threshold))


def softplus_backward(grad: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    """`grad` times a sigmoid, or 1 beyond the threshold."""
    slope = torch.sigmoid(x * beta)
    if threshold < WITHIN_ROUNDING:
        slope = slope + (1 - slope) * is_positive(torch.relu(x * beta - threshold))
    return grad * slope


def gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` times the normal distribution function of `x`, and the slope.

    With the tail beyond |x|, the function is relu(x) - |x| * tail, and no difference of near numbers is taken.
    """
    size = torch.abs(x)
    density = torch.exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))
    tail = density * (_polynomial(size, _MILLS_ABOVE) / _polynomial(size, _MILLS_BELOW))
    above = torch.relu(x)
    gate = is_positive(above)
    bend = tail - size * density
    return above - size * tail, gate + bend - gate * bend * 2


def gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU's approximation by a tanh, and its slope."""
    factor = 2 * math.sqrt(2 / math.pi)
    square = x * x
    share = torch.sigmoid(x * (square * (factor * _TANH_CUBE) + factor))
    y = x * share
    return y, share + (y - y * share) * (square * (3 * factor * _TANH_CUBE) + factor)


def _ramp(x: Tensor) -> Tensor:
    """0 up to -3, 6 from 3 on."""
    above = torch.relu(x + 3)
    return above - torch.relu(above - 6)


def _is_between(clipped: Tensor, low: float, high: float) -> Tensor:
    return is_positive((clipped - low) * (high - clipped))


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    *rest, leading = coefficients
    first = x * leading + rest.pop()
    return reduce(lambda value, coefficient: value * x + coefficient, reversed(rest), first)
