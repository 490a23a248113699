"""Content on offer: published once as retained chunks, so that the broker, not the server, serves N devices."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from frostline.protocol.blobs import index_of, split_chunks
from frostline.protocol.connection import Connection
from frostline.protocol.errors import UsageError
from frostline.protocol.messages import MESSAGE_BYTES_LIMIT, BlobReference, ContentRequest
from frostline.protocol.topics import Topics

REPEAT_SECONDS = 0.5
"""Requests for the same content within this time are answered once, since every subscriber hears the answer."""
OFFER_BYTES = 1024
"""What an update's offer holds besides its index, which is as long as that of the weights it belongs to."""


@dataclass(frozen=True)
class _Published:
    topic: str
    payload: bytes


class ContentPublisher:
    """Keeps the content of the current stage and round on the broker, and gives it again to a broker that forgot."""

    def __init__(self, connection: Connection, topics: Topics, chunk_size: int) -> None:
        self._connection = connection
        self._topics = topics
        self._chunk_size = chunk_size
        self._offered: dict[str, dict[str, _Published]] = {}
        self._last_repeat: dict[str, float] = {}

    def offer(self, content: bytes) -> BlobReference:
        """Publish `content` until it is withdrawn.

        Raises
        ------
        UsageError
            If its chunks are too many for one index.
        """
        index = index_of(content, self._chunk_size)
        if len(index.encode()) + OFFER_BYTES > MESSAGE_BYTES_LIMIT:
            raise UsageError(
                f"broker.chunk_size = {self._chunk_size}: content of {len(content)} bytes makes too many chunks; "
                f"use at least {2 * self._chunk_size}, if the broker takes such messages"
            )
        reference = BlobReference(sha256=index.sha256, size=index.size)
        if reference.sha256 in self._offered:
            return reference
        chunks = zip(index.chunks, split_chunks(content, self._chunk_size), strict=True)
        messages = {h: _Published(self._topics.chunk(h), chunk) for h, chunk in chunks}
        if len(index.chunks) > 1:
            # Asked for by the hash of the whole, which no chunk has.
            messages[index.sha256] = _Published(self._topics.index(index.sha256), index.encode())
        self._offered[reference.sha256] = messages
        for message in messages.values():
            self._publish(message)
        return reference

    def withdraw(self, reference: BlobReference) -> None:
        """Clear content from the broker's memory."""
        for h, message in self._offered.pop(reference.sha256, {}).items():
            # Another content may share the chunk.
            if self._find(h) is None:
                self._connection.publish(message.topic, b"", retain=True)
                self._last_repeat.pop(h, None)

    def withdraw_all(self) -> None:
        """Clear everything."""
        for sha256 in list(self._offered):
            self.withdraw(BlobReference(sha256=sha256, size=1))

    def reseed(self) -> None:
        """Publish everything again: the broker may have restarted with an empty memory."""
        for messages in self._offered.values():
            for message in messages.values():
                self._publish(message)

    def answer(self, request: ContentRequest) -> None:
        """Publish what a device missed."""
        now = asyncio.get_running_loop().time()
        for h in request.hashes:
            message = self._find(h)
            if message is not None and now - self._last_repeat.get(h, -REPEAT_SECONDS) >= REPEAT_SECONDS:
                self._last_repeat[h] = now
                self._publish(message)

    def _find(self, sha256: str) -> _Published | None:
        return next((m[sha256] for m in self._offered.values() if sha256 in m), None)

    def _publish(self, message: _Published) -> None:
        self._connection.publish(message.topic, message.payload, retain=True)
