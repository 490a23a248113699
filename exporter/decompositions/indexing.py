"""Advanced indexing as the choice of places along one axis, and what else picks values by their places.

Indexed axes are moved together and joined, the indices into them too; then one `index_select` reads, and one `index_add` or
`index_copy` writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

Indices = Sequence[Tensor | None]


@dataclass(frozen=True)
class _Places:
    """Which places of a tensor are meant by indices into some of its axes.

    Attributes
    ----------
    order : list of int
        The tensor's axes, those that are indexed together.
    first : int
        Where those begin in that order.
    sizes : list of int
        Their lengths.
    places : Tensor
        Into the joined axis, (number,) int64.
    shape : tuple of int
        What the indices' shapes broadcast to.
    """

    order: list[int]
    first: int
    sizes: list[int]
    places: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor, indices: Indices) -> _Places:
        indexed = [axis for axis, each in enumerate(indices) if each is not None]
        rest = [axis for axis in range(x.dim()) if axis not in indexed]
        together = indexed[-1] - indexed[0] == len(indexed) - 1
        first = indexed[0] if together else 0
        order = [*rest[:first], *indexed, *rest[first:]]
        sizes = [x.shape[axis] for axis in indexed]
        given = torch.broadcast_tensors(*(each for each in indices if each is not None))
        joined = torch.zeros_like(given[0], dtype=torch.int64)
        for size, each in zip(sizes, given, strict=True):
            joined = joined * size + torch.where(each < 0, each + size, each)
        return cls(order, first, sizes, joined.reshape(-1), tuple(given[0].shape))

    def joined(self, x: Tensor) -> Tensor:
        """The tensor with its indexed axes in one."""
        moved = x if self.order == sorted(self.order) else x.permute(self.order)
        last = self.first + len(self.sizes)
        return moved.reshape([*moved.shape[: self.first], math.prod(self.sizes), *moved.shape[last:]])

    def picked(self, joined: Tensor) -> list[int]:
        """The shape of what the indices pick."""
        return [*joined.shape[: self.first], *self.shape, *joined.shape[self.first + 1 :]]

    def apart(self, joined: Tensor) -> Tensor:
        """The opposite of `joined`."""
        split = joined.reshape([*joined.shape[: self.first], *self.sizes, *joined.shape[self.first + 1 :]])
        if self.order == sorted(self.order):
            return split
        return split.permute([self.order.index(axis) for axis in range(len(self.order))])


def index(x: Tensor, indices: Indices) -> Tensor:
    """`x[indices]`, None standing for a whole axis; masks have results of no fixed shape."""
    if _has_mask(indices):
        return NotImplemented
    places = _Places.of(x, indices)
    joined = places.joined(x)
    return joined.index_select(places.first, places.places).reshape(places.picked(joined))


def index_put(
    x: Tensor, indices: Indices, values: Tensor, accumulate: bool = False, unsafe: bool = False
) -> Tensor:
    """`x` with `values` at `x[indices]`, or added there; a mask takes a single number."""
    if _has_mask(indices):
        return _masked_put(x, indices, values, accumulate)
    places = _Places.of(x, indices)
    joined = places.joined(x)
    given = values.expand(places.picked(joined)).reshape(
        [*joined.shape[: places.first], places.places.numel(), *joined.shape[places.first + 1 :]]
    )
    write = aten.index_add if accumulate else index_copy
    return places.apart(write(joined, places.first, places.places, given))


def _has_mask(indices: Indices) -> bool:
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices)


def _masked_put(x: Tensor, indices: Indices, values: Tensor, accumulate: bool) -> Tensor:
    mask = indices[0]
    if mask is None or any(each is not None for each in indices[1:]) or values.numel() != 1:
        return NotImplemented
    mask = mask.to(torch.bool).reshape([*mask.shape, *[1] * (x.dim() - mask.dim())])
    value = values.reshape([])
    return torch.where(mask, x + value if accumulate else value, x)


def index_copy(x: Tensor, axis: int, places: Tensor, values: Tensor) -> Tensor:
    """`x` with `values` at `places` along an axis: scattered over all of it."""
    if x.dim() == 0:
        return values.reshape([])
    shape = [1] * x.dim()
    shape[axis] = -1
    return aten.scatter(x, axis, places.reshape(shape).expand(values.shape), values)


def index_fill(x: Tensor, axis: int, places: Tensor, value: Any) -> Tensor:
    """`x` with one number at `places` along an axis."""
    shape = list(x.shape)
    shape[axis] = places.numel()
    number = value if isinstance(value, Tensor) else torch.full([], value, dtype=x.dtype)
    return index_copy(x, axis % x.dim(), places.reshape(-1), number.to(x.dtype).expand(shape))


def put(x: Tensor, places: Tensor, values: Tensor, accumulate: bool = False) -> Tensor:
    """`x` with values at places counted through all of it."""
    flat = index_put(x.reshape(-1), [places.reshape(-1)], values.reshape(-1), accumulate)
    return flat.reshape(x.shape)


def masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """`x` with the values of `source`, in their order, where `mask` is true."""
    mask = mask.expand(x.shape).reshape(-1)
    places = torch.clamp(torch.cumsum(mask.to(torch.int64), 0) - 1, 0, source.numel() - 1)
    given = source.reshape(-1).index_select(0, places)
    return torch.where(mask, given, x.reshape(-1)).reshape(x.shape)


def diagonal(x: Tensor, offset: int = 0, first: int = 0, second: int = 1) -> Tensor:
    """A diagonal of the matrices in two axes, as a last axis."""
    return index(*_of_diagonal(x, offset, first, second)[:2])


def diagonal_scatter(x: Tensor, values: Tensor, offset: int = 0, first: int = 0, second: int = 1) -> Tensor:
    """`x` with `values` on a diagonal."""
    moved, indices, back = _of_diagonal(x, offset, first, second)
    return index_put(moved, indices, values).permute(back)


def diagonal_backward(grad: Tensor, size: Sequence[int], offset: int, first: int, second: int) -> Tensor:
    """Zeros of `size` with `grad` on a diagonal."""
    zeros = torch.zeros(list(size), dtype=grad.dtype)
    return diagonal_scatter(zeros, grad, offset, first, second)


def _of_diagonal(x: Tensor, offset: int, first: int, second: int) -> tuple[Tensor, Indices, list[int]]:
    """`x` with the two axes last, the indices of the diagonal, and the order that puts the axes back."""
    first, second = first % x.dim(), second % x.dim()
    order = [*(axis for axis in range(x.dim()) if axis not in (first, second)), first, second]
    rows, columns = x.shape[first], x.shape[second]
    length = max(min(rows + min(offset, 0), columns - max(offset, 0)), 0)
    along = torch.arange(length)
    indices = [*[None] * (x.dim() - 2), along + max(-offset, 0), along + max(offset, 0)]
    return x.permute(order), indices, [order.index(axis) for axis in range(x.dim())]


def unfold(x: Tensor, axis: int, size: int, step: int) -> Tensor:
    """Windows of an axis, each in a last axis of its own."""
    if x.dim() == 0:
        return x.reshape([1])
    axis %= x.dim()
    places, count = _windows(x.shape[axis], size, step)
    windows = x.index_select(axis, places).reshape([*x.shape[:axis], count, size, *x.shape[axis + 1 :]])
    return windows.movedim(axis + 1, -1)


def unfold_backward(grad: Tensor, sizes: Sequence[int], axis: int, size: int, step: int) -> Tensor:
    """The sum of all windows' gradients at each place."""
    if not sizes:
        return grad.reshape([])
    axis %= len(sizes)
    places, _ = _windows(sizes[axis], size, step)
    windows = grad.movedim(-1, axis + 1).reshape([*sizes[:axis], places.numel(), *sizes[axis + 1 :]])
    return aten.index_add(torch.zeros(list(sizes), dtype=grad.dtype), axis, places, windows)


def _windows(length: int, size: int, step: int) -> tuple[Tensor, int]:
    """Which places each window sees, one window behind the other, and how many windows there are."""
    count = (length - size) // step + 1
    return (torch.arange(count)[:, None] * step + torch.arange(size)).reshape(-1), count


def as_strided(
    x: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    offset: int | None = None,
    *,
    recorded: Tensor | None = None,
) -> Tensor:
    """Places of the memory that `x` takes, or took when the operator was recorded, all of which must be its own."""
    found = _in_memory(x if recorded is None else recorded, size, stride, offset)
    if found is None:
        return NotImplemented
    order, places = found
    moved = x if order == sorted(order) else x.permute(order)
    if places is None:
        return moved.reshape(list(size))
    return moved.reshape(-1).index_select(0, places).reshape(list(size))


def as_strided_scatter(
    x: Tensor, values: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Tensor:
    """`x` with `values` at places of its memory."""
    found = _in_memory(x, size, stride, offset)
    if found is None:
        return NotImplemented
    order, places = found
    moved = x.permute(order)
    flat = moved.reshape(-1)
    written = values.reshape(-1) if places is None else index_copy(flat, 0, places, values.reshape(-1))
    return written.reshape(moved.shape).permute([order.index(axis) for axis in range(x.dim())])


def _in_memory(
    x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None
) -> tuple[list[int], Tensor | None] | None:
    """The order of axes that `x` lies in memory in, and which places of it are meant; None for all of them in order."""
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda axis: (-strides[axis], axis))
    start = 0 if offset is None else offset - x.storage_offset()
    last = start + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if not x.permute(order).is_contiguous() or start < 0 or last >= x.numel():
        return None
    if (
        start == 0
        and torch.empty(list(size), device="meta").stride() == tuple(stride)
        and last == x.numel() - 1
    ):
        return order, None
    meant = torch.tensor(start)
    for n, step in zip(size, stride, strict=True):
        meant = meant[..., None] + torch.arange(n) * step
    return order, meant.reshape(-1)


def roll(x: Tensor, shifts: Any, axes: Any = ()) -> Tensor:
    """What leaves an axis at one end enters at the other; without axes, the values in their order."""
    shifts, axes = ([each] if isinstance(each, int) else list(each) for each in (shifts, axes))
    if not axes:
        return roll(x.reshape(-1), shifts, [0]).reshape(x.shape)
    for shift, axis in zip(shifts, axes, strict=True):
        length = x.shape[axis]
        if length and shift % length:
            cut = length - shift % length
            x = torch.cat([x.narrow(axis, cut, length - cut), x.narrow(axis, 0, cut)], axis)
    return x


def select_scatter(x: Tensor, values: Tensor, axis: int, place: int) -> Tensor:
    """`x` with `values` at one place of an axis."""
    place %= x.shape[axis]
    return slice_scatter(x, values.unsqueeze(axis), axis, place, place + 1)


def slice_scatter(
    x: Tensor,
    values: Tensor,
    axis: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Tensor:
    """`x` with `values` in a slice of an axis."""
    length = x.shape[axis]
    begin, stop, _ = slice(start, end).indices(length)
    values = values.to(x.dtype)
    if step == 1:
        behind = max(begin, stop)
        parts = [x.narrow(axis, 0, begin), values, x.narrow(axis, behind, length - behind)]
        kept = [part for part in parts if part.shape[axis]]
        return kept[0] if len(kept) == 1 else torch.cat(kept, axis)
    return index_copy(x, axis % x.dim(), torch.arange(begin, stop, step), values)


def bucketize(x: Tensor, boundaries: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    """How many boundaries lie before each value of `x`."""
    return searchsorted(boundaries, x, out_int32=out_int32, right=right)


def searchsorted(
    sequence: Tensor,
    x: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """How many values of a sorted sequence (..., n), or (n,) for all, lie before each of `x` (..., m)."""
    if sorter is not None:
        return NotImplemented
    if sequence.dim() > 1:
        sequence = sequence.unsqueeze(-2)
    wanted = x.unsqueeze(-1)
    before = sequence <= wanted if right or side == "right" else sequence < wanted
    return before.sum(-1).to(torch.int32 if out_int32 else torch.int64)


def kthvalue(x: Tensor, k: int, axis: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The k-th smallest value along an axis, and its place."""
    if x.dim() == 0:
        return x.clone(), torch.zeros([], dtype=torch.int64)
    found = torch.topk(x, k, axis, largest=False)
    last = [each.narrow(axis, k - 1, 1) for each in found]
    values, places = last if keepdim else [each.squeeze(axis) for each in last]
    return values, places


def median(x: Tensor, axis: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The middle value along an axis, the lower of two, and its place."""
    length = x.shape[axis] if x.dim() else 1
    return kthvalue(x, (length + 1) // 2, axis, keepdim)


def median_of_all(x: Tensor) -> Tensor:
    """The middle value."""
    return median(x.reshape(-1), 0)[0]


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten._index_put_impl.default: index_put,
    aten._unsafe_index.Tensor: index,
    aten._unsafe_index_put.default: index_put,
    aten.as_strided.default: as_strided,
    aten.as_strided_copy.default: as_strided,
    aten.as_strided_scatter.default: as_strided_scatter,
    aten.bucketize.Tensor: bucketize,
    aten.diagonal.default: diagonal,
    aten.diagonal_backward.default: diagonal_backward,
    aten.diagonal_copy.default: diagonal,
    aten.diagonal_scatter.default: diagonal_scatter,
    aten.index.Tensor: index,
    aten.index_copy.default: index_copy,
    aten.index_fill.int_Scalar: index_fill,
    aten.index_fill.int_Tensor: index_fill,
    aten.index_put.default: index_put,
    aten.kthvalue.default: kthvalue,
    aten.masked_scatter.default: masked_scatter,
    aten.median.default: median_of_all,
    aten.median.dim: median,
    aten.put.default: put,
    aten.roll.default: roll,
    aten.searchsorted.Tensor: searchsorted,
    aten.select_scatter.default: select_scatter,
    aten.slice_scatter.default: slice_scatter,
    aten.unfold.default: unfold,
    aten.unfold_backward.default: unfold_backward,
    aten.unfold_copy.default: unfold,
}
