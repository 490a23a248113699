from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from frostline.protocol.blobs import BlobStore, index_of, split_chunks
from frostline.protocol.messages import Receipt, TrainingMetrics, UpdateOffer
from frostline.server.updates import STORAGE_SECONDS, UPLOAD_SLOTS, WAIT_SECONDS, WINDOW, UpdateReceiver

CHUNK = 1024
METRICS = TrainingMetrics(samples=1, steps=1, loss=0.5, seconds=1.0)
UPDATE = "a" * 32


class FakeJudge:
    """Objects to the leases it is told to, and counts everything else unless it has a verdict."""

    def __init__(self) -> None:
        self.counted: dict[str, bytes] = {}
        self.settled: set[str] = set()
        self.verdict = ""
        self.strangers: set[str] = set()

    def is_known(self, device: str) -> bool:
        return device not in self.strangers

    def is_counted(self, update: str) -> bool:
        return update in self.counted

    def objection(self, device: str, offer: UpdateOffer) -> str:
        return "the lease is not open any more" if offer.lease in self.settled else ""

    def count(self, device: str, offer: UpdateOffer, content: bytes) -> str:
        if not self.verdict:
            assert offer.update not in self.counted
            self.counted[offer.update] = content
        return self.verdict


@pytest.fixture
def judge() -> FakeJudge:
    return FakeJudge()


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


@pytest.fixture
def receiver(store: BlobStore, judge: FakeJudge) -> UpdateReceiver:
    return UpdateReceiver(store, judge)


class Clock:
    """Time as a test tells it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def offer_of(content: bytes, update: str = UPDATE, lease: str = "1" * 32) -> UpdateOffer:
    return UpdateOffer(update=update, lease=lease, content=index_of(content, CHUNK), metrics=METRICS)


def chunks_of(content: bytes) -> list[bytes]:
    return list(split_chunks(content, CHUNK))


def test_an_update_is_received_chunk_by_chunk_in_any_order(
    receiver: UpdateReceiver, judge: FakeJudge
) -> None:
    content = os.urandom(3 * CHUNK)
    chunks = chunks_of(content)
    offer = offer_of(content)
    assert receiver.on_offer("device", offer) == Receipt(update=UPDATE, state="have", have=[], window=WINDOW)
    for index in (2, 0):
        expected = Receipt(update=UPDATE, state="have", have=[index], window=WINDOW)
        assert receiver.on_chunk("device", UPDATE, index, chunks[index]) == expected
    answer = receiver.on_offer("device", offer)
    assert (answer.state, answer.have) == ("have", [0, 2])
    assert receiver.on_chunk("device", UPDATE, 1, chunks[1]) == Receipt(update=UPDATE, state="done")
    assert judge.counted == {UPDATE: content}
    assert receiver.on_offer("device", offer).state == "done"
    assert judge.counted == {UPDATE: content}


def test_an_update_waits_for_its_devices_presence_and_is_not_rejected(
    receiver: UpdateReceiver, judge: FakeJudge
) -> None:
    offer = offer_of(b"update")
    judge.strangers.add("device")
    assert receiver.on_offer("device", offer).state == "wait"
    judge.strangers.clear()
    assert receiver.on_offer("device", offer).state == "have"
    receiver.on_chunk("device", UPDATE, 0, b"update")
    judge.strangers.add("device")
    assert receiver.on_offer("device", offer).state == "done", "what is counted stays counted"


def test_a_restarted_receiver_asks_for_the_rest_only(
    receiver: UpdateReceiver, store: BlobStore, judge: FakeJudge
) -> None:
    content = os.urandom(2 * CHUNK)
    receiver.on_offer("device", offer_of(content))
    receiver.on_chunk("device", UPDATE, 0, content[:CHUNK])
    restarted = UpdateReceiver(store, judge)
    assert restarted.on_chunk("device", UPDATE, 1, content[CHUNK:]) == Receipt(update=UPDATE, state="unknown")
    assert restarted.on_offer("device", offer_of(content)).have == [0]
    answer = restarted.on_chunk("device", UPDATE, 1, content[CHUNK:])
    assert answer is not None
    assert answer.state == "done"
    assert judge.counted == {UPDATE: content}


def test_an_update_whose_chunks_are_all_here_is_counted_when_offered(
    receiver: UpdateReceiver, store: BlobStore, judge: FakeJudge
) -> None:
    content = os.urandom(2 * CHUNK)
    for sha256, chunk in zip(offer_of(content).content.chunks, chunks_of(content), strict=True):
        store.put_chunk(sha256, chunk)
    assert receiver.on_offer("device", offer_of(content)).state == "done"
    assert judge.counted == {UPDATE: content}


@pytest.mark.parametrize(
    ("device", "update"), [("device", "b" * 32), ("another", UPDATE)], ids=["update", "device"]
)
def test_a_chunk_of_an_unknown_upload_is_answered_with_unknown(
    receiver: UpdateReceiver, store: BlobStore, device: str, update: str
) -> None:
    content = os.urandom(2 * CHUNK)
    offer = offer_of(content)
    receiver.on_offer("device", offer)
    assert receiver.on_chunk(device, update, 0, content[:CHUNK]) == Receipt(update=update, state="unknown")
    assert store.missing_chunks(offer.content) == offer.content.chunks


@pytest.mark.parametrize(
    ("index", "chunk"),
    [(2, bytes(CHUNK)), (99_999, bytes(CHUNK)), (0, b""), (0, b"wrong"), (1, bytes(CHUNK))],
)
def test_a_chunk_that_was_not_offered_is_dropped(
    receiver: UpdateReceiver, store: BlobStore, index: int, chunk: bytes
) -> None:
    offer = offer_of(bytes(CHUNK) + b"end")
    receiver.on_offer("device", offer)
    assert receiver.on_chunk("device", UPDATE, index, chunk) is None
    assert store.missing_chunks(offer.content) == offer.content.chunks


@pytest.mark.parametrize("chunks", [1, 3], ids=["too few", "too many"])
def test_an_offer_whose_chunks_do_not_fit_its_size_is_rejected(receiver: UpdateReceiver, chunks: int) -> None:
    offer = offer_of(os.urandom(2 * CHUNK))
    index = offer.content.model_copy(update={"chunks": ["0" * 64] * chunks})
    answer = receiver.on_offer("device", offer.model_copy(update={"content": index}))
    assert (answer.state, answer.reason) == ("rejected", "the number of chunks does not fit the size")


def test_chunks_that_are_not_the_content_are_rejected_and_dropped(
    receiver: UpdateReceiver, store: BlobStore, judge: FakeJudge
) -> None:
    content = os.urandom(2 * CHUNK)
    offer = offer_of(content)
    forged = offer.model_copy(update={"content": offer.content.model_copy(update={"sha256": "0" * 64})})
    receiver.on_offer("device", forged)
    receiver.on_chunk("device", UPDATE, 0, content[:CHUNK])
    answer = receiver.on_chunk("device", UPDATE, 1, content[CHUNK:])
    assert answer is not None
    assert answer.state == "rejected"
    assert "does not match its hash" in answer.reason
    assert judge.counted == {}
    assert store.missing_chunks(offer.content) == offer.content.chunks


def test_an_unwanted_update_is_rejected_and_its_upload_closed(
    receiver: UpdateReceiver, judge: FakeJudge
) -> None:
    content = os.urandom(2 * CHUNK)
    offer = offer_of(content)
    receiver.on_offer("device", offer)
    judge.settled.add(offer.lease)
    answer = receiver.on_offer("device", offer)
    assert (answer.state, answer.reason) == ("rejected", "the lease is not open any more")
    late = receiver.on_chunk("device", UPDATE, 0, content[:CHUNK])
    assert late is not None
    assert late.state == "unknown"


def test_an_update_the_judge_rejects_is_answered_with_its_reason(
    receiver: UpdateReceiver, judge: FakeJudge
) -> None:
    judge.verdict = "not a safetensors file " * 50
    receiver.on_offer("device", offer_of(b"content"))
    answer = receiver.on_chunk("device", UPDATE, 0, b"content")
    assert answer == Receipt(update=UPDATE, state="rejected", reason=judge.verdict[:500])
    assert judge.counted == {}


def occupy_all_slots(receiver: UpdateReceiver) -> None:
    for number in range(UPLOAD_SLOTS):
        offer = offer_of(os.urandom(2 * CHUNK), f"{number:032x}", f"{number:032x}")
        assert receiver.on_offer(f"device-{number}", offer).state == "have"


def test_with_all_slots_taken_a_device_waits(receiver: UpdateReceiver) -> None:
    occupy_all_slots(receiver)
    late = offer_of(os.urandom(2 * CHUNK))
    assert receiver.on_offer("late", late).state == "wait"
    receiver.forget()
    assert receiver.on_offer("late", late).state == "have"


def test_devices_that_wait_come_back_one_after_the_other_at_the_pace_of_the_uploads(
    store: BlobStore, judge: FakeJudge
) -> None:
    clock = Clock()
    receiver = UpdateReceiver(store, judge, clock)
    occupy_all_slots(receiver)
    late = [receiver.on_offer(f"late-{n}", offer_of(os.urandom(CHUNK), f"{n:031x}f")) for n in range(2000)]
    waits = [receipt.retry_seconds for receipt in late]
    assert waits == sorted(waits)
    assert waits[100] - waits[99] == pytest.approx(1 / UPLOAD_SLOTS)
    assert waits[0] >= WAIT_SECONDS[0] and waits[-1] == WAIT_SECONDS[1]

    clock.now = 200.0
    for _ in range(50):
        receiver.on_offer("device-0", offer_of(b"content", os.urandom(16).hex()))
        clock.now += 0.1
        receiver.on_chunk("device-0", receiver._open["device-0"].offer.update, 0, b"content")
        receiver.on_offer("device-0", offer_of(os.urandom(2 * CHUNK), os.urandom(16).hex()))
    late = [receiver.on_offer(f"later-{n}", offer_of(os.urandom(CHUNK), f"{n:031x}e")) for n in range(100)]
    assert late[-1].retry_seconds == pytest.approx(100 * 0.1 / UPLOAD_SLOTS, rel=0.01)


@pytest.mark.parametrize("step", ["put_chunk", "assemble"])
def test_a_full_disk_makes_a_device_wait_and_loses_nothing(
    receiver: UpdateReceiver,
    store: BlobStore,
    judge: FakeJudge,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    offer = offer_of(b"content")
    receiver.on_offer("device", offer)
    with monkeypatch.context() as patch:
        patch.setattr(store, step, fail)
        answer = receiver.on_chunk("device", UPDATE, 0, b"content")
    assert answer == Receipt(update=UPDATE, state="wait", retry_seconds=STORAGE_SECONDS)
    again = receiver.on_offer("device", offer)
    if again.state == "have":
        again = receiver.on_chunk("device", UPDATE, 0, b"content") or again
    assert again.state == "done"
    assert judge.counted == {UPDATE: b"content"}


def test_a_chunk_damaged_by_a_power_cut_is_asked_for_again(
    receiver: UpdateReceiver, store: BlobStore, judge: FakeJudge, tmp_path: Path
) -> None:
    content = os.urandom(2 * CHUNK)
    offer = offer_of(content)
    receiver.on_offer("device", offer)
    receiver.on_chunk("device", UPDATE, 0, content[:CHUNK])
    (tmp_path / "chunks" / offer.content.chunks[0]).write_bytes(bytes(CHUNK))
    answer = receiver.on_chunk("device", UPDATE, 1, content[CHUNK:])
    assert answer == Receipt(update=UPDATE, state="have", have=[1], window=WINDOW)
    answer = receiver.on_chunk("device", UPDATE, 0, content[:CHUNK])
    assert answer == Receipt(update=UPDATE, state="done")
    assert judge.counted == {UPDATE: content}


def test_a_finished_upload_frees_its_slot(receiver: UpdateReceiver) -> None:
    occupy_all_slots(receiver)
    small = offer_of(b"content", "b" * 32)
    # A device that already has a slot takes no second one for another update.
    assert receiver.on_offer("device-0", small).state == "have"
    assert receiver.on_offer("late", offer_of(os.urandom(CHUNK))).state == "wait"
    finished = receiver.on_chunk("device-0", "b" * 32, 0, b"content")
    assert finished is not None
    assert finished.state == "done"
    assert receiver.on_offer("late", offer_of(os.urandom(CHUNK))).state == "have"


def test_the_slot_of_a_settled_lease_is_free(receiver: UpdateReceiver, judge: FakeJudge) -> None:
    """A device that vanished in the middle of an upload must not keep the others from theirs."""
    occupy_all_slots(receiver)
    judge.settled.add(f"{3:032x}")
    assert receiver.on_offer("late", offer_of(os.urandom(2 * CHUNK))).state == "have"
    assert receiver.on_offer("later", offer_of(os.urandom(2 * CHUNK), "b" * 32)).state == "wait"


def test_one_device_cannot_take_every_slot(receiver: UpdateReceiver) -> None:
    for number in range(2 * UPLOAD_SLOTS):
        receiver.on_offer("greedy", offer_of(os.urandom(2 * CHUNK), f"{number:032x}"))
    assert receiver.on_offer("device", offer_of(os.urandom(2 * CHUNK))).state == "have"
