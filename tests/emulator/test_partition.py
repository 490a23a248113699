from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.emulator.partition import split_dirichlet, split_iid
from frostline.protocol.errors import UsageError

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=120).map(
    lambda labels: np.array(labels, dtype=np.int64)
)
SEEDS = st.integers(0, 2**32)


def assert_partition(parts: Sequence[np.ndarray], samples: int) -> None:
    assert sorted(np.concatenate(parts).tolist()) == list(range(samples))
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


def assert_same(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> None:
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@given(labels=LABELS, seed=SEEDS, data=st.data())
def test_iid_covers_everything_evenly(labels: np.ndarray, seed: int, data: st.DataObject) -> None:
    devices = data.draw(st.integers(1, len(labels)))
    parts = split_iid(labels, devices, seed)
    assert len(parts) == devices
    assert_partition(parts, len(labels))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert_same(parts, split_iid(labels, devices, seed))


@given(labels=LABELS, seed=SEEDS, alpha=st.floats(1e-300, 1e6), data=st.data())
def test_dirichlet_covers_everything_with_the_minimum(
    labels: np.ndarray, seed: int, alpha: float, data: st.DataObject
) -> None:
    devices = data.draw(st.integers(1, len(labels)))
    minimum = data.draw(st.integers(1, len(labels) // devices))
    parts = split_dirichlet(labels, devices, alpha, seed, minimum)
    assert len(parts) == devices
    assert_partition(parts, len(labels))
    assert min(len(part) for part in parts) >= minimum
    assert_same(parts, split_dirichlet(labels, devices, alpha, seed, minimum))


def balanced_labels() -> np.ndarray:
    return np.repeat(np.arange(10), 200)


def largest_class_share(parts: Sequence[np.ndarray]) -> float:
    labels = balanced_labels()
    return float(np.mean([np.bincount(labels[part]).max() / len(part) for part in parts]))


def test_a_smaller_alpha_skews_more() -> None:
    shares = [
        largest_class_share(split_dirichlet(balanced_labels(), 10, alpha, seed=3))
        for alpha in (0.05, 1.0, 1e4)
    ]
    assert shares[0] > shares[1] > shares[2]
    assert shares[0] > 0.6
    assert shares[2] < 0.15


def test_a_large_alpha_approaches_even_sizes() -> None:
    sizes = [len(part) for part in split_dirichlet(balanced_labels(), 10, 1e6, seed=0)]
    assert max(sizes) - min(sizes) <= 10


def test_the_seed_changes_the_split() -> None:
    labels = balanced_labels()
    assert split_iid(labels, 4, 0)[0].tolist() != split_iid(labels, 4, 1)[0].tolist()
    first, second = (split_dirichlet(labels, 4, 0.5, seed) for seed in (0, 1))
    assert first[0].tolist() != second[0].tolist()


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf"), 1e7])
def test_bad_alpha_is_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha is"):
        split_dirichlet(balanced_labels(), 2, alpha, seed=0)


@pytest.mark.parametrize(
    ("devices", "seed", "message"),
    [
        (0, 0, "0 devices asked for"),
        (4, 0, "3 samples cannot give 4 devices 1 each"),
        (2, -1, "seed is -1"),
    ],
)
def test_bad_arguments_are_refused(devices: int, seed: int, message: str) -> None:
    labels = np.array([0, 1, 0])
    with pytest.raises(UsageError, match=message):
        split_iid(labels, devices, seed)
    with pytest.raises(UsageError, match=message):
        split_dirichlet(labels, devices, 0.5, seed)


def test_a_minimum_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(UsageError, match="5 samples cannot give 2 devices 3 each"):
        split_dirichlet(np.zeros(5, np.int64), 2, 0.5, seed=0, minimum=3)
    with pytest.raises(UsageError, match="minimum is 0"):
        split_dirichlet(np.zeros(5, np.int64), 2, 0.5, seed=0, minimum=0)


def test_labels_must_be_one_per_sample() -> None:
    with pytest.raises(UsageError, match="give one label per sample"):
        split_iid(np.zeros((4, 2), np.int64), 2, 0)
