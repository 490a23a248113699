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
        # ONNX Runtime compares numbers only.
        dtype = torch.int32 if result.dtype == torch.bool else result.dtype
        values: Operand = operand(graph, x, dtype)
        assert values is not None
        asked = [axes] if isinstance(axes, int) else axes or range(x.dim())
        summed = [axis % x.dim() for axis in asked] if x.dim() else []
        if math.prod(x.shape[axis] for axis in summed) == 1:
            made = graph.reshaped(values, result.shape)
        else:
            made = reduced(graph, operator, values, summed, keepdim)
        return made if dtype == result.dtype else graph.cast(made, result.dtype)

    return emit


def _truths(operator: str) -> Callable[..., Name]:
    """Whether any or all are true."""

    def emit(graph: OnnxGraph, result: Tensor, x: Value, axes: Any = None, keepdim: bool = False) -> Name:
        asked = [axes] if isinstance(axes, int) else axes or range(x.dim())
        numbers = graph.cast(graph.cast(x, torch.bool), torch.int32)
        if not x.dim():
            return graph.cast(numbers, result.dtype)
        over = [axis % x.dim() for axis in asked]
        return graph.cast(reduced(graph, operator, numbers, over, keepdim), result.dtype)

    return emit


def _place_of(operator: str) -> Callable[..., Name]:
    """The first place of an extreme."""

    def emit(
        graph: OnnxGraph, result: Tensor, x: Value, axis: int | None = None, keepdim: bool = False
    ) -> Name:
        # Whole numbers of 64 bits are compared as floating-point numbers of as many.
        values: Value | Name = x
        if not x.dtype.is_floating_point:
            values = graph.cast(x, torch.float64 if x.dtype == torch.int64 else torch.int32)
        if axis is None or not x.dim():
            flat = graph.reshaped(values, [math.prod(x.shape)])
            return graph.reshaped(graph.add(operator, flat, axis=0, keepdims=0), result.shape)
        return graph.add(operator, values, axis=axis % x.dim(), keepdims=int(keepdim))

    return emit


def _extreme(reduction: str, place: str) -> Callable[..., Sequence[Name]]:
    """An extreme along an axis, and its first place."""
    find = _place_of(place)

    def emit(
        graph: OnnxGraph, result: Sequence[Tensor], x: Value, axis: int, keepdim: bool = False
    ) -> Sequence[Name]:
        places = find(graph, result[1], x, axis, keepdim)
        values = _over_axes(reduction)(graph, result[0], x, axis, keepdim)
        return [values, places]

    return emit


def _sort(
    graph: OnnxGraph,
    result: Sequence[Tensor],
    x: Value,
    *given: Any,
    stable: bool | None = None,
    dim: int = -1,
    descending: bool = False,
) -> Sequence[Name]:
    """All of an axis as its largest values; among equal ones the first comes first."""
    # `sort` has axis and direction by position, `sort.stable` by name.
    asked = [*given, *[dim, descending][len(given) :]]
    count = x.shape[asked[0]] if x.dim() else 1
    return _top(graph, result, x, count, asked[0], largest=asked[1])


def _top(
    graph: OnnxGraph,
    result: Sequence[Tensor],
    x: Value,
    count: int,
    axis: int = -1,
    largest: bool = True,
    sorted: bool = True,  # noqa: A002 - PyTorch's name
) -> Sequence[Name]:
    if not x.dim():
        return [x.name, graph.scalar(0, torch.int64)]
    options = {"axis": axis % x.dim(), "largest": int(largest), "sorted": 1}
    return graph.add_several("TopK", [x, graph.integers([count])], 2, **options)


def _running_sum(
    graph: OnnxGraph, result: Tensor, x: Value, axis: int, *, dtype: torch.dtype | None = None
) -> Any:
    values = operand(graph, x, result.dtype)
    if not x.dim():
        return values
    return graph.add("CumSum", values, graph.scalar(axis % x.dim(), torch.int64))


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
    aten.all.default: _truths("ReduceMin"),
    aten.all.dim: _truths("ReduceMin"),
    aten.all.dims: _truths("ReduceMin"),
    aten.any.default: _truths("ReduceMax"),
    aten.any.dim: _truths("ReduceMax"),
    aten.any.dims: _truths("ReduceMax"),
    aten.argmax.default: _place_of("ArgMax"),
    aten.argmin.default: _place_of("ArgMin"),
    aten.cumsum.default: _running_sum,
    aten.max.default: _over_axes("ReduceMax"),
    aten.max.dim: _extreme("ReduceMax", "ArgMax"),
    aten.min.default: _over_axes("ReduceMin"),
    aten.min.dim: _extreme("ReduceMin", "ArgMin"),
    aten.prod.default: _over_axes("ReduceProd"),
    aten.prod.dim_int: _over_axes("ReduceProd"),
    aten.sort.default: _sort,
    aten.sort.stable: _sort,
    aten.topk.default: _top,
    aten.bmm.default: _matrix_product,
    aten.mean.default: _over_axes("ReduceMean"),
    aten.mean.dim: _over_axes("ReduceMean"),
    aten.mm.default: _matrix_product,
    aten.sum.default: _over_axes("ReduceSum"),
    aten.sum.dim_IntList: _over_axes("ReduceSum"),
    aten.var.correction: _variance,
    aten.var_mean.correction: _variance_and_mean,
}
