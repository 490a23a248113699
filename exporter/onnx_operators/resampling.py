"""Enlarging, shrinking and adaptive averaging: products with a matrix along each axis, since all of them are linear.

A matrix says of which places of the input, in which shares, a place of the result is made; its transpose hands gradients
back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from frostline.exporter.onnx_operators.graph import Name, OnnxGraph, Value
from frostline.exporter.rewrites.resampling import AxisMap, averages, linear, nearest

aten = torch.ops.aten

AxisKind = Callable[[int, int, float | None], AxisMap]
"""From the lengths of an axis before and after and the factor asked for, if any, to the map between them."""


def _dense(axis_map: AxisMap) -> Tensor:
    """The matrix of a map, (output, size) float32."""
    matrix = torch.zeros(len(axis_map.terms), axis_map.size)
    for row, terms in enumerate(axis_map.terms):
        for place, weight in terms:
            matrix[row, place] += weight
    return matrix


def resampled(graph: OnnxGraph, x: Value | Name, shape: Sequence[int], matrices: Sequence[Tensor]) -> Name:
    """Multiply each of the last axes of `x`, which has a shape, by a matrix (output, size)."""
    shape = list(shape)
    first = len(shape) - len(matrices)
    made: Value | Name = x
    for axis, matrix in enumerate(matrices, first):
        if matrix.shape[0] == matrix.shape[1] and torch.equal(matrix, torch.eye(len(matrix))):
            continue
        before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        if after == 1:
            rows = graph.reshaped(made, [before, shape[axis]])
            product = graph.add("MatMul", rows, graph.constant(matrix.t().contiguous()))
        else:
            rows = graph.reshaped(made, [before, shape[axis], after])
            product = graph.add("MatMul", graph.constant(matrix), rows)
        shape[axis] = len(matrix)
        made = graph.reshaped(product, shape)
    return made.name if isinstance(made, Value) else made


def _matrices(
    kind: AxisKind, before: Sequence[int], after: Sequence[int], factors: Sequence[float | None]
) -> list[Tensor]:
    return [
        _dense(kind(size, count, factor)) for size, count, factor in zip(before, after, factors, strict=True)
    ]


def adaptive_average(graph: OnnxGraph, x: Value, output: Sequence[int]) -> Name:
    """Means over spans of each of the last axes, which need not divide them."""
    sizes = x.shape[x.dim() - len(output) :]
    return resampled(graph, x, x.shape, [_dense(averages(s, n)) for s, n in zip(sizes, output, strict=True)])


def adaptive_average_backward(graph: OnnxGraph, grad: Value, sizes: Sequence[int]) -> Name:
    """Hand each mean's gradient to its span."""
    outputs = grad.shape[grad.dim() - len(sizes) :]
    matrices = [_dense(averages(s, n)).t().contiguous() for s, n in zip(sizes, outputs, strict=True)]
    return resampled(graph, grad, grad.shape, matrices)


def _enlarged(kind: AxisKind) -> Callable[..., Name]:
    def emit(
        graph: OnnxGraph, result: Tensor, x: Value, output: Sequence[int], *factors: float | None
    ) -> Name:
        matrices = _matrices(kind, x.shape[2:], output, _all(factors, output))
        return resampled(graph, x, x.shape, matrices)

    return emit


def _enlarged_backward(kind: AxisKind) -> Callable[..., Name]:
    def emit(
        graph: OnnxGraph,
        result: Tensor,
        grad: Value,
        output: Sequence[int],
        size: Sequence[int],
        *factors: float | None,
    ) -> Name:
        matrices = _matrices(kind, size[2:], output, _all(factors, output))
        return resampled(graph, grad, grad.shape, [matrix.t().contiguous() for matrix in matrices])

    return emit


def _all(factors: Sequence[float | None], output: Sequence[int]) -> Sequence[float | None]:
    return factors or [None] * len(output)


def _aligning(kind: Callable[[int, int, bool, float | None], AxisMap], backward: bool) -> Callable[..., Name]:
    """The same where ATen says, before the factors, whether the corners stay where they are."""

    def emit(graph: OnnxGraph, result: Tensor, x: Value, *given: Any) -> Name:
        sizes = given[: 2 if backward else 1]
        align, *factors = given[len(sizes) :]
        make = _enlarged_backward if backward else _enlarged
        return make(lambda size, count, factor: kind(size, count, align, factor))(
            graph, result, x, *sizes, *factors
        )

    return emit


def _nearest_exact(size: int, output: int, factor: float | None) -> AxisMap:
    """Each place repeats the one nearest to its centre."""
    step = size / output if factor is None else 1 / factor
    return AxisMap(size, [[(min(int((index + 0.5) * step), size - 1), 1.0)] for index in range(output)])


def _cubic(size: int, output: int, align_corners: bool, factor: float | None) -> AxisMap:
    """Cubic convolution of four neighbours (Keys 1981) with a = -0.75; the ends are repeated."""
    if align_corners:
        step, shift = (size - 1) / (output - 1) if output > 1 else 0.0, 0.0
    else:
        step, shift = size / output if factor is None else 1 / factor, 0.5
    terms = []
    for index in range(output):
        place = (index + shift) * step - shift
        low = math.floor(place)
        weights = [_keys(abs(place - neighbour)) for neighbour in range(low - 1, low + 3)]
        places = [min(max(neighbour, 0), size - 1) for neighbour in range(low - 1, low + 3)]
        terms.append(list(zip(places, weights, strict=True)))
    return AxisMap(size, terms)


def _antialiased(kernel: Callable[[float], float], reach: int) -> Callable[..., AxisMap]:
    """Each place a mean of all that lies under it, weighted by a kernel as wide as the axis shrinks."""

    def kind(size: int, output: int, align_corners: bool, factor: float | None) -> AxisMap:
        if align_corners:
            step = (size - 1) / (output - 1) if output > 1 else 0.0
        else:
            step = size / output if factor is None else 1 / factor
        width = max(step, 1.0)
        terms = []
        for index in range(output):
            centre = step * (index + 0.5)
            start = max(int(centre - width * reach + 0.5), 0)
            end = min(int(centre + width * reach + 0.5), size)
            weights = [kernel(abs(place - centre + 0.5) / width) for place in range(start, end)]
            total = sum(weights) or 1.0
            terms.append([(start + i, weight / total) for i, weight in enumerate(weights)])
        return AxisMap(size, terms)

    return kind


def _triangle(distance: float) -> float:
    return max(1 - distance, 0.0)


def _sharper(distance: float) -> float:
    return _keys(distance, -0.5)


def _keys(distance: float, a: float = -0.75) -> float:
    if distance <= 1:
        return ((a + 2) * distance - (a + 3)) * distance * distance + 1
    if distance < 2:
        return ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return 0.0


def _sampled(
    graph: OnnxGraph,
    result: Tensor,
    x: Value,
    grid: Value,
    interpolation: int,
    padding: int,
    align_corners: bool,
) -> Name:
    """Images read at places that are given as numbers from -1 to 1."""
    mode, rim = ("bilinear", "nearest", "bicubic")[interpolation], ("zeros", "border", "reflection")[padding]
    return graph.add("GridSample", x, grid, mode=mode, padding_mode=rim, align_corners=int(align_corners))


OPERATORS: dict[Any, Callable[..., Any]] = {
    aten._upsample_bicubic2d_aa.default: _aligning(_antialiased(_sharper, 2), backward=False),
    aten._upsample_bicubic2d_aa_backward.default: _aligning(_antialiased(_sharper, 2), backward=True),
    aten._upsample_bilinear2d_aa.default: _aligning(_antialiased(_triangle, 1), backward=False),
    aten._upsample_bilinear2d_aa_backward.default: _aligning(_antialiased(_triangle, 1), backward=True),
    aten._upsample_nearest_exact1d.default: _enlarged(_nearest_exact),
    aten._upsample_nearest_exact1d_backward.default: _enlarged_backward(_nearest_exact),
    aten._upsample_nearest_exact2d.default: _enlarged(_nearest_exact),
    aten._upsample_nearest_exact2d_backward.default: _enlarged_backward(_nearest_exact),
    aten._upsample_nearest_exact3d.default: _enlarged(_nearest_exact),
    aten._upsample_nearest_exact3d_backward.default: _enlarged_backward(_nearest_exact),
    aten.grid_sampler_2d.default: _sampled,
    aten.upsample_bicubic2d.default: _aligning(_cubic, backward=False),
    aten.upsample_bicubic2d_backward.default: _aligning(_cubic, backward=True),
    aten.upsample_bilinear2d.default: _aligning(linear, backward=False),
    aten.upsample_bilinear2d_backward.default: _aligning(linear, backward=True),
    aten.upsample_linear1d.default: _aligning(linear, backward=False),
    aten.upsample_linear1d_backward.default: _aligning(linear, backward=True),
    aten.upsample_nearest1d.default: _enlarged(nearest),
    aten.upsample_nearest1d_backward.default: _enlarged_backward(nearest),
    aten.upsample_nearest2d.default: _enlarged(nearest),
    aten.upsample_nearest2d_backward.default: _enlarged_backward(nearest),
    aten.upsample_nearest3d.default: _enlarged(nearest),
    aten.upsample_nearest3d_backward.default: _enlarged_backward(nearest),
    aten.upsample_trilinear3d.default: _aligning(linear, backward=False),
    aten.upsample_trilinear3d_backward.default: _aligning(linear, backward=True),
}
