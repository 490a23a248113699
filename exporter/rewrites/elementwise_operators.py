"""Rewrites of elementwise operators and of reductions, in whatever order their arguments are held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from frostline.exporter.rewrites import activation, reduction
from frostline.exporter.rewrites.arrangement import Arranger, Permuted, Value, held, image, inverse, permuted

aten = torch.ops.aten


def _elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """The operator in the order its arguments are held."""

    def rewrite(arrange: Arranger, *args: Any, **kwargs: Any) -> Any:
        axes = _common_order(args)
        if axes is None:
            result = function(*(arrange.plain(arg) for arg in args), **kwargs)
        else:
            # Where each axis of the tensor held comes from.
            sources = inverse(axes)
            tensors = [
                arrange(_with_axes(arg, len(axes)), sources) if _is_spread(arg) else arg for arg in args
            ]
            result = function(*tensors, **kwargs)
        if isinstance(result, tuple):
            return tuple(_standing(tensor, axes) for tensor in result)
        return _standing(result, axes)

    return rewrite


def _standing(tensor: Tensor, axes: Sequence[int] | None) -> Value:
    return tensor if axes is None else Permuted(tensor, axes)


def _common_order(args: Sequence[Any]) -> tuple[int, ...] | None:
    """The order of the largest permuted argument, or None for that of the graph.

    Tokens, whose last axis stays last, are turned cheaply: a plain argument decides there. An image is not.
    """
    values = [arg for arg in args if _is_spread(arg)]
    most = max((value.dim() for value in values), default=0)
    candidates = [value for value in values if isinstance(value, Permuted) and value.dim() == most]
    if not candidates:
        return None
    largest = max(candidates, key=lambda value: value.tensor.numel())
    plain = [value for value in values if isinstance(value, Tensor)]
    beside = any(value.numel() >= largest.tensor.numel() for value in plain)
    return None if beside and largest.axes[-1] == most - 1 else largest.axes


def _is_spread(arg: Any) -> bool:
    return isinstance(arg, Tensor | Permuted) and arg.dim() > 0


def _with_axes(value: Value, count: int) -> Value:
    """The value with leading axes of length 1, so that it has `count`."""
    missing = count - value.dim()
    if not missing:
        return value
    tensor, places = held(value)
    tensor = tensor.reshape(*[1] * missing, *tensor.shape)
    return permuted(tensor, [*range(missing), *(place + missing for place in places)])


def _binary(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Broadcast in a form the runtime is fast at."""

    def apply(a: Any, b: Any, **kwargs: Any) -> Tensor:
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return function(a, b, **kwargs)
        return reduction.broadcast(lambda left, right: function(left, right, **kwargs), a, b)

    return _elementwise(apply)


def _power(x: Tensor, exponent: float) -> Tensor:
    """Small whole powers are products; `pow` takes ten times as long."""
    if exponent == 1:
        return x
    if exponent == 2:
        return x * x
    return x * x * x if exponent == 3 else torch.pow(x, exponent)


def _with_slope(name: str, function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """An activation whose slope is kept for its backward operator."""
    rewritten = _elementwise(function)

    def rewrite(arrange: Arranger, x: Value) -> Any:
        y, slope = rewritten(arrange, x)
        arrange.note(name, x, slope)
        return y

    return rewrite


def _by_slope(name: str, function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """The backward of such an activation."""
    rewritten = _elementwise(function)

    def rewrite(arrange: Arranger, grad: Value, x: Value) -> Any:
        slope = arrange.noted(name, x)
        if slope is None:
            _, slope = rewritten(arrange, x)
        return _multiply(arrange, grad, slope)

    return rewrite


def _gelu_kind(approximate: str) -> tuple[str, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    return ("gelu tanh", activation.gelu_tanh) if approximate == "tanh" else ("gelu", activation.gelu)


def _gelu(arrange: Arranger, x: Value, *, approximate: str = "none") -> Any:
    return _with_slope(*_gelu_kind(approximate))(arrange, x)


def _gelu_backward(arrange: Arranger, grad: Value, x: Value, *, approximate: str = "none") -> Any:
    return _by_slope(*_gelu_kind(approximate))(arrange, grad, x)


def _clip(arrange: Arranger, x: Value, low: float = -1.0, high: float = 1.0) -> Any:
    y = _hardtanh(arrange, x, low, high)
    # What follows keeps the output anyway; the gate can be found from it, and the input let go.
    arrange.note(("clip", low, high), x, y)
    return y


def _clip_backward(arrange: Arranger, grad: Value, x: Value, low: float, high: float) -> Any:
    y = arrange.noted(("clip", low, high), x)
    y = _hardtanh(arrange, x, low, high) if y is None else y
    return _clipped_backward(arrange, grad, y, low, high)


def _threshold_backward(arrange: Arranger, grad: Value, output: Value, threshold: float) -> Any:
    return NotImplemented if threshold else _relu_backward(arrange, grad, output)


def _leaky_relu_backward(arrange: Arranger, grad: Value, x: Value, slope: float, of_output: bool) -> Any:
    # A negative slope loses the sign of what it was; PyTorch refuses it in place.
    return _leaky_backward(arrange, grad, x, slope)


def _softplus(arrange: Arranger, x: Value, beta: float = 1, threshold: float = 20) -> Any:
    return _smooth_relu(arrange, x, beta, threshold)


def _softplus_backward(arrange: Arranger, grad: Value, x: Value, beta: float, threshold: float) -> Any:
    return _smooth_relu_backward(arrange, grad, x, beta, threshold)


def _sum(
    arrange: Arranger, x: Value, axes: Sequence[int] | None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    tensor, places = held(x)
    if dtype is not None or not tensor.is_floating_point() or not x.dim():
        return NotImplemented
    summed = {axis % x.dim() for axis in (axes or range(x.dim()))}
    total = reduction.sum_over(tensor, [places[axis] for axis in summed])
    if keepdim:
        return permuted(total, places)
    kept = [places[axis] for axis in range(x.dim()) if axis not in summed]
    in_order = sorted(kept)
    total = total.reshape([tensor.shape[place] for place in in_order])
    return permuted(total, [in_order.index(place) for place in kept])


def _total(arrange: Arranger, x: Value, *, dtype: Any = None) -> Tensor:
    return torch.sum(held(x)[0], dtype=dtype)


def _mean(
    arrange: Arranger, x: Value, axes: Sequence[int] | None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    total = _sum(arrange, x, axes, keepdim, dtype=dtype)
    if total is NotImplemented:
        return NotImplemented
    tensor, places = held(total)
    count = held(x)[0].numel() / tensor.numel()
    return permuted(tensor / count, places)


def _expand(arrange: Arranger, x: Value, size: Sequence[int], implicit: bool = False) -> Any:
    x = _with_axes(x, len(size))
    tensor, _ = held(x)
    if not tensor.is_floating_point():
        return NotImplemented
    shape = [length if full == -1 else full for length, full in zip(x.shape, size, strict=True)]
    if list(x.shape) == shape:
        return x
    if len(shape) > 2 and shape[:2] == list(x.shape[:2]) and max(x.shape[2:]) == 1:
        # One value for all pixels of a channel, as in the backward of a global mean: held like other images.
        return image(reduction.expanded(arrange.image(x), [shape[0], *shape[2:], shape[1]]))
    return reduction.expanded(arrange.plain(x), shape)


_multiply = _binary(torch.mul)
_hardtanh = _elementwise(aten.hardtanh.default)
_relu_backward = _elementwise(activation.relu_backward)
_leaky_backward = _elementwise(activation.leaky_relu_backward)
_clipped_backward = _elementwise(activation.clip_backward)
_smooth_relu = _elementwise(activation.softplus)
_smooth_relu_backward = _elementwise(activation.softplus_backward)

_BINARY = (aten.add.Tensor, aten.div.Tensor, aten.mul.Tensor, aten.sub.Tensor)

_UNARY = (
    aten.abs.default,
    aten.div.Scalar,
    aten.elu.default,
    aten.exp.default,
    aten.leaky_relu.default,
    aten.mul.Scalar,
    aten.neg.default,
    aten.relu.default,
    aten.rsqrt.default,
    aten.sigmoid.default,
    aten.sqrt.default,
)

_WITH_SLOPE = {
    "hardswish": activation.hard_swish,
    "mish": activation.mish,
    "silu": activation.silu,
}

REWRITES: dict[Any, Callable[..., Any]] = {
    **{function: _binary(function) for function in _BINARY},
    **{function: _elementwise(function) for function in _UNARY},
    **{getattr(aten, name).default: _with_slope(name, f) for name, f in _WITH_SLOPE.items()},
    **{getattr(aten, f"{name}_backward").default: _by_slope(name, f) for name, f in _WITH_SLOPE.items()},
    aten._prelu_kernel.default: _elementwise(activation.prelu),
    aten._prelu_kernel_backward.default: _elementwise(activation.prelu_backward),
    aten.elu_backward.default: _elementwise(activation.elu_backward),
    aten.exp2.default: _elementwise(activation.exp2),
    aten.expand.default: _expand,
    aten.gelu.default: _gelu,
    aten.gelu_backward.default: _gelu_backward,
    aten.hardshrink_backward.default: _elementwise(activation.shrink_backward),
    aten.hardsigmoid.default: _elementwise(activation.hard_sigmoid),
    aten.hardsigmoid_backward.default: _elementwise(activation.hard_sigmoid_backward),
    aten.hardtanh.default: _clip,
    aten.hardtanh_backward.default: _clip_backward,
    aten.hypot.default: _binary(activation.hypot),
    aten.leaky_relu_backward.default: _leaky_relu_backward,
    aten.mean.dim: _mean,
    aten.pow.Tensor_Scalar: _elementwise(_power),
    aten.sigmoid_backward.default: _elementwise(activation.sigmoid_backward),
    aten.softshrink_backward.default: _elementwise(activation.shrink_backward),
    aten.softplus.default: _softplus,
    aten.softplus_backward.default: _softplus_backward,
    aten.sum.default: _total,
    aten.sum.dim_IntList: _sum,
    aten.tanh.default: _elementwise(activation.tanh),
    aten.tanh_backward.default: _elementwise(activation.tanh_backward),
    aten.threshold_backward.default: _threshold_backward,
}
