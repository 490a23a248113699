from __future__ import annotations

import asyncio
import errno
import gc
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import pytest

from frostline.device_runtime import fetching
from frostline.device_runtime.download import Download
from frostline.device_runtime.fetching import WINDOW, ContentFetcher
from frostline.emulator.broker import EmbeddedBroker, find_mosquitto
from frostline.protocol.blobs import BlobStore, index_of, sha256_of
from frostline.protocol.connection import BrokerAddress, Connection
from frostline.protocol.errors import CorruptContent
from frostline.protocol.messages import BlobIndex, BlobReference, ContentRequest, decode
from frostline.protocol.topics import Topics
from frostline.server import content as content_module
from frostline.server.content import ContentPublisher

TOPICS = Topics("fleet")
DEVICE = "device"
CHUNK = 1024
Handler = Callable[[str, bytes], None]


class FakeBroker:
    """Delivers messages in the loop's next turns, retains what is to be retained, and loses what it is told to."""

    def __init__(self) -> None:
        self.retained: dict[str, bytes] = {}
        self.subscribers: dict[str, list[FakeConnection]] = {}
        self.losses: dict[str, int] = {}

    def lose(self, topic: str, times: int = 1) -> None:
        """Drop the next deliveries of `topic`."""
        self.losses[topic] = times

    def publish(self, topic: str, payload: bytes, retain: bool) -> None:
        if retain and payload:
            self.retained[topic] = payload
        elif retain:
            self.retained.pop(topic, None)
        for subscriber in self.subscribers.get(topic, []):
            self.deliver(subscriber, topic, payload)

    def deliver(self, subscriber: FakeConnection, topic: str, payload: bytes) -> None:
        if self.losses.get(topic, 0) > 0:
            self.losses[topic] -= 1
            return
        asyncio.get_running_loop().call_soon(lambda: subscriber.on_message(topic, payload))


class FakeConnection:
    """One client of a `FakeBroker`, in place of a `Connection`."""

    def __init__(self, broker: FakeBroker) -> None:
        self._broker = broker
        self.on_message: Handler = lambda topic, payload: None
        self.topics: list[str] = []
        self.history: list[str] = []
        self.most = 0

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        self._broker.publish(topic, payload, retain)

    def subscribe(self, topic: str, qos: int = 1) -> None:
        self.history.append(topic)
        self.topics.append(topic)
        self.most = max(self.most, len(self.topics))
        self._broker.subscribers.setdefault(topic, []).append(self)
        if topic in self._broker.retained:
            self._broker.deliver(self, topic, self._broker.retained[topic])

    def unsubscribe(self, topic: str) -> None:
        self.topics.remove(topic)
        self._broker.subscribers[topic].remove(self)


class Scene:
    """A publisher and a device's fetcher on one fake broker."""

    def __init__(self, folder: Path) -> None:
        self.broker = FakeBroker()
        server = FakeConnection(self.broker)
        self.publisher = ContentPublisher(cast(Connection, server), TOPICS, CHUNK)
        self.requests: list[str] = []
        server.on_message = self._answer
        server.subscribe(TOPICS.request(DEVICE))
        self.store = BlobStore(folder / "blobs")
        self.device = FakeConnection(self.broker)
        self.fetcher = self.restarted()

    def restarted(self) -> ContentFetcher:
        """The device after a restart: a new connection and fetcher on the same store."""
        self.device = FakeConnection(self.broker)
        fetcher = ContentFetcher(cast(Connection, self.device), TOPICS, DEVICE, self.store)
        self.device.on_message = fetcher.deliver
        self.fetcher = fetcher
        return fetcher

    def _answer(self, topic: str, payload: bytes) -> None:
        request = decode(ContentRequest, payload)
        self.requests.extend(request.hashes)
        self.publisher.answer(request)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "FIRST_REQUEST_SECONDS", 0.03)
    monkeypatch.setattr(fetching, "LONGEST_REQUEST_SECONDS", 0.1)
    monkeypatch.setattr(content_module, "REPEAT_SECONDS", 0.01)


def run(main: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await main

    asyncio.run(bounded())


@pytest.mark.parametrize(
    "size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 40 * CHUNK + 7], ids=lambda size: f"{size} bytes"
)
def test_content_arrives_whole(tmp_path: Path, size: int) -> None:
    async def main() -> None:
        scene = Scene(tmp_path)
        content = os.urandom(size)
        reference = scene.publisher.offer(content)
        assert reference == BlobReference(sha256=sha256_of(content), size=size)
        await scene.fetcher.fetch(reference, CHUNK)
        assert scene.store.read(reference) == content
        assert scene.requests == []
        assert scene.device.topics == [], "a subscription was left behind"
        assert TOPICS.index(reference.sha256) in scene.device.history or size <= CHUNK

    run(main())


def test_content_that_is_here_is_not_fetched_again(tmp_path: Path) -> None:
    async def main() -> None:
        scene = Scene(tmp_path)
        reference = scene.store.put(b"content")
        await scene.fetcher.fetch(reference, CHUNK)
        assert scene.device.history == []

    run(main())


def test_repeated_chunks_are_fetched_once(tmp_path: Path) -> None:
    async def main() -> None:
        scene = Scene(tmp_path)
        content = bytes(5 * CHUNK)
        reference = scene.publisher.offer(content)
        await scene.fetcher.fetch(reference, CHUNK)
        assert scene.store.read(reference) == content
        assert len(scene.device.history) == 2

    run(main())


def test_no_more_than_a_window_is_awaited_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        scene = Scene(tmp_path)
        reference = scene.publisher.offer(os.urandom(50 * CHUNK))
        await scene.fetcher.fetch(reference, CHUNK)
        assert WINDOW == 8
        assert scene.device.most == WINDOW

    run(main())


@pytest.mark.parametrize("kind", ["chunk", "index"])
def test_what_the_broker_lost_is_asked_for_and_published_again(tmp_path: Path, kind: str) -> None:
    async def main() -> None:
        scene = Scene(tmp_path)
        content = os.urandom(3 * CHUNK)
        reference = scene.publisher.offer(content)
        chunk = index_of(content, CHUNK).chunks[1]
        sha256 = chunk if kind == "chunk" else reference.sha256
        topic = TOPICS.chunk(chunk) if kind == "chunk" else TOPICS.index(sha256)
        del scene.broker.retained[topic]
        await scene.fetcher.fetch(reference, CHUNK)
        assert scene.requests == [sha256]
        assert scene.store.read(reference) == content
        assert topic in scene.broker.retained

    run(main())


def test_a_request_or_an_answer_that_is_lost_is_repeated(tmp_path: Path) -> None:
    async def main() -> None:
        scene = Scene(tmp_path)
        content = b"content"
        reference = scene.publisher.offer(content)
        scene.broker.lose(TOPICS.request(DEVICE))
        scene.broker.lose(TOPICS.chunk(reference.sha256), times=3)
        await scene.fetcher.fetch(reference, CHUNK)
        assert scene.store.read(reference) == content
        assert len(scene.requests) == 3

    run(main())


@pytest.mark.parametrize("corrupted", [b"", b"other", os.urandom(CHUNK)], ids=["withdrawn", "short", "full"])
def test_a_corrupted_chunk_is_ignored_and_fetched_again(tmp_path: Path, corrupted: bytes) -> None:
    async def main() -> None:
        scene = Scene(tmp_path)
        content = os.urandom(3 * CHUNK)
        reference = scene.publisher.offer(content)
        sha256 = index_of(content, CHUNK).chunks[2]
        scene.broker.retained[TOPICS.chunk(sha256)] = corrupted
        await scene.fetcher.fetch(reference, CHUNK)
        assert scene.requests == [sha256]
        assert scene.store.read(reference) == content

    run(main())


def _index_of_other_content(index: BlobIndex) -> bytes:
    return index_of(os.urandom(3 * CHUNK), CHUNK).encode()


@pytest.mark.parametrize(
    "forge",
    [
        _index_of_other_content,
        lambda index: index.model_copy(update={"size": index.size + 1}).encode(),
        lambda index: index.model_copy(update={"chunks": index.chunks[:-1]}).encode(),
        lambda index: index.model_copy(update={"chunks": [*index.chunks, "0" * 64]}).encode(),
        lambda index: index.model_copy(update={"chunk_size": 2 * CHUNK}).encode(),
        lambda index: b"not JSON",
        lambda index: b"",
    ],
    ids=["other hash", "other size", "a chunk less", "a chunk more", "other chunk size", "garbage", "empty"],
)
def test_a_wrong_index_is_ignored(tmp_path: Path, forge: Callable[[BlobIndex], bytes]) -> None:
    async def main() -> None:
        scene = Scene(tmp_path)
        content = os.urandom(3 * CHUNK)
        reference = scene.publisher.offer(content)
        scene.broker.retained[TOPICS.index(reference.sha256)] = forge(index_of(content, CHUNK))
        await scene.fetcher.fetch(reference, CHUNK)
        assert scene.requests == [reference.sha256]
        assert scene.store.read(reference) == content

    run(main())


def test_an_index_whose_chunks_are_not_the_content_fails_and_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        scene = Scene(tmp_path)
        content = os.urandom(2 * CHUNK)
        other = scene.publisher.offer(os.urandom(2 * CHUNK))
        index = decode(BlobIndex, scene.broker.retained[TOPICS.index(other.sha256)])
        reference = BlobReference(sha256=sha256_of(content), size=len(content))
        forged = index.model_copy(update={"sha256": reference.sha256})
        scene.broker.publish(TOPICS.index(reference.sha256), forged.encode(), retain=True)
        with pytest.raises(CorruptContent, match="does not match its hash"):
            await scene.fetcher.fetch(reference, CHUNK)
        assert not scene.store.has(reference)
        assert scene.store.missing_chunks(index) == index.chunks

    run(main())


def test_after_a_restart_only_missing_chunks_are_fetched(tmp_path: Path) -> None:
    async def main() -> None:
        scene = Scene(tmp_path)
        content = os.urandom(12 * CHUNK)
        reference = scene.publisher.offer(content)
        index = index_of(content, CHUNK)
        withheld = {TOPICS.chunk(h) for h in index.chunks[::3]}
        for topic in withheld:
            scene.broker.lose(topic, times=10**6)
        interrupted = asyncio.create_task(scene.fetcher.fetch(reference, CHUNK))
        while len(Download(scene.store, index).missing()) > len(withheld):
            await asyncio.sleep(0.01)
        interrupted.cancel()
        await asyncio.gather(interrupted, return_exceptions=True)
        assert scene.device.topics == [], "a subscription outlived the fetch"
        scene.broker.losses.clear()
        await scene.restarted().fetch(reference, CHUNK)
        assert scene.store.read(reference) == content
        assert set(scene.device.history) == {*withheld, TOPICS.index(reference.sha256)}

    run(main())


def test_a_full_disk_ends_a_fetch_with_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_up(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def play() -> list[dict[str, object]]:
        unseen: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
        scene = Scene(tmp_path)
        content = os.urandom(WINDOW * CHUNK)
        reference = scene.publisher.offer(content)
        topics = [TOPICS.chunk(sha256) for sha256 in index_of(content, CHUNK).chunks]
        for topic in topics:
            scene.broker.lose(topic)
        monkeypatch.setattr(Download, "put", fill_up)
        fetching = asyncio.create_task(scene.fetcher.fetch(reference, CHUNK))
        while not scene.broker.subscribers.keys() >= set(topics):
            await asyncio.sleep(0)
        # In turns of their own, so that the first failure ends the fetch while the others come in.
        for topic in topics:
            scene.fetcher.deliver(topic, bytes(CHUNK))
            await asyncio.sleep(0)
        with pytest.raises(ExceptionGroup, match="TaskGroup") as caught:
            await fetching
        assert isinstance(caught.value.exceptions[0], OSError)
        del caught, fetching
        gc.collect()
        return unseen

    assert asyncio.run(play()) == [], "the errors of further chunks went to the log"


def test_messages_nobody_awaits_are_dropped(tmp_path: Path) -> None:
    async def main() -> None:
        scene = Scene(tmp_path)
        content = b"content"
        scene.fetcher.deliver(TOPICS.chunk(sha256_of(content)), content)
        assert not scene.store.has(BlobReference(sha256=sha256_of(content), size=len(content)))

    run(main())


def test_withdrawn_content_is_no_longer_on_the_broker(tmp_path: Path) -> None:
    async def main() -> None:
        scene = Scene(tmp_path)
        kept = scene.publisher.offer(b"kept")
        withdrawn = scene.publisher.offer(os.urandom(3 * CHUNK))
        scene.publisher.withdraw(withdrawn)
        assert list(scene.broker.retained) == [TOPICS.chunk(kept.sha256)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await scene.fetcher.fetch(withdrawn, CHUNK)
        assert set(scene.requests) == {withdrawn.sha256}
        assert list(scene.broker.retained) == [TOPICS.chunk(kept.sha256)]

    run(main())


def test_over_a_real_broker_that_forgot_a_chunk(tmp_path: Path) -> None:
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")

    async def main(address: BrokerAddress) -> None:
        server, device = Connection(address, "server"), Connection(address, "device")
        publisher = ContentPublisher(server, TOPICS, 100_000)
        server.on_message = lambda topic, payload: publisher.answer(decode(ContentRequest, payload))
        server.subscribe(TOPICS.request(DEVICE))
        store = BlobStore(tmp_path)
        fetcher = ContentFetcher(device, TOPICS, DEVICE, store)
        device.on_message = fetcher.deliver
        await server.open()
        await device.open()
        content = os.urandom(2_500_000)
        small = publisher.offer(b"small")
        large = publisher.offer(content)
        lost = index_of(content, 100_000).chunks[7]
        server.publish(TOPICS.chunk(lost), b"", retain=True)
        await fetcher.fetch(small, 100_000)
        await fetcher.fetch(large, 100_000)
        assert store.read(small) == b"small"
        assert store.read(large) == content
        await device.close()
        await server.close()

    with EmbeddedBroker(kind="mosquitto") as running:
        run(main(BrokerAddress.parse(running.url)))
