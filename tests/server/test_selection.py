"""In which order devices are asked: drawn, by utility and speed, and round communities of like devices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.protocol.tensors import Array
from frostline.server.config import SelectionTable
from frostline.server.history import DeviceHistory, FleetHistory
from frostline.server.selection import (
    Candidate,
    CommunitySelector,
    OortSelector,
    Ranked,
    UniformSelector,
    build_selector,
    communities,
)
from tests.server.builders import online

METHODS = ["uniform", "oort", "communities"]


def candidate(device: str, seconds: float | None = None, **presence: Any) -> Candidate:
    return Candidate(online(device, **presence), seconds)


def names(ranked: list[Ranked]) -> list[str]:
    return [each.device for each in ranked]


def place_of(ranked: list[Ranked]) -> dict[str, Ranked]:
    return {each.device: each for each in ranked}


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[Candidate], FleetHistory]:
    devices = draw(st.lists(st.text("abcdef", min_size=1, max_size=3), unique=True, max_size=20))
    candidates, history = [], FleetHistory()
    for device in devices:
        counts = draw(st.none() | st.lists(st.integers(0, 9), min_size=2, max_size=3))
        seconds = draw(st.none() | st.sampled_from([0.5, 3.0, 100.0]))
        candidates.append(candidate(device, seconds, class_counts=counts, samples=draw(st.integers(1, 99))))
        if draw(st.booleans()):
            loss = draw(st.none() | st.floats(0, 1e6))
            history.devices[device] = DeviceHistory(last_asked=draw(st.integers(0, 9)), squared_loss=loss)
    return candidates, history


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None)
@given(fleets(), st.integers(0, 2**32 - 1), st.integers(10, 10**6), st.randoms())
def test_the_ranking_is_a_permutation_that_only_its_arguments_decide(
    method: str, fleet: tuple[list[Candidate], FleetHistory], seed: int, number: int, random: Any
) -> None:
    candidates, history = fleet
    table = SelectionTable.model_validate({"method": method})
    ranked = build_selector(table, seed).rank(candidates, history, number)
    assert sorted(names(ranked)) == sorted(c.device for c in candidates)
    assert all(each.reason for each in ranked)
    shuffled = list(candidates)
    random.shuffle(shuffled)
    again = build_selector(table, seed)
    assert again.rank(shuffled, history, number) == ranked
    assert again.rank(shuffled, history, number) == ranked


DEVICES = [f"device-{i}" for i in range(12)]
CANDIDATES = [candidate(device) for device in DEVICES]
NOTHING = FleetHistory()


@pytest.mark.parametrize("method", METHODS)
def test_the_order_changes_with_the_round_and_the_seed(method: str) -> None:
    table = SelectionTable.model_validate({"method": method})
    selector = build_selector(table, 3)
    orders = {tuple(names(selector.rank(CANDIDATES, NOTHING, number))) for number in range(20)}
    assert len(orders) == 20
    assert names(build_selector(table, 4).rank(CANDIDATES, NOTHING, 0)) not in [list(o) for o in orders]


def test_every_device_is_drawn_first_about_equally_often() -> None:
    selector = UniformSelector(0)
    firsts = [selector.rank(CANDIDATES, NOTHING, number)[0].device for number in range(1200)]
    counts = [firsts.count(device) for device in DEVICES]
    # 100 expected, standard deviation 9.6.
    assert min(counts) > 60
    assert max(counts) < 140


GREEDY = SelectionTable(method="oort", exploration=0, exploration_minimum=0, separation=0)


def seen(last_asked: int = 5, **squared_losses: float) -> FleetHistory:
    """Devices that were all asked at the same time."""
    return FleetHistory(
        {d: DeviceHistory(last_asked=last_asked, squared_loss=loss) for d, loss in squared_losses.items()}
    )


def test_without_exploration_higher_utility_comes_first() -> None:
    history = seen(a=1.0, b=9.0, c=4.0)
    ranked = OortSelector(GREEDY, 0).rank([candidate(d, 2.0) for d in "abc"], history, 10)
    assert names(ranked) == ["b", "c", "a"]
    assert [each.utility for each in ranked] == [30.0, 20.0, 10.0]
    more = [candidate("a", 2.0, samples=31), candidate("b", 2.0), candidate("c", 2.0)]
    assert names(OortSelector(GREEDY, 0).rank(more, history, 10)) == ["a", "b", "c"]


def test_without_exploration_devices_never_seen_come_after_the_others() -> None:
    ranked = OortSelector(GREEDY, 0).rank([candidate(d) for d in "abc"], seen(b=0.0), 10)
    assert ranked[0].device == "b"
    assert {each.reason for each in ranked[1:]} == {"explored: never seen yet"}


def test_a_device_slower_than_the_median_is_held_back_by_the_square_of_the_ratio() -> None:
    history = seen(a=9.0, b=9.0, c=1.0, d=9.0)
    group = [candidate("a", 1.0), candidate("b", 2.0), candidate("c", 3.0), candidate("d", 10.0)]
    ranked = place_of(OortSelector(GREEDY, 0).rank(group, history, 10))
    assert [ranked[d].speed_factor for d in "abcd"] == [1.0, 1.0, (2.5 / 3) ** 2, (2.5 / 10) ** 2]
    full = ranked["a"].score
    assert full == ranked["b"].score
    assert ranked["d"].score == full * (2.5 / 10) ** 2
    assert "0.06" in ranked["d"].reason


def test_a_device_of_unknown_speed_is_not_held_back() -> None:
    group = [candidate("a", 1.0), candidate("b", 1.0), candidate("c")]
    ranked = OortSelector(GREEDY, 0).rank(group, seen(a=1.0, b=1.0, c=1.0), 10)
    assert [each.speed_factor for each in ranked] == [1.0] * 3


@pytest.mark.parametrize("outlier", [99.0, 1e9])
def test_utilities_above_the_quantile_count_as_much_as_it(outlier: float) -> None:
    utilities = [*map(float, range(99)), outlier]
    devices = [f"d{i}" for i in range(100)]
    history = seen(**{d: u**2 for d, u in zip(devices, utilities, strict=True)})
    group = [candidate(d, samples=1) for d in devices]
    ranked = place_of(OortSelector(GREEDY, 0).rank(group, history, 10))
    bonus = np.sqrt(0.1 * np.log(11) / 6)
    # The quantile of 0.98 lies at 97.02 of 0 .. 99, whatever the highest is.
    assert ranked["d99"].score == ranked["d98"].score == pytest.approx(1 + bonus)
    assert ranked["d97"].score == pytest.approx(97 / 97.02 + bonus)
    assert ranked["d0"].score == pytest.approx(bonus)
    assert ranked["d99"].utility == pytest.approx(outlier)


def test_devices_not_asked_for_long_get_a_bonus() -> None:
    history = FleetHistory({d: DeviceHistory(last_asked=i, squared_loss=4.0) for i, d in enumerate("abcd")})
    ranked = OortSelector(GREEDY, 0).rank([candidate(d) for d in "abcd"], history, 20)
    assert names(ranked) == ["a", "b", "c", "d"]
    assert [each.score for each in ranked] == pytest.approx(
        [np.sqrt(0.1 * np.log(21) / (last + 1)) for last in range(4)]
    )


def test_the_share_for_exploration_decays_to_its_least() -> None:
    selector = OortSelector(SelectionTable(), 0)
    assert [selector.exploration(number) for number in (0, 1, 7)] == pytest.approx(
        [0.9, 0.9 * 0.95, 0.9 * 0.95**7]
    )
    assert selector.exploration(28) > 0.2
    assert [selector.exploration(number) for number in (30, 10**6)] == [0.2, 0.2]


@pytest.mark.parametrize(("number", "least", "most"), [(1, 310, 375), (50, 50, 115)])
def test_that_share_of_the_places_is_for_devices_never_seen(number: int, least: int, most: int) -> None:
    table = SelectionTable(method="oort", separation=0)
    group = [candidate("known"), candidate("new")]
    history = seen(0, known=1.0)
    firsts = [OortSelector(table, seed).rank(group, history, number)[0] for seed in range(400)]
    # 342 and 80 of 400 expected, standard deviations 7 and 8.
    assert least < sum(each.device == "new" for each in firsts) < most


def test_devices_never_seen_are_drawn_in_proportion_to_their_speed() -> None:
    group = [candidate("fast", 1.0), candidate("slow", 3.0)]
    firsts = [OortSelector(GREEDY, seed).rank(group, NOTHING, 0)[0].device for seed in range(600)]
    # 450 expected, standard deviation 10.6.
    assert 400 < firsts.count("fast") < 500


@pytest.mark.parametrize("method", ["oort", "communities"])
def test_devices_asked_lately_come_last(method: str) -> None:
    table = SelectionTable.model_validate({"method": method, "separation": 3})
    history = FleetHistory(
        {
            "just": DeviceHistory(last_asked=9, squared_loss=100.0),
            "third": DeviceHistory(last_asked=7, squared_loss=50.0),
            "fourth": DeviceHistory(last_asked=6, squared_loss=0.0),
            "failed": DeviceHistory(last_asked=9),
        }
    )
    group = [candidate(device) for device in ("just", "third", "fourth", "failed", "new")]
    ranked = build_selector(table, 0).rank(group, history, 10)
    assert set(names(ranked)[:2]) == {"fourth", "new"}
    assert ["rests" in each.reason for each in ranked] == [False, False, True, True, True]


def separated(groups: int, size: int) -> dict[str, list[int]]:
    """Class counts of devices of which only those of one group share classes."""
    random = np.random.default_rng(0)
    found = {}
    for group in range(groups):
        for index in range(size):
            counts = np.zeros(2 * groups, int)
            counts[2 * group : 2 * group + 2] = random.integers(1, 50, 2)
            found[f"g{group}-{index}"] = [int(count) for count in counts]
    return found


def unit(values: list[int]) -> Array:
    shares: Array = np.sqrt(np.array(values) / sum(values))
    return shares


@pytest.mark.parametrize(("groups", "size"), [(2, 6), (3, 5), (5, 4)])
def test_separate_groups_are_found(groups: int, size: int) -> None:
    found = communities({d: unit(counts) for d, counts in separated(groups, size).items()}, seed=0)
    assert sorted(set(found.values())) == list(range(groups))
    for group in range(groups):
        assert len({found[f"g{group}-{i}"] for i in range(size)}) == 1


def test_communities_are_found_by_sketches_too() -> None:
    random = np.random.default_rng(0)
    centres = random.normal(size=(2, 32))
    noisy = {f"g{i % 2}-{i}": centres[i % 2] + random.normal(0, 0.3, 32) for i in range(12)}
    found = communities({d: v / np.linalg.norm(v) for d, v in noisy.items()}, seed=0)
    assert {(d[:2], c) for d, c in found.items()} == {("g0", found["g0-0"]), ("g1", found["g1-1"])}
    assert found["g0-0"] != found["g1-1"]


def test_few_or_odd_signatures_make_no_trouble() -> None:
    alone = np.array([1.0, 0.0])
    assert communities({}, 0) == {}
    assert communities({"a": alone}, 0) == {"a": 0}
    opposite = communities({"a": alone, "b": -alone}, 0)
    assert sorted(opposite.values()) == [0, 1]
    assert set(communities({"a": np.ones(3), "b": np.ones(3), "c": alone}, 0)) == {"a", "b"}


SETTINGS = SelectionTable(method="communities", separation=0)


def test_a_ranking_goes_round_the_communities() -> None:
    counts = separated(3, 4)
    group = [candidate(device, class_counts=each) for device, each in counts.items()]
    selector = CommunitySelector(SETTINGS, 0)
    begins = set()
    for number in range(3):
        ranked = selector.rank(group, NOTHING, number)
        for first in range(0, 12, 3):
            assert len({each.device[:2] for each in ranked[first : first + 3]}) == 3
        assert all(each.community is not None for each in ranked)
        begins.add(ranked[0].device[:2])
    assert begins == {"g0", "g1", "g2"}


def test_inside_a_community_utility_decides() -> None:
    counts = separated(2, 3)
    group = [candidate(device, class_counts=each) for device, each in counts.items()]
    history = seen(**{device: float(index) for index, device in enumerate(counts)})
    table = SETTINGS.model_copy(update={"exploration": 0, "exploration_minimum": 0})
    ranked = names(CommunitySelector(table, 0).rank(group, history, 10))
    for prefix in ("g0", "g1"):
        assert [d for d in ranked if d.startswith(prefix)] == [f"{prefix}-{i}" for i in (2, 1, 0)]


def test_devices_nothing_is_known_of_take_turns_as_a_community_of_their_own() -> None:
    counts = separated(2, 3)
    group = [candidate(device, class_counts=each) for device, each in counts.items()]
    group += [candidate(f"new-{i}") for i in range(3)]
    ranked = CommunitySelector(SETTINGS, 0).rank(group, NOTHING, 0)
    assert [each.community for each in ranked if each.device.startswith("new")] == [None] * 3
    for first in (0, 3, 6):
        assert {each.device[:2] for each in ranked[first : first + 3]} == {"g0", "g1", "ne"}


def test_signatures_of_different_lengths_are_not_compared() -> None:
    group = [candidate(f"d{i}", class_counts=[1] * (2 + i % 3)) for i in range(9)]
    ranked = CommunitySelector(SETTINGS, 0).rank(group, NOTHING, 0)
    assert sorted(names(ranked)) == [f"d{i}" for i in range(9)]


def test_one_device_with_another_signature_does_not_hide_what_is_known_of_the_others() -> None:
    group = [candidate(device, class_counts=each) for device, each in separated(2, 3).items()]
    history = FleetHistory({"odd": DeviceHistory(last_asked=0, sketch=np.ones(32) / 32**0.5)})
    ranked = CommunitySelector(SETTINGS, 0).rank([*group, candidate("odd")], history, 5)
    assert len({each.community for each in ranked if each.device != "odd"}) == 2


def test_a_device_that_takes_the_place_of_another_is_put_into_a_community() -> None:
    group = [candidate(device, class_counts=each) for device, each in separated(2, 3).items()]
    selector = CommunitySelector(SETTINGS, 0)
    selector.rank(group[1:], NOTHING, 1)
    assert all(each.community is not None for each in selector.rank(group[:-1], NOTHING, 2))
