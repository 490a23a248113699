"""Linear maps along single axes of channels-last images: adaptive average pooling, enlarging.

Each place of the result is a weighted sum of a few places of the input, and both are contiguous runs of pixels; its
transpose is a map of the same kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
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
        parts = []
        for begin, end in self._runs():
            if end - begin > 1:
                ((first, _),) = self.terms[begin]
                parts.append(aten.slice_copy(x, axis, first, first + end - begin))
            else:
                parts.append(_sum(places, self.terms[begin]) if self.terms[begin] else unseen)
        return torch.cat(parts, axis)

    def _runs(self) -> list[tuple[int, int]]:
        """Where stretches of the result begin and end; those longer than one place are copied from neighbours."""
        ends = [
            index
            for index, (before, terms) in enumerate(pairwise(self.terms), 1)
            if not (len(before) == len(terms) == 1 and before[0][1] == terms[0][1] == 1.0)
            or terms[0][0] != before[0][0] + 1
        ]
        return list(pairwise([0, *ends, len(self.terms)]))


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


def nearest(size: int, output: int, scale: float | None, *, exact: bool = False) -> AxisMap:
    """Each place repeats the nearest one before it; `exact`ly the nearest one."""
    step = size / output if scale is None else 1 / scale
    shift = 0.5 if exact else 0.0
    return AxisMap(size, [[(min(int((index + shift) * step), size - 1), 1.0)] for index in range(output)])


def extended(size: int, before: int, after: int, *, mirrored: bool) -> AxisMap:
    """Margins that repeat the outermost places, or mirror those behind them; negative ones are cut off."""
    terms = []
    for place in range(-before, size + after):
        nearest_place = min(max(place, 0), size - 1)
        source = 2 * nearest_place - place if mirrored else nearest_place
        terms.append([(source, 1.0)])
    return AxisMap(size, terms)


def cubic(size: int, output: int, align_corners: bool, scale: float | None) -> AxisMap:
    """Interpolate by cubic convolution between four neighbours, the outermost places repeated (Keys 1981, a = -0.75)."""
    terms = []
    for place in _places(size, output, align_corners, scale):
        low = math.floor(place)
        weights: dict[int, float] = {}
        for neighbour in range(low - 1, low + 3):
            source = min(max(neighbour, 0), size - 1)
            weights[source] = weights.get(source, 0.0) + _cubic_weight(place - neighbour, -0.75)
        terms.append(list(weights.items()))
    return AxisMap(size, terms)


def smooth(size: int, output: int, align_corners: bool, scale: float | None, *, cubic: bool) -> AxisMap:
    """Interpolate by a filter as wide as what a place stands for, so that nothing is left out when images shrink."""
    step = _step(size, output, align_corners, scale)
    width = max(step, 1.0)
    terms = []
    for index in range(output):
        centre = (index + 0.5) * step
        reach = (2 if cubic else 1) * width
        first, last = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), size)
        distances = [(place - centre + 0.5) / width for place in range(first, last)]
        weights = [_cubic_weight(d, -0.5) if cubic else max(1 - abs(d), 0.0) for d in distances]
        total = sum(weights)
        terms.append([(place, w / total) for place, w in zip(range(first, last), weights, strict=True) if w])
    return AxisMap(size, terms)


def linear(size: int, output: int, align_corners: bool, scale: float | None) -> AxisMap:
    """Interpolate between neighbours."""
    terms = []
    for place in _places(size, output, align_corners, scale, least=0.0):
        low = min(int(place), size - 1)
        high, share = min(low + 1, size - 1), place - low
        both = [(low, 1 - share), (high, share)]
        terms.append([(low, 1.0)] if high == low or share == 0 else both)
    return AxisMap(size, terms)


def _step(size: int, output: int, align_corners: bool, scale: float | None) -> float:
    """How far in the input one place of the output is from the next."""
    if align_corners:
        return (size - 1) / (output - 1) if output > 1 else 0.0
    return size / output if scale is None else 1 / scale


def _places(
    size: int, output: int, align_corners: bool, scale: float | None, least: float = -math.inf
) -> list[float]:
    """Where in the input each place of the output lies."""
    step = _step(size, output, align_corners, scale)
    if align_corners:
        return [index * step for index in range(output)]
    return [max((index + 0.5) * step - 0.5, least) for index in range(output)]


def _cubic_weight(distance: float, a: float) -> float:
    x = abs(distance)
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def _sum(places: Sequence[Tensor], terms: Sequence[tuple[int, float]]) -> Tensor:
    weights = {weight for _, weight in terms}
    if len(weights) == 1:
        (weight,) = weights
        total = reduce(add, (places[place] for place, _ in terms))
        return total if weight == 1 else total * weight
    return reduce(add, (places[place] * weight for place, weight in terms))
