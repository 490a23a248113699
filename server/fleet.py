"""What a coordinator needs of a fleet: a broker's, or one that only exists in simulated time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from frostline.protocol.messages import Answer, BlobReference, Lease, Presence, RunAnnouncement
from frostline.server.updates import UpdateJudge


class RoundListener(UpdateJudge, Protocol):
    """What a round is told while it is on."""

    def on_answer(self, device: str, answer: Answer) -> None:
        """A device took, refused or gave up a lease."""

    def on_presence(self, device: str) -> None:
        """A device came, changed or went."""


@dataclass
class DeviceRecord:
    """A device as last heard of.

    Attributes
    ----------
    offline_since : float or None
        A reading of the loop's clock; None while it is online.
    unknown_engines : tuple of str
        What it names that this server has never heard of; left out of `presence`.
    """

    presence: Presence
    offline_since: float | None
    unknown_engines: tuple[str, ...] = ()


class Content(Protocol):
    """Content that devices can fetch."""

    def offer(self, content: bytes) -> BlobReference:
        """Keep `content` on offer until it is withdrawn."""

    def withdraw(self, reference: BlobReference) -> None:
        """Offer it no more."""

    def withdraw_all(self) -> None:
        """Offer nothing more."""


class Fleet(Protocol):
    """The devices, and the way to them."""

    devices: dict[str, DeviceRecord]
    changed: asyncio.Event

    @property
    def content(self) -> Content:
        """What devices can fetch."""

    async def open(self, *, patient: bool) -> bool:
        """Get in touch with the fleet, called once; if `patient`, go on trying in place of raising, and return False."""

    async def close(self) -> None:
        """Leave it."""

    def announce(self, announcement: RunAnnouncement) -> None:
        """Tell the fleet which run is on; devices answer with their presence."""

    def remind(self) -> None:
        """Tell the fleet again, if that was not just done: a device that is missing may not know, or not be known."""

    def listen(self, listener: RoundListener | None) -> None:
        """Hand answers and updates to `listener` from now on; None between rounds."""

    def send_lease(self, device: str, lease: Lease) -> None:
        """Send work to a device."""
