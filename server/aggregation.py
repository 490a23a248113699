"""Sample-weighted federated averaging (McMahan et al., AISTATS 2017), folded in as updates arrive."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from frostline.protocol.tensors import Array


class Aggregator:
    """A running weighted sum of updates: the memory of one model, however many devices answer.

    The sum is kept in float64, so that the order in which updates arrive can show in the float32 result only as a rare
    last bit.

    Parameters
    ----------
    weights : mapping of str to array
        What the devices started the round from; float32.
    """

    def __init__(self, weights: Mapping[str, Array]) -> None:
        self._weights = weights
        self._sum = {name: np.zeros(value.shape, np.float64) for name, value in weights.items()}
        self._total = 0

    def fold(self, update: Mapping[str, Array], samples: int) -> None:
        """Add one device's update, new minus received values, weighted by its `samples`."""
        for name, total in self._sum.items():
            total += np.multiply(update[name], samples, dtype=np.float64)
        self._total += samples

    def result(self) -> dict[str, Array]:
        """The new weights, float32; the old ones if no update was folded in."""
        if not self._total:
            return dict(self._weights)
        return {
            name: (value + self._sum[name] / self._total).astype(value.dtype)
            for name, value in self._weights.items()
        }
