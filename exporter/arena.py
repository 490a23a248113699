"""Where the values of a program lie in its arena."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def plan_arena(
    alignment: int, values: Sequence[Any], graph: object, signature: object, padding: int
) -> list[int]:
    """Give each value the lowest place where none of those lies that are needed at the same time, the largest first.

    Greedy by size, as Pisarchyk & Lee (2020) call it. An algorithm of ExecuTorch's memory planning, whose own is
    quadratic in the number of values and looks at fewer places.

    Parameters
    ----------
    alignment : int
        Of every place, bytes.
    values : sequence of TensorSpec
        With their lifetimes, first and last node that needs them; `mem_id`, `mem_offset` and `mem_obj_id` are set.
    padding : int
        Bytes behind the last value.

    Returns
    -------
    list of int
        Bytes of the constants' arena, of which there is none, and of ours.
    """
    for value in values:
        value.realign(alignment)
    sizes = np.array([value.allocated_memory for value in values], np.int64)
    lifetimes = np.array([value.lifetime for value in values], np.int64).reshape(-1, 2)
    offsets = place_by_size(sizes, lifetimes)
    for index, (value, offset) in enumerate(zip(values, offsets, strict=True)):
        value.mem_id, value.mem_offset, value.mem_obj_id = 1, int(offset), index
    return [0, int((offsets + sizes).max(initial=0)) + padding]


def place_by_size(sizes: npt.NDArray[np.int64], lifetimes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The offset of each of N values, from their sizes (N,) and first and last moments (N, 2)."""
    begins, ends = lifetimes.T
    offsets = np.zeros_like(sizes)
    order = np.lexsort((begins, -sizes))
    for count, index in enumerate(order):
        placed = order[:count]
        beside = placed[(begins[placed] <= ends[index]) & (ends[placed] >= begins[index])]
        beside = beside[np.argsort(offsets[beside], kind="stable")]
        # Where each neighbour begins, and how far those before it reach.
        starts = offsets[beside]
        reached = np.maximum.accumulate(np.concatenate([[0], starts + sizes[beside]]))
        fits = np.flatnonzero(starts - reached[:-1] >= sizes[index])
        offsets[index] = reached[fits[0]] if fits.size else reached[-1]
    return offsets
