"""Receiving updates: device-paced, resumable, acknowledged chunk by chunk after the write, counted exactly once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from frostline.protocol.blobs import BlobStore, chunk_count, chunk_length
from frostline.protocol.errors import CorruptContent, IncompleteContent
from frostline.protocol.messages import Receipt, UpdateOffer, as_reason
from frostline.protocol.topics import HASH_DIGITS

UPLOAD_SLOTS = 16
"""Updates received at once; further devices wait their turn, so that the broker's queues stay short."""
WINDOW = 4
"""Unacknowledged chunks a device may have on the way."""
FIRST_UPLOAD_SECONDS = 1.0
"""What an upload is taken to last before one was seen."""
WAIT_SECONDS = (0.05, 60.0)
"""The shortest and the longest that a device is told to wait."""
STRANGER_SECONDS = 2.0
"""How long a device waits whose presence was lost, and is asked for."""
STORAGE_SECONDS = 5.0
"""How long a device waits that offers an update to a server whose disk is full."""


class UpdateJudge(Protocol):
    """Decides what becomes of an update."""

    def is_counted(self, update: str) -> bool:
        """Whether the update was counted before."""

    def is_known(self, device: str) -> bool:
        """Whether the device said what it is; an update is held against that."""

    def objection(self, device: str, offer: UpdateOffer) -> str:
        """Why the update is not wanted; empty if it is."""

    def count(self, device: str, offer: UpdateOffer, content: bytes) -> str:
        """Journal and fold a whole update; returns why it was rejected instead, or nothing."""


@dataclass
class _Upload:
    offer: UpdateOffer
    missing: set[str]
    began: float

    def have(self) -> list[int]:
        return [i for i, h in enumerate(self.offer.content.chunks) if h not in self.missing]


class _Turns:
    """When devices that find no slot shall come back: one after the other, at the pace of the uploads seen."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._upload_seconds = FIRST_UPLOAD_SECONDS
        self._last = clock()

    def next_wait(self) -> float:
        """Seconds until the next free turn, which is taken with this."""
        now = self._clock()
        self._last = max(self._last, now) + self._upload_seconds / UPLOAD_SLOTS
        shortest, longest = WAIT_SECONDS
        return min(max(self._last - now, shortest), longest)

    def learn(self, seconds: float) -> None:
        """An upload took so long."""
        self._upload_seconds += 0.2 * (seconds - self._upload_seconds)


class UpdateReceiver:
    """Answers offers and chunks; every answer is a receipt for the device.

    A device has one upload at a time: offering another update takes the place of the one before.

    Parameters
    ----------
    clock : callable
        Seconds that never go back.
    """

    def __init__(
        self, store: BlobStore, judge: UpdateJudge, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._judge = judge
        self._clock = clock
        self._open: dict[str, _Upload] = {}
        self._turns = _Turns(clock)

    def on_offer(self, device: str, offer: UpdateOffer) -> Receipt:
        """Answer an offer: which chunks are here already, or that it is counted, unwanted or has to wait."""
        if self._judge.is_counted(offer.update):
            return Receipt(update=offer.update, state="done")
        if not self._judge.is_known(device):
            return Receipt(update=offer.update, state="wait", retry_seconds=STRANGER_SECONDS)
        index = offer.content
        objection = self._judge.objection(device, offer)
        if not objection and len(index.chunks) != chunk_count(index.size, index.chunk_size):
            objection = "the number of chunks does not fit the size"
        if objection:
            self._close(device, offer.update)
            return Receipt(update=offer.update, state="rejected", reason=as_reason(objection))
        if device not in self._open and not self._has_slot():
            return Receipt(update=offer.update, state="wait", retry_seconds=self._turns.next_wait())
        return self._begin(device, offer)

    def on_chunk(self, device: str, update: str, index: int, chunk: bytes) -> Receipt | None:
        """Take a chunk; None where there is nothing to say, since the device offers again by itself."""
        upload = self._open.get(device)
        if upload is None or upload.offer.update[:HASH_DIGITS] != update:
            return Receipt(update=update, state="unknown")
        content = upload.offer.content
        if index >= len(content.chunks) or len(chunk) != chunk_length(content, index):
            return None
        try:
            self._store.put_chunk(content.chunks[index], chunk)
        except CorruptContent:
            return None
        except OSError:
            return self._wait_for_storage(device)
        upload.missing.discard(content.chunks[index])
        if upload.missing:
            return Receipt(update=upload.offer.update, state="have", have=[index], window=WINDOW)
        return self._complete(device, upload)

    def forget(self) -> None:
        """Drop uploads that are still open: their round is over."""
        self._open.clear()

    def _begin(self, device: str, offer: UpdateOffer) -> Receipt:
        previous = self._open.get(device)
        if previous is not None and previous.offer.content != offer.content:
            self._store.drop_chunks(previous.offer.content)
        upload = _Upload(offer, set(self._store.missing_chunks(offer.content)), self._clock())
        self._open[device] = upload
        if not upload.missing:
            return self._complete(device, upload)
        return Receipt(update=offer.update, state="have", have=upload.have(), window=WINDOW)

    def _has_slot(self) -> bool:
        if len(self._open) >= UPLOAD_SLOTS:
            # Devices that vanished in the middle of an upload hold a slot until their leases are settled.
            self._open = {d: u for d, u in self._open.items() if not self._judge.objection(d, u.offer)}
        return len(self._open) < UPLOAD_SLOTS

    def _close(self, device: str, update: str) -> None:
        if device in self._open and self._open[device].offer.update == update:
            del self._open[device]

    def _wait_for_storage(self, device: str) -> Receipt:
        """Nothing is lost by a full disk: the device keeps its update and offers it again."""
        update = self._open.pop(device).offer.update
        return Receipt(update=update, state="wait", retry_seconds=STORAGE_SECONDS)

    def _complete(self, device: str, upload: _Upload) -> Receipt:
        offer = upload.offer
        try:
            path = self._store.assemble(offer.content)
        except IncompleteContent:
            # A power cut damaged chunks that were here before.
            upload.missing = set(self._store.missing_chunks(offer.content))
            return Receipt(update=offer.update, state="have", have=upload.have(), window=WINDOW)
        except CorruptContent as error:
            del self._open[device]
            return Receipt(update=offer.update, state="rejected", reason=as_reason(str(error)))
        except OSError:
            return self._wait_for_storage(device)
        del self._open[device]
        reason = self._judge.count(device, offer, path.read_bytes())
        self._turns.learn(self._clock() - upload.began)
        if reason:
            return Receipt(update=offer.update, state="rejected", reason=as_reason(reason))
        return Receipt(update=offer.update, state="done")
