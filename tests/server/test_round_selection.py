"""What a round is planned with, and what is written down of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from frostline.protocol.errors import CorruptContent
from frostline.protocol.messages import Presence
from frostline.server.config import RunConfig
from frostline.server.fleet import DeviceRecord
from frostline.server.round import RoundPlan
from frostline.server.round_selection import RoundSelection
from frostline.server.run_folder import RunFolder
from tests.server.builders import offered, online, stage_manifest
from tests.server.past import REFERENCE, Past

OFFERS = [
    offered(stage_manifest(memory, flops=1000, variant=v)) for memory, v in ((100, "whole"), (60, "small"))
]
GREEDY = {"method": "oort", "exploration": 0, "exploration_minimum": 0, "separation": 0}


class Server:
    """A selection over a fleet that can be changed, with a ledger that rounds are written to."""

    def __init__(self, folder: Path) -> None:
        self.past = Past(folder)
        self.folder = RunFolder.create(folder / "run")
        self.fleet = SimpleNamespace(devices={})

    def join(self, *presences: Presence) -> None:
        for presence in presences:
            self.past.presences[presence.device] = presence
            self.fleet.devices[presence.device] = DeviceRecord(presence, None)

    def selection(self, devices: int, deadline: float = 600.0, **selection: Any) -> RoundSelection:
        rounds = {"devices": devices, "deadline_seconds": deadline}
        tables = {"model": {"name": "m"}, "rounds": rounds, "selection": GREEDY | selection}
        config = RunConfig.model_validate(tables)
        return RoundSelection(config, self.fleet, self.past.ledger, self.folder)

    def plan(self, selection: RoundSelection, number: int = 10) -> RoundPlan:
        return selection.plan(number, "a" * 32, OFFERS, {1.0: REFERENCE}, ["head.weight"])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.past.ledger.close()


def observed(seconds: float, loss: float = 1.0) -> dict[str, Any]:
    """Ten steps of the stage's, in so many seconds."""
    return {"flops": 1000, "seconds": seconds, "loss": loss}


def test_it_is_written_down_why_each_device_stands_where_it_does(server: Server) -> None:
    server.join(
        online("a"),
        online("b", memory_bytes=60),
        online("c"),
        online("gone", state="offline"),
        online("poor", memory_bytes=59),
        online("other", engines=["onnxruntime"]),
        online("empty", samples=0),
    )
    server.past.round(a=observed(100, loss=1.0), b=observed(50, loss=3.0), c=observed(50, loss=2.0))
    selection = server.selection(devices=2)
    plan = server.plan(selection)
    assert selection.order(plan) == ["b", "c", "a"]
    record = server.folder.selection(10)
    assert record is not None
    assert (record.round, record.stage, record.stage_name, record.method) == (10, 0, "block", "oort")
    assert (record.devices_wanted, record.surplus, record.dropout) == (2, 0, 0.0)
    assert record.deadline_seconds == plan.deadline_seconds
    choices = record.devices
    assert [each.device for each in choices] == ["b", "c", "a", "empty", "gone", "other", "poor"]
    assert [each.chosen for each in choices] == [True, True, False, False, False, False, False]
    assert [each.place for each in choices] == [0, 1, 2, None, None, None, None]
    assert [each.reason for each in choices[:2]] == ["utility 30", "utility 20"]
    assert choices[2].reason.startswith("utility 10, times 0.25")
    assert [each.reason for each in choices[3:]] == [
        "it has no samples",
        "offline",
        "it has none of the engines executorch",
        "60 B are needed, its budget is 59 B",
    ]
    assert [(each.variant, each.planned_bytes, each.memory_bytes) for each in choices[:3]] == [
        ("small", 60, 60),
        ("whole", 100, 1000),
        ("whole", 100, 1000),
    ]
    assert [each.predicted_seconds for each in choices] == [10.0, 10.0, 20.0, *[None] * 4]
    assert [each.utility for each in choices[:3]] == [30.0, 20.0, 10.0]
    assert choices[2].speed_factor == 0.25


def test_the_last_record_of_a_round_is_read_back(server: Server) -> None:
    server.join(online("a"), online("b"))
    selection = server.selection(devices=1)
    assert server.folder.selection(10) is None
    for number in (10, 11):
        selection.order(server.plan(selection, number))
    server.join(online("b", state="offline"))
    selection.order(server.plan(selection, 10))
    again, other = server.folder.selection(10), server.folder.selection(11)
    assert again is not None and other is not None
    assert {each.device: each.reason for each in again.devices}["b"] == "offline"
    assert {each.device: each.place is None for each in other.devices} == {"a": False, "b": False}
    assert server.folder.selection(12) is None


def test_a_record_cut_short_is_left_out_and_a_wrong_one_named(server: Server) -> None:
    server.join(online("a"))
    selection = server.selection(devices=1)
    selection.order(server.plan(selection))
    with server.folder.selection_path.open("a") as file:
        file.write('{"round": 10')
    assert server.folder.selection(10) is not None
    selection.order(server.plan(selection, 11))
    assert len(server.folder.selection_path.read_text().splitlines()) == 2
    server.folder.selection_path.write_text('{"round": 10}\n')
    with pytest.raises(CorruptContent, match=r"selection\.jsonl:1 "):
        server.folder.selection(10)


@pytest.mark.parametrize(
    ("devices", "changes", "expected"),
    [
        (1, {}, 5 * 10.0),
        (2, {}, 5 * 20.0),
        (2, {"deadline_factor": 2.5}, 2.5 * 20.0),
        (2, {"deadline_factor": 1.0}, 30.0),
        (2, {"deadline_factor": 0}, 600.0),
        (2, {"deadline": 90.0}, 90.0),
        (3, {}, 600.0),
    ],
    ids=["fast one", "both", "factor", "least", "no factor", "most", "one never seen"],
)
def test_deadlines_follow_from_what_the_chosen_are_expected_to_take(
    server: Server, devices: int, changes: dict[str, Any], expected: float
) -> None:
    server.join(online("fast"), online("slow"), online("new", gigaflops=1.0))
    server.past.round(fast=observed(50, loss=9.0), slow=observed(100))
    plan = server.plan(server.selection(devices, **changes))
    assert plan.deadline_seconds == pytest.approx(expected)


def test_without_devices_the_deadline_is_the_longest(server: Server) -> None:
    selection = server.selection(devices=2)
    plan = server.plan(selection)
    assert plan.deadline_seconds == 600.0
    assert selection.order(plan) == []


@pytest.mark.parametrize(
    ("devices", "failed", "most", "surplus"),
    [
        (10, 0, 1.5, 0),
        (10, 5, 1.5, 5),
        (10, 5, 1.25, 2),
        (10, 5, 1.0, 0),
        (2, 5, 1.5, 1),
        (1, 5, 1.5, 0),
        (10, 2, 1.5, 2),
    ],
)
def test_the_surplus_makes_up_for_the_dropout_within_its_cap(
    server: Server, devices: int, failed: int, most: float, surplus: int
) -> None:
    server.past.round(**{f"d{i}": "failed" for i in range(failed)})
    plan = server.plan(server.selection(devices, surplus=most))
    assert (plan.devices, plan.surplus) == (devices, surplus)


def test_devices_asked_at_once_count_the_surplus(server: Server) -> None:
    server.join(*(online(f"d{i}") for i in range(5)))
    server.past.round(**{f"d{i}": "failed" for i in range(5)})
    selection = server.selection(devices=2)
    selection.order(server.plan(selection))
    record = server.folder.selection(10)
    assert record is not None
    assert [each.chosen for each in record.devices] == [True, True, True, False, False]
    assert record.dropout == pytest.approx(1 / 3)


def test_a_closed_round_counts_in_the_next(server: Server) -> None:
    server.join(online("a"), online("b"))
    server.past.round(a=observed(50, loss=3.0), b=observed(50, loss=2.0))
    selection = server.selection(devices=1)
    assert selection.order(server.plan(selection, 1)) == ["a", "b"]
    server.past.round(a=observed(50, loss=0.1), b=observed(50, loss=2.0))
    assert selection.order(server.plan(selection, 2)) == ["a", "b"]
    selection.learn(1)
    assert selection.order(server.plan(selection, 2)) == ["a", "b"]
    server.past.round(a=observed(50, loss=0.1), b=observed(50, loss=2.0))
    selection.learn(2)
    assert selection.order(server.plan(selection, 3)) == ["b", "a"]
    again = server.selection(devices=1)
    assert again.order(server.plan(again, 3)) == ["b", "a"]


def test_all_methods_can_be_asked_for(server: Server) -> None:
    server.join(online("a", class_counts=[1, 0]), online("b", class_counts=[0, 1]), online("c"))
    for method in ("uniform", "oort", "communities"):
        selection = server.selection(devices=2, method=method)
        assert sorted(selection.order(server.plan(selection))) == ["a", "b", "c"]
        record = server.folder.selection(10)
        assert record is not None
        assert record.method == method
        communities = {each.device: each.community for each in record.devices}
        assert (communities["a"] is not None) == (method == "communities")
        assert communities["c"] is None
