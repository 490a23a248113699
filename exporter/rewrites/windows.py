"""Sliding windows over channels-last tensors (N, *spatial, C), and their transpose.

A window's position is one strided slice along each spatial axis. With the channels last the runtime copies such a slice
in runs of C values, ten times faster than single ones. Axes are cut with the copying variants of the operators: the
runtime has no strides, so each is a copy there, and saying so keeps every tensor contiguous.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Windows:
    """The geometry of a kernel moving over `spatial` pixels, one entry of each field an axis.

    Attributes
    ----------
    before, after : list of int
        Margins; a negative `after` cuts pixels off that no window sees.
    output : list of int
        How many positions the kernel takes.
    """

    spatial: list[int]
    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    before: list[int]
    after: list[int]
    output: list[int]

    @classmethod
    def over(
        cls,
        spatial: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        *,
        ceil_mode: bool = False,
        output: Sequence[int] | None = None,
    ) -> Windows:
        """The windows PyTorch's convolution and pooling see, with the same margin on either side.

        As many as fit, or `output` of them.
        """
        # PyTorch takes one number for all axes.
        stride, padding, dilation = (
            [*each] * len(spatial) if len(each) == 1 else each for each in (stride, padding, dilation)
        )
        axes = zip(spatial, kernel, stride, padding, dilation, strict=True)
        fitting = [_positions(*axis, ceil_mode=ceil_mode) for axis in axes]
        output = fitting if output is None else list(output)
        after = [
            (count - 1) * s + d * (k - 1) + 1 - size - margin
            for count, s, d, k, size, margin in zip(
                output, stride, dilation, kernel, spatial, padding, strict=True
            )
        ]
        return cls(list(spatial), list(kernel), list(stride), list(dilation), list(padding), after, output)

    @property
    def taps(self) -> int:
        """Pixels a window sees."""
        return math.prod(self.kernel)

    @property
    def has_margins(self) -> bool:
        """Whether any window sees pixels outside."""
        return any(margin > 0 for margin in (*self.before, *self.after))

    def cut(self, x: Tensor, fill: float = 0.0) -> Iterator[Tensor]:
        """For each place in the kernel, the pixels of `x` (N, *spatial, C) it sees: (N, *output, C).

        They are cut when they are asked for: memory is planned in the order of the graph.
        """
        return map(self.taps_of(x, fill), range(self.taps))

    def taps_of(self, x: Tensor, fill: float = 0.0) -> Callable[[int], Tensor]:
        """The same as a function of the place's number."""
        padded = _pad(x, self.before, self.after, fill)
        offsets = list(itertools.product(*(range(k) for k in self.kernel)))
        # One cut along the first axis serves every place along the others; kept until another one is needed.
        rows: dict[int, Tensor] = {}

        def tap(index: int) -> Tensor:
            first, *inner = offsets[index]
            if first not in rows:
                rows.clear()
                rows[first] = self._cut_axis(padded, 0, first)
            cut = rows[first]
            for axis, offset in enumerate(inner, 1):
                cut = self._cut_axis(cut, axis, offset)
            return cut

        return tap

    def add(self, taps: Iterable[Tensor]) -> Tensor:
        """The transpose of `cut`: each tap (N, *output, C) added back onto the pixels it saw, (N, *spatial, C).

        Taps whose places are equal modulo the stride fall on the same pixels, so they are summed on the coarse grid
        before the grids are woven together.
        """
        coarse = [-(-(b + size + max(a, 0)) // s) for b, size, a, s in self._sizes()]
        phases: dict[tuple[int, ...], Tensor] = {}
        for tap, offsets in zip(taps, itertools.product(*(range(k) for k in self.kernel)), strict=True):
            begins = [offset * d for offset, d in zip(offsets, self.dilation, strict=True)]
            phase = tuple(begin % s for begin, s in zip(begins, self.stride, strict=True))
            starts = [begin // s for begin, s in zip(begins, self.stride, strict=True)]
            ends = [size - b - count for size, b, count in zip(coarse, starts, self.output, strict=True)]
            placed = _pad(tap, starts, ends, 0.0)
            phases[phase] = phases[phase] + placed if phase in phases else placed
        woven = self._weave(phases)
        return _pad(woven, [-b for b in self.before], self._surplus(woven), 0.0)

    def _cut_axis(self, x: Tensor, axis: int, offset: int) -> Tensor:
        begin, count, stride = offset * self.dilation[axis], self.output[axis], self.stride[axis]
        if begin == 0 and stride == 1 and count == x.shape[axis + 1]:
            return x
        return aten.slice_copy(x, axis + 1, begin, begin + (count - 1) * stride + 1, stride)

    def _weave(self, phases: dict[tuple[int, ...], Tensor]) -> Tensor:
        """Interleave the coarse grids, one for each phase, into the fine one."""
        for axis in reversed(range(len(self.stride))):
            if self.stride[axis] == 1:
                phases = {phase[:axis]: grid for phase, grid in phases.items()}
                continue
            grids: dict[tuple[int, ...], list[Tensor | None]] = {}
            for phase, grid in phases.items():
                grids.setdefault(phase[:axis], [None] * self.stride[axis])[phase[axis]] = grid
            phases = {outer: _interleave(parts, axis + 1) for outer, parts in grids.items()}
        return phases[()]

    def _surplus(self, woven: Tensor) -> list[int]:
        sizes = zip(self.spatial, self.before, woven.shape[1:], strict=False)
        return [size + before - width for size, before, width in sizes]

    def _sizes(self) -> Iterator[tuple[int, int, int, int]]:
        return zip(self.before, self.spatial, self.after, self.stride, strict=True)


def _positions(size: int, kernel: int, stride: int, margin: int, dilation: int, *, ceil_mode: bool) -> int:
    room = size + 2 * margin - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return room // stride + 1
    count = -(-room // stride) + 1
    # PyTorch lets no window begin in the margin behind the image.
    return count - 1 if (count - 1) * stride >= size + margin else count


def _pad(x: Tensor, before: Sequence[int], after: Sequence[int], fill: float) -> Tensor:
    """`x` (N, *spatial, C) with margins; negative ones cut off."""
    for axis, (b, a) in enumerate(zip(before, after, strict=True), 1):
        if b < 0 or a < 0:
            x = aten.slice_copy(x, axis, max(-b, 0), x.shape[axis] + min(a, 0))
    margins = [0, 0]
    for b, a in zip(reversed(before), reversed(after), strict=True):
        margins += [max(b, 0), max(a, 0)]
    return aten.constant_pad_nd(x, margins, fill) if any(margins) else x


def _interleave(parts: Sequence[Tensor | None], axis: int) -> Tensor:
    """Weave equally shaped `parts` along `axis`; what is None is zeros."""
    known = next(part for part in parts if part is not None)
    full = [torch.zeros_like(known) if part is None else part for part in parts]
    shape = [*known.shape[:axis], known.shape[axis] * len(parts), *known.shape[axis + 1 :]]
    apart = [*known.shape[: axis + 1], 1, *known.shape[axis + 1 :]]
    return torch.cat([part.reshape(apart) for part in full], axis + 1).reshape(shape)
