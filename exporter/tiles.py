"""Large kernels of convolutions, held and passed to programs one place of the kernel at a time.

A program that takes a kernel whole needs memory for its whole gradient and for what the optimizer makes of it. Held with
the places of the kernel first, (*kernel, O, C), each place is a matrix of its own in the same memory: a tile. Programs
take the tiles as separate arguments, and no value in them is larger than one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

SEPARATOR = "#"
"""Between the name of a tensor and the number of a tile; no name of a tensor contains it."""


def tile_name(name: str, index: int) -> str:
    """The name of one tile of a tensor."""
    return f"{name}{SEPARATOR}{index}"


def split_name(name: str) -> tuple[str, int | None]:
    """The tensor's name and the tile's number; None where the whole tensor is meant."""
    whole, _, index = name.partition(SEPARATOR)
    return whole, int(index) if index else None


def tiles_of(tensor: Tensor) -> list[Tensor]:
    """Views of the tiles (O, C) of a tensor held as (*kernel, O, C)."""
    return list(tensor.view(-1, *tensor.shape[-2:]))


def pick(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of a name, or the view of the tile that it means."""
    whole, index = split_name(name)
    return tensors[whole] if index is None else tiles_of(tensors[whole])[index]


@torch.library.custom_op("frostline::kernel", mutates_args=())
def kernel(tiles: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """The kernel (O, C, *size) of a convolution, from its tiles (O, C).

    An operator of its own, so that rewrites find the tiles again.
    """
    return torch.stack(list(tiles), -1).reshape(*tiles[0].shape, *size)


@torch.library.custom_op("frostline::kernel_tiles", mutates_args=())
def kernel_tiles(kernel: Tensor) -> list[Tensor]:
    """The tiles (O, C) of a kernel (O, C, *size)."""
    return [tile.clone() for tile in kernel.flatten(2).unbind(-1)]


@kernel.register_fake
def _(tiles: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    return tiles[0].new_empty(*tiles[0].shape, *size)


@kernel_tiles.register_fake
def _(kernel: Tensor) -> list[Tensor]:
    return [kernel.new_empty(kernel.shape[:2]) for _ in range(math.prod(kernel.shape[2:]))]


def _backward(context: object, grad: Tensor) -> tuple[list[Tensor], None]:
    return kernel_tiles(grad), None


kernel.register_autograd(_backward)
