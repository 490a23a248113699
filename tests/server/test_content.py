from __future__ import annotations

import asyncio
import os
from typing import cast

import pytest

from frostline.protocol.blobs import index_of, sha256_of
from frostline.protocol.connection import Connection
from frostline.protocol.errors import UsageError
from frostline.protocol.messages import MESSAGE_BYTES_LIMIT, ContentRequest, TrainingMetrics, UpdateOffer
from frostline.protocol.topics import Topics
from frostline.server import content as content_module
from frostline.server.content import ContentPublisher

TOPICS = Topics("fleet")
CHUNK = 1024


class Recorder:
    """In place of a `Connection`: what was published, and what the broker would retain."""

    def __init__(self) -> None:
        self.published: list[str] = []
        self.retained: dict[str, bytes] = {}

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        assert retain
        self.published.append(topic)
        self.retained[topic] = payload
        if not payload:
            del self.retained[topic]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def publisher(recorder: Recorder) -> ContentPublisher:
    return ContentPublisher(cast(Connection, recorder), TOPICS, CHUNK)


def expected(content: bytes) -> dict[str, bytes]:
    index = index_of(content, CHUNK)
    chunks = [content[start : start + CHUNK] for start in range(0, len(content), CHUNK)]
    messages = {TOPICS.chunk(h): chunk for h, chunk in zip(index.chunks, chunks, strict=True)}
    if len(chunks) > 1:
        messages[TOPICS.index(index.sha256)] = index.encode()
    return messages


@pytest.mark.parametrize("size", [1, CHUNK, CHUNK + 1, 5 * CHUNK])
def test_content_is_retained_in_chunks_with_an_index_if_there_are_several(
    publisher: ContentPublisher, recorder: Recorder, size: int
) -> None:
    content = os.urandom(size)
    publisher.offer(content)
    assert recorder.retained == expected(content)


def test_content_offered_twice_is_published_once(publisher: ContentPublisher, recorder: Recorder) -> None:
    assert publisher.offer(b"content") == publisher.offer(b"content")
    assert len(recorder.published) == 1


def test_withdraw_clears_what_no_other_content_needs(publisher: ContentPublisher, recorder: Recorder) -> None:
    shared, first, second = (os.urandom(CHUNK) for _ in range(3))
    earlier = publisher.offer(shared + first)
    later = publisher.offer(shared + second)
    alone = publisher.offer(shared)
    publisher.withdraw(earlier)
    assert recorder.retained == expected(shared + second)
    publisher.withdraw(alone)
    assert recorder.retained == expected(shared + second)
    publisher.withdraw(alone)
    publisher.withdraw(later)
    assert recorder.retained == {}


def test_a_shared_chunk_is_still_given_again_after_one_of_its_contents_is_withdrawn(
    publisher: ContentPublisher, recorder: Recorder
) -> None:
    shared = os.urandom(CHUNK)
    publisher.offer(shared + b"first")
    publisher.withdraw(publisher.offer(shared + b"second"))
    recorder.published.clear()
    asyncio.run(answer(publisher, sha256_of(shared)))
    assert recorder.published == [TOPICS.chunk(sha256_of(shared))]


def test_withdraw_all_clears_everything(publisher: ContentPublisher, recorder: Recorder) -> None:
    publisher.offer(b"content")
    publisher.offer(os.urandom(3 * CHUNK))
    publisher.withdraw_all()
    assert recorder.retained == {}
    recorder.published.clear()
    publisher.reseed()
    assert recorder.published == []


def test_reseed_publishes_everything_to_a_broker_that_forgot(
    publisher: ContentPublisher, recorder: Recorder
) -> None:
    publisher.offer(b"content")
    publisher.offer(os.urandom(3 * CHUNK))
    before = dict(recorder.retained)
    recorder.retained.clear()
    publisher.reseed()
    assert recorder.retained == before


async def answer(publisher: ContentPublisher, *hashes: str) -> None:
    publisher.answer(ContentRequest(hashes=list(hashes)))


def test_requests_are_answered_once_within_a_moment(
    publisher: ContentPublisher, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content_module, "REPEAT_SECONDS", 0.1)
    first, second = publisher.offer(b"first"), publisher.offer(b"second")
    recorder.published.clear()

    async def main() -> None:
        await answer(publisher, first.sha256, first.sha256, "0" * 64)
        await answer(publisher, first.sha256, second.sha256)
        assert recorder.published == [TOPICS.chunk(first.sha256), TOPICS.chunk(second.sha256)]
        await asyncio.sleep(0.12)
        await answer(publisher, first.sha256)
        assert recorder.published[2:] == [TOPICS.chunk(first.sha256)]

    asyncio.run(main())


def largest_content(publisher: ContentPublisher) -> bytes:
    """The most chunks that are let through."""
    content = b""
    for chunks in range(900, 1000):
        candidate = bytes(chunks * CHUNK)
        try:
            publisher.withdraw(publisher.offer(candidate))
        except UsageError:
            return content
        content = candidate
    raise AssertionError("no limit was found")


def test_too_many_chunks_are_refused_while_an_update_of_that_size_still_fits_an_offer(
    publisher: ContentPublisher, recorder: Recorder
) -> None:
    content = largest_content(publisher)
    metrics = TrainingMetrics(
        samples=2**40,
        steps=2**40,
        loss=-1.2345678901234567e-300,
        seconds=0.1 + 0.2,
        evaluated=2**53,
        correct=2**53,
    )
    # An update's file is a little larger than that of the weights: its last chunk may be another one.
    index = index_of(content + b"more", CHUNK)
    offer = UpdateOffer(update="a" * 32, lease="b" * 32, content=index, metrics=metrics)
    assert len(offer.encode()) <= MESSAGE_BYTES_LIMIT
    with pytest.raises(UsageError, match=f"broker.chunk_size = {CHUNK}.*use at least {2 * CHUNK}"):
        publisher.offer(content + bytes(CHUNK))
    assert recorder.retained == {}
