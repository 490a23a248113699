"""What the server makes of messages from the network, good and bad."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frostline.protocol.blobs import BlobStore, index_of, sha256_of
from frostline.protocol.connection import BrokerAddress
from frostline.protocol.messages import (
    Answer,
    ContentRequest,
    Lease,
    Presence,
    Receipt,
    RunAnnouncement,
    TrainingMetrics,
    UpdateOffer,
    decode,
)
from frostline.protocol.topics import Topics
from frostline.server import gateway as gateway_module
from frostline.server.gateway import Gateway

TOPICS = Topics("demo")
CONTENT = b"update"


class FakeConnection:
    """Records what is published instead of sending it."""

    def __init__(self, address: BrokerAddress, client_id: str) -> None:
        self.client_id = client_id
        self.published: list[tuple[str, bytes, bool]] = []
        self.subscribed: list[str] = []
        self.on_message: Callable[[str, bytes], None] = lambda _topic, _payload: None
        self.on_connected: Callable[[], None] = lambda: None

    connected = True

    async def open(self, *, patient: bool = False) -> None:
        self.on_connected()

    async def close(self) -> None:
        pass

    def subscribe(self, topic: str, qos: int = 1) -> None:
        self.subscribed.append(topic)

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        self.published.append((topic, payload, retain))


class Listener:
    """Notes what a round would be told; takes every update."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def on_answer(self, device: str, answer: Answer) -> None:
        self.told.append(("answer", device, answer.answer))

    def on_presence(self, device: str) -> None:
        self.told.append(("presence", device))

    def is_known(self, device: str) -> bool:
        return True

    def is_counted(self, update: str) -> bool:
        return False

    def objection(self, device: str, offer: UpdateOffer) -> str:
        return ""

    def count(self, device: str, offer: UpdateOffer, content: bytes) -> str:
        self.told.append(("count", device, content))
        return ""


@pytest.fixture(autouse=True)
def fake_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "Connection", FakeConnection)


async def opened(folder: Path) -> tuple[Gateway, FakeConnection]:
    gateway = Gateway(BrokerAddress("broker.example", 1883), TOPICS, 1024, BlobStore(folder))
    connection = gateway._connection
    assert isinstance(connection, FakeConnection)
    await gateway.open()
    return gateway, connection


def presence(device: str = "phone", session: str = "1" * 32, state: str = "online") -> bytes:
    return Presence.model_validate(
        {"device": device, "session": session, "state": state, "samples": 5}
    ).encode()


OFFER = UpdateOffer(
    update="a" * 32,
    lease="b" * 32,
    content=index_of(CONTENT, 1024),
    metrics=TrainingMetrics(samples=1, steps=1, loss=0.0, seconds=0.0),
)
ANSWER = Answer(lease="b" * 32, answer="accepted")


def test_subscribes_before_it_connects(tmp_path: Path) -> None:
    _, connection = asyncio.run(opened(tmp_path))
    assert connection.subscribed == list(TOPICS.server_filters)
    assert connection.client_id == "frostline-demo-server"


def test_the_announcement_is_retained_and_given_to_a_broker_that_forgot(tmp_path: Path) -> None:
    async def play() -> None:
        gateway, connection = await opened(tmp_path)
        announcement = RunAnnouncement(run="c" * 32, state="open", chunk_size=1024)
        gateway.announce(announcement)
        gateway.content.offer(b"content")
        first = list(connection.published)
        assert (TOPICS.run, announcement.encode(), True) in first
        connection.on_connected()
        assert connection.published == first * 2

    asyncio.run(play())


def test_the_fleet_is_reminded_of_the_run_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_module, "REMIND_SECONDS", 0.05)

    async def play() -> None:
        gateway, connection = await opened(tmp_path)
        gateway.remind()
        assert connection.published == [], "there is no run yet"
        gateway.announce(RunAnnouncement(run="c" * 32, state="open", chunk_size=1024))
        for _ in range(3):
            gateway.remind()
        assert len(connection.published) == 1
        await asyncio.sleep(0.06)
        for _ in range(3):
            gateway.remind()
        assert connection.published[1:] == connection.published[:1]
        monkeypatch.setattr(gateway_module, "REMIND_SECONDS_PER_DEVICE", 60)
        connection.on_message(TOPICS.presence("phone"), presence())
        await asyncio.sleep(0.06)
        gateway.remind()
        assert len(connection.published) == 2, "the more devices answer, the rarer"

    asyncio.run(play())


def test_an_offer_of_a_device_that_is_not_known_asks_for_its_presence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_module, "REMIND_SECONDS", 0)

    async def play() -> None:
        gateway, connection = await opened(tmp_path)
        gateway.announce(RunAnnouncement(run="c" * 32, state="open", chunk_size=1024))
        gateway.listen(Listener())
        connection.on_message(TOPICS.offer("phone"), OFFER.encode())
        told = [topic for topic, _, _ in connection.published]
        assert told == [TOPICS.run, TOPICS.run, TOPICS.receipt("phone")]
        connection.on_message(TOPICS.presence("phone"), presence())
        connection.on_message(TOPICS.offer("phone"), OFFER.encode())
        assert [topic for topic, _, _ in connection.published[3:]] == [TOPICS.receipt("phone")]

    asyncio.run(play())


@pytest.mark.parametrize(
    ("topic", "payload"),
    [
        ("", b""),
        ("frostline/v1/demo/run", b"{}"),
        ("frostline/v1/another/from/phone/presence", presence()),
        (TOPICS.lease("phone"), b"{}"),
        ("frostline/v1/demo/from/Phone/presence", presence()),
        ("frostline/v1/demo/from/phone/gossip", b"{}"),
        (TOPICS.update_chunk("phone", "a" * 32, 0).replace("/0", "/-1"), b""),
        (TOPICS.update_chunk("phone", "a" * 32, 0).replace("aaaa", "ZZZZ"), b""),
        (TOPICS.presence("phone"), b""),
        (TOPICS.presence("phone"), b"\xff\xfe"),
        (TOPICS.presence("phone"), b"[" * 10_000),
        (TOPICS.presence("phone"), b"{}"),
        (TOPICS.presence("phone"), b" " * 70_000 + presence()),
        (TOPICS.presence("board"), presence("phone")),
        (TOPICS.answer("phone"), ANSWER.encode().replace(b"accepted", b"maybe")),
        (TOPICS.request("phone"), b'{"hashes": []}'),
        (TOPICS.offer("phone"), OFFER.encode().replace(b'"samples":1', b'"samples":0')),
    ],
)
def test_what_is_malformed_is_counted_and_dropped(tmp_path: Path, topic: str, payload: bytes) -> None:
    async def play() -> None:
        gateway, connection = await opened(tmp_path)
        listener = Listener()
        gateway.listen(listener)
        connection.on_message(topic, payload)
        assert gateway.violations == 1
        assert gateway.devices == {}
        assert listener.told == []
        assert connection.published == []

    asyncio.run(play())


kinds = st.sampled_from(["presence", "answer", "request", "offer", f"chunk/{'a' * 32}/0", "x"])
payloads = st.binary(max_size=40) | st.sampled_from([presence(), OFFER.encode(), ANSWER.encode(), CONTENT])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(kinds | st.text(max_size=8), payloads), max_size=8))
def test_nothing_a_device_sends_raises(tmp_path: Path, messages: list[tuple[str, bytes]]) -> None:
    async def play() -> None:
        gateway, connection = await opened(tmp_path)
        gateway.listen(Listener())
        for kind, payload in messages:
            gateway.changed.clear()
            connection.on_message(f"{TOPICS.root}/from/phone/{kind}", payload)
            assert gateway.changed.is_set()
        assert gateway.devices.keys() <= {"phone"}

    asyncio.run(play())


def test_a_presence_is_remembered_and_told(tmp_path: Path) -> None:
    async def play() -> None:
        gateway, connection = await opened(tmp_path)
        connection.on_message(TOPICS.presence("phone"), presence())
        listener = Listener()
        gateway.listen(listener)
        connection.on_message(TOPICS.presence("board"), presence("board"))
        assert gateway.devices["phone"].presence == decode(Presence, presence())
        assert gateway.devices["phone"].offline_since is None
        assert listener.told == [("presence", "board")]
        assert gateway.violations == 0

    asyncio.run(play())


def with_engines(engines: Any) -> bytes:
    return json.dumps({**json.loads(presence()), "engines": engines}).encode()


@pytest.mark.parametrize(
    ("engines", "known", "unknown"),
    [
        (["tflite"], [], ("tflite",)),
        (["tflite", "onnxruntime", "executorch-2"], ["onnxruntime"], ("tflite", "executorch-2")),
        (["executorch"], ["executorch"], ()),
    ],
)
def test_engines_of_a_later_version_are_left_out_and_kept_for_a_person(
    tmp_path: Path, engines: list[str], known: list[str], unknown: tuple[str, ...]
) -> None:
    async def play() -> None:
        gateway, connection = await opened(tmp_path)
        connection.on_message(TOPICS.presence("phone"), with_engines(engines))
        record = gateway.devices["phone"]
        assert (record.presence.engines, record.unknown_engines) == (known, unknown)
        assert gateway.violations == 0

    asyncio.run(play())


@pytest.mark.parametrize(
    "engines",
    [["a b"], ["x" * 33], ["\x1b[31m"], [7], [["executorch"]], {"executorch": 1}, ["tflite"] * 17, "tflite"],
)
def test_engines_that_are_no_names_are_a_violation(tmp_path: Path, engines: Any) -> None:
    async def play() -> None:
        gateway, connection = await opened(tmp_path)
        connection.on_message(TOPICS.presence("phone"), with_engines(engines))
        assert gateway.violations == 1
        assert gateway.devices == {}

    asyncio.run(play())


@pytest.mark.parametrize(
    ("messages", "online"),
    [
        ([("1", "online"), ("1", "offline")], False),
        ([("1", "online"), ("2", "online"), ("1", "offline")], True),
        ([("1", "online"), ("2", "online"), ("2", "offline")], False),
        ([("1", "offline"), ("2", "online")], True),
        ([("1", "offline"), ("2", "offline")], False),
    ],
)
def test_the_will_of_an_earlier_session_is_ignored(
    tmp_path: Path, messages: list[tuple[str, str]], online: bool
) -> None:
    async def play() -> None:
        gateway, connection = await opened(tmp_path)
        for session, state in messages:
            connection.on_message(TOPICS.presence("phone"), presence(session=session * 32, state=state))
        record = gateway.devices["phone"]
        assert (record.presence.state == "online") is online
        assert (record.offline_since is None) is online

    asyncio.run(play())


def test_only_so_many_names_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "DEVICES_LIMIT", 2)

    async def play() -> None:
        gateway, connection = await opened(tmp_path)
        for device in ("a", "b", "c", "a"):
            connection.on_message(TOPICS.presence(device), presence(device))
        assert gateway.devices.keys() == {"a", "b"}
        assert gateway.violations == 1

    asyncio.run(play())


def test_an_update_is_received_and_receipted(tmp_path: Path) -> None:
    async def play() -> None:
        gateway, connection = await opened(tmp_path)
        listener = Listener()
        gateway.listen(listener)
        connection.on_message(TOPICS.offer("phone"), OFFER.encode())
        connection.on_message(TOPICS.update_chunk("phone", OFFER.update, 0), CONTENT)
        connection.on_message(TOPICS.answer("phone"), ANSWER.encode())
        assert {topic for topic, _, _ in connection.published} == {TOPICS.receipt("phone")}
        receipts = [decode(Receipt, payload).state for _, payload, _ in connection.published]
        assert receipts == ["have", "done"]
        assert listener.told == [("count", "phone", CONTENT), ("answer", "phone", "accepted")]

    asyncio.run(play())


def test_between_rounds_updates_and_answers_are_left_lying(tmp_path: Path) -> None:
    async def play() -> None:
        gateway, connection = await opened(tmp_path)
        gateway.listen(Listener())
        gateway.listen(None)
        connection.on_message(TOPICS.offer("phone"), OFFER.encode())
        connection.on_message(TOPICS.update_chunk("phone", OFFER.update, 0), CONTENT)
        connection.on_message(TOPICS.answer("phone"), ANSWER.encode())
        assert connection.published == []
        assert gateway.violations == 0

    asyncio.run(play())


def test_missed_content_is_given_again(tmp_path: Path) -> None:
    async def play() -> None:
        gateway, connection = await opened(tmp_path)
        gateway.content.offer(b"content")
        known = sha256_of(b"content")
        request = ContentRequest(hashes=[known, sha256_of(b"other")])
        connection.on_message(TOPICS.request("phone"), request.encode())
        assert connection.published == [(TOPICS.chunk(known), b"content", True)] * 2

    asyncio.run(play())


def test_a_lease_goes_to_its_device(tmp_path: Path) -> None:
    async def play() -> None:
        gateway, connection = await opened(tmp_path)
        lease = Lease(
            run="c" * 32,
            lease="b" * 32,
            round=0,
            manifest=OFFER.content,
            weights=OFFER.content,
            epochs=1,
            learning_rate=0.1,
            seed=0,
            deadline_seconds=1.0,
        )
        gateway.send_lease("phone", lease)
        assert connection.published == [(TOPICS.lease("phone"), lease.encode(), False)]

    asyncio.run(play())
