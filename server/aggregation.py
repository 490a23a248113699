"""Sample-weighted federated averaging (McMahan et al., AISTATS 2017), folded in as updates arrive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from frostline.protocol.manifest import TensorSpec
from frostline.protocol.tensors import Array


def leading_part(array: Array, shape: Sequence[int]) -> Array:
    """A view of the first `shape` elements along each axis: what a narrower model shares with a wide one."""
    # The ellipsis keeps a tensor without axes a view.
    leading: Any = (*(slice(0, length) for length in shape), ...)
    part: Array = array[leading]
    return part


def narrowed(weights: Mapping[str, Array], specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """The weights of a form of the model whose tensors may be narrower."""
    return {spec.name: np.asarray(leading_part(weights[spec.name], spec.shape), order="C") for spec in specs}


class Aggregator:
    """A running weighted sum of updates: the memory of one model, however many devices answer.

    The sum is kept in float64, so that the order in which updates arrive can show in the float32 result only as a rare
    last bit. Updates of narrower forms of the model count for the coordinates they hold (HeteroFL, Diao et al., ICLR
    2021); a coordinate that no device held keeps its value, as in HeteroFL's own code.

    Parameters
    ----------
    weights : mapping of str to array
        What the devices started the round from; float32.
    """

    def __init__(self, weights: Mapping[str, Array]) -> None:
        self._weights = weights
        self._sum = {name: np.zeros(value.shape, np.float64) for name, value in weights.items()}
        # One number while all updates are whole, an array once one was not.
        self._samples: dict[str, Array | int] = dict.fromkeys(weights, 0)

    def fold(self, update: Mapping[str, Array], samples: int) -> None:
        """Add one device's update, new minus received values, weighted by its `samples`."""
        for name, total in self._sum.items():
            value = update[name]
            part = leading_part(total, value.shape)
            part += np.multiply(value, samples, dtype=np.float64)
            if value.shape != total.shape and isinstance(self._samples[name], int):
                self._samples[name] = np.full(total.shape, self._samples[name], np.float64)
            held = self._samples[name]
            if isinstance(held, int):
                self._samples[name] = held + samples
            else:
                held_part = leading_part(held, value.shape)
                held_part += samples

    def result(self) -> dict[str, Array]:
        """The new weights, float32; the old ones where no update was folded in."""
        if not any(np.any(held) for held in self._samples.values()):
            return dict(self._weights)
        # What is too large for float32 becomes infinite, which the server makes an error of.
        with np.errstate(over="ignore"):
            return {
                name: (value + self._sum[name] / np.maximum(self._samples[name], 1)).astype(value.dtype)
                for name, value in self._weights.items()
            }
