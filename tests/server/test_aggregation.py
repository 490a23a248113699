"""The running sum against NumPy's weighted mean."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from frostline.protocol.manifest import TensorSpec
from frostline.protocol.tensors import Array
from frostline.server.aggregation import Aggregator, narrowed

# On this grid every product and every sum is exact in float64, so that no order can show in any last bit.
grid_values = st.integers(-(2**20), 2**20).map(lambda value: value / 2**16)


@st.composite
def updates_in_two_orders(
    draw: st.DrawFn,
) -> tuple[Array, list[tuple[Array, int]], list[tuple[Array, int]]]:
    tensors = hnp.arrays(np.float32, (3, 2), elements=grid_values)
    updates = draw(st.lists(st.tuples(tensors, st.integers(1, 10_000)), min_size=2, max_size=6))
    order = draw(st.permutations(range(len(updates))))
    return draw(tensors), updates, [updates[i] for i in order]


def aggregate(weights: Array, updates: list[tuple[Array, int]]) -> Array:
    aggregator = Aggregator({"w": weights})
    for update, samples in updates:
        aggregator.fold({"w": update}, samples)
    return aggregator.result()["w"]


@given(updates_in_two_orders())
def test_is_the_weighted_mean(drawn: tuple[Array, list[tuple[Array, int]], list[tuple[Array, int]]]) -> None:
    weights, updates, _ = drawn
    samples = [count for _, count in updates]
    mean = np.average(np.stack([u for u, _ in updates]).astype(np.float64), axis=0, weights=samples)
    result = aggregate(weights, updates)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, weights + mean, rtol=1e-6, atol=1e-6)


@given(updates_in_two_orders())
def test_the_order_does_not_show(
    drawn: tuple[Array, list[tuple[Array, int]], list[tuple[Array, int]]],
) -> None:
    weights, updates, reordered = drawn
    assert aggregate(weights, updates).tobytes() == aggregate(weights, reordered).tobytes()


def test_the_order_does_not_show_in_values_such_as_training_gives() -> None:
    random = np.random.default_rng(0)
    weights = random.normal(size=2000).astype(np.float32)
    updates = [
        (random.normal(0, 0.01, 2000).astype(np.float32), int(random.integers(1, 500))) for _ in range(20)
    ]
    expected = aggregate(weights, updates).tobytes()
    for _ in range(20):
        shuffled = [updates[i] for i in random.permutation(len(updates))]
        assert aggregate(weights, shuffled).tobytes() == expected


def test_every_tensor_is_averaged_by_itself() -> None:
    weights = {"a": np.zeros((2,), np.float32), "b": np.ones((), np.float32)}
    aggregator = Aggregator(weights)
    aggregator.fold({"a": np.array([1, 2], np.float32), "b": np.array(4, np.float32)}, 1)
    aggregator.fold({"a": np.array([5, 2], np.float32), "b": np.array(0, np.float32)}, 3)
    result = aggregator.result()
    assert result["a"].tolist() == [4.0, 2.0]
    assert result["b"].tolist() == 2.0
    assert weights["a"].tolist() == [0.0, 0.0]


def test_no_update_leaves_the_weights() -> None:
    weights = {"w": np.array([1.5, -2.0], np.float32)}
    result = Aggregator(weights).result()
    assert result.keys() == weights.keys()
    assert result["w"] is weights["w"]


def test_updates_are_not_kept() -> None:
    aggregator = Aggregator({"w": np.zeros(1000, np.float32)})
    update = np.ones(1000, np.float32)
    alive = weakref.ref(update)
    aggregator.fold({"w": update}, 2)
    del update
    gc.collect()
    assert alive() is None
    assert aggregator.result()["w"].tolist() == [1.0] * 1000


def test_a_missing_tensor_is_not_taken_for_zero() -> None:
    with pytest.raises(KeyError):
        Aggregator({"w": np.zeros(1, np.float32)}).fold({}, 1)


@st.composite
def parts(draw: st.DrawFn) -> tuple[Array, list[tuple[Array, int]]]:
    """Weights, and updates of their leading parts."""
    full = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    weights = draw(hnp.arrays(np.float32, full, elements=grid_values))
    updates = []
    for _ in range(draw(st.integers(0, 5))):
        shape = tuple(draw(st.integers(1, length)) for length in full)
        values = draw(hnp.arrays(np.float32, shape, elements=grid_values))
        updates.append((values, draw(st.integers(1, 10_000))))
    return weights, updates


@given(parts())
def test_a_coordinate_is_averaged_over_those_that_hold_it(
    drawn: tuple[Array, list[tuple[Array, int]]],
) -> None:
    weights, updates = drawn
    before = weights.copy()
    result = aggregate(weights, updates)
    assert (result.shape, result.dtype) == (weights.shape, np.float32)
    for place in np.ndindex(weights.shape):
        held = [
            (float(values[place]), samples)
            for values, samples in updates
            if all(i < length for i, length in zip(place, values.shape, strict=True))
        ]
        if held:
            mean = sum(value * samples for value, samples in held) / sum(samples for _, samples in held)
            assert result[place] == pytest.approx(weights[place] + mean, rel=1e-6, abs=1e-6)
        else:
            assert result[place] == weights[place]
    np.testing.assert_array_equal(weights, before)


def test_tensors_that_all_hold_whole_do_not_change_by_those_they_do_not() -> None:
    random = np.random.default_rng(0)
    weights = {"whole": random.normal(size=(4, 3)).astype(np.float32), "bias": np.float32(0.5).reshape(())}
    updates = [
        {n: random.normal(size=w.shape).astype(np.float32) for n, w in weights.items()} for _ in range(3)
    ]
    alone = Aggregator(weights)
    mixed = Aggregator({**weights, "cut": np.zeros((2, 2), np.float32)})
    for index, update in enumerate(updates):
        alone.fold(update, index + 1)
        mixed.fold({**update, "cut": np.ones((1 + index % 2, 1), np.float32)}, index + 1)
    for name, value in alone.result().items():
        assert mixed.result()[name].tobytes() == value.tobytes()
    assert mixed.result()["cut"].tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_a_narrower_form_is_the_leading_part() -> None:
    weights = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "scale": np.array(7, np.float32)}
    specs = [TensorSpec(name="w", shape=(2, 3)), TensorSpec(name="scale", shape=())]
    part = narrowed(weights, specs)
    assert part["w"].tolist() == [[0, 1, 2], [4, 5, 6]]
    assert part["w"].flags.c_contiguous
    assert part["scale"].shape == ()
    assert part["scale"] == 7
