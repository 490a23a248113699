from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.emulator import faulty_link
from frostline.emulator.broker import EmbeddedBroker
from frostline.emulator.faulty_link import Fault, FaultyLink, Published, _encode_length, _published
from frostline.protocol.connection import BrokerAddress, Connection


@given(
    topic=st.text("abc/-", min_size=1, max_size=200),
    identifier=st.sampled_from([b"", b"\x00\x01"]),
    payload=st.binary(min_size=1, max_size=40_000),
)
def test_a_packet_is_taken_apart_and_put_together(topic: str, identifier: bytes, payload: bytes) -> None:
    message = Published(True, 0b0010 if identifier else 0, topic, identifier, payload)
    assert _published(message.encode(), True) == message


@pytest.mark.parametrize(
    ("length", "encoded"), [(0, b"\x00"), (127, b"\x7f"), (128, b"\x80\x01"), (2_097_151, b"\xff\xff\x7f")]
)
def test_lengths_are_encoded_as_the_standard_says(length: int, encoded: bytes) -> None:
    assert _encode_length(length) == encoded


@pytest.fixture(scope="module")
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker() as running:
        yield running


class Scene:
    """A good connection that listens and one over the link that publishes, or the other way round."""

    def __init__(self, broker: EmbeddedBroker) -> None:
        self.fault: Fault | None = None
        self.heard: list[bytes] = []
        self.address = BrokerAddress.parse(broker.url)
        self.link = FaultyLink(self.address.host, self.address.port, self._choose)

    def _choose(self, message: Published) -> Fault | None:
        fault, self.fault = self.fault, None
        return fault

    def hear(self, topic: str, payload: bytes) -> None:
        self.heard.append(payload)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)


def play(broker: EmbeddedBroker, script: Callable[[Scene, Connection, Connection], Awaitable[None]]) -> None:
    async def main() -> None:
        scene = Scene(broker)
        await scene.link.open()
        good = Connection(scene.address, "good")
        bad = Connection(BrokerAddress.parse(f"mqtt://127.0.0.1:{scene.link.port}"), "bad")
        for connection in (good, bad):
            connection.on_message = scene.hear
        good.subscribe("to-good")
        bad.subscribe("to-bad")
        await good.open()
        await bad.open()
        await asyncio.sleep(0.1)
        try:
            await script(scene, good, bad)
        finally:
            await good.close()
            await bad.close()
            await scene.link.close()

    asyncio.run(main())


@pytest.mark.parametrize("inbound", [False, True])
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault.DUPLICATED, [b"first", b"first", b"second"]),
        (Fault.REORDERED, [b"second", b"first"]),
        (Fault.LOST, [b"second"]),
        (Fault.STALLED, [b"first", b"second"]),
    ],
)
def test_what_happens_to_a_message(
    broker: EmbeddedBroker,
    fault: Fault,
    expected: list[bytes],
    inbound: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(faulty_link, "STALL_SECONDS", 0.1)

    async def script(scene: Scene, good: Connection, bad: Connection) -> None:
        scene.fault = fault
        sender, topic = (good, "to-bad") if inbound else (bad, "to-good")
        sender.publish(topic, b"first")
        sender.publish(topic, b"second")
        await scene.until(lambda: len(scene.heard) >= len(expected))
        await asyncio.sleep(0.1)
        assert scene.heard == expected

    play(broker, script)


def test_a_damaged_message_has_one_other_bit_or_fewer_bytes(broker: EmbeddedBroker) -> None:
    async def script(scene: Scene, good: Connection, bad: Connection) -> None:
        payload = bytes(range(100))
        for fault in (Fault.BIT_FLIPPED, Fault.TRUNCATED):
            scene.fault = fault
            bad.publish("to-good", payload)
            bad.publish("to-good", b"end")
            await scene.until(lambda: b"end" in scene.heard)
            damaged, _ = scene.heard
            scene.heard.clear()
            if fault is Fault.BIT_FLIPPED:
                assert sum((a ^ b).bit_count() for a, b in zip(damaged, payload, strict=True)) == 1
            else:
                assert damaged == payload[: len(damaged)] and len(damaged) < 100

    play(broker, script)


def test_a_cut_link_is_joined_again(broker: EmbeddedBroker) -> None:
    async def script(scene: Scene, good: Connection, bad: Connection) -> None:
        scene.fault = Fault.CUT
        bad.publish("to-good", b"cut")
        await scene.until(lambda: not bad.connected)
        await scene.until(lambda: bad.connected)
        bad.publish("to-good", b"again")
        # paho itself publishes again what was not acknowledged.
        await scene.until(lambda: scene.heard == [b"cut", b"again"])
        scene.link.cut()
        await scene.until(lambda: not bad.connected)

    play(broker, script)
