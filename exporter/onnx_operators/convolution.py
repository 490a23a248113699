"""Convolution, and its backward as convolutions and products of matrices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frostline.exporter.onnx_operators.arranging import flipped, padded, sliced, transposed
from frostline.exporter.onnx_operators.graph import Name, OnnxGraph, Value
from frostline.exporter.onnx_operators.reducing import reduced

aten = torch.ops.aten


@dataclass(frozen=True)
class _Geometry:
    """How a convolution moves its kernel."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(
        cls,
        axes: int,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> _Geometry:
        # ATen lets one number stand for all axes.
        stride, padding, dilation = (
            tuple(given) * (axes // len(given)) for given in (stride, padding, dilation)
        )
        return cls(stride, padding, dilation, groups)

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "strides": list(self.stride),
            "pads": [*self.padding, *self.padding],
            "dilations": list(self.dilation),
            "group": self.groups,
        }

    def left_over(self, large: Sequence[int], small: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """The pixels at the end of each axis of the input that no window reaches."""
        return [
            size - ((count - 1) * s - 2 * p + d * (k - 1) + 1)
            for size, count, k, s, p, d in zip(
                large, small, kernel, self.stride, self.padding, self.dilation, strict=True
            )
        ]


def _convolution(
    graph: OnnxGraph,
    result: Tensor,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    is_transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Name:
    geometry = _Geometry.of(x.dim() - 2, stride, padding, dilation, groups)
    if is_transposed:
        return _spread(graph, geometry, x, weight, result.shape[2:], bias)
    return graph.add("Conv", x, weight, bias, **geometry.attributes)


def _convolution_backward(
    graph: OnnxGraph,
    result: Sequence[Tensor],
    grad: Value,
    x: Value,
    weight: Value,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    is_transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Name | None, Name | None, Name | None]:
    geometry = _Geometry.of(x.dim() - 2, stride, padding, dilation, groups)
    grad_x = grad_weight = grad_bias = None
    if output_mask[0]:
        if is_transposed:
            grad_x = _read_back(graph, geometry, grad, x, weight)
        else:
            grad_x = _input_gradient(graph, geometry, grad, x, weight)
    if output_mask[1]:
        large, small = (grad, x) if is_transposed else (x, grad)
        grad_weight = _kernel_gradient(graph, geometry, large, small, weight)
    if output_mask[2]:
        grad_bias = reduced(graph, "ReduceSum", grad, [0, *range(2, grad.dim())])
    return grad_x, grad_weight, grad_bias


def _read_back(graph: OnnxGraph, geometry: _Geometry, grad: Value, x: Value, weight: Value) -> Name:
    """The input's gradient of a transposed convolution, without the pixels at the end that no window reaches."""
    extra = geometry.left_over(grad.shape[2:], x.shape[2:], weight.shape[2:])
    ends = [size - e for size, e in zip(grad.shape[2:], extra, strict=True)]
    reached: Value | Name = grad
    if any(e >= s for e, s in zip(extra, geometry.stride, strict=True)):
        axes = range(2, grad.dim())
        reached = sliced(graph, grad, axes, [0] * len(ends), ends, [1] * len(ends))
    return graph.add("Conv", reached, weight, **geometry.attributes)


def _input_gradient(graph: OnnxGraph, geometry: _Geometry, grad: Value, x: Value, weight: Value) -> Name:
    """A convolution with the kernel turned around.

    Where there is less of the images than of the kernel, those are turned around, and back.
    """
    small = math.prod(grad.shape) + math.prod(x.shape) < math.prod(weight.shape)
    if set(geometry.stride) != {1} or geometry.groups > 1 or not small:
        return _spread(graph, geometry, grad, weight, x.shape[2:])
    spatial = range(2, x.dim())
    kernel = weight.shape[2:]
    padding = [d * (k - 1) - p for k, d, p in zip(kernel, geometry.dilation, geometry.padding, strict=True)]
    if min(padding) < 0:
        return _spread(graph, geometry, grad, weight, x.shape[2:])
    turned_kernel = transposed(graph, weight, weight.shape, [1, 0, *spatial])
    turned = flipped(graph, grad, spatial)
    pads = {"pads": [*padding, *padding], "dilations": list(geometry.dilation)}
    return flipped(graph, graph.add("Conv", turned, turned_kernel, **pads), spatial)


def _spread(
    graph: OnnxGraph,
    geometry: _Geometry,
    small: Value,
    weight: Value,
    size: Sequence[int],
    bias: Value | None = None,
) -> Name:
    """A transposed convolution to images of `size`.

    Pixels at the end that no window reaches are first those that the padding would cut off, then zeros.
    """
    extra = geometry.left_over(size, small.shape[2:], weight.shape[2:])
    # ONNX Runtime takes as much output padding as leaves the number of windows as it is.
    appended = [e if e < s else 0 for e, s in zip(extra, geometry.stride, strict=True)]
    rest = [e - a for e, a in zip(extra, appended, strict=True)]
    kept = [min(r, p) for r, p in zip(rest, geometry.padding, strict=True)]
    ends = [p - k for p, k in zip(geometry.padding, kept, strict=True)]
    attributes = {
        **geometry.attributes,
        "pads": [*geometry.padding, *ends],
        "output_padding": appended,
    }
    zeros = [r - k for r, k in zip(rest, kept, strict=True)]
    if not any(zeros):
        return graph.add("ConvTranspose", small, weight, bias, **attributes)
    made = graph.add("ConvTranspose", small, weight, **attributes)
    made = padded(graph, made, [0] * small.dim(), [0, 0, *zeros])
    if bias is None:
        return made
    return graph.add("Add", made, graph.reshaped(bias, [*bias.shape, *(1 for _ in zeros)]))


def _kernel_gradient(
    graph: OnnxGraph, geometry: _Geometry, large: Value, small: Value, weight: Value
) -> Name:
    """The sum over all windows of a value of `small` times the value of `large` under each place of the kernel.

    One product of matrices for each place: all windows at once would take memory for every place.
    """
    groups = geometry.groups
    rows, columns = small.shape[1] // groups, large.shape[1] // groups
    kernel = weight.shape[2:]
    spatial = range(2, large.dim())
    # Channels first, so that one product sums over samples and pixels.
    by_channel = [1, 0, *spatial]
    smalls = graph.reshaped(
        transposed(graph, small, small.shape, by_channel),
        [*([groups] if groups > 1 else []), rows, small.shape[0] * math.prod(small.shape[2:])],
    )
    turned = transposed(graph, large, large.shape, by_channel)
    extra = geometry.left_over(large.shape[2:], small.shape[2:], kernel)
    framed = padded(
        graph,
        turned,
        [0, 0, *geometry.padding],
        [0, 0, *(max(p - e, 0) for p, e in zip(geometry.padding, extra, strict=True))],
    )
    places = []
    for place in itertools.product(*(range(k) for k in kernel)):
        cut = _under(graph, geometry, framed, place, small.shape[2:], single=math.prod(kernel) == 1)
        places.append(_product(graph, groups, rows, columns, smalls, cut, small))
    shape = [groups * rows, columns, *kernel]
    if len(places) == 1:
        return graph.reshaped(places[0], shape)
    stacked = graph.add("Concat", *places, axis=0)
    return graph.reshaped(transposed(graph, stacked, [len(places), groups * rows, columns], [1, 2, 0]), shape)


def _under(
    graph: OnnxGraph,
    geometry: _Geometry,
    framed: Name,
    place: Sequence[int],
    count: Sequence[int],
    single: bool,
) -> Name:
    """The pixels under one place of the kernel, over all windows."""
    if single and set(geometry.stride) == {1} and not any(geometry.padding):
        return framed
    starts = [at * d for at, d in zip(place, geometry.dilation, strict=True)]
    ends = [start + (n - 1) * s + 1 for start, n, s in zip(starts, count, geometry.stride, strict=True)]
    axes = range(2, 2 + len(place))
    return sliced(graph, framed, axes, starts, ends, geometry.stride)


def _product(
    graph: OnnxGraph, groups: int, rows: int, columns: int, smalls: Name, cut: Name, small: Value
) -> Name:
    """One place of the kernel's gradient, (1, groups * rows, columns)."""
    pixels = small.shape[0] * math.prod(small.shape[2:])
    shape = [1, groups * rows, columns]
    if groups == 1:
        made = graph.add("Gemm", smalls, graph.reshaped(cut, [columns, pixels]), transB=1)
        return graph.reshaped(made, shape)
    cuts = graph.reshaped(cut, [groups, columns, pixels])
    if columns == 1:
        return graph.reshaped(reduced(graph, "ReduceSum", graph.add("Mul", smalls, cuts), [2]), shape)
    turned = graph.add("Transpose", cuts, perm=[0, 2, 1])
    return graph.reshaped(graph.add("MatMul", smalls, turned), shape)


OPERATORS: dict[Any, Callable[..., Any]] = {
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}
