"""Rewrites of operators on images: their arguments as channels-last tensors, their results standing for (N, C, ...)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._decomp.decompositions import grid_sampler_2d

import frostline.exporter.tiles  # noqa: F401 - defines the operators of tiles
from frostline.exporter.rewrites import convolution, normalization, pooling, resampling, turning
from frostline.exporter.rewrites.arrangement import (
    Arranger,
    Deferred,
    Permuted,
    Tiled,
    TiledGradient,
    Value,
    image,
    optional_image,
)
from frostline.exporter.rewrites.windows import Windows

aten = torch.ops.aten


def _convolution(
    arrange: Arranger,
    x: Value,
    weight: Value | Tiled,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    held = (arrange.image(x), _kernel(arrange, weight), arrange.plain(bias))
    if transposed:
        y = convolution.transposed_convolution(*held, stride, padding, dilation, output_padding, groups)
        return image(y)
    return image(convolution.convolution(*held, stride, padding, dilation, groups))


def _convolution_backward(
    arrange: Arranger,
    grad: Value,
    x: Value,
    weight: Value | Tiled,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Any:
    held = (arrange.image(grad), arrange.image(x), _kernel(arrange, weight))
    grad_weight: Tensor | TiledGradient | None
    if transposed:
        grad_x, grad_weight, grad_bias = convolution.transposed_convolution_backward(
            *held, stride, padding, dilation, output_padding, groups, output_mask
        )
    else:
        grad_x, grad_weight, grad_bias = convolution.convolution_backward(
            *held, stride, padding, dilation, groups, output_mask
        )
    kernel = grad_weight if isinstance(grad_weight, TiledGradient) else optional_image(grad_weight)
    return optional_image(grad_x), kernel, grad_bias


def _kernel(arrange: Arranger, weight: Value | Tiled) -> Any:
    return weight if isinstance(weight, Tiled) else arrange.image(weight)


def _of_tiles(arrange: Arranger, tiles: Sequence[Tensor], size: Sequence[int]) -> Tiled:
    return Tiled(tiles, size)


def _tiles_of(arrange: Arranger, weight: Value | TiledGradient) -> Any:
    if isinstance(weight, TiledGradient):
        return weight.tiles
    places = arrange(weight, [*range(2, weight.dim()), 0, 1])
    tiles = places.reshape(-1, *places.shape[-2:])
    return [aten.select_copy(tiles, 0, index) for index in range(tiles.shape[0])]


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
    return image(y), mean, scale


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
    return optional_image(grad_x), grad_weight, grad_bias


def _batch_norm(arrange: Arranger, x: Value, *rest: Any) -> Any:
    y, *statistics = normalization.batch_norm(arrange.image(x), *rest)
    return image(y), *statistics


def _batch_norm_that_writes_nothing(arrange: Arranger, x: Value, *rest: Any) -> Any:
    return _batch_norm(arrange, x, *rest)[:3]


def _batch_norm_without_statistics(
    arrange: Arranger, x: Value, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> Any:
    return _batch_norm(arrange, x, weight, bias, None, None, *rest)[:3]


def _batch_norm_backward(arrange: Arranger, grad: Value, x: Value, *rest: Any) -> Any:
    grad_x, grad_weight, grad_bias = normalization.batch_norm_backward(
        arrange.image(grad), arrange.image(x), *rest
    )
    return optional_image(grad_x), grad_weight, grad_bias


def _max_pool(arrange: Arranger, x: Value, *geometry: Any) -> Any:
    held = _finite(arrange, x)
    windows = pooling.windows_of_pool(held.shape[1:-1], *geometry)
    return _with_places(held, windows, arrange.far_values)


def _finite(arrange: Arranger, x: Value) -> Tensor:
    """What maxima are taken of: their products do not take what is infinite."""
    held = arrange.image(x)
    return held.clamp(pooling.LOWEST, -pooling.LOWEST) if arrange.far_values else held


def _max_pool_backward(arrange: Arranger, grad: Value, x: Value, *rest: Any) -> Any:
    held = _finite(arrange, x)
    *geometry, _indices = rest
    windows = pooling.windows_of_pool(held.shape[1:-1], *geometry)
    return image(pooling.max_pool_backward(arrange.image(grad), held, windows, far=arrange.far_values))


def _average_pool(arrange: Arranger, x: Value, *geometry: Any) -> Any:
    held = arrange.image(x)
    windows, share = _averaging(held, *geometry)
    return image(pooling.average_pool(held, windows, share))


def _average_pool_backward(arrange: Arranger, grad: Value, x: Value, *geometry: Any) -> Any:
    held = arrange.image(x)
    windows, share = _averaging(held, *geometry)
    return image(pooling.average_pool_backward(arrange.image(grad), windows, share))


def _averaging(
    held: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> tuple[Windows, Tensor | float]:
    """The windows of ATen's average pooling, and each one's share."""
    windows = pooling.windows_of_pool(held.shape[1:-1], kernel, stride, padding, ceil_mode=ceil_mode)
    return windows, pooling.shares_of_pool(held, windows, padding, count_include_pad, divisor)


def _adaptive_average_pool(arrange: Arranger, x: Value, output: Sequence[int]) -> Any:
    held = arrange.image(x)
    windows = _dividing_windows(held, output)
    if windows is not None:
        return image(pooling.average_pool(held, windows))
    return image(resampling.resample(held, _averages(held.shape, output)))


def _adaptive_average_pool_backward(arrange: Arranger, grad: Value, x: Value) -> Any:
    windows = _dividing_windows(arrange.image(x), grad.shape[2:])
    if windows is not None:
        return image(pooling.average_pool_backward(arrange.image(grad), windows))
    maps = _averages(arrange.image(x).shape, grad.shape[2:])
    return image(resampling.resample_backward(arrange.image(grad), maps))


def _averages(shape: Sequence[int], output: Sequence[int]) -> list[resampling.AxisMap]:
    return [resampling.averages(size, count) for size, count in zip(shape[1:-1], output, strict=True)]


def _adaptive_max_pool(arrange: Arranger, x: Value, output: Sequence[int]) -> Any:
    held, far = _finite(arrange, x), arrange.far_values
    if math.prod(output) == 1:
        shape = [held.shape[0], held.shape[-1], *output]
        places = Deferred(lambda: pooling.whole_max_places(held).reshape(shape))
        return pooling.whole_max(held).reshape(shape), places
    windows = _dividing_windows(held, output)
    if windows is not None:
        return _with_places(held, windows, far)
    largest = image(pooling.adaptive_max_pool(held, output, far=far))
    return largest, _turned_when_read(lambda: pooling.adaptive_max_pool_places(held, output, far=far))


def _adaptive_max_pool_backward(arrange: Arranger, grad: Value, x: Value, indices: Any) -> Any:
    held, far = _finite(arrange, x), arrange.far_values
    if math.prod(grad.shape[2:]) == 1:
        return image(pooling.whole_max_backward(arrange.plain(grad).reshape(grad.shape[:2]), held))
    windows = _dividing_windows(held, grad.shape[2:])
    if windows is not None:
        return image(pooling.max_pool_backward(arrange.image(grad), held, windows, far=far))
    return image(pooling.adaptive_max_pool_backward(arrange.image(grad), held, far=far))


def _dividing_windows(held: Tensor, output: Sequence[int]) -> Windows | None:
    """Adaptive pooling as the usual one, where every axis divides."""
    spatial = held.shape[1:-1]
    if any(size % count for size, count in zip(spatial, output, strict=True)):
        return None
    return pooling.windows_of_pool(
        spatial, [size // count for size, count in zip(spatial, output, strict=True)]
    )


def _with_places(held: Tensor, windows: Windows, far: bool) -> tuple[Value, Deferred]:
    """The maximum of each window, and the place of it: for the backward pass ours finds it anew."""
    largest = image(pooling.max_pool(held, windows, far=far))
    return largest, _turned_when_read(lambda: pooling.max_pool_places(held, windows, far=far))


def _turned_when_read(compute: Callable[[], Tensor]) -> Deferred:
    def turned() -> Tensor:
        found = compute()
        return found.permute(0, found.dim() - 1, *range(1, found.dim() - 1))

    return Deferred(turned)


def _sampled_backward(
    arrange: Arranger,
    grad: Value,
    x: Value,
    grid: Value,
    interpolation: int,
    padding: int,
    align_corners: bool,
    mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """From PyTorch's decomposition of the forward pass: there is none of the backward one."""

    def sampled(x: Tensor, grid: Tensor) -> Tensor:
        return grid_sampler_2d(x, grid, interpolation, padding, align_corners)

    backward: Any = torch.func.vjp(sampled, arrange.plain(x), arrange.plain(grid))[1]
    grad_x, grad_grid = backward(arrange.plain(grad))
    return grad_x if mask[0] else None, grad_grid if mask[1] else None


def _resampled(kind: Callable[..., resampling.AxisMap], *, settings: int) -> Callable[..., Any]:
    """Enlarging and its like: an axis map of each axis's sizes, of `settings` arguments and of the axis's scale."""

    def rewrite(arrange: Arranger, x: Value, output: Sequence[int], *rest: Any) -> Any:
        maps = _enlargements(kind, x.shape[2:], output, rest[:settings], rest[settings:])
        return image(resampling.resample(arrange.image(x), maps))

    return rewrite


def _resampled_backward(kind: Callable[..., resampling.AxisMap], *, settings: int) -> Callable[..., Any]:
    def rewrite(
        arrange: Arranger, grad: Value, output: Sequence[int], size: Sequence[int], *rest: Any
    ) -> Any:
        maps = _enlargements(kind, size[2:], output, rest[:settings], rest[settings:])
        return image(resampling.resample_backward(arrange.image(grad), maps))

    return rewrite


def _enlargements(
    kind: Callable[..., resampling.AxisMap],
    spatial: Sequence[int],
    output: Sequence[int],
    settings: Sequence[Any],
    scales: Sequence[float | None],
) -> list[resampling.AxisMap]:
    axes = zip(spatial, output, scales or [None] * len(spatial), strict=True)
    return [kind(size, count, *settings, scale) for size, count, scale in axes]


def _padded(arrange: Arranger, x: Value, padding: Sequence[int], *, mirrored: bool) -> Any:
    return image(resampling.resample(arrange.image(x), _margins(x.shape[2:], padding, mirrored)))


def _padded_backward(
    arrange: Arranger, grad: Value, x: Value, padding: Sequence[int], *, mirrored: bool
) -> Any:
    maps = _margins(x.shape[2:], padding, mirrored)
    return image(resampling.resample_backward(arrange.image(grad), maps))


def _margins(spatial: Sequence[int], padding: Sequence[int], mirrored: bool) -> list[resampling.AxisMap]:
    # ATen names the last axis first.
    sides = list(zip(padding[::2], padding[1::2], strict=True))[::-1]
    axes = zip(spatial, sides, strict=True)
    return [resampling.extended(size, *side, mirrored=mirrored) for size, side in axes]


def _columns(arrange: Arranger, x: Value, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Any:
    """What each window sees, side by side: (N, C * places, windows)."""
    held = arrange.image(x)
    windows = Windows.over(held.shape[1:-1], kernel, stride, padding, dilation)
    taps = [tap.reshape(held.shape[0], -1, 1, held.shape[-1]) for tap in windows.cut(held)]
    seen = Permuted(torch.cat(taps, 2), [0, 3, 2, 1])
    return arrange.plain(seen).reshape(held.shape[0], -1, math.prod(windows.output))


def _columns_backward(
    arrange: Arranger, x: Value, output: Sequence[int], kernel: Any, dilation: Any, padding: Any, stride: Any
) -> Any:
    """The transpose: each window's values added to the pixels it saw."""
    windows = Windows.over(output, kernel, stride, padding, dilation)
    n = x.shape[0]
    apart = arrange.plain(x).reshape(n, -1, windows.taps, math.prod(windows.output))
    by_place = turning.permuted(apart, [2, 0, 3, 1])
    taps = (aten.select_copy(by_place, 0, index) for index in range(windows.taps))
    return image(windows.add(tap.reshape(n, *windows.output, -1) for tap in taps))


_UPSAMPLED: dict[str, tuple[Callable[..., resampling.AxisMap], int]] = {
    "_upsample_bicubic2d_aa": (partial(resampling.smooth, cubic=True), 1),
    "_upsample_bilinear2d_aa": (partial(resampling.smooth, cubic=False), 1),
    "_upsample_nearest_exact1d": (partial(resampling.nearest, exact=True), 0),
    "_upsample_nearest_exact2d": (partial(resampling.nearest, exact=True), 0),
    "_upsample_nearest_exact3d": (partial(resampling.nearest, exact=True), 0),
    "upsample_bicubic2d": (resampling.cubic, 1),
    "upsample_bilinear2d": (resampling.linear, 1),
    "upsample_linear1d": (resampling.linear, 1),
    "upsample_nearest1d": (resampling.nearest, 0),
    "upsample_nearest2d": (resampling.nearest, 0),
    "upsample_nearest3d": (resampling.nearest, 0),
    "upsample_trilinear3d": (resampling.linear, 1),
}
"""For each operator the map along an axis, and how many settings it takes before the scales."""

_PADS = [
    (f"{kind}_pad{axes}d", kind == "reflection")
    for kind in ("reflection", "replication")
    for axes in (1, 2, 3)
]

REWRITES: dict[Any, Callable[..., Any]] = {
    aten._adaptive_avg_pool2d.default: _adaptive_average_pool,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_average_pool_backward,
    aten._adaptive_avg_pool3d.default: _adaptive_average_pool,
    aten._adaptive_avg_pool3d_backward.default: _adaptive_average_pool_backward,
    aten._native_batch_norm_legit.no_stats: _batch_norm_without_statistics,
    aten._native_batch_norm_legit_functional.default: _batch_norm,
    aten.adaptive_max_pool2d.default: _adaptive_max_pool,
    aten.adaptive_max_pool2d_backward.default: _adaptive_max_pool_backward,
    aten.adaptive_max_pool3d.default: _adaptive_max_pool,
    aten.adaptive_max_pool3d_backward.default: _adaptive_max_pool_backward,
    aten.avg_pool2d.default: _average_pool,
    aten.avg_pool2d_backward.default: _average_pool_backward,
    aten.avg_pool3d.default: _average_pool,
    aten.avg_pool3d_backward.default: _average_pool_backward,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    aten.max_pool3d_with_indices.default: _max_pool,
    aten.max_pool3d_with_indices_backward.default: _max_pool_backward,
    aten.native_batch_norm.default: _batch_norm_that_writes_nothing,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
    aten.col2im.default: _columns_backward,
    aten.grid_sampler_2d_backward.default: _sampled_backward,
    aten.im2col.default: _columns,
    torch.ops.frostline.kernel.default: _of_tiles,
    torch.ops.frostline.kernel_tiles.default: _tiles_of,
    **{getattr(aten, name).default: _resampled(kind, settings=n) for name, (kind, n) in _UPSAMPLED.items()},
    **{
        getattr(aten, f"{name}_backward").default: _resampled_backward(kind, settings=n)
        for name, (kind, n) in _UPSAMPLED.items()
    },
    **{getattr(aten, name).default: partial(_padded, mirrored=mirrored) for name, mirrored in _PADS},
    **{
        getattr(aten, f"{name}_backward").default: partial(_padded_backward, mirrored=mirrored)
        for name, mirrored in _PADS
    },
}

IGNORES_PLACES = (
    aten.adaptive_max_pool2d_backward.default,
    aten.adaptive_max_pool3d_backward.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.max_pool3d_with_indices_backward.default,
)
"""What takes the places of maxima and finds them itself."""
