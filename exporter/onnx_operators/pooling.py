"""Pooling and its backward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frostline.exporter.onnx_operators.arranging import filled, padded, sliced
from frostline.exporter.onnx_operators.graph import Name, OnnxGraph, Value
from frostline.exporter.onnx_operators.resampling import adaptive_average, adaptive_average_backward
from frostline.exporter.rewrites.resampling import adaptive_spans

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
    """ONNX counts places through the whole tensor, PyTorch through each image."""
    axes = len(kernel)
    attributes = _attributes(axes, kernel, stride, padding)
    dilations, shape = _each(dilation, axes), _images(x.shape, axes)
    batch = x.name if x.dim() == len(shape) else graph.reshaped(x, shape)
    largest, counted = graph.add_several(
        "MaxPool", [batch], 2, dilations=dilations, ceil_mode=int(ceil_mode), **attributes
    )
    pixels = graph.scalar(math.prod(shape[2:]), torch.int64)
    places = graph.add("Mod", counted, pixels)
    if x.dim() != len(shape):
        largest, places = (graph.reshaped(each, result[0].shape) for each in (largest, places))
    graph.places_in_whole[places] = counted
    return [largest, places]


def _images(shape: Sequence[int], axes: int) -> Sequence[int]:
    """(N, C, *spatial), of a batch or of one image."""
    return shape if len(shape) == axes + 2 else [1, *shape]


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
    return _handed_to(graph, grad, x, indices, len(kernel))


def _handed_to(graph: OnnxGraph, grad: Value, x: Value, indices: Value, axes: int) -> Name:
    """Gradients added at places that are counted through each image, or through all of them."""
    count = math.prod(grad.shape)
    counted = graph.places_in_whole.get(indices.name)
    if counted is None:
        images, pixels = math.prod(x.shape[:-axes]), math.prod(x.shape[-axes:])
        starts = graph.constant(torch.arange(images)[:, None] * pixels)
        counted = graph.add("Add", graph.reshaped(indices, [images, count // images]), starts)
    flat = filled(graph, 0, [math.prod(x.shape)], grad.dtype)
    places, values = graph.reshaped(counted, [count]), graph.reshaped(grad, [count])
    added = graph.add("ScatterElements", flat, places, values, axis=0, reduction="add")
    return graph.reshaped(added, x.shape)


def _adaptive_max_pool_backward(axes: int) -> Callable[..., Name]:
    def emit(graph: OnnxGraph, result: Tensor, grad: Value, x: Value, indices: Value) -> Name:
        return _handed_to(graph, grad, x, indices, axes)

    return emit


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
) -> Name:
    axes = len(kernel)
    shape = _images(x.shape, axes)
    batch = x.name if x.dim() == len(shape) else graph.reshaped(x, shape)
    pool = _Pool.of(kernel, stride, padding, shape[2:], result.shape[-axes:])
    shares = pool.shares(count_include_pad, divisor)
    if shares is None:
        made = graph.add("AveragePool", batch, count_include_pad=1, pads=pool.rims, **pool.attributes)
    else:
        rims = [0, 0, *pool.rims[:axes]], [0, 0, *pool.rims[axes:]]
        means = graph.add("AveragePool", padded(graph, batch, *rims), **pool.attributes)
        made = graph.add("Mul", means, graph.constant(shares * math.prod(pool.kernel)))
    return made if x.dim() == len(shape) else graph.reshaped(made, result.shape)


@dataclass(frozen=True)
class _Pool:
    """Windows over images of `sizes` that are as many as `counts` along each axis."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    sizes: Sequence[int]
    counts: Sequence[int]

    @classmethod
    def of(
        cls,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        sizes: Sequence[int],
        counts: Sequence[int],
    ) -> _Pool:
        kernel, stride, padding = (_each(given, len(sizes)) for given in (kernel, stride or kernel, padding))
        return cls(kernel, stride, padding, sizes, counts)

    @property
    def tiles(self) -> bool:
        """Whether each pixel is in one window."""
        return self.stride == self.kernel and not any(self.padding) and not any(self.behind)

    @property
    def attributes(self) -> dict[str, Any]:
        return {"kernel_shape": self.kernel, "strides": self.stride}

    @property
    def rims(self) -> list[int]:
        """The padding before each axis, and what the last windows need of it behind each."""
        return [*self.padding, *(max(b, 0) for b in self.behind)]

    @property
    def behind(self) -> list[int]:
        """How far the last windows reach beyond each axis: less than nothing where they do not reach its end."""
        return [
            (count - 1) * s + k - p - size
            for k, s, p, size, count in zip(
                self.kernel, self.stride, self.padding, self.sizes, self.counts, strict=True
            )
        ]

    def shares(self, count_include_pad: bool, divisor: int | None) -> Tensor | None:
        """One over what PyTorch divides each window by, (1, 1, *counts); None where that is always the kernel's size."""
        within = all(b <= p for b, p in zip(self.behind, self.padding, strict=True))
        unpadded = not any(self.padding) and max(self.behind) <= 0
        if divisor is not None:
            return torch.full([1, 1, *self.counts], 1 / divisor)
        if unpadded or (count_include_pad and within):
            return None
        counted = torch.ones([])
        for index in range(len(self.sizes)):
            along = torch.tensor(self._counted(index, count_include_pad), dtype=torch.float32)
            counted = counted[..., None] * along
        return 1 / counted[None, None]

    def _counted(self, axis: int, count_include_pad: bool) -> list[int]:
        """How many places each window counts along one axis; those behind the padding never."""
        margin = self.padding[axis] if count_include_pad else 0
        spans = []
        for index in range(self.counts[axis]):
            start = index * self.stride[axis] - self.padding[axis]
            end = min(start + self.kernel[axis], self.sizes[axis] + margin)
            spans.append(end - max(start, -margin))
        return spans


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
) -> Name:
    """A transposed convolution of every channel with the window's share."""
    axes = len(kernel)
    shape, given = _images(x.shape, axes), _images(grad.shape, axes)
    pool = _Pool.of(kernel, stride, padding, shape[2:], given[2:])
    shares = pool.shares(count_include_pad, divisor)
    handed: Value | Name = grad if grad.dim() == len(given) else graph.reshaped(grad, given)
    if shares is not None:
        handed = graph.add("Mul", handed, graph.constant(shares))
    share = 1 / math.prod(pool.kernel) if shares is None else 1.0
    if pool.tiles:
        return graph.reshaped(_repeated(graph, pool, handed, given, share, grad.dtype), x.shape)
    weights = filled(graph, share, [shape[1], 1, *pool.kernel], grad.dtype)
    made = _spread(graph, pool, handed, weights, shape[1])
    return made if x.dim() == len(shape) else graph.reshaped(made, x.shape)


def _repeated(
    graph: OnnxGraph, pool: _Pool, grad: Value | Name, shape: Sequence[int], share: float, dtype: torch.dtype
) -> Name:
    """Repeat each pixel as often as a kernel is large."""
    shared = graph.add("Mul", grad, graph.scalar(share, dtype))
    apart = [*shape[:2], *(n for count in pool.counts for n in (count, 1))]
    repeated = [*shape[:2], *(n for pair in zip(pool.counts, pool.kernel, strict=True) for n in pair)]
    return graph.add("Expand", graph.reshaped(shared, apart), graph.integers(repeated))


def _spread(graph: OnnxGraph, pool: _Pool, grad: Value | Name, weights: Name, channels: int) -> Name:
    """Sum the windows at the places that they see; what the last of them see behind the image is cut off."""
    extra = [max(-b, 0) for b in pool.behind]
    # ONNX Runtime takes as much output padding as leaves the number of windows as it is.
    appended = [e if e < s else 0 for e, s in zip(extra, pool.stride, strict=True)]
    attributes = {**pool.attributes, "group": channels, "pads": pool.rims, "output_padding": appended}
    made = graph.add("ConvTranspose", grad, weights, **attributes)
    rest = [e - a for e, a in zip(extra, appended, strict=True)]
    return padded(graph, made, [0] * (2 + len(rest)), [0, 0, *rest])


def _adaptive_average_pool(graph: OnnxGraph, result: Tensor, x: Value, output: Sequence[int]) -> Name:
    axes = len(output)
    windows = _dividing_windows(x.shape[-axes:], result.shape[-axes:])
    if windows is None:
        return adaptive_average(graph, x, result.shape[-axes:])
    return _average_pool(graph, result, x, windows)


def _adaptive_average_pool_backward(axes: int) -> Callable[..., Name]:
    def emit(graph: OnnxGraph, result: Tensor, grad: Value, x: Value) -> Name:
        windows = _dividing_windows(x.shape[-axes:], grad.shape[-axes:])
        if windows is None:
            return adaptive_average_backward(graph, grad, x.shape[-axes:])
        return _average_pool_backward(graph, result, grad, x, windows, windows, [0], False, True, None)

    return emit


def _dividing_windows(sizes: Sequence[int], counts: Sequence[int]) -> list[int] | None:
    """Adaptive pooling as the usual one, where every axis divides."""
    if any(size % count for size, count in zip(sizes, counts, strict=True)):
        return None
    return [size // count for size, count in zip(sizes, counts, strict=True)]


def _adaptive_max_pool(graph: OnnxGraph, result: Sequence[Tensor], x: Value, output: Sequence[int]) -> Any:
    axes = len(output)
    windows = _dividing_windows(x.shape[-axes:], result[0].shape[-axes:])
    if windows is not None:
        return _max_pool(graph, result, x, windows, windows)
    shape = _images(x.shape, axes)
    spans = [
        adaptive_spans(size, count) for size, count in zip(shape[2:], result[0].shape[-axes:], strict=True)
    ]
    parts = [_largest_of(graph, x, shape, place) for place in itertools.product(*spans)]
    return [
        graph.reshaped(graph.add("Concat", *each, axis=2), result[0].shape)
        for each in zip(*parts, strict=True)
    ]


def _largest_of(
    graph: OnnxGraph, x: Value, shape: Sequence[int], spans: Sequence[tuple[int, int]]
) -> tuple[Name, Name]:
    """The largest value in one part of each image, and its place, both (N, C, 1)."""
    axes = range(2, len(shape))
    starts, ends = [begin for begin, _ in spans], [end for _, end in spans]
    batch = x.name if x.dim() == len(shape) else graph.reshaped(x, shape)
    part = sliced(graph, batch, axes, starts, ends, [1] * len(spans))
    pixels = math.prod(end - begin for begin, end in spans)
    flat = graph.reshaped(part, [*shape[:2], pixels])
    largest = graph.add("ReduceMax", flat, graph.integers([2]), keepdims=1)
    numbers = torch.arange(math.prod(shape[2:])).reshape(list(shape[2:]))
    seen = numbers[tuple(slice(begin, end) for begin, end in spans)].reshape(-1)
    place = graph.add("ArgMax", flat, axis=2, keepdims=1)
    return largest, graph.add("Gather", graph.constant(seen), place, axis=0)


def _unpool(axes: int) -> Callable[..., Name]:
    """Put each value at the place it was the largest at, counted through its image, and zeros elsewhere."""

    def emit(
        graph: OnnxGraph, result: Tensor, x: Value, indices: Value, size: Sequence[int], *rest: Any
    ) -> Name:
        images, count = math.prod(x.shape[:-axes]), math.prod(x.shape[-axes:])
        pixels = math.prod(size)
        places, values = (graph.reshaped(each, [images, count]) for each in (indices, x))
        zeros = filled(graph, 0, [images, pixels], x.dtype)
        return graph.reshaped(graph.add("ScatterElements", zeros, places, values, axis=1), result.shape)

    return emit


OPERATORS: dict[Any, Callable[..., Any]] = {
    aten._adaptive_avg_pool2d.default: _adaptive_average_pool,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_average_pool_backward(2),
    aten._adaptive_avg_pool3d.default: _adaptive_average_pool,
    aten._adaptive_avg_pool3d_backward.default: _adaptive_average_pool_backward(3),
    aten.adaptive_max_pool2d.default: _adaptive_max_pool,
    aten.adaptive_max_pool2d_backward.default: _adaptive_max_pool_backward(2),
    aten.adaptive_max_pool3d.default: _adaptive_max_pool,
    aten.adaptive_max_pool3d_backward.default: _adaptive_max_pool_backward(3),
    aten.avg_pool2d.default: _average_pool,
    aten.avg_pool2d_backward.default: _average_pool_backward,
    aten.avg_pool3d.default: _average_pool,
    aten.avg_pool3d_backward.default: _average_pool_backward,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    aten.max_pool3d_with_indices.default: _max_pool,
    aten.max_pool3d_with_indices_backward.default: _max_pool_backward,
    aten.max_unpool2d.default: _unpool(2),
    aten.max_unpool3d.default: _unpool(3),
}
