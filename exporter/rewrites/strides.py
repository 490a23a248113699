"""Operators that speak of strides, as what they mean for values: the runtime's tensors have none.

PyTorch holds images in two orders of memory, and some of its operators restate the strides of the other order. A traced
graph says which strides a value had; with them a strided window is a permutation of the value, or picks from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from frostline.exporter.rewrites.arrangement import Arranger, Value, inverse, permuted

aten = torch.ops.aten


def owner(node: fx.Node) -> fx.Node:
    """The node whose memory the value of `node` is a view of."""
    while isinstance(node.target, OpOverload) and node.target.is_view:
        node = node.all_input_nodes[0]
    return node


def _as_strided(
    arrange: Arranger,
    base: Value,
    base_like: Tensor,
    like: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    offset: int | None = None,
) -> Value:
    """A window (size) over the memory of `base`, whose strides `base_like` tells; `like` is the view it is taken of."""
    begin = int(like.storage_offset()) if offset is None else offset
    memory = _memory(arrange, base, base_like)
    order = _memory_order(size, stride)
    if begin == 0 and math.prod(size) == memory.numel() and _is_dense(size, stride):
        return permuted(memory.reshape([size[axis] for axis in order]), inverse(order))
    return torch.index_select(memory, 0, _places(size, stride, begin)).reshape(list(size))


def _as_strided_scatter(
    arrange: Arranger,
    base: Value,
    base_like: Tensor,
    like: Tensor,
    values: Value,
    size: Sequence[int],
    stride: Sequence[int],
    offset: int | None = None,
) -> Value:
    """`base` with `values` (size) written to such a window over its memory."""
    begin = int(like.storage_offset()) if offset is None else offset
    order = _memory_order(base_like.shape, base_like.stride())
    if begin == 0 and math.prod(size) == base_like.numel() and _is_dense(size, stride):
        memory = arrange(values, _memory_order(size, stride))
    else:
        memory = _memory(arrange, base, base_like)
        written = arrange.plain(values).reshape(-1)
        memory = memory.scatter(0, _places(size, stride, begin), written)
    return permuted(memory.reshape([base_like.shape[axis] for axis in order]), inverse(order))


def _memory(arrange: Arranger, base: Value, like: Tensor) -> Tensor:
    """All values in the order PyTorch had them in memory, on one axis."""
    if not _is_dense(like.shape, like.stride()):
        raise NotImplementedError(f"a strided window over memory with gaps: {like.shape}, {like.stride()}")
    return arrange(base, _memory_order(like.shape, like.stride())).reshape(-1)


def _memory_order(size: Sequence[int], stride: Sequence[int]) -> list[int]:
    """The axes from the one that changes slowest in memory to the one that changes fastest."""
    return sorted(range(len(size)), key=lambda axis: -stride[axis] if size[axis] != 1 else 0)


def _is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the values fill their memory without gaps or overlaps."""
    count = 1
    for axis in reversed(_memory_order(size, stride)):
        if size[axis] != 1 and stride[axis] != count:
            return False
        count *= size[axis]
    return True


def _places(size: Sequence[int], stride: Sequence[int], begin: int) -> Tensor:
    """Where in memory each value of a window lies, int64 on one axis."""
    places = torch.full((1,), begin, dtype=torch.int64)
    for length, step in zip(size, stride, strict=True):
        places = (places.reshape(-1, 1) + torch.arange(length) * step).reshape(-1)
    return places


STRIDED: dict[Any, Callable[..., Value]] = {
    aten.as_strided.default: _as_strided,
    aten.as_strided_scatter.default: _as_strided_scatter,
}
"""For each operator a function of an `Arranger`, of the memory's first owner with its strides, and of the arguments."""
