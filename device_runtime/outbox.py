"""The durable outbox: a finished update is on disk before it is announced, and stays until the server counted it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from frostline.protocol.blobs import index_of, split_chunks, write_atomically
from frostline.protocol.connection import Connection
from frostline.protocol.errors import ProtocolViolation
from frostline.protocol.messages import Receipt, UpdateOffer, decode
from frostline.protocol.topics import Topics

ANSWER_SECONDS = 3.0
"""How long to wait for the server's word before offering again."""
UNKNOWN_SECONDS = 0.1
"""How long to wait before offering again what the server says it does not know."""


class Outbox:
    """Finished updates of one device, sent until the server says `done` or `rejected`."""

    def __init__(self, connection: Connection, topics: Topics, device: str, folder: Path) -> None:
        self._connection = connection
        self._topics = topics
        self._device = device
        self._folder = folder
        self._receipts: dict[str, asyncio.Queue[Receipt]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def content_path(self, lease: str) -> Path:
        """Where the update of `lease` is to be written before `add`."""
        return self._folder / f"{lease}.safetensors"

    def add(self, offer: UpdateOffer) -> None:
        """Make a finished update part of the outbox; its content is at `content_path` already."""
        write_atomically(self._offer_path(offer.lease), offer.encode())

    def pending(self) -> list[UpdateOffer]:
        """Updates whose fate the server has not told yet, such as those from before a restart.

        What a crash left unfinished or damaged is dropped: call it before training, never during.
        """
        offers = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                offer = decode(UpdateOffer, path.read_bytes())
            except ProtocolViolation:
                path.unlink()
                continue
            # Chunks that are not as announced would be sent for ever: the server drops them without a word.
            if path == self._offer_path(offer.lease) and self._is_whole(offer):
                offers.append(offer)
            else:
                path.unlink()
        known = {self.content_path(offer.lease) for offer in offers}
        for path in self._folder.glob("*.safetensors"):
            if path not in known:
                path.unlink()
        return offers

    async def send(self, offer: UpdateOffer) -> Receipt:
        """Send an update until the server ends it, then remove it; the last receipt says how it ended."""
        queue: asyncio.Queue[Receipt] = asyncio.Queue()
        self._receipts[offer.update] = queue
        try:
            last = await self._deliver(offer, queue)
        finally:
            del self._receipts[offer.update]
        self._offer_path(offer.lease).unlink(missing_ok=True)
        self.content_path(offer.lease).unlink(missing_ok=True)
        return last

    def receive(self, receipt: Receipt) -> None:
        """Take the server's word on an update."""
        queue = self._receipts.get(receipt.update)
        if queue is not None:
            queue.put_nowait(receipt)

    async def _deliver(self, offer: UpdateOffer, queue: asyncio.Queue[Receipt]) -> Receipt:
        chunks = list(split_chunks(self.content_path(offer.lease).read_bytes(), offer.content.chunk_size))
        have: set[int] = set()
        in_flight: set[int] = set()
        self._announce(offer)
        while True:
            try:
                # Not wait_for: before Python 3.12 it drops a cancellation that meets a receipt.
                async with asyncio.timeout(ANSWER_SECONDS):
                    receipt = await queue.get()
            except TimeoutError:
                self._begin_again(offer, have, in_flight)
                continue
            match receipt.state:
                case "done" | "rejected":
                    return receipt
                case "wait" | "unknown":
                    await asyncio.sleep(receipt.retry_seconds if receipt.state == "wait" else UNKNOWN_SECONDS)
                    self._begin_again(offer, have, in_flight)
                case "have":
                    have.update(receipt.have)
                    in_flight -= have
                    self._fill_window(offer, chunks, have, in_flight, receipt.window)

    def _begin_again(self, offer: UpdateOffer, have: set[int], in_flight: set[int]) -> None:
        # The server may have lost chunks it had: its answer to an offer lists all that are there now.
        have.clear()
        in_flight.clear()
        self._announce(offer)

    def _fill_window(
        self, offer: UpdateOffer, chunks: list[bytes], have: set[int], in_flight: set[int], window: int
    ) -> None:
        for index, chunk in enumerate(chunks):
            if len(in_flight) >= window:
                return
            if index not in have and index not in in_flight:
                in_flight.add(index)
                topic = self._topics.update_chunk(self._device, offer.update, index)
                self._connection.publish(topic, chunk)

    def _announce(self, offer: UpdateOffer) -> None:
        self._connection.publish(self._topics.offer(self._device), offer.encode())

    def _is_whole(self, offer: UpdateOffer) -> bool:
        try:
            content = self.content_path(offer.lease).read_bytes()
        except FileNotFoundError:
            return False
        return index_of(content, offer.content.chunk_size) == offer.content

    def _offer_path(self, lease: str) -> Path:
        return self._folder / f"{lease}.json"
