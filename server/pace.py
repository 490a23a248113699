"""The pace controller decides when the active block has converged.

It watches two figures of the aggregated weights a_k after each round k. The *effective movement* over the last H
rounds is how far they got divided by how far they walked,

    EM_k = |a_k - a_(k-H)|_1 / sum_(j<H) |a_(k-j) - a_(k-j-1)|_1

which is 1 on a straight line, 0 on a zig-zag, 1/sqrt(H) for a random walk and 1/H for noise around a fixed point. It
is the metric of ProFL's released code (Wu et al., KDD 2025), described there as SmartFreeze's block perturbation is.
Because EM is blind to the size of the steps, a block that creeps ever more slowly along one line, as one does once the
training loss is near zero, keeps an EM near 1 for ever; so the *speed* is watched too, the last step's length as a
fraction of the longest step of the stage.

The rule on top is ours, since theirs was not released: the block has settled when EM is flat and it either wanders
(EM is low) or creeps (the speed is low), and has converged when that holds for some rounds in a row.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from frostline.protocol.tensors import Array
from frostline.server.config import PaceTable


@dataclass(frozen=True)
class PaceReading:
    """What one round showed; a figure is None until enough rounds have been seen.

    Attributes
    ----------
    effective_movement : float or None
        EM over the window, 0 to 1.
    slope : float or None
        Slope of the least-squares line through the last values of EM, a round.
    speed : float or None
        Length of the last step over that of the longest, 0 to 1.
    converged : bool
        Whether the block may be frozen.
    """

    effective_movement: float | None
    slope: float | None
    speed: float | None
    converged: bool


class PaceController:
    """Watches one block; make a new one for each stage.

    Parameters
    ----------
    settings : PaceTable
        Window, thresholds and patience.
    seed : int
        Picks the watched values of a block that has more than `settings.scalars`.
    """

    def __init__(self, settings: PaceTable, seed: int) -> None:
        self._settings = settings
        self._random = np.random.default_rng(seed)
        self._picked: Array | None = None
        self._positions: deque[Array] = deque(maxlen=settings.window + 1)
        self._movements: list[float] = []
        self._longest_step = 0.0
        self._settled = 0

    def observe(self, block: Mapping[str, Array]) -> PaceReading:
        """Take the aggregated values of the active block after one more round."""
        self._positions.append(self._watched(block))
        if len(self._positions) < 2:
            return PaceReading(None, None, None, False)
        step = _distance(self._positions[-2], self._positions[-1])
        self._longest_step = max(self._longest_step, step)
        speed = step / self._longest_step if self._longest_step else 0.0
        if len(self._positions) <= self._settings.window:
            return PaceReading(None, None, speed, False)
        self._movements.append(effective_movement(list(self._positions)))
        recent = self._movements[-self._settings.regression :]
        slope = fitted_slope(recent) if len(recent) == self._settings.regression else None
        wanders = float(np.mean(recent)) <= self._settings.level
        flat = slope is not None and abs(slope) <= self._settings.slope
        settled = flat and (wanders or speed <= self._settings.creep)
        self._settled = self._settled + 1 if settled else 0
        return PaceReading(recent[-1], slope, speed, self.converged)

    @property
    def converged(self) -> bool:
        """Whether the block may be frozen, as of the last round."""
        return self._settled >= self._settings.patience

    def snapshot(self) -> dict[str, Array]:
        """Everything `restore` needs to go on after a restart, as arrays."""
        return {
            "positions": np.stack(self._positions) if self._positions else np.zeros((0, 0), np.float32),
            "movements": np.asarray(self._movements, np.float64),
            "longest_step": np.asarray(self._longest_step, np.float64),
            "settled": np.asarray(self._settled, np.int64),
        }

    def restore(self, snapshot: Mapping[str, Array]) -> None:
        """Go on from a snapshot of a controller with the same settings and seed."""
        self._positions.extend(snapshot["positions"])
        self._movements = [float(value) for value in snapshot["movements"]]
        self._longest_step = float(snapshot["longest_step"])
        self._settled = int(snapshot["settled"])

    def _watched(self, block: Mapping[str, Array]) -> Array:
        flat = np.concatenate([block[name].ravel() for name in sorted(block)]).astype(np.float32)
        if self._picked is None:
            count = min(len(flat), self._settings.scalars)
            self._picked = np.sort(self._random.choice(len(flat), count, replace=False))
        watched: Array = flat[self._picked]
        return watched


def effective_movement(positions: list[Array]) -> float:
    """EM of the H + 1 successive `positions`, each (scalars,); 0 where nothing moved at all."""
    walked = sum(_distance(a, b) for a, b in itertools.pairwise(positions))
    # Rounding may leave a straight line a little longer than the sum of its steps.
    return min(_distance(positions[0], positions[-1]) / walked, 1.0) if walked else 0.0


def fitted_slope(values: list[float]) -> float:
    """Slope of the least-squares line through equally spaced `values`."""
    return float(np.polyfit(np.arange(len(values)), values, 1)[0])


def _distance(a: Array, b: Array) -> float:
    # In float32 the difference of two large values may overflow, and its rounding would bend a straight line.
    return float(np.abs(np.subtract(b, a, dtype=np.float64)).sum())
