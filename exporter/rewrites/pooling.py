"""Max pooling over shifted slices.

The portable kernel of the backward pass adds into memory it never clears, so in a planned arena it returns what was
there before; and both directions take 15 ns an element. Here a maximum's place is found by arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from frostline.exporter.rewrites.windows import add_taps, crop, pad, slice_taps

LOWEST = torch.finfo(torch.float32).min
STEEP = 1e38


def max_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """`aten.max_pool2d_with_indices`; the indices are left empty, since `max_pool2d_backward` needs none."""
    geometry = _Geometry(x, kernel, stride, padding, dilation, ceil_mode)
    return reduce(torch.maximum, geometry.taps(x)), x.new_empty(0, dtype=torch.int64)


def max_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """`aten.max_pool2d_with_indices_backward`: of equal maxima the first in the window gets the gradient."""
    geometry = _Geometry(x, kernel, stride, padding, dilation, ceil_mode)
    taps = list(geometry.taps(x))
    maximum = reduce(torch.maximum, taps)
    shares = []
    unclaimed: Tensor | None = None
    for tap in taps:
        # 1 where the tap is the maximum, 0 where it is any smaller: comparisons are 30 times slower than this.
        claim = torch.relu(1 - (maximum - tap) * STEEP)
        if unclaimed is not None:
            claim = claim * unclaimed
        unclaimed = 1 - claim if unclaimed is None else unclaimed - claim
        shares.append(grad * claim)
    return geometry.scatter(shares)


class _Geometry:
    """The windows of one pooling, with defaults and ceil mode worked out."""

    def __init__(
        self,
        x: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
    ) -> None:
        self.spatial = list(x.shape[-2:])
        self.kernel = _pair(kernel)
        self.stride = _pair(stride) if len(stride) else self.kernel
        self.before = _pair(padding)
        self.dilation = _pair(dilation)
        self.output = [self._output(axis, ceil_mode) for axis in range(2)]
        self.after = [
            max((out - 1) * s + d * (k - 1) + 1 - size - b, 0)
            for out, s, d, k, size, b in zip(
                self.output, self.stride, self.dilation, self.kernel, self.spatial, self.before, strict=True
            )
        ]

    def taps(self, x: Tensor) -> Iterator[Tensor]:
        padded = pad(x, self.before, self.after, LOWEST)
        return slice_taps(padded, self.kernel, self.output, self.stride, self.dilation)

    def scatter(self, shares: Sequence[Tensor]) -> Tensor:
        padded = [size + b + a for size, b, a in zip(self.spatial, self.before, self.after, strict=True)]
        total = add_taps(shares, padded, self.kernel, self.stride, self.dilation)
        return crop(total, self.before, self.spatial)

    def _output(self, axis: int, ceil_mode: bool) -> int:
        size, before, stride = self.spatial[axis], self.before[axis], self.stride[axis]
        room = size + 2 * before - self.dilation[axis] * (self.kernel[axis] - 1) - 1
        if not ceil_mode:
            return room // stride + 1
        output = -(-room // stride) + 1
        # PyTorch lets no window begin in the margin behind the image.
        return output - 1 if (output - 1) * stride >= size + before else output


def _pair(values: Sequence[int]) -> list[int]:
    return [*values] if len(values) == 2 else [values[0], values[0]]
