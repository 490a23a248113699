"""Receiving updates: device-paced, resumable, acknowledged chunk by chunk after the write, counted exactly once."""

from __future__ import annotations

from typing import Protocol

from frostline.protocol.blobs import BlobStore, chunk_count, chunk_length
from frostline.protocol.errors import CorruptContent
from frostline.protocol.messages import Receipt, UpdateOffer, as_reason
from frostline.protocol.topics import HASH_DIGITS

UPLOAD_SLOTS = 16
"""Updates received at once; further devices wait their turn, so that the broker's queues stay short."""
WINDOW = 4
"""Unacknowledged chunks a device may have on the way."""
WAIT_SECONDS = 1.0


class UpdateJudge(Protocol):
    """Decides what becomes of an update."""

    def is_counted(self, update: str) -> bool:
        """Whether the update was counted before."""

    def objection(self, device: str, offer: UpdateOffer) -> str:
        """Why the update is not wanted; empty if it is."""

    def count(self, device: str, offer: UpdateOffer, content: bytes) -> str:
        """Journal and fold a whole update; returns why it was rejected instead, or nothing."""


class UpdateReceiver:
    """Answers offers and chunks; every answer is a receipt for the device.

    A device has one upload at a time: offering another update takes the place of the one before.
    """

    def __init__(self, store: BlobStore, judge: UpdateJudge) -> None:
        self._store = store
        self._judge = judge
        self._open: dict[str, UpdateOffer] = {}

    def on_offer(self, device: str, offer: UpdateOffer) -> Receipt:
        """Answer an offer: which chunks are here already, or that it is counted, unwanted or has to wait."""
        if self._judge.is_counted(offer.update):
            return Receipt(update=offer.update, state="done")
        index = offer.content
        objection = self._judge.objection(device, offer)
        if not objection and len(index.chunks) != chunk_count(index.size, index.chunk_size):
            objection = "the number of chunks does not fit the size"
        if objection:
            self._close(device, offer.update)
            return Receipt(update=offer.update, state="rejected", reason=as_reason(objection))
        if device not in self._open and not self._has_slot():
            return Receipt(update=offer.update, state="wait", retry_seconds=WAIT_SECONDS)
        previous = self._open.get(device)
        if previous is not None and previous.content != index:
            self._store.drop_chunks(previous.content)
        self._open[device] = offer
        missing = set(self._store.missing_chunks(index))
        if not missing:
            return self._complete(device, offer)
        have = [i for i, h in enumerate(index.chunks) if h not in missing]
        return Receipt(update=offer.update, state="have", have=have, window=WINDOW)

    def on_chunk(self, device: str, update: str, index: int, chunk: bytes) -> Receipt | None:
        """Take a chunk; None where there is nothing to say, since the device offers again by itself."""
        offer = self._open.get(device)
        if offer is None or offer.update[:HASH_DIGITS] != update:
            return Receipt(update=update, state="unknown")
        if index >= len(offer.content.chunks) or len(chunk) != chunk_length(offer.content, index):
            return None
        try:
            self._store.put_chunk(offer.content.chunks[index], chunk)
        except CorruptContent:
            return None
        if self._store.missing_chunks(offer.content):
            return Receipt(update=offer.update, state="have", have=[index], window=WINDOW)
        return self._complete(device, offer)

    def forget(self) -> None:
        """Drop uploads that are still open: their round is over."""
        self._open.clear()

    def _has_slot(self) -> bool:
        if len(self._open) >= UPLOAD_SLOTS:
            # Devices that vanished in the middle of an upload hold a slot until their leases are settled.
            self._open = {d: o for d, o in self._open.items() if not self._judge.objection(d, o)}
        return len(self._open) < UPLOAD_SLOTS

    def _close(self, device: str, update: str) -> None:
        if device in self._open and self._open[device].update == update:
            del self._open[device]

    def _complete(self, device: str, offer: UpdateOffer) -> Receipt:
        del self._open[device]
        try:
            path = self._store.assemble(offer.content)
        except CorruptContent as error:
            return Receipt(update=offer.update, state="rejected", reason=as_reason(str(error)))
        reason = self._judge.count(device, offer, path.read_bytes())
        if reason:
            return Receipt(update=offer.update, state="rejected", reason=as_reason(reason))
        return Receipt(update=offer.update, state="done")
