"""Sums, extremes and softmax along axes, and products of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from frostline.exporter.onnx_operators.elementwise import operand
from frostline.exporter.onnx_operators.graph import Name, OnnxGraph, Operand, Value

aten = torch.ops.aten


def reduced(
    graph: OnnxGraph, operator: str, x: Value | Name, axes: Sequence[int], keepdims: bool = False
) -> Name:
    """A reduction over some axes."""
    return graph.add(operator, x, graph.integers(axes), keepdims=int(keepdims))


def _over_axes(operator: str) -> Callable[..., Any]:
    def emit(
        graph: OnnxGraph, result: Tensor, x: Value, axes: Any = None, keepdim: bool = False, **options: Any
    ) -> Any:
        values: Operand = operand(graph, x, result.dtype)
        assert values is not None
        asked = [axes] if isinstance(axes, int) else axes or range(x.dim())
        summed = [axis % x.dim() for axis in asked] if x.dim() else []
        if math.prod(x.shape[axis] for axis in summed) == 1:
            return graph.reshaped(values, result.shape)
        return reduced(graph, operator, values, summed, keepdim)

    return emit


def _any(graph: OnnxGraph, result: Tensor, x: Value, axes: Any = None, keepdim: bool = False) -> Name:
    asked = [axes] if isinstance(axes, int) else axes or range(x.dim())
    numbers = graph.cast(graph.cast(x, torch.bool), torch.int32)
    return graph.cast(
        reduced(graph, "ReduceMax", numbers, [axis % x.dim() for axis in asked], keepdim), torch.bool
    )


def _argmax(
    graph: OnnxGraph, result: Tensor, x: Value, axis: int | None = None, keepdim: bool = False
) -> Name:
    if axis is None:
        flat = graph.reshaped(x, [math.prod(x.shape)])
        return graph.reshaped(graph.add("ArgMax", flat, axis=0, keepdims=0), result.shape)
    return graph.add("ArgMax", x, axis=axis % x.dim(), keepdims=int(keepdim))


def _variance_and_mean(
    graph: OnnxGraph,
    result: Sequence[Tensor],
    x: Value,
    axes: Sequence[int] | None = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> Sequence[Name]:
    over = [axis % x.dim() for axis in (axes or range(x.dim()))]
    count = math.prod(x.shape[axis] for axis in over)
    mean = reduced(graph, "ReduceMean", x, over, keepdims=True)
    centred = graph.add("Sub", x, mean)
    squares = graph.add("Mul", centred, centred)
    variance = reduced(graph, "ReduceMean", squares, over, keepdims=keepdim)
    free = count - (1 if correction is None else correction)
    if free != count:
        variance = graph.add("Mul", variance, graph.scalar(count / free, x.dtype))
    return [variance, mean if keepdim else graph.reshaped(mean, result[1].shape)]


def _softmax(operator: str) -> Callable[..., Name]:
    def emit(graph: OnnxGraph, result: Tensor, x: Value, axis: int, half_to_float: bool) -> Name:
        return graph.add(operator, x, axis=axis % max(x.dim(), 1))

    return emit


def _matrix_product(graph: OnnxGraph, result: Tensor, a: Value, b: Value) -> Name:
    return graph.add("MatMul", a, b)


def _variance(
    graph: OnnxGraph, result: Tensor, x: Value, axes: Sequence[int] | None = None, **options: Any
) -> Name:
    mean = result
    return _variance_and_mean(graph, [result, mean], x, axes, **options)[0]


OPERATORS: dict[Any, Callable[..., Any]] = {
    aten._log_softmax.default: _softmax("LogSoftmax"),
    aten._softmax.default: _softmax("Softmax"),
    aten.amax.default: _over_axes("ReduceMax"),
    aten.amin.default: _over_axes("ReduceMin"),
    aten.any.default: _any,
    aten.any.dim: _any,
    aten.any.dims: _any,
    aten.argmax.default: _argmax,
    aten.bmm.default: _matrix_product,
    aten.mean.default: _over_axes("ReduceMean"),
    aten.mean.dim: _over_axes("ReduceMean"),
    aten.mm.default: _matrix_product,
    aten.sum.default: _over_axes("ReduceSum"),
    aten.sum.dim_IntList: _over_axes("ReduceSum"),
    aten.var.correction: _variance,
    aten.var_mean.correction: _variance_and_mean,
}
