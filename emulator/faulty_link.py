"""A bad network between MQTT clients and their broker: it cuts, stalls, loses, repeats, reorders and damages.

A TCP proxy that reads packets as they pass. Whether and how one is damaged is decided by its owner; everything that is not
a PUBLISH passes as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from frostline.protocol.errors import RunError

_PUBLISH, _PUBACK = 3, 4
LARGEST_PACKET_BYTES = 16 * 2**20
STALL_SECONDS = 2.0


class Fault(StrEnum):
    """What can happen to one message."""

    DUPLICATED = "duplicated"
    REORDERED = "reordered"
    TRUNCATED = "truncated"
    BIT_FLIPPED = "bit_flipped"
    LOST = "lost_after_puback"
    CUT = "link_cut"
    STALLED = "link_stalled"


@dataclass(frozen=True)
class Published:
    """A PUBLISH packet, taken apart."""

    to_broker: bool
    flags: int
    topic: str
    identifier: bytes
    payload: bytes

    def encode(self) -> bytes:
        """The packet as it travels (MQTT 3.1.1, section 3.3)."""
        topic = self.topic.encode()
        body = len(topic).to_bytes(2, "big") + topic + self.identifier + self.payload
        return bytes([_PUBLISH << 4 | self.flags]) + _encode_length(len(body)) + body


class FaultyLink:
    """A port that stands for the broker's.

    Parameters
    ----------
    host, port : str, int
        The broker.
    choose : callable
        Called with every message; returns what is to happen to it, or None.
    """

    def __init__(
        self, host: str, port: int, choose: Callable[[Published], Fault | None], seed: int = 0
    ) -> None:
        self._broker = host, port
        self._choose = choose
        self._random = random.Random(seed)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._connections: set[asyncio.Task[Any]] = set()

    @property
    def port(self) -> int:
        """Where clients connect, on the loopback interface."""
        if self._server is None:
            raise RunError("The link has no port yet: open it first.")
        number: int = self._server.sockets[0].getsockname()[1]
        return number

    async def open(self) -> None:
        """Accept connections until `close`."""
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)

    async def close(self) -> None:
        """Cut every connection and accept no more."""
        if self._server is not None:
            self._server.close()
        self.cut()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def cut(self) -> None:
        """Cut every connection at once, without a goodbye."""
        for writer in self._writers:
            writer.transport.abort()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._broker)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, far_writer}
        self._writers |= ends
        pumps = [
            asyncio.create_task(self._pass_on(reader, far_writer, writer, to_broker=True)),
            asyncio.create_task(self._pass_on(far_reader, writer, far_writer, to_broker=False)),
        ]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for end in ends:
            end.transport.abort()
        self._writers -= ends

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        back: asyncio.StreamWriter,
        *,
        to_broker: bool,
    ) -> None:
        """Pass packets one way until either end is gone."""
        held = b""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                packet = await _read_packet(reader)
                message = _published(packet, to_broker)
                fault = self._choose(message) if message else None
                if fault is Fault.CUT:
                    return
                if fault is Fault.STALLED:
                    await asyncio.sleep(STALL_SECONDS)
                if fault is Fault.REORDERED:
                    held += packet
                    continue
                if message and fault is Fault.LOST:
                    if message.identifier:
                        back.write(bytes([_PUBACK << 4, 2]) + message.identifier)
                    continue
                writer.write((self._damaged(message, fault) if message else packet) + held)
                held = b""
                await writer.drain()

    def _damaged(self, message: Published, fault: Fault | None) -> bytes:
        payload = bytearray(message.payload)
        if fault is Fault.TRUNCATED:
            del payload[self._random.randrange(len(payload)) :]
        elif fault is Fault.BIT_FLIPPED:
            payload[self._random.randrange(len(payload))] ^= 1 << self._random.randrange(8)
        packet = Published(
            message.to_broker, message.flags, message.topic, message.identifier, bytes(payload)
        ).encode()
        return packet * 2 if fault is Fault.DUPLICATED else packet


async def _read_packet(reader: asyncio.StreamReader) -> bytes:
    """The next packet: a byte of kind and flags, one to four of length, and the rest (MQTT 3.1.1, section 2.2)."""
    head = await reader.readexactly(1)
    length, shift = 0, 0
    while True:
        digit = await reader.readexactly(1)
        head += digit
        length |= (digit[0] & 0x7F) << shift
        shift += 7
        if not digit[0] & 0x80:
            break
        if shift == 28:
            raise OSError("not MQTT")
    if length > LARGEST_PACKET_BYTES:
        raise OSError(f"a packet of {length} bytes")
    return head + await reader.readexactly(length)


def _published(packet: bytes, to_broker: bool) -> Published | None:
    """The message in a packet with a payload; None for any other."""
    kind, flags = packet[0] >> 4, packet[0] & 0x0F
    if kind != _PUBLISH:
        return None
    start = 2
    while packet[start - 1] & 0x80:
        start += 1
    topic_end = start + 2 + int.from_bytes(packet[start : start + 2], "big")
    identifier_end = topic_end + (2 if flags & 0b0110 else 0)
    if identifier_end >= len(packet):
        return None
    topic = packet[start + 2 : topic_end].decode()
    return Published(to_broker, flags, topic, packet[topic_end:identifier_end], packet[identifier_end:])


def _encode_length(length: int) -> bytes:
    encoded = bytearray()
    while True:
        length, digit = divmod(length, 128)
        encoded.append(digit | (0x80 if length else 0))
        if not length:
            return bytes(encoded)
