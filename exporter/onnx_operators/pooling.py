"""Pooling and its backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from frostline.exporter.onnx_operators.arranging import filled
from frostline.exporter.onnx_operators.graph import Name, OnnxGraph, Value

aten = torch.ops.aten


def _each(given: Sequence[int], axes: int) -> list[int]:
    """ATen lets one number stand for all axes."""
    return list(given) * (axes // len(given))


def _attributes(
    axes: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> dict[str, Any]:
    width = _each(padding, axes)
    return {
        "kernel_shape": _each(kernel, axes),
        "strides": _each(stride or kernel, axes),
        "pads": [*width, *width],
    }


def _max_pool(
    graph: OnnxGraph,
    result: Sequence[Tensor],
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Sequence[Name]:
    axes = x.dim() - 2
    attributes = _attributes(axes, kernel, stride, padding)
    dilations = _each(dilation, axes)
    return graph.add_several("MaxPool", [x], 2, dilations=dilations, ceil_mode=int(ceil_mode), **attributes)


def _max_pool_backward(
    graph: OnnxGraph,
    result: Tensor,
    grad: Value,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Value,
) -> Name:
    """ONNX counts places through the whole tensor: the gradients are added at them."""
    count = math.prod(grad.shape)
    flat = filled(graph, 0, [math.prod(x.shape)], grad.dtype)
    places, values = graph.reshaped(indices, [count]), graph.reshaped(grad, [count])
    added = graph.add("ScatterElements", flat, places, values, axis=0, reduction="add")
    return graph.reshaped(added, x.shape)


def _average_pool(
    graph: OnnxGraph,
    result: Tensor,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Any:
    if divisor is not None:
        return NotImplemented
    attributes = _attributes(x.dim() - 2, kernel, stride, padding)
    included = int(count_include_pad)
    return graph.add("AveragePool", x, count_include_pad=included, ceil_mode=int(ceil_mode), **attributes)


def _average_pool_backward(
    graph: OnnxGraph,
    result: Tensor,
    grad: Value,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Any:
    """A transposed convolution of every channel with the window's share."""
    if ceil_mode or divisor is not None or (any(padding) and not count_include_pad):
        return NotImplemented
    axes, channels = x.dim() - 2, x.shape[1]
    attributes = _attributes(axes, kernel, stride, padding)
    sizes = attributes.pop("kernel_shape")
    shares = filled(graph, 1 / math.prod(sizes), [channels, 1, *sizes], grad.dtype)
    extra = [
        size - ((count - 1) * s - 2 * p + k)
        for size, count, s, p, k in zip(
            x.shape[2:], grad.shape[2:], attributes["strides"], _each(padding, axes), sizes, strict=True
        )
    ]
    return graph.add("ConvTranspose", grad, shares, group=channels, output_padding=extra, **attributes)


def _adaptive_average_pool(graph: OnnxGraph, result: Tensor, x: Value, output: Sequence[int]) -> Any:
    windows = _dividing_windows(x.shape[2:], result.shape[2:])
    return NotImplemented if windows is None else _average_pool(graph, result, x, windows)


def _adaptive_average_pool_backward(graph: OnnxGraph, result: Tensor, grad: Value, x: Value) -> Any:
    windows = _dividing_windows(x.shape[2:], grad.shape[2:])
    if windows is None:
        return NotImplemented
    return _average_pool_backward(graph, result, grad, x, windows, windows, [0], False, True, None)


def _dividing_windows(sizes: Sequence[int], counts: Sequence[int]) -> list[int] | None:
    """Adaptive pooling as the usual one, where every axis divides."""
    if any(size % count for size, count in zip(sizes, counts, strict=True)):
        return None
    return [size // count for size, count in zip(sizes, counts, strict=True)]


OPERATORS: dict[Any, Callable[..., Any]] = {
    aten._adaptive_avg_pool2d.default: _adaptive_average_pool,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_average_pool_backward,
    aten.avg_pool2d.default: _average_pool,
    aten.avg_pool2d_backward.default: _average_pool_backward,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
}
