"""The order in which a device holds a stage's tensors.

Tensors travel in the model's order, so that devices of every runtime can be averaged. For ExecuTorch the kernels of
convolutions are held as (O, *kernel, C), those of transposed ones as (C, *kernel, O): the order their products read them
in, so that no step has to turn them. Large kernels are held as (*kernel, O, C), so that programs can take them in tiles
(see `frostline.exporter.tiles`). Everything else keeps the model's order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

# The common base of Conv1d, Conv2d and Conv3d is public in all but name.
from torch.nn.modules.conv import _ConvNd

from frostline.exporter.capture import name_of
from frostline.exporter.part import Part

TILED_BYTES = 2**20
"""Kernels of this size are held in tiles: below it, more arguments cost more than smaller values save."""

TILED_CHANNELS = 16
"""Kernels that see fewer channels than this are multiplied whole."""


@dataclass(frozen=True)
class Layout:
    """How a device holds the tensors of a stage.

    Attributes
    ----------
    axes : mapping
        For each tensor that is held in another order, the model's axes in the order they are held.
    tiled : frozenset of str
        Those that programs take in tiles.
    """

    axes: Mapping[str, tuple[int, ...]]
    tiled: frozenset[str] = frozenset()

    @classmethod
    def channels_last(cls, model: nn.Module) -> Layout:
        """The layout that ExecuTorch's programs want, large kernels in tiles."""
        kernels = dict(_kernels(model))
        in_tiles = frozenset(name for name, kernel in kernels.items() if _is_tiled(kernel))
        axes = {
            name: (*range(2, each.weight.dim()), 0, 1)
            if name in in_tiles
            else (0, *range(2, each.weight.dim()), 1)
            for name, each in kernels.items()
        }
        return cls(axes, in_tiles)

    def is_tiled(self, name: str) -> bool:
        """Whether programs take a parameter, or what the optimizer keeps of it (as `<kind>.<name>`), in tiles."""
        return name in self.tiled or name.partition(".")[2] in self.tiled

    def held(self, name: str, tensor: Tensor) -> Tensor:
        """The model's `tensor` as devices hold it, contiguous."""
        # `contiguous` would keep odd strides of axes of length 1, which the runtime refuses.
        return self.held_view(name, tensor).clone(memory_format=torch.contiguous_format)

    def held_view(self, name: str, tensor: Tensor) -> Tensor:
        """A view of the model's `tensor` in the order devices hold it."""
        return tensor.permute(self.axes[name]) if name in self.axes else tensor

    def model(self, name: str, tensor: Tensor) -> Tensor:
        """A view of a held `tensor` in the model's order."""
        if name not in self.axes:
            return tensor
        axes = self.axes[name]
        return tensor.permute([axes.index(axis) for axis in range(len(axes))])


MODEL_ORDER = Layout({})
"""Every tensor as the model has it."""


@dataclass(frozen=True)
class _Kernel:
    """The weight of a convolution, as the model has it."""

    weight: Tensor
    transposed: bool
    groups: int


def _kernels(model: nn.Module) -> Iterator[tuple[str, _Kernel]]:
    """The kernels of a stage's model by name: those of its layers, and what its parts convolve with."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, _ConvNd):
            yield f"{prefix}weight", _Kernel(module.weight, module.transposed, module.groups)
        elif isinstance(module, Part):
            for name, node in module.convolved_tensors():
                transposed = name_of(node).startswith("conv_transpose")
                groups = _argument(node, "groups", 1)
                yield prefix + name, _Kernel(module.get_parameter(name), transposed, groups)


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    """An argument of an operator, given by position or by name."""
    assert isinstance(node.target, OpOverload)
    place = [each.name for each in node.target._schema.arguments].index(name)
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)


def _is_tiled(kernel: _Kernel) -> bool:
    weight = kernel.weight
    _, channels, *size = weight.shape
    return (
        not kernel.transposed
        and kernel.groups == 1
        and math.prod(size) > 1
        and channels >= TILED_CHANNELS
        and weight.numel() * weight.element_size() >= TILED_BYTES
    )
