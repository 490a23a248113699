"""Rewrites of operators that rearrange, cut and join axes, on values that may be held in another order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from frostline.exporter.rewrites.arrangement import Arranger, Permuted, Value, held, inverse, permuted

aten = torch.ops.aten


def _permute(arrange: Arranger, x: Value, axes: Sequence[int]) -> Value:
    tensor, places = held(x)
    return permuted(tensor, [places[axis] for axis in axes])


def _transpose(arrange: Arranger, x: Value, first: int = 0, second: int = 1) -> Value:
    if x.dim() < 2:
        return x
    axes = list(range(x.dim()))
    axes[first], axes[second] = axes[second], axes[first]
    return _permute(arrange, x, axes)


def _unsqueeze(arrange: Arranger, x: Value, axis: int) -> Value:
    axis %= x.dim() + 1
    if isinstance(x, Permuted):
        places = [*x.axes[:axis], x.dim(), *x.axes[axis:]]
        return permuted(x.tensor.reshape(*x.tensor.shape, 1), places)
    # A view costs nothing in the runtime, `unsqueeze` a copy.
    return x.reshape(*x.shape[:axis], 1, *x.shape[axis:])


def _squeeze(arrange: Arranger, x: Value, axis: int | Sequence[int]) -> Value:
    asked = [axis] if isinstance(axis, int) else axis
    dropped = {place % x.dim() for place in asked if x.shape[place] == 1}
    return _without(x, dropped)


def _without(x: Value, dropped: set[int]) -> Value:
    """The value without some of its axes, of length 1."""
    tensor, places = held(x)
    kept = [place for axis, place in enumerate(places) if axis not in dropped]
    in_order = sorted(kept)
    tensor = tensor.reshape([tensor.shape[place] for place in in_order])
    return permuted(tensor, [in_order.index(place) for place in kept])


def _view(arrange: Arranger, x: Value, size: Sequence[int]) -> Value:
    """A view splits axes, or joins those that lie together, in the order the value is held."""
    if not isinstance(x, Permuted):
        return x.reshape(list(size))
    parts = _matching_axes(x.shape, _resolved(x, size))
    groups = [[x.axes[axis] for axis in axes if x.shape[axis] != 1] for axes, _ in parts]
    if not all(_lie_together(group, x.tensor) for group in groups):
        return arrange.plain(x).reshape(list(size))
    order = sorted(range(len(parts)), key=lambda index: groups[index][:1] or [x.dim()])
    starts, start = {}, 0
    for index in order:
        starts[index], start = start, start + len(parts[index][1])
    tensor = x.tensor.reshape([length for index in order for length in parts[index][1]])
    axes = [starts[index] + offset for index, (_, sizes) in enumerate(parts) for offset in range(len(sizes))]
    return permuted(tensor, axes)


def _resolved(x: Value, size: Sequence[int]) -> list[int]:
    known = math.prod(length for length in size if length != -1)
    return [math.prod(x.shape) // known if length == -1 else length for length in size]


def _matching_axes(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of axes of `old`, each with the sizes of `new` that hold the same values."""
    parts: list[tuple[list[int], list[int]]] = []
    sizes = list(new)
    for axis, length in enumerate(old):
        if not parts or _are_even(parts[-1], old):
            parts.append(([], []))
        axes, taken = parts[-1]
        axes.append(axis)
        while (
            sizes
            and math.prod(taken) * sizes[0] <= math.prod(old[a] for a in axes)
            and (
                math.prod(taken) < math.prod(old[a] for a in axes)
                or (sizes[0] == 1 and length == 1 and not taken)
            )
        ):
            taken.append(sizes.pop(0))
    parts[-1][1].extend(sizes)
    return parts


def _are_even(part: tuple[list[int], list[int]], old: Sequence[int]) -> bool:
    return math.prod(old[axis] for axis in part[0]) == math.prod(part[1])


def _lie_together(places: Sequence[int], tensor: Tensor) -> bool:
    """Whether nothing lies between them and they are in order."""
    return all(
        a < b and all(tensor.shape[between] == 1 for between in range(a + 1, b))
        for a, b in itertools.pairwise(places)
    )


def _same(arrange: Arranger, x: Value, *, memory_format: Any = None) -> Value:
    """Values are never changed where they lie, so one is as good as its copy."""
    return x


def _converted(
    arrange: Arranger, x: Value, *, dtype: torch.dtype | None = None, memory_format: Any = None, **where: Any
) -> Value:
    tensor, places = held(x)
    return x if dtype in (None, tensor.dtype) else permuted(tensor.to(dtype), places)


def _overwritten(arrange: Arranger, old: Value, new: Value, non_blocking: bool = False) -> Any:
    """What is copied over a value takes its place."""
    (before, _), (tensor, places) = held(old), held(new)
    if tuple(old.shape) == tuple(new.shape):
        return new if before.dtype == tensor.dtype else permuted(tensor.to(before.dtype), places)
    return arrange.plain(new).to(before.dtype).expand(list(old.shape))


def _view_with_strides(arrange: Arranger, x: Value, size: Sequence[int], stride: Sequence[int]) -> Value:
    return _view(arrange, x, size)


def _empty(arrange: Arranger, *args: Any, **kwargs: Any) -> Tensor:
    """The size is the first argument that is a list."""
    size = next(arg for arg in args if isinstance(arg, list | tuple))
    return torch.empty(size, dtype=kwargs.get("dtype"))


def _slice(
    arrange: Arranger,
    x: Value,
    axis: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Value:
    tensor, places = held(x)
    place = places[axis]
    length = tensor.shape[place]
    begin, stop, _ = slice(start, end).indices(length)
    return permuted(_cut(tensor, place, begin, stop, step), places)


def _cut(tensor: Tensor, axis: int, begin: int, end: int, step: int = 1) -> Tensor:
    """A slice; along the last axis in the widest runs there are, as the runtime copies single values there."""
    length = tensor.shape[axis]
    if (begin, end, step) == (0, length, 1):
        return tensor
    run = math.gcd(begin, end, length)
    if axis < tensor.dim() - 1 or step != 1 or run == 1:
        return aten.slice_copy(tensor, axis, begin, end, step)
    runs = tensor.reshape(*tensor.shape[:-1], length // run, run)
    return aten.slice_copy(runs, axis, begin // run, end // run).reshape(*tensor.shape[:-1], end - begin)


def _padded(tensor: Tensor, axis: int, before: int, after: int) -> Tensor:
    """Zeros before and after; along the last axis in the widest runs there are."""
    length = tensor.shape[axis]
    last = axis == tensor.dim() - 1
    run = math.gcd(length, before, after) if last else 1
    runs = tensor.reshape(*tensor.shape[:-1], length // run, run) if last else tensor
    margins = [0, 0] * (runs.dim() - 1 - axis) + [before // run, after // run]
    shape = [*tensor.shape[:axis], before + length + after, *tensor.shape[axis + 1 :]]
    return F.pad(runs, margins).reshape(shape)


def _slice_backward(
    arrange: Arranger, grad: Value, size: Sequence[int], axis: int, start: int, end: int, step: int
) -> Any:
    if step != 1:
        return NotImplemented
    begin, stop, _ = slice(start, end).indices(size[axis])
    tensor, places = held(grad)
    return permuted(_padded(tensor, places[axis], begin, size[axis] - stop), places)


def _constant_pad(arrange: Arranger, x: Value, pad: Sequence[int], fill: float = 0) -> Value:
    """Margins, which the runtime does not know negative: they are cut off."""
    tensor, places = held(x)
    margins = [0] * (2 * tensor.dim())
    sides = zip(pad[::2], pad[1::2], strict=True)
    for axis, (before, after) in zip(reversed(range(x.dim())), sides, strict=False):
        place = places[axis]
        tensor = _cut(tensor, place, max(-before, 0), tensor.shape[place] + min(after, 0))
        start = 2 * (tensor.dim() - 1 - place)
        margins[start : start + 2] = max(before, 0), max(after, 0)
    return permuted(aten.constant_pad_nd(tensor, margins, fill) if any(margins) else tensor, places)


def _slice_scatter(
    arrange: Arranger,
    x: Value,
    part: Value,
    axis: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    if step != 1:
        return NotImplemented
    tensor, places = held(x)
    place = places[axis]
    length = tensor.shape[place]
    begin, stop, _ = slice(start, end).indices(length)
    middle = arrange(part, inverse(places))
    parts = [_cut(tensor, place, 0, begin), middle, _cut(tensor, place, stop, length)]
    return permuted(torch.cat([each for each in parts if each.shape[place]], place), places)


def _select_scatter(arrange: Arranger, x: Value, part: Value, axis: int, index: int) -> Any:
    axis %= x.dim()
    index %= x.shape[axis]
    return _slice_scatter(arrange, x, _unsqueeze(arrange, part, axis), axis, index, index + 1)


def _diagonal_scatter(
    arrange: Arranger, x: Value, part: Value, offset: int = 0, first: int = 0, second: int = 1
) -> Value:
    first, second = first % x.dim(), second % x.dim()
    order = [*(axis for axis in range(x.dim()) if axis not in (first, second)), first, second]
    matrices, values = arrange(x, order), arrange.plain(part)
    rows, columns = matrices.shape[-2:]
    length = values.shape[-1]
    before = max(-offset, 0), max(offset, 0)
    around = [before[1], columns - before[1] - length, before[0], rows - before[0] - length]
    eye = torch.eye(length, dtype=matrices.dtype)
    kept = 1 - F.pad(eye, around)
    return permuted(matrices * kept + F.pad(values.unsqueeze(-1) * eye, around), inverse(order))


def _select(arrange: Arranger, x: Value, axis: int, index: int) -> Value:
    tensor, places = held(x)
    place = places[axis]
    index %= tensor.shape[place]
    part = Permuted(_cut(tensor, place, index, index + 1), places)
    return _without(part, {axis % x.dim()})


def _select_backward(arrange: Arranger, grad: Value, size: Sequence[int], axis: int, index: int) -> Value:
    axis %= len(size)
    tensor, places = held(grad)
    # The axis that was selected from becomes the one before what it was held with.
    target = next((place for place in places[axis:]), tensor.dim())
    spread = tensor.reshape(*tensor.shape[:target], 1, *tensor.shape[target:])
    moved = [place + (place >= target) for place in places]
    index %= size[axis]
    padded = _padded(spread, target, index, size[axis] - index - 1)
    return permuted(padded, [*moved[:axis], target, *moved[axis:]])


def _split(arrange: Arranger, x: Value, size: int | Sequence[int], axis: int = 0) -> list[Value]:
    length = x.shape[axis]
    if isinstance(size, int):
        ends = [min(begin + size, length) for begin in range(0, length, size)]
    else:
        ends = [sum(size[: index + 1]) for index in range(len(size))]
    return [_slice(arrange, x, axis, begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def _unbind(arrange: Arranger, x: Value, axis: int = 0) -> list[Value]:
    return [_select(arrange, x, axis, index) for index in range(x.shape[axis])]


def _concatenate(arrange: Arranger, values: Sequence[Value], axis: int = 0) -> Any:
    order = next((value.axes for value in values if isinstance(value, Permuted)), None)
    if order is None or any(value.dim() != len(order) for value in values):
        return NotImplemented
    return permuted(torch.cat([arrange(value, inverse(order)) for value in values], order[axis]), order)


def _stack(arrange: Arranger, values: Sequence[Value], axis: int = 0) -> Any:
    plain = [arrange.plain(value) for value in values]
    axis %= plain[0].dim() + 1
    shape = [*plain[0].shape[:axis], 1, *plain[0].shape[axis:]]
    return torch.cat([value.reshape(shape) for value in plain], axis)


def _pixel_shuffle(arrange: Arranger, x: Value, factor: int) -> Value:
    n, c, h, w = x.shape
    view = _view(arrange, x, [n, c // factor**2, factor, factor, h, w])
    # Held with the channels last, which the next operator wants.
    out = arrange(view, [0, 4, 2, 5, 3, 1]).reshape(n, h * factor, w * factor, c // factor**2)
    return permuted(out, [0, 3, 1, 2])


def _pixel_unshuffle(arrange: Arranger, x: Value, factor: int) -> Value:
    n, c, h, w = x.shape
    image = arrange(x, [0, 2, 3, 1]).reshape(n, h // factor, factor, w // factor, factor, c)
    out = arrange(image, [0, 1, 3, 5, 2, 4]).reshape(n, h // factor, w // factor, c * factor**2)
    return permuted(out, [0, 3, 1, 2])


def _channel_shuffle(arrange: Arranger, x: Value, groups: int) -> Value:
    image = arrange.image(x)
    split = image.reshape(*image.shape[:-1], groups, -1)
    axes = list(range(image.dim() - 1))
    turned = arrange(split, [*axes, len(axes) + 1, len(axes)]).reshape(image.shape)
    return permuted(turned, [0, image.dim() - 1, *range(1, image.dim() - 1)])


REWRITES: dict[Any, Callable[..., Any]] = {
    aten._unsafe_view.default: _view,
    aten.cat.default: _concatenate,
    aten.channel_shuffle.default: _channel_shuffle,
    aten._reshape_alias.default: _view_with_strides,
    aten._to_copy.default: _converted,
    aten.alias.default: _same,
    aten.clone.default: _same,
    aten.constant_pad_nd.default: _constant_pad,
    aten.copy.default: _overwritten,
    aten.detach.default: _same,
    aten.diagonal_scatter.default: _diagonal_scatter,
    aten.empty_permuted.default: _empty,
    aten.empty_strided.default: _empty,
    aten.lift_fresh_copy.default: _same,
    aten.permute.default: _permute,
    aten.pixel_shuffle.default: _pixel_shuffle,
    aten.pixel_unshuffle.default: _pixel_unshuffle,
    aten.select.int: _select,
    aten.select_backward.default: _select_backward,
    aten.select_scatter.default: _select_scatter,
    aten.slice.Tensor: _slice,
    aten.slice_backward.default: _slice_backward,
    aten.slice_scatter.default: _slice_scatter,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.stack.default: _stack,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.unbind.int: _unbind,
    aten.unsqueeze.default: _unsqueeze,
    aten.view.default: _view,
}
