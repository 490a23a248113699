"""Operators that move values, and those that make them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from frostline.exporter.onnx_operators.elementwise import operand
from frostline.exporter.onnx_operators.graph import Name, OnnxGraph, Value
from frostline.exporter.onnx_operators.waiting import AFTER

aten = torch.ops.aten

LARGEST = 2**62
"""Stands for the end of an axis."""


def _reshape(graph: OnnxGraph, result: Tensor, x: Value, *rest: Any, **options: Any) -> Name:
    """Whatever keeps the order of the values."""
    return x.name if x.shape == tuple(result.shape) else graph.reshaped(x, result.shape)


def _permute(graph: OnnxGraph, result: Tensor, x: Value, axes: Sequence[int]) -> Name:
    return transposed(graph, x, x.shape, [axis % x.dim() for axis in axes])


def _transpose(graph: OnnxGraph, result: Tensor, x: Value, first: int = 0, second: int = 1) -> Name:
    if x.dim() < 2:
        return x.name
    axes = list(range(x.dim()))
    axes[first], axes[second] = axes[second], axes[first]
    return transposed(graph, x, x.shape, axes)


def transposed(graph: OnnxGraph, x: Value | Name, shape: Sequence[int], axes: Sequence[int]) -> Name:
    """`x` of a shape with its axes in another order; a view where none of them moves past another of length above 1."""
    moved = [axis for axis in axes if shape[axis] != 1]
    if moved == sorted(moved):
        return graph.reshaped(x, [shape[axis] for axis in axes])
    return graph.add("Transpose", x, perm=list(axes))


def _expand(graph: OnnxGraph, result: Tensor, x: Value, *rest: Any, **options: Any) -> Name:
    if x.shape == tuple(result.shape):
        return x.name
    return graph.add("Expand", x, graph.integers(result.shape))


def _after(graph: OnnxGraph, result: Tensor, value: Value, awaited: Value) -> Name:
    """A view whose shape can be read off only once `awaited` is there; what `awaited` holds does not matter."""
    first = graph.add(
        "Gather", graph.reshaped(awaited, [math.prod(awaited.shape)]), graph.scalar(0, torch.int64)
    )
    nothing = graph.add(
        "Mul", graph.cast(graph.add("IsNaN", first), torch.int64), graph.scalar(0, torch.int64)
    )
    return graph.add("Reshape", value, graph.add("Add", graph.integers(value.shape), nothing), allowzero=1)


def _join(graph: OnnxGraph, result: Tensor, tensors: Sequence[Value], axis: int = 0) -> Any:
    # Empty tensors of one axis join anything.
    joined = [operand(graph, each, result.dtype) for each in tensors if each.shape != (0,)]
    return joined[0] if len(joined) == 1 else graph.add("Concat", *joined, axis=axis % result.dim())


def sliced(
    graph: OnnxGraph,
    x: Value | Name,
    axes: Sequence[int],
    starts: Sequence[int],
    ends: Sequence[int],
    steps: Sequence[int],
) -> Name:
    """Part of a tensor along some axes."""
    places = [graph.integers(each) for each in (starts, ends, axes, steps)]
    return graph.add("Slice", x, *places)


def _slice(
    graph: OnnxGraph,
    result: Tensor,
    x: Value,
    axis: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Name:
    last = LARGEST if end is None else min(end, LARGEST)
    return sliced(graph, x, [axis % x.dim()], [start or 0], [last], [step])


def _select(graph: OnnxGraph, result: Tensor, x: Value, axis: int, index: int) -> Name:
    axis %= x.dim()
    index %= x.shape[axis]
    return graph.reshaped(sliced(graph, x, [axis], [index], [index + 1], [1]), result.shape)


def _flip(graph: OnnxGraph, result: Tensor, x: Value, axes: Sequence[int]) -> Name:
    return flipped(graph, x, [axis % x.dim() for axis in axes])


def flipped(graph: OnnxGraph, x: Value | Name, axes: Sequence[int]) -> Name:
    """A tensor read backwards along some axes."""
    count = len(axes)
    return sliced(graph, x, axes, [-1] * count, [-LARGEST] * count, [-1] * count)


def _split(graph: OnnxGraph, result: Sequence[Tensor], x: Value, sizes: Any, axis: int = 0) -> Sequence[Name]:
    axis %= x.dim()
    if len(result) == 1:
        return [x.name]
    lengths = graph.integers([part.shape[axis] for part in result])
    return graph.add_several("Split", [x, lengths], len(result), axis=axis)


def _unbind(graph: OnnxGraph, result: Sequence[Tensor], x: Value, axis: int = 0) -> Sequence[Name]:
    parts = graph.add_several("Split", [x], len(result), axis=axis % x.dim(), num_outputs=len(result))
    return [graph.reshaped(part, each.shape) for part, each in zip(parts, result, strict=True)]


def _pad(graph: OnnxGraph, result: Tensor, x: Value, widths: Sequence[int], value: float = 0) -> Name:
    missing = [0] * (x.dim() - len(widths) // 2)
    before = missing + list(widths[0::2])[::-1]
    after = missing + list(widths[1::2])[::-1]
    if min(before + after) < 0:
        kept = [(-min(b, 0), size + min(a, 0)) for b, a, size in zip(before, after, x.shape, strict=True)]
        axes = range(x.dim())
        cut = sliced(graph, x, axes, [start for start, _ in kept], [end for _, end in kept], [1] * x.dim())
        return padded(graph, cut, [max(b, 0) for b in before], [max(a, 0) for a in after], value, x.dtype)
    return padded(graph, x, before, after, value, x.dtype)


def padded(
    graph: OnnxGraph,
    x: Value | Name,
    before: Sequence[int],
    after: Sequence[int],
    value: float = 0,
    dtype: torch.dtype = torch.float32,
) -> Name:
    """A tensor with `value` around it, so much on each axis."""
    if not any([*before, *after]):
        return x.name if isinstance(x, Value) else x
    return graph.add("Pad", x, graph.integers([*before, *after]), graph.scalar(value, dtype))


def _pad_with_own(mode: str) -> Callable[..., Any]:
    """With what the tensor itself holds at its ends, or mirrored there."""

    def emit(graph: OnnxGraph, result: Tensor, x: Value, widths: Sequence[int]) -> Any:
        if min(widths) < 0:
            return NotImplemented
        missing = [0] * (x.dim() - len(widths) // 2)
        before, after = ([*missing, *widths[side::2][::-1]] for side in (0, 1))
        return graph.add("Pad", x, graph.integers([*before, *after]), mode=mode)

    return emit


def _slice_backward(
    graph: OnnxGraph,
    result: Tensor,
    grad: Value,
    sizes: Sequence[int],
    axis: int,
    start: int,
    end: int,
    step: int,
) -> Any:
    axis %= result.dim()
    if step == 1:
        return _placed(graph, result, grad, axis, start)
    # Each value gets an axis of its own, with zeros behind it, which is then joined again.
    before, count, after = list(grad.shape[:axis]), grad.shape[axis], list(grad.shape[axis + 1 :])
    apart = graph.reshaped(grad, [*before, count, 1, *after])
    gaps = [0] * (result.dim() + 1)
    gaps[axis + 1] = step - 1
    spread = graph.reshaped(
        padded(graph, apart, [0] * len(gaps), gaps, dtype=grad.dtype), [*before, count * step, *after]
    )
    length = (count - 1) * step + 1
    cut = sliced(graph, spread, [axis], [0], [length], [1])
    return _placed(graph, result, Value(cut, (*before, length, *after), grad.dtype), axis, start)


def _select_backward(
    graph: OnnxGraph, result: Tensor, grad: Value, sizes: Sequence[int], axis: int, index: int
) -> Name:
    axis %= result.dim()
    shape = [*grad.shape[:axis], 1, *grad.shape[axis:]]
    part = Value(graph.reshaped(grad, shape), tuple(shape), grad.dtype)
    return _placed(graph, result, part, axis, index)


def _placed(graph: OnnxGraph, result: Tensor, part: Value, axis: int, start: int) -> Name:
    """`part` at `start` of an axis, zeros beside it."""
    length = result.shape[axis]
    start = start + length if start < 0 else start
    before, after = [0] * result.dim(), [0] * result.dim()
    before[axis], after[axis] = start, length - start - part.shape[axis]
    return padded(graph, part, before, after, dtype=part.dtype)


def _repeat(graph: OnnxGraph, result: Tensor, x: Value, repeats: Sequence[int]) -> Name:
    shape = [1] * (len(repeats) - x.dim()) + list(x.shape)
    return graph.add("Tile", graph.reshaped(x, shape), graph.integers(repeats))


def _lookup(graph: OnnxGraph, result: Tensor, table: Value, rows: Value, *rest: Any) -> Name:
    return graph.add("Gather", table, rows, axis=0)


def _lookup_backward(
    graph: OnnxGraph, result: Tensor, grad: Value, rows: Value, count: int, padding: int, by_frequency: bool
) -> Any:
    width, found = grad.shape[-1], math.prod(rows.shape)
    values = graph.reshaped(grad, [found, width])
    if padding >= 0:
        skipped = graph.add("Equal", graph.reshaped(rows, [found, 1]), graph.scalar(padding, torch.int64))
        values = graph.add("Mul", values, graph.cast(graph.add("Not", skipped), grad.dtype))
    if by_frequency:
        none = filled(graph, 0, (count,), grad.dtype)
        ones = filled(graph, 1, (found,), grad.dtype)
        places = graph.reshaped(rows, [found, 1])
        often = graph.add("ScatterND", none, places, ones, reduction="add")
        values = graph.add("Div", values, graph.reshaped(graph.add("Gather", often, places), [found, 1]))
    zeros = filled(graph, 0, (count, width), grad.dtype)
    return graph.add("ScatterND", zeros, graph.reshaped(rows, [found, 1]), values, reduction="add")


def _index_select(graph: OnnxGraph, result: Tensor, x: Value, axis: int, places: Value) -> Name:
    return graph.add("Gather", x, places, axis=axis % x.dim())


def _index_add(
    graph: OnnxGraph, result: Tensor, x: Value, axis: int, places: Value, source: Value, *, alpha: float = 1
) -> Name:
    axis = axis % x.dim() if x.dim() else 0
    if not x.dim():
        return graph.add("Add", x, graph.reshaped(source, []))
    given: Value | Name = source
    if alpha != 1:
        given = graph.add("Mul", source, graph.scalar(alpha, source.dtype))
    order = [axis, *(other for other in range(x.dim()) if other != axis)]
    rows, added = transposed(graph, x, x.shape, order), transposed(graph, given, source.shape, order)
    indices = graph.reshaped(places, [*places.shape, 1])
    made = graph.add("ScatterND", rows, indices, added, reduction="add")
    back = [order.index(other) for other in range(x.dim())]
    return transposed(graph, made, [x.shape[other] for other in order], back)


def _gather(graph: OnnxGraph, result: Tensor, x: Value, axis: int, places: Value, **options: Any) -> Name:
    if not x.dim():
        return graph.reshaped(x, result.shape)
    if not places.dim():
        places = Value(graph.reshaped(places, [1]), (1,), places.dtype)
    return graph.reshaped(graph.add("GatherElements", x, places, axis=axis % x.dim()), result.shape)


def _scatter(graph: OnnxGraph, result: Tensor, x: Value, axis: int, places: Value, source: Any) -> Name:
    return _scattered(graph, x, axis, places, source, "none")


def _scatter_add(graph: OnnxGraph, result: Tensor, x: Value, axis: int, places: Value, source: Value) -> Name:
    return _scattered(graph, x, axis, places, source, "add")


def _scattered(graph: OnnxGraph, x: Value, axis: int, places: Value, source: Any, reduction: str) -> Name:
    if not isinstance(source, Value):
        values = filled(graph, source, places.shape, x.dtype)
    elif source.shape != places.shape:
        starts = [0] * source.dim()
        values = sliced(graph, source, range(source.dim()), starts, list(places.shape), [1] * source.dim())
    else:
        values = source.name
    if not x.dim():
        one = graph.reshaped(x, [1]), graph.reshaped(places, [1]), graph.reshaped(values, [1])
        return graph.reshaped(graph.add("ScatterElements", *one, axis=0, reduction=reduction), [])
    return graph.add("ScatterElements", x, places, values, axis=axis % x.dim(), reduction=reduction)


_REDUCTIONS = {
    "sum": ("add", 0.0),
    "prod": ("mul", 1.0),
    "amax": ("max", -math.inf),
    "amin": ("min", math.inf),
}
"""Of a scatter, and what leaves a value as it is."""


def _scatter_reduce(
    graph: OnnxGraph,
    result: Tensor,
    x: Value,
    axis: int,
    places: Value,
    source: Value,
    reduce: str,
    *,
    include_self: bool = True,
) -> Name:
    operator, neutral = _REDUCTIONS["sum" if reduce == "mean" else reduce]
    start: Value = x
    touched: Name | None = None
    if not include_self:
        start = Value(_scattered(graph, x, axis, places, _finite(neutral, x.dtype), "none"), x.shape, x.dtype)
    made = _scattered(graph, start, axis, places, source, operator)
    if reduce != "mean":
        return made
    counted = graph.constant(torch.ones(x.shape, dtype=x.dtype))
    count = Value(counted, x.shape, x.dtype)
    if not include_self:
        count = Value(_scattered(graph, count, axis, places, 0, "none"), x.shape, x.dtype)
    ones = Value(filled(graph, 1, places.shape, x.dtype), places.shape, x.dtype)
    touched = _scattered(graph, count, axis, places, ones, "add")
    return graph.add("Div", made, touched)


def _finite(value: float, dtype: torch.dtype) -> float:
    """Whole numbers have no infinity."""
    if dtype.is_floating_point or math.isfinite(value):
        return value
    return torch.iinfo(dtype).max if value > 0 else torch.iinfo(dtype).min


def filled(graph: OnnxGraph, value: float, shape: Sequence[int], dtype: torch.dtype) -> Name:
    """A tensor of one number; only the number is stored."""
    number = graph.scalar(value, dtype)
    return graph.add("Expand", number, graph.integers(shape)) if len(shape) else number


def _triangle(*, upper: bool) -> Callable[..., Name]:
    def emit(graph: OnnxGraph, result: Tensor, x: Value, offset: int = 0) -> Name:
        return graph.add("Trilu", x, graph.scalar(offset, torch.int64), upper=int(upper))

    return emit


def _full(graph: OnnxGraph, result: Tensor, size: Any, value: float, **options: Any) -> Name:
    return filled(graph, value, result.shape, result.dtype)


def _of_shape(graph: OnnxGraph, result: Tensor, x: Value, size: Any, value: float, **options: Any) -> Name:
    return filled(graph, value, result.shape, result.dtype)


def _of(value: float) -> Callable[..., Name]:
    def emit(graph: OnnxGraph, result: Tensor, *rest: Any, **options: Any) -> Name:
        return filled(graph, value, result.shape, result.dtype)

    return emit


def _number(graph: OnnxGraph, result: Tensor, value: float, **options: Any) -> Name:
    return graph.scalar(value, result.dtype)


def _range(graph: OnnxGraph, result: Tensor, *limits: float, **options: Any) -> Name:
    return graph.constant(torch.arange(*limits, dtype=result.dtype))


OPERATORS: dict[Any, Callable[..., Any]] = {
    AFTER: _after,
    aten._unsafe_view.default: _reshape,
    aten._efficientzerotensor.default: _of(0),
    aten.arange.default: _range,
    aten.arange.start: _range,
    aten.arange.start_step: _range,
    aten.cat.default: _join,
    aten.constant_pad_nd.default: _pad,
    aten.embedding.default: _lookup,
    aten.embedding_dense_backward.default: _lookup_backward,
    aten.empty.memory_format: _of(0),
    aten.empty_like.default: _of(0),
    aten.empty_permuted.default: _of(0),
    aten.empty_strided.default: _of(0),
    aten.expand.default: _expand,
    aten.flip.default: _flip,
    aten.full.default: _full,
    aten.full_like.default: _full,
    aten.gather.default: _gather,
    aten.index_add.default: _index_add,
    aten.index_select.default: _index_select,
    aten.new_empty.default: _of(0),
    aten.new_empty_strided.default: _of(0),
    aten.new_full.default: _of_shape,
    aten.new_ones.default: _of(1),
    aten.new_zeros.default: _of(0),
    aten.ones.default: _of(1),
    aten.ones_like.default: _of(1),
    aten.permute.default: _permute,
    aten.permute_copy.default: _permute,
    aten.reflection_pad1d.default: _pad_with_own("reflect"),
    aten.reflection_pad2d.default: _pad_with_own("reflect"),
    aten.reflection_pad3d.default: _pad_with_own("reflect"),
    aten.repeat.default: _repeat,
    aten.replication_pad1d.default: _pad_with_own("edge"),
    aten.replication_pad2d.default: _pad_with_own("edge"),
    aten.replication_pad3d.default: _pad_with_own("edge"),
    aten.scalar_tensor.default: _number,
    aten.scatter.src: _scatter,
    aten.scatter.value: _scatter,
    aten.scatter_add.default: _scatter_add,
    aten.scatter_reduce.two: _scatter_reduce,
    aten.select.int: _select,
    aten.select_backward.default: _select_backward,
    aten.select_copy.int: _select,
    aten.slice.Tensor: _slice,
    aten.slice_backward.default: _slice_backward,
    aten.slice_copy.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.squeeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.tril.default: _triangle(upper=False),
    aten.triu.default: _triangle(upper=True),
    aten.unbind.int: _unbind,
    aten.unsqueeze.default: _reshape,
    aten.view.default: _reshape,
    aten.zeros.default: _of(0),
    aten.zeros_like.default: _of(0),
}
