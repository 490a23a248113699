"""One round with a scripted fleet, the real ledger and the real update store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frostline.protocol.blobs import BlobStore, index_of, reference_to
from frostline.protocol.manifest import TensorSpec
from frostline.protocol.messages import Answer, Lease, TrainingMetrics, UpdateEncoding, UpdateOffer
from frostline.protocol.tensors import Array, encode_tensors
from frostline.protocol.update_encoding import decode_update, encode_update
from frostline.server import round as round_module
from frostline.server.admission import OfferedStage
from frostline.server.aggregation import Aggregator
from frostline.server.config import RunConfig
from frostline.server.fleet import DeviceRecord, RoundListener
from frostline.server.history import FleetHistory, Observation
from frostline.server.ledger import Ledger, NewLease
from frostline.server.round import Round, RoundPlan
from tests.server.builders import offered, online, stage_manifest

TRAINED = [TensorSpec(name="block.w", shape=(2, 3)), TensorSpec(name="block.mean", shape=(2,))]
NARROW = [TensorSpec(name="block.w", shape=(1, 3)), TensorSpec(name="block.mean", shape=(1,))]


def form(
    memory: int, trained: list[TensorSpec] = TRAINED, width: float = 1.0, **changes: Any
) -> OfferedStage:
    manifest = stage_manifest(
        memory, parameters=trained[:1], statistics=trained[1:], flops=1000, name=f"block {width}", **changes
    )
    return offered(manifest, width)


OFFERS = [form(132), form(72, variant="small")]
NARROW_OFFER = form(36, NARROW, width=0.5)
FORMS = {offer.reference: offer.manifest for offer in [*OFFERS, NARROW_OFFER]}
WEIGHTS_REFERENCE = reference_to(b"weights")
PLAN = RoundPlan(0, "a" * 32, OFFERS[:1], {1.0: WEIGHTS_REFERENCE}, devices=1, deadline_seconds=5.0)
TWO_WIDTHS = replace(
    PLAN,
    offers=[OFFERS[0], NARROW_OFFER],
    weights={1.0: WEIGHTS_REFERENCE, 0.5: reference_to(b"narrow weights")},
    last_layer=["block.w"],
)
WEIGHTS = {"block.w": np.ones((2, 3), np.float32), "block.mean": np.zeros(2, np.float32)}
SAMPLES = 10

Behaviour = Callable[["Fleet", str, Lease], None]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_module, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(round_module, "OFFLINE_GRACE_SECONDS", 0.03)


class Fleet:
    """Stands in for the gateway; what a device does with its lease is a function of its name."""

    def __init__(self, folder: Path, behaviours: dict[str, Behaviour] | None = None) -> None:
        self.store = BlobStore(folder / "updates")
        self.ledger = Ledger(f"sqlite:///{folder}/ledger.sqlite")
        self.behaviours = behaviours or {}
        self.devices: dict[str, DeviceRecord] = {}
        self.changed = asyncio.Event()
        self.listener: RoundListener | None = None
        self.leases: list[tuple[str, Lease]] = []
        self.receipts: dict[str, str] = {}
        self.reminders = 0
        self.plan = PLAN
        self.encoding = UpdateEncoding()
        self.ledger.begin_stage(0, "block")
        self.ledger.open_round(0, 0, WEIGHTS_REFERENCE)

    def listen(self, listener: RoundListener | None) -> None:
        self.listener = listener

    def send_lease(self, device: str, lease: Lease) -> None:
        self.leases.append((device, lease))
        behave = self.behaviours.get(device, finish)
        asyncio.get_running_loop().call_soon(behave, self, device, lease)

    def remind(self) -> None:
        self.reminders += 1

    @property
    def asked(self) -> list[str]:
        return [device for device, _ in self.leases]

    def join(
        self, *devices: str, session: str = "0" * 32, samples: int = SAMPLES, memory: int = 1000
    ) -> None:
        for device in devices:
            presence = online(device, session=session, memory_bytes=memory, samples=samples)
            self.devices[device] = DeviceRecord(presence, None)
            if self.listener is not None:
                self.listener.on_presence(device)
        self.changed.set()

    def leave(self, device: str) -> None:
        presence = self.devices[device].presence.model_copy(update={"state": "offline"})
        self.devices[device] = DeviceRecord(presence, asyncio.get_running_loop().time())
        assert self.listener is not None
        self.listener.on_presence(device)
        self.changed.set()

    def round(self, devices: int, deadline: float = 5.0, surplus: int = 0) -> Round:
        encoding = self.encoding.model_dump()
        config = RunConfig.model_validate({"model": {"name": "m"}, "updates": encoding})
        self.aggregator = Aggregator(WEIGHTS)
        plan = replace(self.plan, devices=devices, deadline_seconds=deadline, surplus=surplus)
        return Round(plan, config, self, self.ledger, self.aggregator, self.store)

    def send(self, device: str, offer: UpdateOffer, content: bytes) -> str:
        """Go the way of an update through the receiver; returns why it was rejected, or nothing."""
        assert self.listener is not None
        reason = self.listener.objection(device, offer)
        if not reason:
            self.store.put(content)
            reason = self.listener.count(device, offer, content)
        self.receipts[offer.update] = reason
        self.changed.set()
        return reason


def update_of(device: str, trained: list[TensorSpec] = TRAINED) -> dict[str, Array]:
    random = np.random.default_rng(list(device.encode()))
    return {spec.name: random.normal(size=spec.shape).astype(np.float32) for spec in trained}


def offer_of(lease: str, content: bytes, update: str | None = None, samples: int = SAMPLES) -> UpdateOffer:
    metrics = TrainingMetrics(samples=samples, steps=1, loss=1.0, seconds=0.1)
    return UpdateOffer(
        update=update or lease[::-1], lease=lease, content=index_of(content, 1024), metrics=metrics
    )


def finish(fleet: Fleet, device: str, lease: Lease) -> None:
    content = encode_tensors(update_of(device, FORMS[lease.manifest].trained))
    fleet.send(device, offer_of(lease.lease, content), content)


def keep_silent(fleet: Fleet, device: str, lease: Lease) -> None:
    pass


def answer(kind: str) -> Behaviour:
    def give_answer(fleet: Fleet, device: str, lease: Lease) -> None:
        assert fleet.listener is not None
        message = Answer.model_validate({"lease": lease.lease, "answer": kind, "reason": "because"})
        fleet.listener.on_answer(device, message)
        fleet.changed.set()

    return give_answer


def vanish(fleet: Fleet, device: str, lease: Lease) -> None:
    fleet.leave(device)


def send_wrong_tensors(fleet: Fleet, device: str, lease: Lease) -> None:
    content = encode_tensors({"block.w": np.zeros((3, 2), np.float32), "block.mean": np.zeros(2, np.float32)})
    fleet.send(device, offer_of(lease.lease, content), content)


def mean_of(devices: Iterable[str]) -> dict[str, Array]:
    aggregator = Aggregator(WEIGHTS)
    for device in devices:
        aggregator.fold(update_of(device), SAMPLES)
    return aggregator.result()


def assert_same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6)


def states(fleet: Fleet) -> dict[str, str]:
    return {row.device: row.state for row in fleet.ledger.leases(0)}


NAMES = [f"device-{index}" for index in range(6)]


def test_asks_as_many_devices_as_wanted_and_folds_what_they_return(tmp_path: Path) -> None:
    async def play() -> None:
        fleet = Fleet(tmp_path)
        fleet.join(*NAMES)
        current = fleet.round(devices=4)
        await current.run(iter(NAMES))
        assert fleet.asked == NAMES[:4]
        assert current.asked == len(current.metrics) == 4
        assert current.bytes_up == 4 * len(encode_tensors(update_of("any")))
        assert_same(fleet.aggregator.result(), mean_of(NAMES[:4]))
        assert set(states(fleet).values()) == {"done"}
        assert fleet.listener is None

    asyncio.run(play())


@pytest.mark.parametrize(
    ("behaviour", "state", "deadline"),
    [
        (answer("refused"), "refused", 5.0),
        (answer("failed"), "failed", 5.0),
        (send_wrong_tensors, "failed", 5.0),
        (keep_silent, "expired", 0.1),
        (vanish, "expired", 5.0),
    ],
    ids=["refuses", "fails", "sends wrong tensors", "keeps silent", "vanishes"],
)
def test_a_device_that_gives_nothing_is_replaced(
    tmp_path: Path, behaviour: Behaviour, state: str, deadline: float
) -> None:
    async def play() -> None:
        fleet = Fleet(tmp_path, {NAMES[1]: behaviour})
        fleet.join(*NAMES)
        current = fleet.round(devices=2, deadline=deadline)
        await asyncio.wait_for(current.run(iter(NAMES)), 3)
        assert fleet.asked == NAMES[:3]
        assert states(fleet) == {NAMES[0]: "done", NAMES[1]: state, NAMES[2]: "done"}
        assert len(current.notes) == 1
        assert current.notes[0].startswith(f"{NAMES[1]}: {state}: ")
        assert_same(fleet.aggregator.result(), mean_of([NAMES[0], NAMES[2]]))

    asyncio.run(play())


def test_a_device_back_within_the_grace_keeps_its_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_module, "OFFLINE_GRACE_SECONDS", 2.0)

    def blink(fleet: Fleet, device: str, lease: Lease) -> None:
        if fleet.asked.count(device) == 1:
            fleet.leave(device)
            asyncio.get_running_loop().call_later(0.05, lambda: fleet.join(device, session="1" * 32))
        else:
            finish(fleet, device, lease)

    async def play() -> None:
        fleet = Fleet(tmp_path, {NAMES[0]: blink})
        fleet.join(*NAMES)
        await asyncio.wait_for(fleet.round(devices=1).run(iter(NAMES)), 3)
        assert fleet.asked == [NAMES[0], NAMES[0]]
        assert fleet.leases[0] == fleet.leases[1]
        assert states(fleet) == {NAMES[0]: "done"}

    asyncio.run(play())


def test_a_device_is_asked_at_most_once_a_round(tmp_path: Path) -> None:
    async def play() -> None:
        fleet = Fleet(tmp_path, {NAMES[0]: answer("failed")})
        fleet.join(*NAMES[:2])
        current = fleet.round(devices=5)
        await current.run(iter([NAMES[0], NAMES[0], NAMES[1], NAMES[1]]))
        await current.run(iter(NAMES[:2]))
        assert sorted(fleet.asked) == NAMES[:2]
        assert len(current.metrics) == 1

    asyncio.run(play())


def test_a_device_that_failed_is_asked_again_only_when_it_is_forgiven(tmp_path: Path) -> None:
    def fail_once(fleet: Fleet, device: str, lease: Lease) -> None:
        (answer("failed") if fleet.asked.count(device) == 1 else finish)(fleet, device, lease)

    async def play() -> None:
        fleet = Fleet(tmp_path, {NAMES[0]: fail_once})
        fleet.join(*NAMES[:2])
        current = fleet.round(devices=2)
        await current.run(iter(NAMES))
        await current.run(iter(NAMES))
        assert fleet.asked == NAMES[:2]
        current.forgive()
        await current.run(iter(NAMES))
        assert fleet.asked == [*NAMES[:2], NAMES[0]]
        assert (current.asked, len(current.metrics)) == (2, 2)
        assert sorted(row.state for row in fleet.ledger.leases(0)) == ["done", "done", "failed"]
        current.forgive()
        await current.run(iter(NAMES))
        assert len(fleet.asked) == 3

    asyncio.run(play())


def test_collecting_waits_reminds_and_forgives_until_there_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_module, "FORGIVE_SECONDS", 0.1)

    def fail_once(fleet: Fleet, device: str, lease: Lease) -> None:
        (answer("failed") if fleet.asked.count(device) == 1 else finish)(fleet, device, lease)

    async def play() -> None:
        fleet = Fleet(tmp_path, {NAMES[0]: fail_once})
        fleet.join(NAMES[0])
        asyncio.get_running_loop().call_later(0.2, fleet.join, NAMES[1])
        current = fleet.round(devices=2)
        orders = iter([NAMES[:1]] * 2)
        assert await current.collect(lambda: next(orders, NAMES[:2]), 2, patience_seconds=3)
        assert sorted(fleet.asked) == [NAMES[0], NAMES[0], NAMES[1]]
        assert fleet.reminders > 1
        assert_same(fleet.aggregator.result(), mean_of(NAMES[:2]))

    asyncio.run(play())


def test_collecting_gives_up_when_nobody_comes(tmp_path: Path) -> None:
    async def play() -> None:
        fleet = Fleet(tmp_path)
        fleet.join(NAMES[0])
        current = fleet.round(devices=2)
        began = asyncio.get_running_loop().time()
        assert not await current.collect(lambda: NAMES[:1], 2, patience_seconds=0.3)
        assert asyncio.get_running_loop().time() - began >= 0.3
        assert len(current.metrics) == 1

    asyncio.run(play())


def test_a_device_that_cannot_train_the_stage_any_more_is_passed_over(tmp_path: Path) -> None:
    async def play() -> None:
        fleet = Fleet(tmp_path)
        fleet.join(*NAMES)
        fleet.join(NAMES[0], memory=10)
        await fleet.round(devices=1).run(iter(NAMES))
        assert fleet.asked == [NAMES[1]]

    asyncio.run(play())


def test_without_candidates_a_round_ends_at_once(tmp_path: Path) -> None:
    async def play() -> None:
        fleet = Fleet(tmp_path)
        current = fleet.round(devices=3)
        await asyncio.wait_for(current.run(iter([])), 1)
        assert current.asked == 0
        assert fleet.aggregator.result()["block.w"] is WEIGHTS["block.w"]

    asyncio.run(play())


def test_the_lease_says_what_to_train(tmp_path: Path) -> None:
    async def play() -> None:
        fleet = Fleet(tmp_path)
        fleet.join(*NAMES)
        await fleet.round(devices=2).run(iter(NAMES))
        first, second = (lease for _, lease in fleet.leases)
        assert first.lease != second.lease
        assert (first.run, first.round) == (PLAN.run, 0)
        assert (first.manifest, first.weights) == (OFFERS[0].reference, WEIGHTS_REFERENCE)
        assert first.evaluate

    asyncio.run(play())


def test_each_device_gets_the_fastest_variant_that_fits(tmp_path: Path) -> None:
    async def play() -> None:
        fleet = Fleet(tmp_path)
        fleet.plan = replace(PLAN, offers=OFFERS)
        whole, small = (offer.manifest.planned.total for offer in OFFERS)
        for device, memory in (("a", whole), ("b", whole - 1), ("c", small), ("d", small - 1)):
            fleet.join(device, memory=memory)
        current = fleet.round(devices=4)
        await asyncio.wait_for(current.run(iter("abcd")), 1)
        got = {device: lease.manifest for device, lease in fleet.leases}
        assert got == {"a": OFFERS[0].reference, "b": OFFERS[1].reference, "c": OFFERS[1].reference}
        assert {d: offer.manifest.variant for d, offer in current.variants.items()} == {
            "a": "whole",
            "b": "small",
            "c": "small",
        }
        assert len(current.metrics) == 3

    asyncio.run(play())


def test_a_lease_taken_up_for_an_absent_device_names_the_smallest_variant(tmp_path: Path) -> None:
    async def play() -> None:
        fleet = Fleet(tmp_path)
        fleet.plan = replace(PLAN, offers=OFFERS)
        fleet.ledger.add_leases(0, [NewLease("1" * 32, "absent")])
        running = asyncio.create_task(fleet.round(devices=1).run(iter(())))
        await asyncio.sleep(0)
        fleet.join("absent", memory=OFFERS[1].manifest.planned.total)
        await asyncio.wait_for(running, 1)
        assert [lease.manifest for _, lease in fleet.leases] == [OFFERS[1].reference]

    asyncio.run(play())


async def start(current: Round, candidates: Iterable[str] = NAMES) -> asyncio.Task[None]:
    """Run a round in the background until its leases are out."""
    task = asyncio.create_task(current.run(iter(candidates)))
    await asyncio.sleep(0.03)
    return task


async def stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


CONTENT = encode_tensors(update_of(NAMES[0]))


@pytest.mark.parametrize(
    ("device", "lease", "samples", "content", "reason"),
    [
        (NAMES[0], None, SAMPLES, CONTENT, ""),
        (NAMES[1], None, SAMPLES, CONTENT, "not open"),
        (NAMES[0], "f" * 32, SAMPLES, CONTENT, "not open"),
        (NAMES[0], None, SAMPLES + 1, CONTENT, f"{SAMPLES + 1} samples claimed, {SAMPLES} announced"),
        (NAMES[0], None, SAMPLES, bytes(50_000), "at most"),
    ],
    ids=["good", "wrong device", "unknown lease", "too many samples", "too long"],
)
def test_an_offer_has_to_fit_its_lease(
    tmp_path: Path, device: str, lease: str | None, samples: int, content: bytes, reason: str
) -> None:
    async def play() -> None:
        fleet = Fleet(tmp_path, dict.fromkeys(NAMES, keep_silent))
        fleet.join(*NAMES)
        current = fleet.round(devices=2)
        task = await start(current)
        given = dict(fleet.leases)[NAMES[0]].lease
        found = fleet.send(device, offer_of(lease or given, content, samples=samples), content)
        assert reason in found
        assert bool(found) == bool(reason)
        assert len(current.metrics) == len(fleet.ledger.updates(0)) == (0 if reason else 1)
        await stop(task)

    asyncio.run(play())


def test_a_late_update_is_rejected(tmp_path: Path) -> None:
    async def play() -> None:
        fleet = Fleet(tmp_path, dict.fromkeys(NAMES[:2], keep_silent))
        fleet.join(*NAMES)
        current = fleet.round(devices=1, deadline=0.1)
        task = asyncio.create_task(current.run(iter(NAMES)))
        await asyncio.sleep(0.15)
        assert fleet.asked == NAMES[:2]
        late = dict(fleet.leases)[NAMES[0]].lease
        assert "not open" in fleet.send(NAMES[0], offer_of(late, CONTENT), CONTENT)
        await asyncio.wait_for(task, 3)
        assert [update.device for update in fleet.ledger.updates(0)] == [NAMES[2]]

    asyncio.run(play())


@pytest.mark.parametrize("content", [CONTENT, b"no tensors"], ids=["good", "damaged"])
def test_an_update_whose_lease_ended_while_it_was_on_its_way_is_rejected(
    tmp_path: Path, content: bytes
) -> None:
    async def play() -> None:
        fleet = Fleet(tmp_path, dict.fromkeys(NAMES, keep_silent))
        fleet.join(NAMES[0])
        current = fleet.round(devices=1, deadline=0.1)
        task = await start(current, NAMES[:1])
        offer = offer_of(fleet.leases[0][1].lease, content)
        assert current.objection(NAMES[0], offer) == ""
        await asyncio.wait_for(task, 3)
        assert "not open" in current.count(NAMES[0], offer, content)
        assert current.metrics == []
        assert fleet.ledger.updates(0) == []
        assert states(fleet) == {NAMES[0]: "expired"}

    asyncio.run(play())


def test_of_two_updates_for_one_lease_the_first_counts(tmp_path: Path) -> None:
    async def play() -> None:
        fleet = Fleet(tmp_path, dict.fromkeys(NAMES, keep_silent))
        fleet.join(*NAMES)
        current = fleet.round(devices=2)
        task = await start(current)
        lease = fleet.leases[0][1].lease
        offers = [offer_of(lease, CONTENT, update=digit * 32) for digit in "12"]
        assert [current.objection(NAMES[0], offer) for offer in offers] == ["", ""]
        assert [bool(current.count(NAMES[0], offer, CONTENT)) for offer in offers] == [False, True]
        assert [update.update for update in fleet.ledger.updates(0)] == ["1" * 32]
        assert current.is_counted("1" * 32)
        assert not current.is_counted("2" * 32)
        await stop(task)

    asyncio.run(play())


def test_a_device_cannot_count_under_the_identifier_of_another(tmp_path: Path) -> None:
    async def play() -> None:
        fleet = Fleet(tmp_path, dict.fromkeys(NAMES, keep_silent))
        fleet.join(*NAMES)
        current = fleet.round(devices=2)
        task = await start(current)
        leases = dict(fleet.leases)
        reasons = [
            current.count(device, offer_of(leases[device].lease, CONTENT, update="1" * 32), CONTENT)
            for device in NAMES[:2]
        ]
        assert reasons[0] == ""
        assert "counted before" in reasons[1]
        assert [update.device for update in fleet.ledger.updates(0)] == [NAMES[0]]
        await stop(task)

    asyncio.run(play())


def test_a_round_can_be_cancelled_in_the_turn_in_which_a_message_comes(tmp_path: Path) -> None:
    async def play() -> None:
        fleet = Fleet(tmp_path, dict.fromkeys(NAMES, keep_silent))
        fleet.join(*NAMES)
        task = await start(fleet.round(devices=1))
        fleet.changed.set()
        task.cancel()
        _, running = await asyncio.wait([task], timeout=1)
        assert not running
        assert fleet.listener is None

    asyncio.run(play())


def test_a_lease_is_repeated_until_it_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_module, "REPEAT_SECONDS", 0.02)

    def hear_the_third(fleet: Fleet, device: str, lease: Lease) -> None:
        if fleet.asked.count(device) == 3:
            answer("accepted")(fleet, device, lease)

    async def play() -> None:
        fleet = Fleet(tmp_path, {NAMES[0]: hear_the_third})
        fleet.join(NAMES[0])
        task = await start(fleet.round(devices=1), NAMES[:1])
        await asyncio.sleep(0.3)
        assert fleet.asked == NAMES[:1] * 3
        assert len({lease.lease for _, lease in fleet.leases}) == 1
        await stop(task)

    asyncio.run(play())


def test_answers_about_leases_of_others_change_nothing(tmp_path: Path) -> None:
    async def play() -> None:
        fleet = Fleet(tmp_path, dict.fromkeys(NAMES, keep_silent))
        fleet.join(*NAMES)
        current = fleet.round(devices=1)
        task = await start(current)
        lease = fleet.leases[0][1]
        answer("failed")(fleet, NAMES[1], lease)
        answer("accepted")(fleet, NAMES[1], lease)
        assert states(fleet) == {NAMES[0]: "open"}
        assert current.accepted_by == []
        answer("accepted")(fleet, NAMES[0], lease)
        answer("accepted")(fleet, NAMES[0], lease)
        assert current.accepted_by == [NAMES[0]]
        await stop(task)

    asyncio.run(play())


def test_a_restarted_server_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    async def before() -> list[tuple[str, Lease]]:
        fleet = Fleet(tmp_path, dict.fromkeys(NAMES[2:], keep_silent))
        fleet.join(*NAMES)
        task = await start(fleet.round(devices=3))
        assert states(fleet) == {NAMES[0]: "done", NAMES[1]: "done", NAMES[2]: "open"}
        await stop(task)
        fleet.ledger.close()
        return fleet.leases

    async def after(leases: list[tuple[str, Lease]]) -> None:
        fleet = Fleet(tmp_path)
        current = fleet.round(devices=3)
        assert_same(fleet.aggregator.result(), mean_of(NAMES[:2]))
        assert len(current.metrics) == 2
        assert current.asked == 3
        assert current.bytes_up == 2 * len(CONTENT)
        fleet.join(*NAMES)
        await asyncio.wait_for(current.run(iter(NAMES)), 3)
        assert fleet.leases == [leases[2]]
        assert_same(fleet.aggregator.result(), mean_of(NAMES[:3]))
        assert [row.state for row in fleet.ledger.leases(0)] == ["done"] * 3

    asyncio.run(after(asyncio.run(before())))


def test_encoded_updates_are_folded_in_and_refolded_after_a_restart(tmp_path: Path) -> None:
    encoding = UpdateEncoding(values="int8", share=0.5, compression="zstd")

    def finish_encoded(fleet: Fleet, device: str, lease: Lease) -> None:
        assert lease.encoding == encoding
        content = encode_update(update_of(device), FORMS[lease.manifest], encoding)
        assert not fleet.send(device, offer_of(lease.lease, content), content)

    def scripted() -> Fleet:
        fleet = Fleet(tmp_path, dict.fromkeys(NAMES, finish_encoded))
        fleet.encoding = encoding
        return fleet

    expected = Aggregator(WEIGHTS)
    for device in NAMES[:2]:
        content = encode_update(update_of(device), OFFERS[0].manifest, encoding)
        expected.fold(decode_update(content, OFFERS[0].manifest, encoding, device), SAMPLES)

    async def before() -> None:
        fleet = scripted()
        fleet.join(*NAMES[:2])
        await asyncio.wait_for(fleet.round(devices=2).run(iter(NAMES)), 3)
        assert_same(fleet.aggregator.result(), expected.result())
        fleet.ledger.close()

    async def after() -> None:
        fleet = scripted()
        assert len(fleet.round(devices=3).metrics) == 2
        assert_same(fleet.aggregator.result(), expected.result())

    asyncio.run(before())
    asyncio.run(after())


def test_a_restarted_server_repeats_a_lease_when_its_device_appears(tmp_path: Path) -> None:
    async def before() -> list[tuple[str, Lease]]:
        fleet = Fleet(tmp_path, dict.fromkeys(NAMES, keep_silent))
        fleet.join(NAMES[0])
        await stop(await start(fleet.round(devices=1), NAMES[:1]))
        fleet.ledger.close()
        return fleet.leases

    async def after(leases: list[tuple[str, Lease]]) -> None:
        fleet = Fleet(tmp_path, {NAMES[0]: keep_silent})
        current = fleet.round(devices=1)
        task = await start(current)
        assert fleet.leases == []
        fleet.join(NAMES[0])
        fleet.join(NAMES[0])
        assert fleet.leases == leases
        finish(fleet, *leases[0])
        await asyncio.wait_for(task, 3)
        assert len(current.metrics) == 1

    asyncio.run(after(asyncio.run(before())))


def test_leases_beyond_those_wanted_go_out_and_are_settled_as_surplus(tmp_path: Path) -> None:
    async def play() -> None:
        fleet = Fleet(tmp_path, {NAMES[1]: keep_silent, NAMES[3]: keep_silent})
        fleet.join(*NAMES)
        current = fleet.round(devices=2, surplus=2)
        await asyncio.wait_for(current.run(iter(NAMES)), 3)
        assert fleet.asked == NAMES[:4]
        assert states(fleet) == {
            NAMES[0]: "done",
            NAMES[1]: "surplus",
            NAMES[2]: "done",
            NAMES[3]: "surplus",
        }
        assert current.notes == []
        assert_same(fleet.aggregator.result(), mean_of([NAMES[0], NAMES[2]]))
        late = dict(fleet.leases)[NAMES[1]].lease
        assert "not open" in current.objection(NAMES[1], offer_of(late, CONTENT))
        fleet.ledger.close_round(0, WEIGHTS_REFERENCE, WEIGHTS_REFERENCE)
        history = FleetHistory.read(fleet.ledger, {})
        assert history.dropout == 0
        assert history.of(NAMES[1]).last_asked == 0

    asyncio.run(play())


def test_a_surplus_takes_the_place_of_a_device_that_fails(tmp_path: Path) -> None:
    async def play() -> None:
        fleet = Fleet(tmp_path, {NAMES[0]: answer("failed"), NAMES[1]: keep_silent})
        fleet.join(*NAMES[:3])
        current = fleet.round(devices=1, surplus=1)
        await asyncio.wait_for(current.run(iter(NAMES[:3])), 3)
        assert states(fleet) == {NAMES[0]: "failed", NAMES[1]: "surplus", NAMES[2]: "done"}

    asyncio.run(play())


def test_a_counted_update_is_kept_with_what_it_showed_of_its_device(tmp_path: Path) -> None:
    async def play() -> None:
        fleet = Fleet(tmp_path)
        fleet.plan = TWO_WIDTHS
        fleet.join(NAMES[0])
        await fleet.round(devices=1).run(iter(NAMES))
        (update,) = fleet.ledger.updates(0)
        observation = Observation.model_validate_json(update.observation)
        assert observation.flops == 1000
        assert observation.transferred_bytes == WEIGHTS_REFERENCE.size + len(CONTENT)
        assert 0 <= observation.turnaround_seconds < 5
        assert np.linalg.norm(observation.sketch) == pytest.approx(1)

    asyncio.run(play())


def two_widths(folder: Path, behaviours: dict[str, Behaviour] | None = None) -> Fleet:
    fleet = Fleet(folder, behaviours)
    fleet.plan = TWO_WIDTHS
    fleet.join("wide", "other", memory=132)
    fleet.join("narrow", "slow", memory=36)
    return fleet


def mean_of_two_widths(wide: Iterable[str], narrow: Iterable[str]) -> dict[str, Array]:
    aggregator = Aggregator(WEIGHTS)
    for device in wide:
        aggregator.fold(update_of(device), SAMPLES)
    for device in narrow:
        aggregator.fold(update_of(device, NARROW), SAMPLES)
    return aggregator.result()


def test_a_round_folds_the_updates_of_two_widths(tmp_path: Path) -> None:
    async def play() -> None:
        fleet = two_widths(tmp_path)
        await asyncio.wait_for(fleet.round(devices=3).run(iter(["wide", "narrow", "other"])), 3)
        assert {d: (lease.manifest, lease.weights) for d, lease in fleet.leases} == {
            "wide": (OFFERS[0].reference, WEIGHTS_REFERENCE),
            "narrow": (NARROW_OFFER.reference, TWO_WIDTHS.weights[0.5]),
            "other": (OFFERS[0].reference, WEIGHTS_REFERENCE),
        }
        assert {row.device: row.width for row in fleet.ledger.leases(0)} == {
            "wide": 1.0,
            "narrow": 0.5,
            "other": 1.0,
        }
        result = fleet.aggregator.result()
        assert_same(result, mean_of_two_widths(["wide", "other"], ["narrow"]))
        whole = update_of("wide")["block.w"][1] + update_of("other")["block.w"][1]
        np.testing.assert_allclose(result["block.w"][1], 1 + whole / 2, rtol=1e-6)

    asyncio.run(play())


def test_a_restarted_server_goes_on_with_both_widths(tmp_path: Path) -> None:
    order = ["wide", "narrow", "slow"]

    async def before() -> list[tuple[str, Lease]]:
        fleet = two_widths(tmp_path, {"slow": keep_silent})
        await stop(await start(fleet.round(devices=3), order))
        assert states(fleet) == {"wide": "done", "narrow": "done", "slow": "open"}
        fleet.ledger.close()
        return fleet.leases

    async def after(leases: list[tuple[str, Lease]], *, grown: bool) -> None:
        fleet = two_widths(tmp_path, {"slow": keep_silent})
        if grown:
            # It could hold the full width by now, but it was given the narrow one.
            fleet.join("slow", memory=132)
        current = fleet.round(devices=3)
        assert_same(fleet.aggregator.result(), mean_of_two_widths(["wide"], ["narrow"]))
        task = await start(current, order)
        assert fleet.leases == [leases[2]]
        assert fleet.leases[0][1].weights == TWO_WIDTHS.weights[0.5]
        if grown:
            finish(fleet, *leases[2])
            await asyncio.wait_for(task, 3)
            assert_same(fleet.aggregator.result(), mean_of_two_widths(["wide"], ["narrow", "slow"]))
        await stop(task)
        fleet.ledger.close()

    leases = asyncio.run(before())
    asyncio.run(after(leases, grown=False))
    asyncio.run(after(leases, grown=True))
