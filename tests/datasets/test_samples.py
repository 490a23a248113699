from __future__ import annotations

import numpy as np
import pytest

from frostline.datasets.samples import Samples
from frostline.protocol.errors import UsageError


def five_samples() -> Samples:
    return Samples(
        x=np.arange(10, dtype=np.float32).reshape(5, 2),
        y=np.array([0, 2, 2, 0, 2], dtype=np.int64),
        classes=4,
    )


def test_counts_every_class_even_absent_ones() -> None:
    assert len(five_samples()) == 5
    assert five_samples().class_counts() == [2, 0, 3, 0]


def test_take_keeps_order_repeats_and_classes() -> None:
    taken = five_samples().take([4, 0, 4])
    assert taken.x.tolist() == [[8, 9], [0, 1], [8, 9]]
    assert taken.y.tolist() == [2, 0, 2]
    assert taken.classes == 4


def test_take_copies() -> None:
    samples = five_samples()
    taken = samples.take(np.array([0]))
    taken.x[0, 0] = 77
    assert samples.x[0, 0] == 0


@pytest.mark.parametrize("indices", [[], [-1], [5], [[0, 1]]])
def test_take_refuses_positions_out_of_range(indices: list[int]) -> None:
    with pytest.raises(UsageError, match="samples: indices"):
        five_samples().take(indices)


@pytest.mark.parametrize("count", [None, 5, 6, 10**6])
def test_some_gives_all_where_there_are_no_more(count: int | None) -> None:
    samples = five_samples()
    assert samples.some(count, 0).fingerprint() == samples.fingerprint()


def test_some_draws_as_many_once_each_and_keeps_their_order() -> None:
    samples = Samples(np.arange(100, dtype=np.float32)[:, None], np.arange(100) % 4, 7)
    drawn = samples.some(30, 3)
    places = drawn.x[:, 0].astype(int).tolist()
    assert len(places) == len(set(places)) == 30
    assert places == sorted(places) != list(range(30))
    assert drawn.y.tolist() == [place % 4 for place in places]
    assert drawn.classes == 7


def test_some_draws_the_same_with_the_same_seed() -> None:
    samples = Samples(np.arange(100, dtype=np.float32)[:, None], np.zeros(100, np.int64), 1)
    first, again, other = (samples.some(30, seed).x.tolist() for seed in (3, 3, 4))
    assert first == again != other


def test_fingerprint_is_stable_and_sees_every_part() -> None:
    samples = five_samples()
    assert samples.fingerprint() == five_samples().fingerprint()
    assert len(samples.fingerprint()) == 64
    changed_input = samples.x.copy()
    changed_input[3, 1] += 1
    different = [
        Samples(changed_input, samples.y, 4),
        Samples(samples.x, samples.y[::-1].copy(), 4),
        Samples(samples.x, samples.y, 5),
        Samples(samples.x.reshape(5, 1, 2), samples.y, 4),
    ]
    assert len({samples.fingerprint(), *(other.fingerprint() for other in different)}) == 5


def test_token_ids() -> None:
    ids = Samples(np.arange(6).reshape(3, 2), np.array([0, 1, 0]), 2)
    assert ids.x.dtype == np.int64
    taken = ids.take([2])
    assert (taken.x.dtype, taken.x.tolist()) == (np.int64, [[4, 5]])


def test_fingerprint_tells_dtypes_apart() -> None:
    empty, y = np.zeros((2, 0)), np.array([0, 1])
    prints = [Samples(empty.astype(dtype), y, 2).fingerprint() for dtype in (np.float32, np.int64)]
    assert prints[0] != prints[1]


def test_fingerprint_ignores_memory_layout() -> None:
    samples = five_samples()
    column_major = Samples(np.asfortranarray(samples.x), samples.y, 4)
    assert column_major.fingerprint() == samples.fingerprint()


def test_non_finite_inputs_are_let_through() -> None:
    x = np.array([[np.nan], [np.inf]], dtype=np.float32)
    assert len(Samples(x, np.array([0, 0], dtype=np.int64), 1)) == 2


@pytest.mark.parametrize(
    ("x", "y", "classes", "message"),
    [
        (np.zeros((2, 1)), np.zeros(2, np.int64), 1, "x is float64; convert it to float32"),
        (
            np.zeros((2, 1), np.int32),
            np.zeros(2, np.int64),
            1,
            "x is int32; convert it .* token ids to int64",
        ),
        (np.zeros(2, np.int64), np.zeros(2, np.int64), 1, r"shape \(2,\); give them as \(samples, tokens\)"),
        (np.full((2, 1), -7), np.zeros(2, np.int64), 1, "token id -7; number the ids from 0"),
        (np.zeros((2, 1), np.float32), np.zeros(2, np.int32), 1, "y is int32; convert it to int64"),
        (np.zeros((2, 1), np.float32), np.zeros((2, 1), np.int64), 1, r"y has shape \(2, 1\)"),
        (np.zeros((), np.float32), np.zeros(2, np.int64), 1, r"x has shape \(\)"),
        (np.zeros((3, 1), np.float32), np.zeros(2, np.int64), 1, "3 samples but y holds 2 labels"),
        (np.zeros((0, 1), np.float32), np.zeros(0, np.int64), 1, "empty"),
        (np.zeros((1, 1), np.float32), np.zeros(1, np.int64), 0, "classes is 0"),
        (np.zeros((1, 1), np.float32), np.full(1, 3), 3, r"labels 3\.\.3 but there are 3 classes"),
        (np.zeros((1, 1), np.float32), np.full(1, -1), 3, r"labels -1\.\.-1"),
    ],
)
def test_bad_contents_are_refused(x: np.ndarray, y: np.ndarray, classes: int, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Samples(x, y, classes)
    assert "\n" not in str(caught.value)
