"""Effective movement against its oracles, and what makes the controller stop."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from frostline.protocol.tensors import Array
from frostline.server.config import PaceTable
from frostline.server.pace import PaceController, PaceReading, effective_movement, fitted_slope

WINDOW = 8
WIDTH = 4000


def straight_line(count: int) -> list[Array]:
    direction = np.random.default_rng(1).normal(size=WIDTH)
    return [(k * direction).astype(np.float32) for k in range(count)]


def zig_zag(count: int) -> list[Array]:
    here, there = np.random.default_rng(2).normal(size=(2, WIDTH)).astype(np.float32)
    return [there if k % 2 else here for k in range(count)]


def noise(count: int) -> list[Array]:
    return list(np.random.default_rng(3).normal(size=(count, WIDTH)).astype(np.float32))


def random_walk(count: int) -> list[Array]:
    steps = np.random.default_rng(4).normal(size=(count, WIDTH))
    return list(steps.cumsum(0).astype(np.float32))


def creeping_line(count: int) -> list[Array]:
    direction = np.random.default_rng(5).normal(size=WIDTH)
    return [((1 - 0.7**k) * direction).astype(np.float32) for k in range(count)]


def still(count: int) -> list[Array]:
    return [np.ones(WIDTH, np.float32)] * count


def observe_all(positions: Iterable[Array], table: PaceTable | None = None) -> list[PaceReading]:
    controller = PaceController(table or PaceTable(), seed=0)
    return [controller.observe({"block.weight": position}) for position in positions]


def first_converged(readings: list[PaceReading]) -> int | None:
    """The number of rounds after which the block may be frozen."""
    return next((number for number, reading in enumerate(readings, 1) if reading.converged), None)


@pytest.mark.parametrize(
    ("path", "expected", "tolerance"),
    [
        (straight_line, 1.0, 1e-6),
        (zig_zag, 0.0, 0.0),
        (noise, 1 / WINDOW, 0.01),
        (random_walk, 1 / WINDOW**0.5, 0.02),
        (still, 0.0, 0.0),
    ],
)
def test_effective_movement_of_known_paths(
    path: Callable[[int], list[Array]], expected: float, tolerance: float
) -> None:
    assert effective_movement(path(WINDOW + 1)) == pytest.approx(expected, abs=tolerance)


def test_effective_movement_by_hand() -> None:
    # Two steps right, one back, in one scalar; three up in the other: |1| + |3| over 3 + 3.
    corners = [[0, 0], [1, 1], [2, 2], [1, 3]]
    assert effective_movement([np.array(corner, np.float32) for corner in corners]) == pytest.approx(4 / 6)


paths = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=7),
    elements=st.floats(-1000, 1000, width=32).map(lambda value: value if abs(value) > 1e-6 else 0.0),
)


@given(hnp.arrays(np.float32, (4, 3), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_effective_movement_is_a_fraction(path: Array) -> None:
    assert 0.0 <= effective_movement(list(path)) <= 1.0


@given(paths, st.floats(1e-3, 1e3))
def test_effective_movement_does_not_depend_on_the_scale(path: Array, factor: float) -> None:
    scaled = path.astype(np.float64) * factor
    assert effective_movement(list(scaled)) == pytest.approx(effective_movement(list(path)), abs=1e-9)


@given(st.floats(-2, 2), st.floats(-2, 2), st.integers(2, 20))
def test_slope_of_a_line_is_its_slope(slope: float, offset: float, count: int) -> None:
    assert fitted_slope([offset + slope * k for k in range(count)]) == pytest.approx(slope, abs=1e-9)


def test_readings_appear_as_soon_as_there_are_enough_rounds() -> None:
    table = PaceTable(window=4, regression=3)
    readings = observe_all(noise(9), table)
    assert [reading.speed is not None for reading in readings] == [number >= 2 for number in range(1, 10)]
    assert [r.effective_movement is not None for r in readings] == [n >= 5 for n in range(1, 10)]
    assert [r.slope is not None for r in readings] == [n >= 7 for n in range(1, 10)]


def test_speed_is_the_last_step_over_the_longest() -> None:
    readings = observe_all([np.full(3, value, np.float32) for value in (0, 4, 6, 7, 7)])
    assert [reading.speed for reading in readings] == [None, 1.0, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("path", [noise, zig_zag, creeping_line, still])
def test_converges(path: Callable[[int], list[Array]]) -> None:
    assert first_converged(observe_all(path(60))) is not None


def test_a_steady_line_does_not_converge() -> None:
    readings = observe_all(straight_line(100))
    assert first_converged(readings) is None
    assert readings[-1].speed == pytest.approx(1.0, abs=1e-3)


def test_a_creeping_line_converges_by_its_speed_alone() -> None:
    readings = observe_all(creeping_line(60), PaceTable(creep=0.1))
    stopped = first_converged(readings)
    assert stopped is not None
    reading = readings[stopped - 1]
    assert reading.effective_movement == pytest.approx(1.0, abs=1e-3)
    assert reading.speed is not None and reading.speed <= 0.1
    assert first_converged(observe_all(creeping_line(60), PaceTable(creep=0.0))) != stopped


def test_a_block_that_starts_to_wander_converges_only_then() -> None:
    line = straight_line(30)
    rattle = [line[-1] + step for step in noise(30)]
    stopped = first_converged(observe_all([*line, *rattle]))
    assert stopped is not None and stopped > 30


@pytest.mark.parametrize(
    ("window", "regression", "patience"), itertools.product((2, 5), (2, 6), (1, 4)), ids=str
)
def test_converges_no_sooner_than_every_figure_has_held(window: int, regression: int, patience: int) -> None:
    table = PaceTable(window=window, regression=regression, patience=patience)
    # The first EM takes window + 1 rounds, the first slope regression - 1 more, and that round is the first to hold.
    assert first_converged(observe_all(still(40), table)) == window + regression + patience - 1


def test_patience_starts_again_after_a_leap() -> None:
    table = PaceTable(window=2, regression=2, patience=3)
    quiet = still(5)
    leap = [position + 10 for position in still(8)]
    readings = observe_all([*quiet, *leap], table)
    assert not readings[5].converged
    assert first_converged(readings) == 11


@pytest.mark.parametrize("stop", [0, 1, 3, 7, 12])
def test_goes_on_from_a_snapshot_as_if_nothing_had_happened(stop: int) -> None:
    table = PaceTable(scalars=50)
    positions = [{"b": p[:100], "a": p[100:300].reshape(20, 10)} for p in noise(20)]
    untouched = PaceController(table, seed=9)
    expected = [untouched.observe(position) for position in positions]
    before = PaceController(table, seed=9)
    for position in positions[:stop]:
        before.observe(position)
    after = PaceController(table, seed=9)
    after.restore(before.snapshot())
    assert [after.observe(position) for position in positions[stop:]] == expected[stop:]
    assert any(reading.converged for reading in expected)


def test_watched_scalars_depend_on_the_seed_only() -> None:
    block = {"w": np.arange(1000, dtype=np.float32)}
    picks = []
    for seed in (1, 1, 2):
        controller = PaceController(PaceTable(scalars=30), seed)
        controller.observe(block)
        picks.append(controller.snapshot()["positions"][0])
    assert len(set(picks[0])) == 30
    assert np.array_equal(picks[0], picks[1])
    assert not np.array_equal(picks[0], picks[2])


def test_a_small_block_is_watched_whole_in_the_order_of_its_names() -> None:
    controller = PaceController(PaceTable(scalars=30), seed=0)
    controller.observe({"b": np.array([3.0], np.float32), "a": np.array([[1.0, 2.0]], np.float32)})
    assert controller.snapshot()["positions"].tolist() == [[1.0, 2.0, 3.0]]


@settings(max_examples=30)
@given(hnp.arrays(np.float32, (25, 4), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_any_path_gives_readings_in_range(path: Array) -> None:
    for reading in observe_all(path, PaceTable(window=3, regression=3)):
        assert reading.speed is None or 0 <= reading.speed <= 1
        assert reading.effective_movement is None or 0 <= reading.effective_movement <= 1
        assert reading.slope is None or abs(reading.slope) <= 1 + 1e-9
