"""Operators that take every value by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


_OF_TRUTHS = {"Add": "Or", "Max": "Or", "Min": "And", "Mul": "And"}
"""What arithmetic does to truth values."""


def _binary(operator: str) -> Callable[..., Name]:
    def emit(graph: OnnxGraph, result: Tensor, a: Any, b: Any, *, alpha: float = 1) -> Name:
        dtype = _common(a, b)
        if result.dtype == torch.bool:
            return graph.add(
                _OF_TRUTHS[operator], operand(graph, a, torch.bool), operand(graph, b, torch.bool)
            )
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
        if dtype == torch.bool and operator != "Equal":
            dtype = torch.int32
        compared = graph.add(operator, operand(graph, a, dtype), operand(graph, b, dtype))
        return graph.add("Not", compared) if negated else compared

    return emit


def _logical(operator: str) -> Callable[..., Name]:
    def emit(graph: OnnxGraph, result: Tensor, *values: Value | Number) -> Name:
        return graph.add(operator, *(operand(graph, value, torch.bool) for value in values))

    return emit


def _bitwise(operator: str) -> Callable[..., Name]:
    """Truth values are one bit each."""

    def emit(graph: OnnxGraph, result: Tensor, *values: Value | Number) -> Name:
        prefix = "" if result.dtype == torch.bool else "Bitwise"
        return graph.add(prefix + operator, *(operand(graph, value, result.dtype) for value in values))

    return emit


def _shifted(*, left: bool) -> Callable[..., Name]:
    """Whole numbers multiplied or divided by a power of two."""

    def emit(graph: OnnxGraph, result: Tensor, x: Any, places: Any) -> Name:
        number, places = operand(graph, x, result.dtype), operand(graph, places, result.dtype)
        factor = graph.add("Pow", graph.scalar(2, result.dtype), places)
        if left:
            return graph.add("Mul", number, factor)
        return _floor_quotient(graph, number, factor, result.dtype)

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
    clipped = operand(graph, x, result.dtype)
    if all(not isinstance(limit, Value) or limit.shape == () for limit in (low, high)):
        return graph.add("Clip", clipped, *limits)
    for operator, limit in zip(("Max", "Min"), limits, strict=True):
        if limit is not None:
            clipped = graph.add(operator, clipped, limit)
    assert isinstance(clipped, str)
    return clipped


def _clip(graph: OnnxGraph, result: Tensor, x: Value, low: float = -1, high: float = 1) -> Name:
    return _clamp(graph, result, x, low, high)


def _where(graph: OnnxGraph, result: Tensor, condition: Value, a: Any, b: Any) -> Name:
    # ONNX Runtime chooses between numbers only.
    dtype = torch.int32 if result.dtype == torch.bool else result.dtype
    chosen = graph.add(
        "Where", operand(graph, condition, torch.bool), operand(graph, a, dtype), operand(graph, b, dtype)
    )
    return graph.cast(chosen, torch.bool) if result.dtype == torch.bool else chosen


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


def _remainder_of_dividend(graph: OnnxGraph, result: Tensor, a: Any, b: Any) -> Name:
    """`fmod`: with the sign of the dividend."""
    return graph.add("Mod", operand(graph, a, result.dtype), operand(graph, b, result.dtype), fmod=1)


def _whole(graph: OnnxGraph, x: Operand, dtype: torch.dtype) -> Name:
    """Rounded towards zero."""
    return graph.add("Mul", graph.add("Sign", x), graph.add("Floor", graph.add("Abs", x)))


def _truncate(graph: OnnxGraph, result: Tensor, x: Value) -> Name:
    return _whole(graph, x, x.dtype) if x.dtype.is_floating_point else x.name


def _floor_quotient(graph: OnnxGraph, a: Operand, b: Operand, dtype: torch.dtype) -> Name:
    if dtype.is_floating_point:
        return graph.add("Floor", graph.add("Div", a, b))
    # ONNX rounds quotients of whole numbers towards zero; what is left over has the sign of the divisor.
    return graph.add("Div", graph.add("Sub", a, graph.add("Mod", a, b)), b)


def _quotient(graph: OnnxGraph, result: Tensor, a: Any, b: Any, *, rounding_mode: str | None = None) -> Name:
    dividend, divisor = operand(graph, a, result.dtype), operand(graph, b, result.dtype)
    if rounding_mode == "floor":
        return _floor_quotient(graph, dividend, divisor, result.dtype)
    quotient = graph.add("Div", dividend, divisor)
    whole = rounding_mode == "trunc" and result.is_floating_point()
    return _whole(graph, quotient, result.dtype) if whole else quotient


def _floor_divide(graph: OnnxGraph, result: Tensor, a: Any, b: Any) -> Name:
    return _quotient(graph, result, a, b, rounding_mode="floor")


def _times(operator: str, factor: float) -> Callable[..., Name]:
    """An operator, and its result in another unit."""

    def emit(graph: OnnxGraph, result: Tensor, x: Value) -> Name:
        values = graph.add(operator, operand(graph, x, result.dtype))
        return graph.add("Mul", values, graph.scalar(factor, result.dtype))

    return emit


def _power_of_two(graph: OnnxGraph, result: Tensor, x: Value) -> Name:
    factor = graph.scalar(math.log(2), result.dtype)
    return graph.add("Exp", graph.add("Mul", operand(graph, x, result.dtype), factor))


def _complementary_error(graph: OnnxGraph, result: Tensor, x: Value) -> Name:
    return graph.add("Sub", graph.scalar(1, x.dtype), graph.add("Erf", x))


def _angle(graph: OnnxGraph, result: Tensor, y: Value, x: Value) -> Name:
    """The arctangent of y / x in the quadrant of both."""

    def number(value: float) -> Name:
        return graph.scalar(value, result.dtype)

    y_, x_ = operand(graph, y, result.dtype), operand(graph, x, result.dtype)
    below = graph.add("Less", y_, number(0))
    half = graph.add("Where", below, number(-math.pi), number(math.pi))
    on_axis = graph.add("Equal", x_, number(0))
    divisor = graph.add("Where", on_axis, number(1), x_)
    angle = graph.add("Atan", graph.add("Div", y_, divisor))
    left = graph.add("Where", graph.add("Less", x_, number(0)), half, number(0))
    quarter = graph.add("Mul", graph.add("Sign", y_), number(math.pi / 2))
    return graph.add("Where", on_axis, quarter, graph.add("Add", angle, left))


def _hypotenuse(graph: OnnxGraph, result: Tensor, a: Value, b: Value) -> Name:
    return graph.add("Sqrt", graph.add("Add", graph.add("Mul", a, a), graph.add("Mul", b, b)))


def _extreme_but_nan(operator: str) -> Callable[..., Name]:
    """`fmax` and `fmin`: what is no number gives way."""

    def emit(graph: OnnxGraph, result: Tensor, a: Value, b: Value) -> Name:
        a_, b_ = operand(graph, a, result.dtype), operand(graph, b, result.dtype)
        kept = graph.add("Where", graph.add("IsNaN", b_), a_, graph.add(operator, a_, b_))
        return graph.add("Where", graph.add("IsNaN", a_), b_, kept)

    return emit


def _rounded(graph: OnnxGraph, result: Tensor, x: Value, *, decimals: int = 0) -> Name:
    if not result.is_floating_point():
        return x.name
    unit = graph.scalar(10.0**decimals, result.dtype)
    return graph.add("Div", graph.add("Round", graph.add("Mul", x, unit)), unit)


def _is_negative(graph: OnnxGraph, result: Tensor, x: Value) -> Name:
    return graph.add("Less", x, graph.scalar(0, x.dtype))


def _with_sign(graph: OnnxGraph, result: Tensor, x: Value, sign: Any) -> Name:
    size = graph.add("Abs", operand(graph, x, result.dtype))
    below = graph.add("Less", operand(graph, sign, result.dtype), graph.scalar(0, result.dtype))
    return graph.add("Where", below, graph.add("Neg", size), size)


def _of_numbers(operator: str) -> Callable[..., Name]:
    """A question that whole numbers have one answer to."""

    def emit(graph: OnnxGraph, result: Tensor, x: Value) -> Name:
        return graph.add(operator, operand(graph, x, torch.float32) if not x.dtype.is_floating_point else x)

    return emit


_GILES = (
    (
        2.81022636e-08,
        3.43273939e-07,
        -3.5233877e-06,
        -4.39150654e-06,
        0.00021858087,
        -0.00125372503,
        -0.00417768164,
        0.246640727,
        1.50140941,
    ),
    (
        -0.000200214257,
        0.000100950558,
        0.00134934322,
        -0.00367342844,
        0.00573950773,
        -0.0076224613,
        0.00943887047,
        1.00167406,
        2.83297682,
    ),
)
"""The polynomials of M. Giles, "Approximating the erfinv function", GPU Computing Gems 2 (2011)."""


def _inverse_error(graph: OnnxGraph, result: Tensor, x: Value) -> Name:
    """One polynomial of -log(1 - x^2) for the middle, one of its root for the tails."""

    def number(value: float) -> Name:
        return graph.scalar(value, x.dtype)

    w = graph.add("Neg", graph.add("Log", graph.add("Sub", number(1), graph.add("Mul", x, x))))
    shifted = [graph.add("Sub", w, number(2.5)), graph.add("Sub", graph.add("Sqrt", w), number(3))]
    middle, tails = (
        _polynomial(graph, z, [number(c) for c in coefficients])
        for z, coefficients in zip(shifted, _GILES, strict=True)
    )
    inside = graph.add("Less", w, number(5))
    made = graph.add("Mul", graph.add("Where", inside, middle, tails), x)
    # At the ends one infinity is taken from the other.
    infinite = graph.add("Equal", graph.add("Abs", x), number(1))
    return graph.add("Where", infinite, graph.add("Mul", x, number(math.inf)), made)


def _polynomial(graph: OnnxGraph, x: Name, coefficients: Sequence[Name]) -> Name:
    value, *rest = coefficients
    for coefficient in rest:
        value = graph.add("Add", graph.add("Mul", value, x), coefficient)
    return value


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
) -> Name:
    if (scale, input_scale) == (1, 1):
        return graph.add("Elu", x, alpha=float(alpha))
    negative = graph.add(
        "Mul", graph.add("Min", x, graph.scalar(0, x.dtype)), graph.scalar(input_scale, x.dtype)
    )
    curve = _exponential_less_one(graph, result, Value(negative, x.shape, x.dtype))
    below = graph.add("Mul", curve, graph.scalar(alpha, x.dtype))
    made = graph.add("Add", graph.add("Relu", x), below)
    return made if scale == 1 else graph.add("Mul", made, graph.scalar(scale, x.dtype))


def _leaky_relu(graph: OnnxGraph, result: Tensor, x: Value, slope: float = 0.01) -> Name:
    return graph.add("LeakyRelu", x, alpha=float(slope))


def _leaky_relu_of_slopes(graph: OnnxGraph, result: Tensor, x: Value, slope: Value) -> Name:
    return graph.add("PRelu", x, slope)


def _hard_sigmoid(graph: OnnxGraph, result: Tensor, x: Value) -> Name:
    return graph.add("HardSigmoid", x, alpha=1 / 6, beta=0.5)


def _to_dtype(graph: OnnxGraph, result: Tensor, x: Value, **options: Any) -> Any:
    return x.name if x.dtype == result.dtype else graph.cast(x, result.dtype)


def _same(graph: OnnxGraph, result: Tensor, x: Value, **options: Any) -> Name:
    return x.name


OPERATORS: dict[Any, Callable[..., Any]] = {
    aten.__lshift__.Scalar: _shifted(left=True),
    aten.__lshift__.Tensor: _shifted(left=True),
    aten.__rshift__.Scalar: _shifted(left=False),
    aten.__rshift__.Tensor: _shifted(left=False),
    aten._prelu_kernel.default: _leaky_relu_of_slopes,
    aten._to_copy.default: _to_dtype,
    aten.abs.default: _unary("Abs"),
    aten.acos.default: _unary("Acos"),
    aten.acosh.default: _unary("Acosh"),
    aten.add.Scalar: _binary("Add"),
    aten.add.Tensor: _binary("Add"),
    aten.alias.default: _same,
    aten.asin.default: _unary("Asin"),
    aten.asinh.default: _unary("Asinh"),
    aten.atan.default: _unary("Atan"),
    aten.atan2.default: _angle,
    aten.atanh.default: _unary("Atanh"),
    aten.bitwise_and.Scalar: _bitwise("And"),
    aten.bitwise_and.Tensor: _bitwise("And"),
    aten.bitwise_left_shift.Tensor: _shifted(left=True),
    aten.bitwise_left_shift.Tensor_Scalar: _shifted(left=True),
    aten.bitwise_not.default: _bitwise("Not"),
    aten.bitwise_or.Scalar: _bitwise("Or"),
    aten.bitwise_or.Tensor: _bitwise("Or"),
    aten.bitwise_right_shift.Tensor: _shifted(left=False),
    aten.bitwise_right_shift.Tensor_Scalar: _shifted(left=False),
    aten.bitwise_xor.Scalar: _bitwise("Xor"),
    aten.bitwise_xor.Tensor: _bitwise("Xor"),
    aten.ceil.default: _unary("Ceil"),
    aten.clamp.Tensor: _clamp,
    aten.clamp.default: _clamp,
    aten.clone.default: _same,
    aten.copysign.Tensor: _with_sign,
    aten.cos.default: _unary("Cos"),
    aten.cosh.default: _unary("Cosh"),
    aten.detach.default: _same,
    aten.div.Scalar: _binary("Div"),
    aten.div.Scalar_mode: _quotient,
    aten.div.Tensor: _binary("Div"),
    aten.div.Tensor_mode: _quotient,
    aten.elu.default: _elu,
    aten.eq.Scalar: _comparison("Equal"),
    aten.eq.Tensor: _comparison("Equal"),
    aten.erf.default: _unary("Erf"),
    aten.erfc.default: _complementary_error,
    aten.erfinv.default: _inverse_error,
    aten.exp.default: _unary("Exp"),
    aten.exp2.default: _power_of_two,
    aten.expm1.default: _exponential_less_one,
    aten.floor.default: _unary("Floor"),
    aten.floor_divide.Scalar: _floor_divide,
    aten.floor_divide.default: _floor_divide,
    aten.fmax.default: _extreme_but_nan("Max"),
    aten.fmin.default: _extreme_but_nan("Min"),
    aten.fmod.Scalar: _remainder_of_dividend,
    aten.fmod.Tensor: _remainder_of_dividend,
    aten.ge.Scalar: _comparison("GreaterOrEqual"),
    aten.ge.Tensor: _comparison("GreaterOrEqual"),
    aten.gelu.default: _gelu,
    aten.gt.Scalar: _comparison("Greater"),
    aten.gt.Tensor: _comparison("Greater"),
    aten.hardsigmoid.default: _hard_sigmoid,
    aten.hardswish.default: _unary("HardSwish"),
    aten.hardtanh.default: _clip,
    aten.hardtanh_backward.default: _clip_backward,
    aten.hypot.default: _hypotenuse,
    aten.isinf.default: _of_numbers("IsInf"),
    aten.isnan.default: _of_numbers("IsNaN"),
    aten.le.Scalar: _comparison("LessOrEqual"),
    aten.le.Tensor: _comparison("LessOrEqual"),
    aten.leaky_relu.default: _leaky_relu,
    aten.lift.default: _same,
    aten.lift_fresh.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.log.default: _unary("Log"),
    aten.log10.default: _times("Log", 1 / math.log(10)),
    aten.log1p.default: _logarithm_of_one_more,
    aten.log2.default: _times("Log", 1 / math.log(2)),
    aten.logical_and.default: _logical("And"),
    aten.logical_not.default: _logical("Not"),
    aten.logical_or.default: _logical("Or"),
    aten.logical_xor.default: _logical("Xor"),
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
    aten.remainder.Scalar_Tensor: _remainder,
    aten.remainder.Tensor: _remainder,
    aten.round.decimals: _rounded,
    aten.round.default: _unary("Round"),
    aten.rsqrt.default: _unary("Sqrt", "Reciprocal"),
    aten.rsub.Scalar: _reversed_difference,
    aten.rsub.Tensor: _reversed_difference,
    aten.sgn.default: _unary("Sign"),
    aten.sigmoid.default: _unary("Sigmoid"),
    aten.sign.default: _unary("Sign"),
    aten.signbit.default: _is_negative,
    aten.sin.default: _unary("Sin"),
    aten.sinh.default: _unary("Sinh"),
    aten.sqrt.default: _unary("Sqrt"),
    aten.sub.Scalar: _binary("Sub"),
    aten.sub.Tensor: _binary("Sub"),
    aten.tan.default: _unary("Tan"),
    aten.tanh.default: _unary("Tanh"),
    aten.threshold_backward.default: _threshold_backward,
    aten.trunc.default: _truncate,
    aten.where.self: _where,
}

IN_SINGLE_PRECISION = {
    aten.acos.default,
    aten.acosh.default,
    aten.asin.default,
    aten.asinh.default,
    aten.atan.default,
    aten.atan2.default,
    aten.atanh.default,
    aten.cosh.default,
    aten.erf.default,
    aten.erfc.default,
    aten.gelu.default,
    aten.sinh.default,
    aten.tan.default,
}
"""Operators of which ONNX Runtime has kernels for float32 alone."""
