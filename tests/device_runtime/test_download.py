from __future__ import annotations

import errno
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.device_runtime.download import Download
from frostline.protocol.blobs import BlobStore, index_of, sha256_of, split_chunks
from frostline.protocol.errors import CorruptContent, IncompleteContent

CHUNK = 1024
CONTENT = b"".join(bytes([i]) * CHUNK for i in range(3)) + b"end"
INDEX = index_of(CONTENT, CHUNK)


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def put_all(download: Download, content: bytes = CONTENT) -> None:
    for chunk in split_chunks(content, CHUNK):
        assert download.put(sha256_of(chunk), chunk)


def content_files(store: BlobStore) -> list[Path]:
    return [path for path in store.path(INDEX).parent.iterdir() if path.is_file()]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.binary(min_size=1, max_size=64),
    size=st.integers(1, 12_000),
    order=st.randoms(use_true_random=False),
    restarts=st.integers(0, 3),
)
def test_chunks_in_any_order_with_restarts_give_the_content(
    seed: bytes, size: int, order: Any, restarts: int
) -> None:
    # Short seeds repeat, so some files hold the same chunk several times.
    content = (seed * (size // len(seed) + 1))[:size]
    index = index_of(content, CHUNK)
    with TemporaryDirectory() as folder:
        store = BlobStore(Path(folder))
        download = Download(store, index)
        chunks = {sha256_of(chunk): chunk for chunk in split_chunks(content, CHUNK)}
        assert download.missing() == list(chunks)
        hashes = list(chunks)
        order.shuffle(hashes)
        for count, sha256 in enumerate(hashes):
            if count < restarts:
                download = Download(store, index)
            with pytest.raises(IncompleteContent):
                download.finish()
            assert download.put(sha256, chunks[sha256])
            assert sha256 not in download.missing()
        download.finish()
        assert store.read(index) == content
        assert [path.name for path in Path(folder).iterdir() if path.is_file()] == [index.sha256]


def test_a_chunk_of_another_length_is_refused(store: BlobStore) -> None:
    download = Download(store, INDEX)
    assert not download.put(INDEX.chunks[0], b"")
    assert not download.put(INDEX.chunks[-1], bytes(CHUNK))
    assert download.missing() == INDEX.chunks


@pytest.mark.parametrize("restarted", [False, True])
def test_a_damaged_chunk_is_found_by_the_whole_and_then_checked_as_it_comes(
    store: BlobStore, restarted: bool
) -> None:
    download = Download(store, INDEX)
    put_all(download)
    assert download.put(INDEX.chunks[1], b"x" * CHUNK)
    with pytest.raises(IncompleteContent, match="damaged"):
        download.finish()
    assert not store.has(INDEX)
    if restarted:
        assert Download(store, INDEX).missing() == [INDEX.chunks[1]]
    assert download.missing() == [INDEX.chunks[1]]
    assert not download.put(INDEX.chunks[1], b"x" * CHUNK)
    assert download.put(INDEX.chunks[1], CONTENT[CHUNK : 2 * CHUNK])
    download.finish()
    assert store.read(INDEX) == CONTENT


@pytest.mark.parametrize(
    "damage",
    [
        lambda content, listed: content.write_bytes(b""),
        lambda content, listed: content.write_bytes(bytes(len(CONTENT))),
        lambda content, listed: content.write_bytes(CONTENT + b"more"),
        lambda content, listed: content.unlink(),
        lambda content, listed: listed.unlink(),
        lambda content, listed: listed.write_bytes(listed.read_bytes()[:5]),
        lambda content, listed: listed.write_bytes(b"\xff" * 64),
    ],
    ids=["empty", "zeros", "longer", "no content", "no list", "half a list", "garbage list"],
)
def test_whatever_a_crash_left_the_content_comes_in_the_end(store: BlobStore, damage: Any) -> None:
    first = Download(store, INDEX)
    put_all(first)
    (content,) = [path for path in content_files(store) if path.suffix == ".content"]
    (listed,) = [path for path in content_files(store) if path.suffix == ".chunks"]
    damage(content, listed)
    download = Download(store, INDEX)
    for _ in range(2):
        chunks = {sha256_of(chunk): chunk for chunk in split_chunks(CONTENT, CHUNK)}
        for sha256 in download.missing():
            assert download.put(sha256, chunks[sha256])
        try:
            download.finish()
        except IncompleteContent:
            continue
        break
    assert store.read(INDEX) == CONTENT
    assert len(content_files(store)) == 1


def test_an_index_that_lies_leaves_nothing(store: BlobStore) -> None:
    forged = INDEX.model_copy(update={"sha256": "0" * 64})
    download = Download(store, forged)
    put_all(download)
    with pytest.raises(CorruptContent, match="000000000000 does not match its hash"):
        download.finish()
    assert content_files(store) == []


def test_a_full_disk_loses_no_chunk_that_came_before(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    download = Download(store, INDEX)
    assert download.put(INDEX.chunks[0], CONTENT[:CHUNK])
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(OSError, match="No space left"):
            download.put(INDEX.chunks[1], CONTENT[CHUNK : 2 * CHUNK])
    assert Download(store, INDEX).missing() == INDEX.chunks[1:]
    put_all(download)
    download.finish()
    assert store.read(INDEX) == CONTENT
