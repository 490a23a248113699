from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from frostline.exporter.arena import place_by_size

VALUES = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 20), st.integers(0, 6)), min_size=1, max_size=25
)


def _arrays(values: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.array([16 * size for size, _, _ in values], np.int64)
    lifetimes = np.array([[begin, begin + length] for _, begin, length in values], np.int64)
    return sizes, lifetimes


@given(VALUES)
def test_values_needed_at_the_same_time_lie_apart(values: list[tuple[int, int, int]]) -> None:
    sizes, lifetimes = _arrays(values)
    offsets = place_by_size(sizes, lifetimes)
    for moment in range(30):
        alive = np.flatnonzero((lifetimes[:, 0] <= moment) & (moment <= lifetimes[:, 1]) & (sizes > 0))
        order = alive[np.argsort(offsets[alive])]
        assert (offsets[order[1:]] >= offsets[order[:-1]] + sizes[order[:-1]]).all()


@given(VALUES)
def test_no_value_could_lie_lower(values: list[tuple[int, int, int]]) -> None:
    """Each one is at the bottom or right above one that is needed at the same time."""
    sizes, lifetimes = _arrays(values)
    offsets = place_by_size(sizes, lifetimes)
    for index, offset in enumerate(offsets):
        beside = (lifetimes[:, 0] <= lifetimes[index, 1]) & (lifetimes[:, 1] >= lifetimes[index, 0])
        assert offset == 0 or offset in (offsets + sizes)[beside]


def test_a_value_takes_the_place_of_one_that_is_gone() -> None:
    sizes = np.array([64, 32, 64], np.int64)
    lifetimes = np.array([[0, 1], [1, 2], [2, 3]], np.int64)
    assert place_by_size(sizes, lifetimes).tolist() == [0, 64, 0]


def test_a_gap_between_others_is_filled() -> None:
    sizes = np.array([100, 50, 40, 50], np.int64)
    lifetimes = np.array([[0, 9], [0, 3], [0, 9], [4, 9]], np.int64)
    assert place_by_size(sizes, lifetimes).tolist() == [0, 100, 150, 100]
