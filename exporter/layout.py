"""The order in which a device holds a stage's tensors.

The kernels of convolutions are held, sent and averaged as (O, *kernel, C), the order their products read them in, so that
no step has to turn them. Everything else keeps the model's order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# The common base of Conv1d, Conv2d and Conv3d is public in all but name.
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(frozen=True)
class Layout:
    """For each tensor that is held in another order, the axes of the model's tensor in the order they are held."""

    axes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """The layout of a stage's model."""
        return cls(
            {
                f"{name}.weight": (0, *range(2, module.weight.dim()), 1)
                for name, module in model.named_modules()
                if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)
            }
        )

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
