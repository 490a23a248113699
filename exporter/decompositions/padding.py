"""Gradients of padding with what a tensor itself holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _padded_axes(x: Tensor, padding: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Each padded axis, and by how much before and behind it; ATen counts from the last."""
    for index in range(len(padding) // 2):
        yield x.dim() - 1 - index, padding[2 * index], padding[2 * index + 1]


def reflection_pad_backward(grad: Tensor, x: Tensor, padding: Sequence[int]) -> Tensor:
    """Margins are folded back over the places that they mirror, all but those at the ends."""
    if min(padding) < 0:
        return NotImplemented
    for axis, before, after in _padded_axes(x, padding):
        size = x.shape[axis]
        front = grad.narrow(axis, 0, before).flip(axis)
        back = grad.narrow(axis, before + size, after).flip(axis)
        inside = grad.narrow(axis, before, size)
        grad = inside + _at(front, axis, 1, size) + _at(back, axis, size - 1 - after, size)
    return grad


def replication_pad_backward(grad: Tensor, x: Tensor, padding: Sequence[int]) -> Tensor:
    """Margins are summed at the ends."""
    if min(padding) < 0:
        return NotImplemented
    for axis, before, after in _padded_axes(x, padding):
        size = x.shape[axis]
        front = grad.narrow(axis, 0, before).sum(axis, keepdim=True)
        back = grad.narrow(axis, before + size, after).sum(axis, keepdim=True)
        inside = grad.narrow(axis, before, size)
        grad = inside + _at(front, axis, 0, size) + _at(back, axis, size - 1, size)
    return grad


def _at(part: Tensor, axis: int, start: int, size: int) -> Tensor:
    """Zeros, with a part of them at `start` of an axis of `size`."""
    if not part.shape[axis]:
        shape = list(part.shape)
        shape[axis] = size
        return torch.zeros(shape, dtype=part.dtype)
    widths = [0, 0] * (part.dim() - 1 - axis) + [start, size - start - part.shape[axis]]
    return aten.constant_pad_nd(part, widths)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.reflection_pad1d_backward.default: reflection_pad_backward,
    aten.reflection_pad2d_backward.default: reflection_pad_backward,
    aten.reflection_pad3d_backward.default: reflection_pad_backward,
    aten.replication_pad1d_backward.default: replication_pad_backward,
    aten.replication_pad2d_backward.default: replication_pad_backward,
    aten.replication_pad3d_backward.default: replication_pad_backward,
}
