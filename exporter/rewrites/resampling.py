"""Linear maps along single axes of channels-last images: adaptive average pooling, enlarging.

Each place of the result is a weighted sum of a few places of the input, and both are contiguous runs of pixels; its
transpose is a map of the same kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class AxisMap:
    """For each place along one axis of the result, the places of the input it is summed from and their weights."""

    size: int
    terms: list[list[tuple[int, float]]]

    @property
    def transpose(self) -> AxisMap:
        """The map of gradients."""
        terms: list[list[tuple[int, float]]] = [[] for _ in range(self.size)]
        for result, sources in enumerate(self.terms):
            for source, weight in sources:
                terms[source].append((result, weight))
        return AxisMap(len(self.terms), terms)

    def along(self, x: Tensor, axis: int) -> Tensor:
        """Apply it to one axis."""
        if self.terms == [[(place, 1.0)] for place in range(self.size)]:
            return x
        places = [aten.slice_copy(x, axis, place, place + 1) for place in range(self.size)]
        unseen = torch.zeros_like(places[0])
        return torch.cat([_sum(places, terms) if terms else unseen for terms in self.terms], axis)


def resample(x: Tensor, maps: Sequence[AxisMap]) -> Tensor:
    """Map each spatial axis of `x` (N, *spatial, C)."""
    for axis, axis_map in enumerate(maps, 1):
        x = axis_map.along(x, axis)
    return x


def resample_backward(grad: Tensor, maps: Sequence[AxisMap]) -> Tensor:
    """The gradient of the input, from `grad` (N, *output, C)."""
    return resample(grad, [axis_map.transpose for axis_map in maps])


def averages(size: int, output: int) -> AxisMap:
    """Adaptive average pooling: means over nearly equal spans."""
    spans = adaptive_spans(size, output)
    return AxisMap(
        size, [[(place, 1 / (end - begin)) for place in range(begin, end)] for begin, end in spans]
    )


def adaptive_spans(size: int, output: int) -> list[tuple[int, int]]:
    """Where each span of PyTorch's adaptive pooling begins and ends; they overlap where they do not divide the axis."""
    return [(index * size // output, -(-(index + 1) * size // output)) for index in range(output)]


def nearest(size: int, output: int, scale: float | None) -> AxisMap:
    """Each place repeats the nearest one before it."""
    step = size / output if scale is None else 1 / scale
    return AxisMap(size, [[(min(int(index * step), size - 1), 1.0)] for index in range(output)])


def linear(size: int, output: int, align_corners: bool, scale: float | None) -> AxisMap:
    """Interpolate between neighbours."""
    if align_corners:
        step = (size - 1) / (output - 1) if output > 1 else 0.0
        places = [index * step for index in range(output)]
    else:
        step = size / output if scale is None else 1 / scale
        places = [max((index + 0.5) * step - 0.5, 0.0) for index in range(output)]
    terms = []
    for place in places:
        low = min(int(place), size - 1)
        high, share = min(low + 1, size - 1), place - low
        both = [(low, 1 - share), (high, share)]
        terms.append([(low, 1.0)] if high == low or share == 0 else both)
    return AxisMap(size, terms)


def _sum(places: Sequence[Tensor], terms: Sequence[tuple[int, float]]) -> Tensor:
    weights = {weight for _, weight in terms}
    if len(weights) == 1:
        (weight,) = weights
        total = reduce(add, (places[place] for place, _ in terms))
        return total if weight == 1 else total * weight
    return reduce(add, (places[place] * weight for place, weight in terms))
