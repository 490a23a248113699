"""Operators that take every value by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from frostline.exporter.onnx_operators.graph import Name, OnnxGraph, Operand, Value

aten = torch.ops.aten

Number = float | int | bool


def operand(graph: OnnxGraph, value: Value | Number, dtype: torch.dtype) -> Operand:
    """A tensor or a number as a tensor of `dtype`."""
    if not isinstance(value, Value):
        return graph.scalar(value, dtype)
    return value if value.dtype == dtype else graph.cast(value, dtype)


def _common(*values: Value | Number) -> torch.dtype:
    """The dtype that PyTorch computes an operator of several arguments in."""
    examples = [torch.empty([1] * len(v.shape), dtype=v.dtype) if isinstance(v, Value) else v for v in values]
    common = examples[0]
    for example in examples[1:]:
        common = torch.empty([1], dtype=torch.result_type(common, example))
    assert isinstance(common, Tensor)
    return common.dtype


def _binary(operator: str) -> Callable[..., Name]:
    def emit(graph: OnnxGraph, result: Tensor, a: Any, b: Any, *, alpha: float = 1) -> Name:
        dtype = _common(a, b)
        if dtype == torch.bool or (operator == "Div" and not dtype.is_floating_point):
            dtype = result.dtype
        second = operand(graph, b, dtype)
        if alpha != 1:
            second = graph.add("Mul", second, graph.scalar(alpha, dtype))
        return graph.add(operator, operand(graph, a, dtype), second)

    return emit


def _reversed_difference(graph: OnnxGraph, result: Tensor, a: Value, b: Any, alpha: float = 1) -> Name:
    return _binary("Sub")(graph, result, b, a, alpha=alpha)


def _comparison(operator: str, *, negated: bool = False) -> Callable[..., Name]:
    def emit(graph: OnnxGraph, result: Tensor, a: Any, b: Any) -> Name:
        dtype = _common(a, b)
        compared = graph.add(operator, operand(graph, a, dtype), operand(graph, b, dtype))
        return graph.add("Not", compared) if negated else compared

    return emit


def _logical(operator: str) -> Callable[..., Name]:
    def emit(graph: OnnxGraph, result: Tensor, *values: Value) -> Name:
        return graph.add(operator, *(operand(graph, value, torch.bool) for value in values))

    return emit


def _unary(*operators: str) -> Callable[..., Name]:
    """One operator after the other."""

    def emit(graph: OnnxGraph, result: Tensor, x: Value) -> Name:
        last: Operand = operand(graph, x, result.dtype)
        for operator in operators:
            last = graph.add(operator, last)
        assert isinstance(last, str)
        return last

    return emit


def _exponential_less_one(graph: OnnxGraph, result: Tensor, x: Value) -> Name:
    """By the hyperbolic tangent of half, without cancellation near zero: 2 t / (1 - t)."""
    half = graph.add("Tanh", graph.add("Mul", x, graph.scalar(0.5, x.dtype)))
    double = graph.add("Add", half, half)
    return graph.add("Div", double, graph.add("Sub", graph.scalar(1, x.dtype), half))


def _logarithm_of_one_more(graph: OnnxGraph, result: Tensor, x: Value) -> Name:
    return graph.add("Log", graph.add("Add", x, graph.scalar(1, x.dtype)))


def _clamp(graph: OnnxGraph, result: Tensor, x: Value, low: Any = None, high: Any = None) -> Name:
    limits = [None if limit is None else operand(graph, limit, result.dtype) for limit in (low, high)]
    return graph.add("Clip", operand(graph, x, result.dtype), *limits)


def _clip(graph: OnnxGraph, result: Tensor, x: Value, low: float = -1, high: float = 1) -> Name:
    return _clamp(graph, result, x, low, high)


def _where(graph: OnnxGraph, result: Tensor, condition: Value, a: Any, b: Any) -> Name:
    return graph.add("Where", condition, operand(graph, a, result.dtype), operand(graph, b, result.dtype))


def _threshold_backward(graph: OnnxGraph, result: Tensor, grad: Value, x: Value, threshold: float) -> Name:
    """Multiplied by a gate: `Where` takes six times as long."""
    gate = graph.add("Greater", x, graph.scalar(threshold, x.dtype))
    return graph.add("Mul", grad, graph.cast(gate, grad.dtype))


def _clip_backward(
    graph: OnnxGraph, result: Tensor, grad: Value, x: Value, low: float = -1, high: float = 1
) -> Name:
    above = graph.add("Greater", x, graph.scalar(low, x.dtype))
    below = graph.add("Less", x, graph.scalar(high, x.dtype))
    return graph.add("Mul", grad, graph.cast(graph.add("And", above, below), grad.dtype))


def _power(graph: OnnxGraph, result: Tensor, x: Any, exponent: Any) -> Name:
    if exponent == 2:
        return graph.add("Mul", x, x)
    return graph.add("Pow", operand(graph, x, result.dtype), operand(graph, exponent, result.dtype))


def _remainder(graph: OnnxGraph, result: Tensor, a: Any, b: Any) -> Name:
    """With the sign of the divisor; ONNX has that of floating-point numbers with the sign of the dividend only."""
    dividend, divisor = operand(graph, a, result.dtype), operand(graph, b, result.dtype)
    if not result.is_floating_point():
        return graph.add("Mod", dividend, divisor)
    whole = graph.add("Floor", graph.add("Div", dividend, divisor))
    return graph.add("Sub", dividend, graph.add("Mul", whole, divisor))


def _gelu(graph: OnnxGraph, result: Tensor, x: Value, *, approximate: str = "none") -> Name:
    half = graph.add("Mul", x, graph.scalar(0.5, x.dtype))
    if approximate == "none":
        curve = graph.add("Erf", graph.add("Mul", x, graph.scalar(2**-0.5, x.dtype)))
    else:
        cube = graph.add("Mul", graph.add("Mul", x, x), x)
        inner = graph.add("Add", x, graph.add("Mul", cube, graph.scalar(0.044715, x.dtype)))
        curve = graph.add("Tanh", graph.add("Mul", inner, graph.scalar((2 / torch.pi) ** 0.5, x.dtype)))
    return graph.add("Mul", half, graph.add("Add", curve, graph.scalar(1, x.dtype)))


def _elu(
    graph: OnnxGraph, result: Tensor, x: Value, alpha: float = 1, scale: float = 1, input_scale: float = 1
) -> Any:
    return NotImplemented if (scale, input_scale) != (1, 1) else graph.add("Elu", x, alpha=float(alpha))


def _leaky_relu(graph: OnnxGraph, result: Tensor, x: Value, slope: float = 0.01) -> Name:
    return graph.add("LeakyRelu", x, alpha=float(slope))


def _hard_sigmoid(graph: OnnxGraph, result: Tensor, x: Value) -> Name:
    return graph.add("HardSigmoid", x, alpha=1 / 6, beta=0.5)


def _to_dtype(graph: OnnxGraph, result: Tensor, x: Value, **options: Any) -> Any:
    return x.name if x.dtype == result.dtype else graph.cast(x, result.dtype)


def _same(graph: OnnxGraph, result: Tensor, x: Value, **options: Any) -> Name:
    return x.name


def _with_values_of(graph: OnnxGraph, result: Tensor, x: Value, source: Value, *rest: Any) -> Any:
    """`copy`: the values of one tensor in the shape and dtype of another."""
    if source.shape != tuple(result.shape):
        return NotImplemented
    return operand(graph, source, result.dtype)


OPERATORS: dict[Any, Callable[..., Any]] = {
    aten._to_copy.default: _to_dtype,
    aten.abs.default: _unary("Abs"),
    aten.add.Scalar: _binary("Add"),
    aten.add.Tensor: _binary("Add"),
    aten.alias.default: _same,
    aten.bitwise_and.Tensor: _logical("And"),
    aten.bitwise_not.default: _logical("Not"),
    aten.bitwise_or.Tensor: _logical("Or"),
    aten.ceil.default: _unary("Ceil"),
    aten.clamp.default: _clamp,
    aten.clone.default: _same,
    aten.copy.default: _with_values_of,
    aten.cos.default: _unary("Cos"),
    aten.detach.default: _same,
    aten.div.Scalar: _binary("Div"),
    aten.div.Tensor: _binary("Div"),
    aten.elu.default: _elu,
    aten.eq.Scalar: _comparison("Equal"),
    aten.eq.Tensor: _comparison("Equal"),
    aten.erf.default: _unary("Erf"),
    aten.exp.default: _unary("Exp"),
    aten.expm1.default: _exponential_less_one,
    aten.floor.default: _unary("Floor"),
    aten.ge.Scalar: _comparison("GreaterOrEqual"),
    aten.ge.Tensor: _comparison("GreaterOrEqual"),
    aten.gelu.default: _gelu,
    aten.gt.Scalar: _comparison("Greater"),
    aten.gt.Tensor: _comparison("Greater"),
    aten.hardsigmoid.default: _hard_sigmoid,
    aten.hardswish.default: _unary("HardSwish"),
    aten.hardtanh.default: _clip,
    aten.hardtanh_backward.default: _clip_backward,
    aten.le.Scalar: _comparison("LessOrEqual"),
    aten.le.Tensor: _comparison("LessOrEqual"),
    aten.leaky_relu.default: _leaky_relu,
    aten.lift_fresh_copy.default: _same,
    aten.log.default: _unary("Log"),
    aten.log1p.default: _logarithm_of_one_more,
    aten.logical_and.default: _logical("And"),
    aten.logical_not.default: _logical("Not"),
    aten.logical_or.default: _logical("Or"),
    aten.lt.Scalar: _comparison("Less"),
    aten.lt.Tensor: _comparison("Less"),
    aten.maximum.default: _binary("Max"),
    aten.minimum.default: _binary("Min"),
    aten.mul.Scalar: _binary("Mul"),
    aten.mul.Tensor: _binary("Mul"),
    aten.ne.Scalar: _comparison("Equal", negated=True),
    aten.ne.Tensor: _comparison("Equal", negated=True),
    aten.neg.default: _unary("Neg"),
    aten.pow.Scalar: _power,
    aten.pow.Tensor_Scalar: _power,
    aten.pow.Tensor_Tensor: _power,
    aten.reciprocal.default: _unary("Reciprocal"),
    aten.relu.default: _unary("Relu"),
    aten.remainder.Scalar: _remainder,
    aten.remainder.Tensor: _remainder,
    aten.round.default: _unary("Round"),
    aten.rsqrt.default: _unary("Sqrt", "Reciprocal"),
    aten.rsub.Scalar: _reversed_difference,
    aten.rsub.Tensor: _reversed_difference,
    aten.sigmoid.default: _unary("Sigmoid"),
    aten.sign.default: _unary("Sign"),
    aten.sin.default: _unary("Sin"),
    aten.sqrt.default: _unary("Sqrt"),
    aten.sub.Scalar: _binary("Sub"),
    aten.sub.Tensor: _binary("Sub"),
    aten.tanh.default: _unary("Tanh"),
    aten.threshold_backward.default: _threshold_backward,
    aten.where.self: _where,
}
