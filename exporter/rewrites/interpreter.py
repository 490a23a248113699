"""Runs a traced graph again with its values held the way the runtime is fast.

PyTorch's graphs hold images as (N, C, *spatial); the runtime is fast when a pixel's channels lie side by side. So the
graph is interpreted once more: operators on images take and return `Permuted` values, computed by the rewrites of this
folder, and an image is only turned where an operator without a rewrite needs it the other way. In the same manner
transposed matrices and the kernels of convolutions stay as they are.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from frostline.exporter.rewrites import activation, convolution, normalization, pooling

aten = torch.ops.aten


class Permuted:
    """A value that stands for `tensor.permute(axes)` and stays as it is until somebody needs it turned."""

    def __init__(self, tensor: Tensor, axes: Sequence[int]) -> None:
        self.tensor = tensor
        self.axes = tuple(axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape it stands for."""
        return tuple(self.tensor.shape[axis] for axis in self.axes)

    def dim(self) -> int:
        """How many axes it has."""
        return len(self.axes)


Value = Tensor | Permuted


class Arranger:
    """Hands out values with their axes in the order asked for; each order is made once, however many ask."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, tuple[int, ...]], tuple[Value, Tensor]] = {}

    def __call__(self, value: Value, axes: Sequence[int]) -> Tensor:
        """`value.permute(axes)` as a plain tensor."""
        key = (id(value), tuple(axes))
        if key not in self._made:
            # The value is kept as well: its id must not be given to another one.
            self._made[key] = value, _arranged(value, axes)
        return self._made[key][1]

    def plain(self, value: Any) -> Any:
        """`value` as the tensor it stands for; anything else is left alone."""
        return self(value, range(value.dim())) if isinstance(value, Permuted) else value

    def image(self, value: Value) -> Tensor:
        """(N, C, *spatial) held as (N, *spatial, C), and the kernel of a convolution likewise."""
        return self(value, [0, *range(2, value.dim()), 1])


class RewritingInterpreter(fx.Interpreter):
    """Interprets a graph of ATen operators; trace `run` to get the rewritten graph."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self._arrange = Arranger()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Rewrite the operator if there is a rewrite, else hand it plain tensors."""
        if target is operator.getitem:
            return args[0][args[1]]
        rewrite = REWRITES.get(target)
        if rewrite is not None:
            result = rewrite(self._arrange, *args, **kwargs)
            if result is not NotImplemented:
                return result
        plain = pytree.tree_map(self._arrange.plain, (args, kwargs))
        return super().call_function(target, plain[0], plain[1])

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The graph's results as plain tensors."""
        return super().output(target, pytree.tree_map(self._arrange.plain, args), kwargs)


def _arranged(value: Value, axes: Sequence[int]) -> Tensor:
    if isinstance(value, Permuted):
        axes = [value.axes[axis] for axis in axes]
        value = value.tensor
    if list(axes) == list(range(value.dim())):
        return value
    # Moving axes of length 1 is free.
    long = [axis for axis in axes if value.shape[axis] != 1]
    free = long == sorted(long)
    return (
        value.reshape([value.shape[axis] for axis in axes]) if free else aten.permute_copy(value, list(axes))
    )


def _image(held: Tensor) -> Permuted:
    """(N, *spatial, C) standing for (N, C, *spatial)."""
    return Permuted(held, [0, held.dim() - 1, *range(1, held.dim() - 1)])


def _optional_image(held: Tensor | None) -> Permuted | None:
    return None if held is None else _image(held)


def _convolution(
    arrange: Arranger,
    x: Value,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    if transposed:
        return NotImplemented
    y = convolution.convolution(
        arrange.image(x), arrange.image(weight), arrange.plain(bias), stride, padding, dilation, groups
    )
    return _image(y)


def _convolution_backward(
    arrange: Arranger,
    grad: Value,
    x: Value,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Any:
    if transposed:
        return NotImplemented
    grad_x, grad_weight, grad_bias = convolution.convolution_backward(
        arrange.image(grad),
        arrange.image(x),
        arrange.image(weight),
        stride,
        padding,
        dilation,
        groups,
        output_mask,
    )
    return _optional_image(grad_x), _optional_image(grad_weight), grad_bias


def _group_norm(
    arrange: Arranger,
    x: Value,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    c: int,
    size: int,
    groups: int,
    eps: float,
) -> Any:
    y, mean, scale = normalization.group_norm(arrange.image(x), weight, bias, groups, eps)
    return _image(y), mean, scale


def _group_norm_backward(
    arrange: Arranger,
    grad: Value,
    x: Value,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    n: int,
    c: int,
    size: int,
    groups: int,
    output_mask: Sequence[bool],
) -> Any:
    grad_x, grad_weight, grad_bias = normalization.group_norm_backward(
        arrange.image(grad), arrange.image(x), mean, scale, weight, groups, output_mask
    )
    return _optional_image(grad_x), grad_weight, grad_bias


def _batch_norm(arrange: Arranger, x: Value, *rest: Any) -> Any:
    y, mean, scale = normalization.batch_norm(arrange.image(x), *rest)
    return _image(y), mean, scale


def _batch_norm_backward(arrange: Arranger, grad: Value, x: Value, *rest: Any) -> Any:
    grad_x, grad_weight, grad_bias = normalization.batch_norm_backward(
        arrange.image(grad), arrange.image(x), *rest
    )
    return _optional_image(grad_x), grad_weight, grad_bias


def _max_pool(arrange: Arranger, x: Value, *geometry: Any) -> Any:
    image = arrange.image(x)
    windows = pooling.windows_of_pool(image.shape[1:-1], *geometry)
    # The indices are for the backward pass, and ours finds the places anew.
    return _image(pooling.max_pool(image, windows)), image.new_empty(0, dtype=torch.int64)


def _max_pool_backward(arrange: Arranger, grad: Value, x: Value, *rest: Any) -> Any:
    image = arrange.image(x)
    *geometry, _indices = rest
    windows = pooling.windows_of_pool(image.shape[1:-1], *geometry)
    return _image(pooling.max_pool_backward(arrange.image(grad), image, windows))


def _average_pool(
    arrange: Arranger,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    if ceil_mode or divisor_override or (any(padding) and not count_include_pad):
        return NotImplemented
    image = arrange.image(x)
    windows = pooling.windows_of_pool(image.shape[1:-1], kernel, stride, padding)
    return _image(pooling.average_pool(image, windows))


def _average_pool_backward(
    arrange: Arranger,
    grad: Value,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Any:
    if ceil_mode or divisor_override or (any(padding) and not count_include_pad):
        return NotImplemented
    windows = pooling.windows_of_pool(x.shape[2:], kernel, stride, padding)
    return _image(pooling.average_pool_backward(arrange.image(grad), windows))


def _relu_backward(arrange: Arranger, grad: Value, output: Value, threshold: float) -> Any:
    if threshold:
        return NotImplemented
    if isinstance(grad, Permuted) or isinstance(output, Permuted):
        return _elementwise_relu_backward(arrange, grad, output)
    return activation.relu_backward(grad, output)


def _mean(arrange: Arranger, x: Value, axes: Sequence[int] | None, keepdim: bool = False) -> Any:
    if x.dim() < 3 or axes is None or sorted(axis % x.dim() for axis in axes) != list(range(2, x.dim())):
        return NotImplemented
    image = arrange.image(x)
    pixels = image.reshape(image.shape[0], -1, image.shape[-1])
    mean = pixels.sum(1) / pixels.shape[1]
    return mean.reshape(*mean.shape, *[1] * (x.dim() - 2)) if keepdim else mean


def _expand(arrange: Arranger, x: Value, size: Sequence[int], implicit: bool = False) -> Any:
    """The backward of a global mean: one value for all pixels of a channel."""
    if (
        len(size) != x.dim()
        or len(size) < 3
        or math.prod(x.shape[2:]) != 1
        or list(size[:2]) != list(x.shape[:2])
    ):
        return NotImplemented
    return _image(arrange.image(x).expand(size[0], *size[2:], size[1]))


def _permute(arrange: Arranger, x: Value, axes: Sequence[int]) -> Permuted:
    axes = [axis % x.dim() for axis in axes]
    if isinstance(x, Permuted):
        return Permuted(x.tensor, [x.axes[axis] for axis in axes])
    return Permuted(x, axes)


def _transpose(arrange: Arranger, x: Value, first: int = 0, second: int = 1) -> Permuted:
    axes = list(range(x.dim()))
    axes[first], axes[second] = axes[second], axes[first]
    return _permute(arrange, x, axes)


def _matrix_product(arrange: Arranger, a: Value, b: Value) -> Tensor:
    # A second factor that is held transposed may stay so.
    if isinstance(b, Permuted) and b.axes == (1, 0):
        return torch.mm(arrange.plain(a), b.tensor.t())
    return torch.mm(arrange.plain(a), arrange.plain(b))


def _matrix_product_with_bias(
    arrange: Arranger, bias: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """The portable `addmm` is ten times slower than its `mm`."""
    product = _matrix_product(arrange, a, b)
    product = product if alpha == 1 else product * alpha
    return product + (arrange.plain(bias) if beta == 1 else arrange.plain(bias) * beta)


def _detach(arrange: Arranger, x: Any) -> Any:
    return x


def _elementwise(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """The operator in whatever order its first permuted argument is held."""

    def rewrite(arrange: Arranger, *args: Any, **kwargs: Any) -> Any:
        axes = next((arg.axes for arg in args if isinstance(arg, Permuted)), None)
        if axes is None:
            return NotImplemented
        values = [arg for arg in args if isinstance(arg, Tensor | Permuted) and arg.dim()]
        if any(value.dim() != len(axes) for value in values):
            return NotImplemented
        inverse = [axes.index(axis) for axis in range(len(axes))]
        held = [arrange(arg, inverse) if any(arg is value for value in values) else arg for arg in args]
        return Permuted(function(*held, **kwargs), axes)

    return rewrite


_elementwise_relu_backward = _elementwise(activation.relu_backward)

_ELEMENTWISE = (
    aten.add.Tensor,
    aten.clone.default,
    aten.div.Scalar,
    aten.div.Tensor,
    aten.mul.Scalar,
    aten.mul.Tensor,
    aten.neg.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.sub.Tensor,
)

REWRITES: dict[Any, Callable[..., Any]] = {
    **{function: _elementwise(function) for function in _ELEMENTWISE},
    aten._native_batch_norm_legit.default: _batch_norm,
    aten.addmm.default: _matrix_product_with_bias,
    aten.avg_pool2d.default: _average_pool,
    aten.avg_pool2d_backward.default: _average_pool_backward,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten.detach.default: _detach,
    aten.expand.default: _expand,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    aten.mean.dim: _mean,
    aten.mm.default: _matrix_product,
    aten.native_batch_norm.default: _batch_norm,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
    aten.permute.default: _permute,
    aten.t.default: _transpose,
    aten.threshold_backward.default: _relu_backward,
    aten.transpose.int: _transpose,
}
