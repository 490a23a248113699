"""Fetching content by hash: the device asks for a few chunks at a time and the broker does the fan-out."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from functools import partial

from frostline.device_runtime.download import Download
from frostline.protocol.blobs import BlobStore, chunk_count
from frostline.protocol.connection import Connection
from frostline.protocol.errors import IncompleteContent, ProtocolViolation
from frostline.protocol.messages import BlobIndex, BlobReference, ContentRequest, decode
from frostline.protocol.topics import Topics

WINDOW = 8
"""Chunks awaited at once: the back-pressure that keeps a slow device's backlog out of the broker."""
FIRST_REQUEST_SECONDS = 2.0
LONGEST_REQUEST_SECONDS = 30.0


class ContentFetcher:
    """Fetches content into a store, chunk by chunk; what arrived is kept across restarts.

    Chunks are retained on topics named by their hash, so a subscription is a request that the broker answers. What it
    does not have is asked of the server, which publishes it again.
    """

    def __init__(self, connection: Connection, topics: Topics, device: str, store: BlobStore) -> None:
        self._connection = connection
        self._topics = topics
        self._device = device
        self._store = store
        self._awaited: dict[str, tuple[Callable[[bytes], bool], asyncio.Future[bytes]]] = {}

    async def fetch(self, reference: BlobReference, chunk_size: int) -> None:
        """Bring `reference`'s content into the store, verified.

        Raises
        ------
        CorruptContent
            If the chunks, each as announced, do not make up the content.
        """
        if self._store.has(reference):
            return
        index = await self._index(reference, chunk_size)
        download = Download(self._store, index)
        while not self._store.has(reference):
            await self._fetch_chunks(download)
            # Chunks that were damaged are missing now, and fetched again.
            with contextlib.suppress(IncompleteContent):
                await _to_the_end(download.finish)

    def deliver(self, topic: str, payload: bytes) -> None:
        """Take a message from an `index/` or `chunk/` topic; anything but what is awaited is dropped."""
        accepts, future = self._awaited.get(topic, (None, None))
        if accepts is None or future is None or future.done():
            return
        try:
            if accepts(payload):
                future.set_result(payload)
        except OSError as error:  # As when the disk is full: it ends the fetch, and not the connection.
            future.set_exception(error)

    async def _index(self, reference: BlobReference, chunk_size: int) -> BlobIndex:
        if reference.size <= chunk_size:
            return BlobIndex(
                sha256=reference.sha256, size=reference.size, chunk_size=chunk_size, chunks=[reference.sha256]
            )

        def describes(payload: bytes) -> bool:
            try:
                index = decode(BlobIndex, payload)
            except ProtocolViolation:
                return False
            whole = (index.sha256, index.size) == (reference.sha256, reference.size)
            return whole and len(index.chunks) == chunk_count(index.size, index.chunk_size)

        topic = self._topics.index(reference.sha256)
        return decode(BlobIndex, await self._await(topic, reference.sha256, describes))

    async def _fetch_chunks(self, download: Download) -> None:
        window = asyncio.Semaphore(WINDOW)
        missing = download.missing()
        random.shuffle(missing)  # So that devices that start together do not wait for the same chunk.

        async def fetch_chunk(sha256: str) -> None:
            async with window:
                await self._await(self._topics.chunk(sha256), sha256, partial(download.put, sha256))

        async with asyncio.TaskGroup() as group:
            for sha256 in missing:
                group.create_task(fetch_chunk(sha256))

    async def _await(self, topic: str, sha256: str, accepts: Callable[[bytes], bool]) -> bytes:
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._awaited[topic] = accepts, future
        # QoS 0: the broker keeps nothing for us, and a lost chunk is simply asked for.
        self._connection.subscribe(topic, qos=0)
        patience = FIRST_REQUEST_SECONDS
        try:
            while not (await asyncio.wait([future], timeout=patience))[0]:
                request = ContentRequest(hashes=[sha256])
                self._connection.publish(self._topics.request(self._device), request.encode())
                patience = min(patience * 2, LONGEST_REQUEST_SECONDS)
            return future.result()
        finally:
            self._connection.unsubscribe(topic)
            del self._awaited[topic]
            if not future.cancel():
                # When another chunk's failure ends the fetch, nobody asks for this one's.
                future.exception()


async def _to_the_end(function: Callable[[], None]) -> None:
    """Call something slow in a thread, and leave it to nobody's future: its files may be wanted again at once."""
    running = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.gather(running, return_exceptions=True)
        raise
