"""What is learned of devices from their leases and updates, and predicted from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frostline.protocol.manifest import TensorSpec
from frostline.protocol.tensors import Array
from frostline.server.history import SKETCH, DeviceHistory, FleetHistory, sketch_of
from frostline.server.ledger import NewLease
from tests.server.builders import offered, online, stage_manifest
from tests.server.past import REFERENCE, Past

OFFER = offered(stage_manifest(100, flops=2000, parameters=[TensorSpec(name="w", shape=(25,))]))


@pytest.fixture
def past(tmp_path: Path) -> Iterator[Past]:
    made = Past(tmp_path)
    yield made
    made.ledger.close()


def test_rate_and_bandwidth_are_moving_averages_of_what_was_observed(past: Past) -> None:
    past.round(a={"flops": 1000, "turnaround_seconds": 5.0, "transferred_bytes": 600})
    device = past.history.of("a")
    assert (device.rate, device.bandwidth) == (5000.0, 200.0)
    past.round(a={"flops": 3000, "turnaround_seconds": 4.0, "transferred_bytes": 800})
    assert (device.rate, device.bandwidth) == (10_000.0, 300.0)
    assert (device.asked, device.finished, device.last_asked) == (2, 2, 1)


@pytest.mark.parametrize(
    "shown",
    [{}, {"flops": 1000, "seconds": 0.0}, {"transferred_bytes": 9, "turnaround_seconds": 2.0}],
    ids=["nothing observed", "no time", "no time left for the transfer"],
)
def test_what_says_nothing_about_speed_teaches_none(past: Past, shown: dict[str, Any]) -> None:
    past.round(a=shown)
    device = past.history.of("a")
    assert (device.rate, device.bandwidth, device.finished) == (None, None, 1)


def test_the_mean_squared_loss_is_learned_or_taken_from_the_loss(past: Past) -> None:
    past.round(a={"loss": 2.0, "squared_loss": 5.0}, b={"loss": 3.0})
    past.round(a={"loss": 2.0, "squared_loss": 9.0}, c="failed")
    assert [past.history.of(device).squared_loss for device in "abc"] == [7.0, 9.0, None]


def test_time_is_that_of_the_steps_and_of_the_transfer() -> None:
    history = FleetHistory({"a": DeviceHistory(rate=5000.0)})
    presence = online("a", samples=100)
    # 2 epochs of 100 samples in batches of 4 are 50 steps.
    assert history.predict_seconds(presence, OFFER, epochs=2) == 50 * 2000 / 5000
    history.devices["a"].bandwidth = 50.0
    assert history.predict_seconds(presence, OFFER, epochs=2) == 20 + 2 * 100 / 50
    assert history.predict_seconds(online("a", samples=1), OFFER, epochs=1) == 2000 / 5000 + 4


def test_without_knowledge_there_is_no_prediction() -> None:
    assert FleetHistory().predict_seconds(online(), OFFER, epochs=1) is None
    uncounted = offered(stage_manifest(100))
    assert FleetHistory({"phone": DeviceHistory(rate=1.0)}).predict_seconds(online(), uncounted, 1) is None
    assert FleetHistory().predict_seconds(online(gigaflops=1e-6), OFFER, 1) == 2 * 2000 / 1000


def test_announced_speeds_are_corrected_by_how_far_the_fleets_were_off(past: Past) -> None:
    past.presences = {d: online(d, gigaflops=10_000 / 1e9) for d in "abc"}
    # They announce 10 000 operations a second and do 5000, 2500 and 40 000: half as many in the median.
    past.round(a={"flops": 1000}, b={"flops": 500}, c={"flops": 8000})
    assert past.history.predict_seconds(online("new", gigaflops=2e-5), OFFER, 1) == pytest.approx(0.4)
    assert past.history.predict_seconds(online("a", gigaflops=9.0), OFFER, 1) == pytest.approx(0.8)


def test_a_device_that_announces_no_speed_is_taken_for_a_middling_one() -> None:
    known = {f"d{i}": DeviceHistory(rate=rate, bandwidth=100.0) for i, rate in enumerate([1.0, 2000.0, 1e9])}
    assert FleetHistory(known).predict_seconds(online("new"), OFFER, 1) == 2 + 2


def test_dropout_counts_leases_that_were_taken_and_not_kept(past: Past) -> None:
    assert past.history.dropout == 0
    past.round(a="refused", b="surplus", c="open")
    assert past.history.dropout == pytest.approx(1 / 11)  # A round closes its open leases as expired.
    past.round(a="failed", b={}, c={})
    assert past.history.dropout == pytest.approx(2 / 14)


def test_a_few_failures_do_not_look_like_the_rule_and_old_ones_are_forgotten(past: Past) -> None:
    past.round(**{f"d{i}": "failed" for i in range(5)})
    assert past.history.dropout == pytest.approx(1 / 3)
    past.round(**{f"d{i}": "failed" for i in range(100)})
    assert past.history.dropout == pytest.approx(100 / 110)
    past.round(**{f"d{i}": {} for i in range(100)})
    assert past.history.dropout == 0


LAYER = {"head.bias": (10,), "head.weight": (10, 64)}


def movement(seed: int, scale: float = 1.0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    moved = {name: (scale * random.normal(size=shape)).astype(np.float32) for name, shape in LAYER.items()}
    return {**moved, "block.w": np.full(5, seed, np.float32)}


def test_a_sketch_is_the_direction_of_the_last_layers_movement() -> None:
    sketch = np.array(sketch_of(movement(1), LAYER, seed=7))
    assert sketch.shape == (SKETCH,)
    assert np.linalg.norm(sketch) == pytest.approx(1)
    farther = movement(1, scale=3.0) | {"block.w": np.zeros(5, np.float32)}
    np.testing.assert_allclose(sketch_of(farther, reversed(LAYER), seed=7), sketch, rtol=1e-5)
    np.testing.assert_allclose(sketch_of(movement(1, scale=-1.0), LAYER, seed=7), -sketch, rtol=1e-5)
    others = np.array([sketch_of(movement(seed), LAYER, seed=7) for seed in range(2, 42)])
    # The cosine of unrelated directions in 32 dimensions has a standard deviation of 0.18.
    assert np.mean(np.abs(others @ sketch)) < 0.25
    assert np.max(np.abs(others @ sketch)) < 0.8


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_movement_without_a_direction_has_no_sketch(value: float) -> None:
    still = {name: np.full(shape, value, np.float32) for name, shape in LAYER.items()}
    with np.errstate(invalid="ignore"):
        assert sketch_of(still, LAYER, seed=0) == []
    assert sketch_of(movement(1), [], seed=0) == []


def test_a_signature_is_announced_or_learned(past: Past) -> None:
    past.round(a={"sketch": [1.0, 0.0]})
    past.round(a={"sketch": [0.0, 1.0]})
    learned = past.history.signature(online("a"))
    np.testing.assert_allclose(learned, [0.5**0.5, 0.5**0.5])
    announced = past.history.signature(online("a", class_counts=[9, 0, 16]))
    np.testing.assert_allclose(announced, [0.6, 0.0, 0.8])
    assert past.history.signature(online("b")) is None
    assert past.history.signature(online("b", class_counts=[0, 0])) is None


def figures(history: FleetHistory) -> dict[str, Any]:
    return {
        device: {
            key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in past.items()
        }
        for device, past in asdict(history)["devices"].items()
    }


def test_a_history_read_from_the_ledger_is_the_one_that_was_learned(past: Past) -> None:
    past.presences = {"a": online("a", gigaflops=2e-5)}
    shown = {"flops": 700, "turnaround_seconds": 3.0, "transferred_bytes": 60}
    past.round(a={**shown, "sketch": [1.0, 0.0]}, b="failed", c={"loss": 0.25})
    past.round(a={**shown, "seconds": 1.0, "sketch": [0.0, 1.0]}, b={**shown, "loss": 1e-3}, d="surplus")
    past.round(a="expired", c={**shown, "squared_loss": 4.0})
    past.ledger.open_round(3, 0, REFERENCE)
    past.ledger.add_leases(3, [NewLease("f" * 32, "e")])
    read = FleetHistory.read(past.ledger, past.presences)
    assert figures(read) == figures(past.history)
    assert read.dropout == past.history.dropout > 0
    assert past.history.devices.keys() == {"a", "b", "c", "d"}
    assert past.history.of("a").announced_ratio is not None


def test_a_loss_without_bounds_is_no_trouble(past: Past) -> None:
    past.round(a={"loss": 1e300})
    assert past.history.of("a").finished == 1
