"""Whole runs in simulated time, with real training and invented step times."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from frostline.emulator import step_profile
from frostline.emulator.emulation import memory_budgets, split_samples
from frostline.emulator.simulated_fleet import SimulatedFleet, VirtualDevice
from frostline.emulator.simulation import virtual_devices
from frostline.protocol.errors import RunError
from frostline.protocol.messages import RunAnnouncement
from frostline.protocol.tensors import Array, encode_tensors
from frostline.server.aggregation import Aggregator, leading_part
from frostline.server.config import Document, FleetTable, merge
from frostline.server.coordinator import RunObserver
from frostline.server.ledger import LeaseRow, Ledger, sqlite_url
from frostline.server.records import RunSummary
from frostline.server.round import OFFLINE_GRACE_SECONDS
from frostline.server.run_folder import RunFolder
from frostline.server.schedule import GrowingSchedule
from tests.emulator.small_runs import finish, prepare, rows

STEP, BLOCK = 0.25, 0.125
"""Seconds that a step, and a batch through a frozen block, take here."""

ONE_ROUND: dict[str, Document] = {"model": {"blocks": 1}, "rounds": {"max_per_stage": 1}}


@pytest.fixture(autouse=True)
def _invented_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_profile, "_time_step", lambda *_: STEP)
    monkeypatch.setattr(step_profile, "_time_block", lambda *_: BLOCK)


def changed(base: Mapping[str, Document], **tables: Document) -> dict[str, Document]:
    return merge(dict(base), tables)


def leases(out: Path, number: int) -> list[LeaseRow]:
    ledger = Ledger(sqlite_url(out / "ledger.sqlite"))
    try:
        return ledger.leases(number)
    finally:
        ledger.close()


def test_the_same_run_again_is_the_same_to_the_last_bit(tmp_path: Path, compiled: Path) -> None:
    changes: dict[str, Document] = {
        "pace": {"rollback": 1.0},
        "selection": {"method": "communities"},
        "simulation": {"dropout": 0.2, "away_seconds": 60.0},
    }
    for name in ("first", "again"):
        finish(prepare(tmp_path / name, compiled, changes), tmp_path / "profile.json")
    first, again = (tmp_path / name for name in ("first", "again"))
    assert rows(first) == rows(again)
    assert len(rows(first)) == 4
    ends = [sorted((lease.device, lease.state) for lease in leases(out, 0)) for out in (first, again)]
    assert ends[0] == ends[1]
    weights = [load_file(out / "model.safetensors") for out in (first, again)]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_seconds_are_what_the_slowest_device_needs(tmp_path: Path, compiled: Path) -> None:
    changes: dict[str, Document] = {
        "pace": {"rollback": 1.0},
        "fleet": {"split": "dirichlet"},
        "training": {"epochs": 2},
        "rounds": {"max_per_stage": 1, "devices": 3},
    }
    run = prepare(tmp_path / "run", compiled, changes)
    shards = split_samples(run.config)
    devices = {d.name: d for d in virtual_devices(run.config, shards, [1] * len(shards))}
    first = run.schedule.prepare(0, "onnxruntime")
    finish(run)
    second = run.schedule.prepare(1, "onnxruntime")
    records = rows(run.folder.path)
    assert [record["stage"] for record in records] == [0, 1]
    for record, stage in zip(records, (first, second), strict=True):
        needed = []
        for lease in leases(run.folder.path, record["round"]):
            device = devices[lease.device]
            weights = len(encode_tensors(stage.weights))
            programs = len(stage.manifest.encode()) + sum(len(each) for each in stage.files.values())
            steps = max(1, 2 * len(device.samples) // 8)
            batches = len(stage.manifest.prefix) * math.ceil(len(device.samples) / 8)
            computing = (steps * STEP + batches * BLOCK) / device.speed
            needed.append((programs + weights) / device.bandwidth + computing + weights / device.bandwidth)
        assert len(needed) == record["devices_finished"] == 3
        assert len({round(seconds, 3) for seconds in needed}) == 3
        assert record["seconds"] == pytest.approx(max(needed), rel=1e-9)
    assert len(second.manifest.prefix) == 1


def test_a_device_fetches_programs_once(tmp_path: Path, compiled: Path) -> None:
    changes = changed(
        ONE_ROUND,
        rounds={"max_per_stage": 2, "devices": 1},
        fleet={"devices": 1},
        simulation={"speed": [1.0, 1.0], "bandwidth": ["10 kB", "10 kB"]},
    )
    run = prepare(tmp_path / "run", compiled, changes)
    weights = len(encode_tensors(run.schedule.prepare(0, "onnxruntime").weights))
    finish(run)
    computing = 20 * STEP
    for record in rows(run.folder.path):
        moved = record["bytes_down"] + record["bytes_up"]
        assert record["seconds"] == pytest.approx(moved / 10_000 + computing, rel=1e-9)
    assert rows(run.folder.path)[1]["bytes_down"] == weights


def test_a_slower_fleet_takes_longer_in_proportion(tmp_path: Path, compiled: Path) -> None:
    seconds = []
    for speed in (0.5, 0.125):
        table = {"speed": [speed, speed], "bandwidth": ["1 GB", "1 GB"]}
        out = tmp_path / str(speed)
        finish(prepare(out, compiled, {**ONE_ROUND, "simulation": table}))
        seconds.append(rows(out)[0]["seconds"])
    assert seconds[0] == pytest.approx(5 * STEP / 0.5, rel=1e-2)
    assert seconds[1] == pytest.approx(4 * seconds[0], rel=1e-2)


def test_encoded_updates_take_less_time_and_train_the_same_block(tmp_path: Path, compiled: Path) -> None:
    slow = changed(ONE_ROUND, simulation={"speed": [1.0, 1.0], "bandwidth": ["10 kB", "10 kB"]})
    finish(prepare(tmp_path / "plain", compiled, slow))
    finish(prepare(tmp_path / "int8", compiled, changed(slow, updates={"values": "int8"})))
    (plain,), (int8,) = rows(tmp_path / "plain"), rows(tmp_path / "int8")
    assert int8["bytes_up"] < 0.5 * plain["bytes_up"]
    saved = (plain["bytes_up"] - int8["bytes_up"]) / plain["devices_finished"] / 10_000
    # The file's header is longer by the names of the scales.
    assert plain["seconds"] - int8["seconds"] == pytest.approx(saved, rel=0.3)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "int8")]
    for name, value in weights[0].items():
        np.testing.assert_allclose(weights[1][name], value, atol=0.01)


def test_nothing_of_the_devices_is_left_behind(tmp_path: Path, compiled: Path) -> None:
    run = prepare(tmp_path / "run", compiled, ONE_ROUND)
    summary = finish(run)
    assert not (tmp_path / "run" / "devices").exists()
    assert (tmp_path / "run" / "profile.json").is_file()
    assert summary.seconds == pytest.approx(sum(row["seconds"] for row in rows(tmp_path / "run")))


def test_vanished_devices_are_replaced_and_later_rounds_lease_more(tmp_path: Path, compiled: Path) -> None:
    changes = changed(
        ONE_ROUND,
        rounds={"devices": 4, "max_per_stage": 6, "join_seconds": 500},
        fleet={"devices": 12},
        simulation={"dropout": 0.4, "away_seconds": 40.0},
        pace={"patience": 100},
    )
    run = prepare(tmp_path / "run", compiled, changes)
    finish(run)
    records = rows(run.folder.path)
    assert len(records) == 6
    every = [leases(run.folder.path, number) for number in range(6)]
    gone = [lease for found in every for lease in found if lease.state == "expired"]
    assert gone and all(lease.reason == "the device went offline" for lease in gone)
    for record, found in zip(records, every, strict=True):
        done = [lease.device for lease in found if lease.state == "done"]
        # Those who are away are missed in the rounds after: a round makes do with whom it finds.
        assert record["devices_finished"] == len(done) == len(set(done)) <= 4
        assert all(lease.state in ("done", "expired", "surplus") for lease in found)
    first = every[0]
    assert len([lease for lease in first if lease.state == "done"]) == 4
    assert len(first) > 4 and len([lease for lease in first if lease.state == "expired"]) == len(first) - 4
    selections = [RunFolder.open(run.folder.path).selection(number) for number in range(6)]
    surplus = [selection.surplus if selection else -1 for selection in selections]
    assert surplus[0] == 0 and max(surplus) > 0


def test_a_round_waits_out_the_grace_before_it_asks_another(tmp_path: Path, compiled: Path) -> None:
    quick = {"speed": [100.0, 100.0], "bandwidth": ["1 GB", "1 GB"]}
    changes = changed(
        ONE_ROUND, rounds={"devices": 4, "join_seconds": 900}, fleet={"devices": 12}, simulation=quick
    )
    finish(prepare(tmp_path / "steady", compiled, changes))
    changes = changed(changes, simulation={"dropout": 0.5, "away_seconds": 40.0})
    finish(prepare(tmp_path / "shaky", compiled, changes))
    assert len(leases(tmp_path / "steady", 0)) == 4
    assert len(leases(tmp_path / "shaky", 0)) > 4
    assert rows(tmp_path / "steady")[0]["seconds"] < 1
    assert rows(tmp_path / "shaky")[0]["seconds"] > OFFLINE_GRACE_SECONDS


@pytest.mark.parametrize("asked", [True, False])
def test_class_counts_are_announced_only_if_asked(tmp_path: Path, compiled: Path, asked: bool) -> None:
    run = prepare(tmp_path / "run", compiled, {"selection": {"class_counts": asked}})
    shards = split_samples(run.config)
    fleet = simulated_fleet(tmp_path, virtual_devices(run.config, shards, [1000] * 4))

    async def announce() -> None:
        fleet.announce(
            RunAnnouncement(run="0" * 32, state="open", asks_class_counts=asked, chunk_size=65_536)
        )

    asyncio.run(announce())
    expected = [shard.class_counts() if asked else None for shard in shards]
    assert [record.presence.class_counts for record in fleet.devices.values()] == expected
    assert all(record.presence.memory_bytes == 1000 for record in fleet.devices.values())


def simulated_fleet(folder: Path, devices: list[VirtualDevice]) -> SimulatedFleet:
    from frostline.emulator.step_profile import StepProfile
    from frostline.protocol.blobs import BlobStore

    profile = StepProfile(folder / "profile.json")
    return SimulatedFleet(devices, profile, folder / "devices", BlobStore(folder / "updates"), 65_536, 0)


def test_speeds_and_bandwidths_are_drawn_in_their_ranges(tmp_path: Path, compiled: Path) -> None:
    tables: dict[str, Document] = {
        "fleet": {"devices": 50, "seed": 5},
        "simulation": {"speed": [0.125, 8.0], "bandwidth": ["10 kB", "1 MB"]},
    }
    run = prepare(tmp_path / "run", compiled, tables)
    shards = split_samples(run.config)
    devices, again = (virtual_devices(run.config, shards, [1] * 50) for _ in range(2))
    assert [(d.speed, d.bandwidth) for d in devices] == [(d.speed, d.bandwidth) for d in again]
    speeds, bandwidths = [d.speed for d in devices], [d.bandwidth for d in devices]
    assert 0.125 <= min(speeds) < 0.2 and 5 < max(speeds) <= 8
    assert 10_000 <= min(bandwidths) < 20_000 and 500_000 < max(bandwidths) <= 1_000_000
    # Evenly on a logarithmic scale: half are slower than the geometric mean.
    assert 15 < sum(speed < 1 for speed in speeds) < 35
    # The one says nothing about the other.
    assert abs(np.corrcoef(np.log(speeds), np.log(bandwidths))[0, 1]) < 0.4
    assert len({d.name for d in devices}) == 50


def budgets(**table: Any) -> list[int]:
    fleet = FleetTable(**table)
    plan = SimpleNamespace(estimate_whole_model=lambda: SimpleNamespace(total=1000))
    run: Any = SimpleNamespace(config=SimpleNamespace(fleet=fleet), schedule=plan)
    return asyncio.run(memory_budgets(run))


def test_budgets_are_drawn_in_their_range() -> None:
    drawn = budgets(devices=200, memory_range=["2 kB", "300%"], seed=3)
    assert 2000 <= min(drawn) < 2050 and 2950 < max(drawn) <= 3000
    assert drawn == budgets(devices=200, memory_range=["2 kB", "300%"], seed=3)
    assert drawn != budgets(devices=200, memory_range=["2 kB", "300%"], seed=4)


def test_budgets_are_dealt_out_in_turn() -> None:
    assert budgets(devices=5, memory=["50%", "7 kB"]) == [500, 7000, 500, 7000, 500]


@pytest.mark.parametrize("variants", ["auto", "whole"])
def test_a_fleet_too_small_is_told_the_least_that_would_do(
    tmp_path: Path, compiled: Path, variants: str
) -> None:
    changes = changed(
        ONE_ROUND,
        model={"blocks": ["block2", "block3"]},
        fleet={"memory": ["1 kB", "2 kB"]},
        training={"variants": variants},
    )
    with pytest.raises(RunError, match="stage 'block2' can be trained with") as caught:
        finish(prepare(tmp_path / "small", compiled, changes))
    assert "the largest budget is 2000 bytes" in str(caught.value)
    found = re.search(r"with (\d+) bytes", str(caught.value))
    assert found
    least = int(found[1])
    rerun = changed(changes, fleet={"memory": [str(least)]})
    finish_first_stage(prepare(tmp_path / "enough", compiled, rerun))
    assert rows(tmp_path / "enough")[0]["served_bytes"] == least
    rerun = changed(changes, fleet={"memory": [str(least - 1)]})
    with pytest.raises(RunError, match="can be trained with"):
        finish(prepare(tmp_path / "short", compiled, rerun))


def finish_first_stage(run: Any) -> None:
    """A later stage may need more."""
    try:
        finish(run)
    except RunError as error:
        assert "stage 'block3' can be trained with" in str(error)


class Notes(RunObserver):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def scripted(monkeypatch: pytest.MonkeyPatch, accuracies: dict[int, float]) -> None:
    monkeypatch.setattr(GrowingSchedule, "accuracy", lambda self, index, weights: accuracies[index])


def simulate_scripted(
    tmp_path: Path, compiled: Path, rollback: float, blocks: int = 2
) -> tuple[RunSummary, list[str]]:
    tables: dict[str, Document] = {
        "model": {"blocks": blocks},
        "pace": {"rollback": rollback},
        "rounds": {"max_per_stage": 1},
    }
    notes = Notes()
    summary = finish(prepare(tmp_path / "run", compiled, tables, notes))
    return summary, [note for note in notes.notes if "once more" in note]


def test_a_block_whose_freezing_costs_accuracy_is_trained_once_more(
    tmp_path: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {0: 0.9, 1: 0.5})
    summary, notes = simulate_scripted(tmp_path, compiled, 0.0)
    assert len(notes) == 1 and "block2" in notes[0] and "block3" in notes[0]
    assert [row["stage"] for row in rows(tmp_path / "run")] == [0, 1, 0, 1]
    assert [row["round_in_stage"] for row in rows(tmp_path / "run")] == [0, 0, 1, 1]
    assert [(stage.stage, stage.reopened, stage.rounds) for stage in summary.stages] == [
        (0, True, 2),
        (1, False, 2),
    ]
    assert summary.accuracy == 0.5
    assert all(
        math.isfinite(value.sum()) for value in load_file(tmp_path / "run" / "model.safetensors").values()
    )


def test_reopened_stages_go_on_from_their_weights(
    tmp_path: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {0: 0.9, 1: 0.5})
    began: list[dict[str, Array]] = []
    ended: list[dict[str, Array]] = []

    class Spy(Aggregator):
        def __init__(self, weights: Mapping[str, Array]) -> None:
            super().__init__(weights)
            began.append(dict(weights))

        def result(self) -> dict[str, Array]:
            ended.append(super().result())
            return ended[-1]

    monkeypatch.setattr("frostline.server.coordinator.Aggregator", Spy)
    simulate_scripted(tmp_path, compiled, 0.0)
    assert len(began) == 4
    for before, after in ((0, 2), (1, 3)):
        assert began[after].keys() == ended[before].keys()
        assert all(np.array_equal(began[after][name], ended[before][name]) for name in began[after])
    # The block that ships is the one that was trained last.
    final = load_file(tmp_path / "run" / "model.safetensors")
    trained = {name.removeprefix("block."): w for name, w in ended[2].items() if name.startswith("block.")}
    assert trained
    assert all(np.array_equal(value, held_as(final, name)) for name, value in trained.items())


def held_as(weights: Mapping[str, Array], name: str) -> Array:
    return next(value for key, value in weights.items() if key.endswith(name))


def test_every_block_may_be_reopened_once(
    tmp_path: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {0: 0.9, 1: 0.5, 2: 0.1})
    summary, notes = simulate_scripted(tmp_path, compiled, 0.0, blocks=3)
    assert len(notes) == 2
    assert [row["stage"] for row in rows(tmp_path / "run")] == [0, 1, 0, 1, 2, 1, 2]
    assert [stage.reopened for stage in summary.stages] == [True, True, False]
    assert [stage.rounds for stage in summary.stages] == [2, 3, 2]


@pytest.mark.parametrize(("second", "rollback"), [(0.5, 1.0), (0.9, 0.0), (0.875, 0.03125)])
def test_what_is_no_worse_than_allowed_stays_frozen(
    tmp_path: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch, second: float, rollback: float
) -> None:
    scripted(monkeypatch, {0: 0.90625 if rollback < 1 and second < 0.9 else 0.9, 1: second})
    summary, notes = simulate_scripted(tmp_path, compiled, rollback)
    assert not notes and len(rows(tmp_path / "run")) == 2
    assert not any(stage.reopened for stage in summary.stages)


def test_narrow_devices_change_the_leading_part_only(
    tmp_path: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = changed(
        ONE_ROUND,
        model={"options": {"width": 8}, "widths": [1.0, 0.25]},
        training={"variants": "auto"},
        fleet={"devices": 2},
    )
    probe = prepare(tmp_path / "probe", compiled, tables)
    whole = probe.schedule.prepare(0, "onnxruntime").manifest.planned.total
    narrow = probe.schedule.smallest(0, "onnxruntime").manifest.planned.total
    assert narrow < whole
    began: list[Mapping[str, Array]] = []
    folded: list[tuple[Mapping[str, Array], int]] = []

    class Spy(Aggregator):
        def __init__(self, weights: Mapping[str, Array]) -> None:
            super().__init__(weights)
            began.append(weights)

        def fold(self, update: Mapping[str, Array], samples: int) -> None:
            super().fold(update, samples)
            folded.append((update, samples))

    monkeypatch.setattr("frostline.server.coordinator.Aggregator", Spy)
    tables = changed(tables, fleet={"memory": [str(whole), str(narrow)]})
    run = prepare(tmp_path / "run", compiled, tables)
    finish(run)
    assert sorted(lease.width for lease in leases(tmp_path / "run", 0)) == [0.25, 1.0]
    assert rows(tmp_path / "run")[0]["served_bytes"] == round((whole + narrow) / 2)
    (wide, m), (part, n) = sorted(folded, key=lambda each: -sum(v.size for v in each[0].values()))
    final = run.schedule.trained_model().state_dict()
    narrower = 0
    for name, before in began[0].items():
        expected = (before + wide[name].astype(np.float64)).astype(np.float32)
        held = leading_part(expected, part[name].shape)
        mean = (
            m * leading_part(wide[name], part[name].shape).astype(np.float64)
            + n * part[name].astype(np.float64)
        ) / (m + n)
        held[...] = leading_part(before, part[name].shape) + mean
        narrower += part[name].shape != before.shape
        own = next(tensor for key, tensor in final.items() if name.endswith(key))
        assert np.allclose(own.numpy(), expected, atol=1e-7)
    assert narrower > 3
    assert any(np.abs(value).max() > 0 for value in part.values())
