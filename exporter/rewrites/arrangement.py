"""Values held with their axes in another order than the graph's, and tensors in the order asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from frostline.exporter.rewrites import turning

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


class Deferred:
    """A tensor that is computed where it is first used: memory is planned in the order of the graph."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._tensor: Tensor | None = None

    def tensor(self) -> Tensor:
        """The tensor, computed once."""
        if self._tensor is None:
            self._tensor = self._compute()
        return self._tensor


class Tiled:
    """The kernel of a convolution as one matrix (O, C) for each place in it, standing for (O, C, *kernel)."""

    def __init__(self, tiles: Sequence[Tensor], kernel: Sequence[int]) -> None:
        self.tiles = list(tiles)
        self.kernel = tuple(kernel)

    @property
    def shape(self) -> tuple[int, ...]:
        """As channels-last kernels are held: (O, *kernel, C)."""
        outputs, channels = self.tiles[0].shape
        return (outputs, *self.kernel, channels)


class TiledGradient:
    """The gradient of a kernel in tiles, each computed where it is used."""

    def __init__(self, tiles: Sequence[Deferred], kernel: Sequence[int]) -> None:
        self.tiles = list(tiles)
        self.kernel = tuple(kernel)


Value = Tensor | Permuted


class Arranger:
    """Hands out values with their axes in the order asked for; each order is made once, however many ask.

    Attributes
    ----------
    far_values : bool
        Whether values may be far apart or infinite, so that small ones are lost in sums with them.
    """

    def __init__(self, *, far_values: bool = False) -> None:
        self.far_values = far_values
        self._made: dict[tuple[int, tuple[int, ...]], tuple[Value, Tensor]] = {}
        self._notes: dict[tuple[Hashable, int], tuple[Value, Any]] = {}

    def __call__(self, value: Value, axes: Sequence[int]) -> Tensor:
        """`value.permute(axes)` as a plain tensor."""
        key = (id(value), tuple(axes))
        if key not in self._made:
            # The value is kept as well: its id must not be given to another one.
            self._made[key] = value, _arranged(value, axes)
        return self._made[key][1]

    def plain(self, value: Any) -> Any:
        """`value` as the tensor it stands for; anything else is left alone."""
        if isinstance(value, Deferred):
            return value.tensor()
        if isinstance(value, Tiled | TiledGradient):
            tiles = [self.plain(tile) for tile in value.tiles]
            return torch.stack(tiles, -1).reshape(*tiles[0].shape, *value.kernel)
        return self(value, range(value.dim())) if isinstance(value, Permuted) else value

    def image(self, value: Value) -> Tensor:
        """(N, C, *spatial) held as (N, *spatial, C), and the kernel of a convolution likewise."""
        return self(value, [0, *range(2, value.dim()), 1])

    def note(self, subject: Hashable, value: Value, made: Any) -> None:
        """Keep what a forward operator made of `value` for its backward operator."""
        self._notes[subject, id(value)] = value, made

    def noted(self, subject: Hashable, value: Value) -> Any:
        """What was kept, or None."""
        return self._notes.get((subject, id(value)), (None, None))[1]


def held(value: Value) -> tuple[Tensor, tuple[int, ...]]:
    """The tensor in the order it is held, and for each axis of `value` where it lies in there."""
    if isinstance(value, Permuted):
        return value.tensor, value.axes
    return value, tuple(range(value.dim()))


def permuted(tensor: Tensor, axes: Sequence[int]) -> Value:
    """`tensor.permute(axes)`, held as it is."""
    return tensor if list(axes) == list(range(tensor.dim())) else Permuted(tensor, axes)


def image(tensor: Tensor) -> Permuted:
    """(N, *spatial, C) standing for (N, C, *spatial)."""
    return Permuted(tensor, [0, tensor.dim() - 1, *range(1, tensor.dim() - 1)])


def optional_image(tensor: Tensor | None) -> Permuted | None:
    """The same of what may be missing."""
    return None if tensor is None else image(tensor)


def inverse(axes: Sequence[int]) -> list[int]:
    """The permutation that undoes `axes`."""
    return [axes.index(axis) for axis in range(len(axes))]


def _arranged(value: Value, axes: Sequence[int]) -> Tensor:
    tensor, places = held(value)
    order = [places[axis] for axis in axes]
    return tensor if order == list(range(tensor.dim())) else turning.permuted(tensor, order)
