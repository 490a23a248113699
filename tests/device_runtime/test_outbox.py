from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from frostline.device_runtime import outbox as outbox_module
from frostline.device_runtime.outbox import Outbox
from frostline.protocol.blobs import BlobStore, index_of, write_atomically
from frostline.protocol.connection import Connection
from frostline.protocol.messages import Receipt, TrainingMetrics, UpdateOffer, decode
from frostline.protocol.topics import Topics
from frostline.server import updates as updates_module
from frostline.server.updates import UpdateReceiver

TOPICS = Topics("fleet")
DEVICE = "device"
CHUNK = 1024
LEASE = "1" * 32
METRICS = TrainingMetrics(samples=1, steps=1, loss=0.5, seconds=1.0)


def offer_of(content: bytes, lease: str = LEASE, update: str = "a" * 32) -> UpdateOffer:
    return UpdateOffer(update=update, lease=lease, content=index_of(content, CHUNK), metrics=METRICS)


class FakeJudge:
    """Remembers what was counted, as the ledger does across restarts."""

    def __init__(self) -> None:
        self.counted: list[tuple[str, bytes]] = []
        self.verdict = ""

    def is_known(self, device: str) -> bool:
        return True

    def is_counted(self, update: str) -> bool:
        return any(known == update for known, _ in self.counted)

    def objection(self, device: str, offer: UpdateOffer) -> str:
        return self.verdict

    def count(self, device: str, offer: UpdateOffer, content: bytes) -> str:
        self.counted.append((offer.update, content))
        return ""


class Link:
    """A device's outbox and a server's receiver with a bad network between them.

    Parameters
    ----------
    fates : sequence of str
        What becomes of the first messages, in either direction; all later ones arrive.
    """

    def __init__(self, folder: Path, fates: Sequence[str] = ()) -> None:
        self.folder = folder
        self.judge = FakeJudge()
        self.store = BlobStore(folder / "server")
        self.sent: list[str] = []
        self.receipts: list[Receipt] = []
        self._fates: Iterator[str] = iter(fates)
        self._delayed: list[tuple[str, bytes]] = []
        self.restart_server()
        self.restart_device()

    def restart_server(self) -> None:
        self.receiver = UpdateReceiver(self.store, self.judge)

    def restart_device(self) -> None:
        self.outbox = Outbox(cast(Connection, self), TOPICS, DEVICE, self.folder / "outbox")

    def add(self, content: bytes, offer: UpdateOffer | None = None) -> UpdateOffer:
        offer = offer or offer_of(content)
        write_atomically(self.outbox.content_path(offer.lease), content)
        self.outbox.add(offer)
        return offer

    def publish(self, topic: str, payload: bytes) -> None:
        """The device's connection ends here."""
        self.sent.append(topic)
        self._pass_on(topic, payload)

    def _pass_on(self, topic: str, payload: bytes) -> None:
        match next(self._fates, "arrive"):
            case "arrive":
                self._arrive(topic, payload)
            case "twice":
                self._arrive(topic, payload)
                self._arrive(topic, payload)
            case "late":
                # After the next message that arrives.
                self._delayed.append((topic, payload))
            case "restart server":
                self.restart_server()
                self._arrive(topic, payload)

    def _arrive(self, topic: str, payload: bytes) -> None:
        messages = [(topic, payload), *self._delayed]
        self._delayed.clear()
        for message in messages:
            asyncio.get_running_loop().call_soon(self._handle, *message)

    def _handle(self, topic: str, payload: bytes) -> None:
        if topic == TOPICS.receipt(DEVICE):
            self.outbox.receive(decode(Receipt, payload))
            return
        received = TOPICS.parse(topic)
        if received.kind == "offer":
            receipt: Receipt | None = self.receiver.on_offer(received.device, decode(UpdateOffer, payload))
        else:
            receipt = self.receiver.on_chunk(received.device, received.update, received.index, payload)
        if receipt is not None:
            self.receipts.append(receipt)
            self._pass_on(TOPICS.receipt(DEVICE), receipt.encode())


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outbox_module, "ANSWER_SECONDS", 0.02)
        patch.setattr(outbox_module, "UNKNOWN_SECONDS", 0.005)
        patch.setattr(updates_module, "WAIT_SECONDS", (0.01, 0.02))
        yield


def run(main: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await main

    asyncio.run(bounded())


def chunk_topics(link: Link) -> list[str]:
    return [topic for topic in link.sent if "/chunk/" in topic]


@pytest.mark.parametrize("size", [1, CHUNK, CHUNK + 1, 20 * CHUNK])
def test_over_a_good_network_every_chunk_is_sent_once(tmp_path: Path, size: int) -> None:
    async def main() -> None:
        link = Link(tmp_path)
        content = os.urandom(size)
        offer = link.add(content)
        assert link.outbox.pending() == [offer]
        assert (await link.outbox.send(offer)).state == "done"
        assert link.judge.counted == [(offer.update, content)]
        assert len(chunk_topics(link)) == len(set(chunk_topics(link))) == len(offer.content.chunks)
        assert link.outbox.pending() == []
        assert list((tmp_path / "outbox").iterdir()) == []

    run(main())


FATES = st.lists(st.sampled_from(["arrive", "lose", "twice", "late", "restart server"]), max_size=40)
CONTENTS = st.sampled_from([3 * CHUNK, 10 * CHUNK + 5])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(fates=FATES, size=CONTENTS, repetitive=st.booleans())
@example(fates=["lose"] * 40, size=10 * CHUNK, repetitive=False)
@example(fates=["twice"] * 40, size=10 * CHUNK, repetitive=False)
@example(fates=["arrive", "restart server"] * 20, size=10 * CHUNK, repetitive=False)
def test_over_a_bad_network_the_update_is_counted_exactly_once_bit_for_bit(
    fates: list[str], size: int, repetitive: bool
) -> None:
    async def main(folder: Path) -> None:
        link = Link(folder, fates)
        content = bytes(size) if repetitive else os.urandom(size)
        offer = link.add(content)
        assert (await link.outbox.send(offer)).state == "done"
        assert link.judge.counted == [(offer.update, content)]
        # Late copies change nothing.
        for topic in link.sent:
            link._arrive(topic, b"" if "/chunk/" in topic else offer.encode())
        await asyncio.sleep(0.01)
        assert len(link.judge.counted) == 1

    with tempfile.TemporaryDirectory() as folder:
        run(main(Path(folder)))


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(fates=FATES, restarts=st.lists(st.integers(0, 25), min_size=1, max_size=3))
def test_a_device_that_restarts_in_the_middle_goes_on(fates: list[str], restarts: list[int]) -> None:
    async def main(folder: Path) -> None:
        link = Link(folder, fates)
        content = os.urandom(10 * CHUNK)
        offer = link.add(content)
        for turns in restarts:
            sending = asyncio.create_task(link.outbox.send(offer))
            for _ in range(turns):
                await asyncio.sleep(0)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            link.restart_device()
            if link.outbox.pending() == []:
                # It had heard the end before it was stopped.
                break
            assert link.outbox.pending() == [offer]
        for pending in link.outbox.pending():
            assert (await link.outbox.send(pending)).state == "done"
        assert link.judge.counted == [(offer.update, content)]

    with tempfile.TemporaryDirectory() as folder:
        run(main(Path(folder)))


def test_chunks_from_before_a_restart_are_not_sent_again(tmp_path: Path) -> None:
    async def main() -> None:
        link = Link(tmp_path)
        content = os.urandom(10 * CHUNK)
        offer = link.add(content)
        for chunk in offer.content.chunks[:7]:
            link.store.put_chunk(chunk, content[offer.content.chunks.index(chunk) * CHUNK :][:CHUNK])
        link.restart_device()
        link.restart_server()
        assert (await link.outbox.send(offer)).state == "done"
        assert chunk_topics(link) == [TOPICS.update_chunk(DEVICE, offer.update, i) for i in (7, 8, 9)]
        assert link.judge.counted == [(offer.update, content)]

    run(main())


def test_chunks_the_server_lost_are_sent_again(tmp_path: Path) -> None:
    """Another device's update may share a chunk, and take it along when it is whole."""

    async def main() -> None:
        link = Link(tmp_path, fates=["arrive", "arrive", "arrive", "lose"])
        content = os.urandom(2 * CHUNK)
        offer = link.add(content)
        sending = asyncio.create_task(link.outbox.send(offer))
        first = tmp_path / "server" / "chunks" / offer.content.chunks[0]
        while not first.exists():
            await asyncio.sleep(0)
        first.unlink()
        assert (await sending).state == "done"
        assert link.judge.counted == [(offer.update, content)]

    run(main())


def test_no_more_chunks_are_on_the_way_than_the_server_allows(tmp_path: Path) -> None:
    async def main() -> None:
        link = Link(tmp_path)
        offer = link.add(os.urandom(30 * CHUNK))
        most = 0
        put = link.outbox.receive

        def receive(receipt: Receipt) -> None:
            nonlocal most
            acknowledged = sum(len(r.have) for r in link.receipts)
            most = max(most, len(chunk_topics(link)) - acknowledged)
            put(receipt)

        link.outbox.receive = receive  # type: ignore[method-assign]
        await link.outbox.send(offer)
        assert 1 <= most <= updates_module.WINDOW

    run(main())


def test_a_device_without_a_slot_waits_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates_module, "UPLOAD_SLOTS", 1)

    async def main() -> None:
        link = Link(tmp_path)
        content = os.urandom(3 * CHUNK)
        offer = link.add(content)
        link.receiver.on_offer("another", offer_of(os.urandom(5 * CHUNK), "2" * 32, "b" * 32))
        sending = asyncio.create_task(link.outbox.send(offer))
        while [receipt.state for receipt in link.receipts] != ["wait"] * 3:
            await asyncio.sleep(0.005)
        assert chunk_topics(link) == []
        link.receiver.forget()
        assert (await sending).state == "done"
        assert link.judge.counted == [(offer.update, content)]

    run(main())


def test_a_rejected_update_is_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        link = Link(tmp_path)
        link.judge.verdict = "the lease is not open any more"
        offer = link.add(b"content")
        receipt = await link.outbox.send(offer)
        assert (receipt.state, receipt.reason) == ("rejected", "the lease is not open any more")
        assert link.outbox.pending() == []
        assert list((tmp_path / "outbox").iterdir()) == []
        assert link.judge.counted == []

    run(main())


def test_receipts_of_other_updates_are_ignored(tmp_path: Path) -> None:
    async def main() -> None:
        link = Link(tmp_path)
        offer = link.add(b"content")
        link.outbox.receive(Receipt(update=offer.update, state="done"))
        assert link.outbox.pending() == [offer]
        sending = asyncio.create_task(link.outbox.send(offer))
        await asyncio.sleep(0)
        link.outbox.receive(Receipt(update="b" * 32, state="rejected"))
        assert (await sending).state == "done"

    run(main())


@pytest.mark.parametrize("damage", ["no content", "other content", "cut short", "garbage offer", "no offer"])
def test_what_a_crash_damaged_is_dropped_and_the_rest_is_sent(tmp_path: Path, damage: str) -> None:
    link = Link(tmp_path)
    intact = link.add(b"intact", offer_of(b"intact", "2" * 32, "b" * 32))
    damaged = link.add(os.urandom(2 * CHUNK))
    content = link.outbox.content_path(damaged.lease)
    announced = content.with_suffix(".json")
    match damage:
        case "no content":
            content.unlink()
        case "other content":
            content.write_bytes(os.urandom(2 * CHUNK))
        case "cut short":
            content.write_bytes(content.read_bytes()[:CHUNK])
        case "garbage offer":
            announced.write_bytes(b"{")
        case "no offer":
            announced.unlink()
    link.restart_device()
    assert link.outbox.pending() == [intact]
    kept = {path.name for path in (tmp_path / "outbox").iterdir()}
    assert kept == {f"{intact.lease}.json", f"{intact.lease}.safetensors"}
