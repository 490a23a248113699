"""The server's end of the wire: it validates what devices say and hands it to the round that is on."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any, get_args

from frostline.protocol.blobs import BlobStore
from frostline.protocol.connection import BrokerAddress, Connection
from frostline.protocol.errors import ProtocolViolation, RunError
from frostline.protocol.messages import (
    MESSAGE_BYTES_LIMIT,
    Answer,
    ContentRequest,
    Engine,
    Lease,
    Presence,
    Receipt,
    RunAnnouncement,
    UpdateOffer,
    decode,
)
from frostline.protocol.topics import Received, Topics
from frostline.server.content import ContentPublisher
from frostline.server.fleet import DeviceRecord, RoundListener
from frostline.server.updates import UpdateReceiver

REMIND_SECONDS = 5.0
"""How often the fleet is told of the run again while devices are missing."""
REMIND_SECONDS_PER_DEVICE = 0.002
"""What is left between reminders for each device there is, since all of them answer."""
ENGINES = get_args(Engine)
ENGINE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
"""What the name of an engine may look like that is shown to a person."""
ENGINES_LIMIT = 16
"""Most engines looked at of a device that names unknown ones."""
DEVICES_LIMIT = 100_000
"""Most device names remembered: names come from the network."""


class Gateway:
    """One server's connection to a fleet."""

    def __init__(self, address: BrokerAddress, topics: Topics, chunk_size: int, updates: BlobStore) -> None:
        self._topics = topics
        self._connection = Connection(address, f"frostline-{topics.fleet}-server")
        self._updates = updates
        self._announcement: RunAnnouncement | None = None
        self._receiver: UpdateReceiver | None = None
        self._listener: RoundListener | None = None
        self.content = ContentPublisher(self._connection, topics, chunk_size)
        self.devices: dict[str, DeviceRecord] = {}
        self.changed = asyncio.Event()
        self.violations = 0
        self._announced_at = -math.inf

    async def open(self, *, patient: bool = False) -> bool:
        """Connect; if `patient`, go on trying where no broker answers.

        Returns
        -------
        bool
            Whether the broker answered.

        Raises
        ------
        BrokerUnreachable
            If the broker cannot be reached and this is not patient.
        """
        self._connection.on_message = self._on_message
        self._connection.on_connected = self._on_connected
        for topic in self._topics.server_filters:
            self._connection.subscribe(topic)
        await self._connection.open(patient=patient)
        return self._connection.connected

    async def close(self) -> None:
        """Leave the broker."""
        await self._connection.close()

    def announce(self, announcement: RunAnnouncement) -> None:
        """Tell the fleet which run is on; devices answer with their presence."""
        self._announcement = announcement
        self._announced_at = asyncio.get_running_loop().time()
        self._connection.publish(self._topics.run, announcement.encode(), retain=True)

    def remind(self) -> None:
        """Announce the run again, now and then: brokers drop what overflows a queue, and devices answer with presence."""
        pause = max(REMIND_SECONDS, REMIND_SECONDS_PER_DEVICE * len(self.devices))
        if self._announcement is not None and asyncio.get_running_loop().time() >= self._announced_at + pause:
            self.announce(self._announcement)

    def listen(self, listener: RoundListener | None) -> None:
        """Hand answers and updates to `listener` from now on; None between rounds."""
        self._listener = listener
        self._receiver = UpdateReceiver(self._updates, listener) if listener else None

    def send_lease(self, device: str, lease: Lease) -> None:
        """Send work to a device."""
        self._connection.publish(self._topics.lease(device), lease.encode())

    def _on_connected(self) -> None:
        if self._announcement is not None:
            self.announce(self._announcement)
        self.content.reseed()

    def _on_message(self, topic: str, payload: bytes) -> None:
        try:
            self._handle(self._topics.parse(topic), payload)
        except ProtocolViolation:
            self.violations += 1
        except RunError:
            # The round ends with it; a device that hears nothing offers its update again to the server that resumes.
            pass
        self.changed.set()

    def _handle(self, received: Received, payload: bytes) -> None:
        device = received.device
        match received.kind:
            case "presence":
                self._on_presence(device, *_decode_presence(payload))
            case "answer" if self._listener is not None:
                self._listener.on_answer(device, decode(Answer, payload))
            case "request":
                self.content.answer(decode(ContentRequest, payload))
            case "offer" if self._receiver is not None:
                if device not in self.devices:
                    self.remind()
                self._reply(device, self._receiver.on_offer(device, decode(UpdateOffer, payload)))
            case "chunk" if self._receiver is not None:
                self._reply(device, self._receiver.on_chunk(device, received.update, received.index, payload))

    def _on_presence(self, device: str, presence: Presence, unknown_engines: tuple[str, ...]) -> None:
        if presence.device != device:
            raise ProtocolViolation(f"presence of {presence.device!r} on the topic of {device!r}")
        known = self.devices.get(device)
        if known is None and len(self.devices) >= DEVICES_LIMIT:
            raise ProtocolViolation("too many devices")
        # The will of an earlier session may arrive after the next session's greeting.
        stale = (
            known is not None and known.offline_since is None and known.presence.session != presence.session
        )
        if presence.state == "offline" and stale:
            return
        offline_since = asyncio.get_running_loop().time() if presence.state == "offline" else None
        self.devices[device] = DeviceRecord(presence, offline_since, unknown_engines)
        if self._listener is not None:
            self._listener.on_presence(device)

    def _reply(self, device: str, receipt: Receipt | None) -> None:
        if receipt is not None:
            self._connection.publish(self._topics.receipt(device), receipt.encode())


def _decode_presence(payload: bytes) -> tuple[Presence, tuple[str, ...]]:
    """A presence, and the engines in it that this server has never heard of, which it leaves out.

    A device that is newer than its server is told apart from one that sends nonsense: it may have other engines as well,
    and a person is told of it.

    Raises
    ------
    ProtocolViolation
        If anything else is wrong with it.
    """
    try:
        return decode(Presence, payload), ()
    except ProtocolViolation:
        document = _json_object(payload)
        engines = document.get("engines")
        if not isinstance(engines, list) or len(engines) > ENGINES_LIMIT:
            raise
        unknown = [each for each in engines if each not in ENGINES]
        if not unknown or not all(isinstance(each, str) and ENGINE_NAME.fullmatch(each) for each in unknown):
            raise
        known = {**document, "engines": [each for each in engines if each in ENGINES]}
        return decode(Presence, json.dumps(known).encode()), tuple(unknown)


def _json_object(payload: bytes) -> dict[str, Any]:
    """What a message holds; nothing if it is no JSON object or too long."""
    try:
        document = json.loads(payload) if len(payload) <= MESSAGE_BYTES_LIMIT else None
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
