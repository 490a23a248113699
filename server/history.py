"""What the server has seen of each device: the models of time and data that devices are chosen by.

Memory needs no model: planned bytes are exact (`frostline.server.admission`). Time is predicted from the floating-point
operations of a stage's step and what a device was seen to do in a second; before it was seen at work, from what it
announces, corrected by how far the fleet's announcements were off. Data is described by the counts of classes that
devices announce where the run asks for them, else by the direction in which a device's update moved the last layer: the
mean of its gradients, which label skew shows in.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from pydantic import BaseModel, ConfigDict

from frostline.protocol.messages import Presence, TrainingMetrics
from frostline.protocol.tensors import Array
from frostline.server.admission import OfferedStage
from frostline.server.ledger import Ledger

NEWEST = 0.5
"""Weight of the newest observation in a device's moving averages."""
REMEMBERED_LEASES = 100
"""Leases that the dropout is counted over."""
CAUTION = 10
"""Leases added to that count as if they had ended well, so that the first failures do not look like the rule."""
SKETCH = 32
"""Values that the movement of the last layer is projected to."""
LAYER_VALUES = 65_536
"""Values of a larger last layer that are looked at."""
LARGEST_SQUARED_LOSS = 1e12
FAILED = ("failed", "expired")
"""How a lease ends that a device took and did not keep."""


class Observation(BaseModel):
    """What a counted update showed of its device besides the metrics; kept in the ledger.

    Attributes
    ----------
    flops : int
        Floating-point operations of a step.
    turnaround_seconds : float
        From the lease to the whole update.
    transferred_bytes : int
        Weights sent and update received.
    sketch : list of float
        The last layer's movement, projected to `SKETCH` values of length 1; empty if there is none.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    flops: int = 0
    turnaround_seconds: float = 0.0
    transferred_bytes: int = 0
    sketch: list[float] = []


@dataclass
class DeviceHistory:
    """One device's past.

    Attributes
    ----------
    last_asked : int or None
        The last round it had a lease in.
    squared_loss : float or None
        Moving average of the mean squared loss of its steps; None before its first update.
    rate : float or None
        Floating-point operations a second, of training alone.
    bandwidth : float or None
        Bytes a second, both ways together.
    announced_ratio : float or None
        What it does in a second over what it announced.
    """

    asked: int = 0
    finished: int = 0
    last_asked: int | None = None
    squared_loss: float | None = None
    rate: float | None = None
    bandwidth: float | None = None
    announced_ratio: float | None = None
    sketch: Array | None = None


@dataclass
class FleetHistory:
    """All devices' pasts, as they are needed to choose among them."""

    devices: dict[str, DeviceHistory] = field(default_factory=dict)
    _ends: deque[bool] = field(default_factory=lambda: deque(maxlen=REMEMBERED_LEASES))

    @classmethod
    def read(cls, ledger: Ledger, presences: Mapping[str, Presence]) -> FleetHistory:
        """What the closed rounds of a ledger tell."""
        history = cls()
        for number in range(ledger.rounds()):
            history.add_round(ledger, number, presences)
        return history

    def of(self, device: str) -> DeviceHistory:
        """The past of a device; an empty one if it has none."""
        return self.devices.get(device) or DeviceHistory()

    def add_round(self, ledger: Ledger, number: int, presences: Mapping[str, Presence]) -> None:
        """Take in one closed round."""
        for lease in ledger.leases(number):
            device = self.devices.setdefault(lease.device, DeviceHistory())
            device.asked += 1
            device.last_asked = number
            if lease.state in ("done", *FAILED):
                self._ends.append(lease.state in FAILED)
        for update in ledger.updates(number):
            device = self.devices.setdefault(update.device, DeviceHistory())
            device.finished += 1
            observation = Observation.model_validate_json(update.observation)
            _take(device, update.metrics, observation, presences.get(update.device))

    @property
    def dropout(self) -> float:
        """Share of the latest leases that were taken and not kept; too low rather than too high while they are few."""
        return sum(self._ends) / (len(self._ends) + CAUTION)

    def predict_seconds(self, presence: Presence, offer: OfferedStage, epochs: int) -> float | None:
        """Seconds that a device is expected to take for a lease; None while nothing is known of any device's speed."""
        device = self.of(presence.device)
        rate = device.rate or self._expected_rate(presence)
        if not rate or not offer.manifest.flops:
            return None
        steps = max(1, presence.samples * epochs // offer.manifest.batch)
        seconds = steps * offer.manifest.flops / rate
        bandwidth = device.bandwidth or _median(each.bandwidth for each in self.devices.values())
        if bandwidth:
            both_ways = 2 * sum(spec.size_bytes for spec in offer.manifest.trained)
            seconds += both_ways / bandwidth
        return float(seconds)

    def _expected_rate(self, presence: Presence) -> float | None:
        if presence.gigaflops:
            correction = _median(each.announced_ratio for each in self.devices.values())
            return presence.gigaflops * 1e9 * (correction or 1.0)
        return _median(each.rate for each in self.devices.values())

    def signature(self, presence: Presence) -> Array | None:
        """What a device's data look like, as a vector of length 1; None if nothing is known of them.

        Of announced counts the square roots, so that the product of two is their Bhattacharyya coefficient.
        """
        if presence.class_counts and sum(presence.class_counts):
            counts = np.asarray(presence.class_counts, np.float64)
            shares: Array = np.sqrt(counts / counts.sum())
            return shares
        return self.of(presence.device).sketch


def sketch_of(update: Mapping[str, Array], last_layer: Iterable[str], seed: int) -> list[float]:
    """The direction in which an update moved the last layer, by a random projection that `seed` decides."""
    names = sorted(last_layer)
    if not names:
        return []
    moved = np.concatenate([update[name].ravel() for name in names])[:LAYER_VALUES].astype(np.float64)
    projected = _projection(len(moved), seed) @ moved
    length = float(np.linalg.norm(projected))
    return [float(value) for value in projected / length] if length and math.isfinite(length) else []


@lru_cache(maxsize=2)
def _projection(values: int, seed: int) -> Array:
    projection: Array = np.random.default_rng(seed).standard_normal((SKETCH, values))
    return projection


def _take(
    device: DeviceHistory, metrics: TrainingMetrics, observation: Observation, presence: Presence | None
) -> None:
    squared = metrics.loss * metrics.loss if metrics.squared_loss is None else metrics.squared_loss
    # A diverged device, or one that lies, is clipped among its peers; here it only has to stay a number.
    device.squared_loss = _moved(device.squared_loss, min(squared, LARGEST_SQUARED_LOSS))
    if observation.flops and metrics.seconds > 0:
        device.rate = _moved(device.rate, metrics.steps * observation.flops / metrics.seconds)
        if presence is not None and presence.gigaflops:
            device.announced_ratio = device.rate / (presence.gigaflops * 1e9)
    waited = observation.turnaround_seconds - metrics.seconds
    if observation.transferred_bytes and waited > 0:
        device.bandwidth = _moved(device.bandwidth, observation.transferred_bytes / waited)
    if observation.sketch:
        newest = np.asarray(observation.sketch)
        mixed = newest if device.sketch is None else _moved_array(device.sketch, newest)
        length = float(np.linalg.norm(mixed))
        device.sketch = mixed / length if length else newest


def _moved(average: float | None, newest: float) -> float:
    return newest if average is None else (1 - NEWEST) * average + NEWEST * newest


def _moved_array(average: Array, newest: Array) -> Array:
    moved: Array = (1 - NEWEST) * average + NEWEST * newest
    return moved


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None
