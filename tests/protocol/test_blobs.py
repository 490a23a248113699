from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.protocol.blobs import (
    BlobStore,
    chunk_count,
    index_of,
    reference_to,
    sha256_of,
    split_chunks,
    write_atomically,
)
from frostline.protocol.errors import CorruptContent, IncompleteContent, StorageExceeded
from frostline.protocol.messages import BlobIndex, BlobReference

CONTENT = bytes(range(256)) * 12
CHUNK_SIZE = 1024


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def put_all(store: BlobStore, content: bytes, chunk_size: int) -> None:
    for chunk in split_chunks(content, chunk_size):
        store.put_chunk(sha256_of(chunk), chunk)


@given(content=st.binary(max_size=500), chunk_size=st.integers(1, 100))
def test_chunks_join_to_the_content(content: bytes, chunk_size: int) -> None:
    chunks = list(split_chunks(content, chunk_size))
    assert b"".join(chunks) == content
    assert len(chunks) == chunk_count(len(content), chunk_size)
    assert all(len(chunk) == chunk_size for chunk in chunks[:-1])
    assert all(chunks)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.binary(min_size=1, max_size=64),
    size=st.integers(1, 12_000),
    chunk_size=st.integers(1024, 5000),
    order=st.randoms(use_true_random=False),
)
def test_a_transfer_in_any_order_gives_the_content(
    seed: bytes, size: int, chunk_size: int, order: Any
) -> None:
    # Short seeds repeat, so some files hold the same chunk several times.
    content = (seed * (size // len(seed) + 1))[:size]
    index = index_of(content, chunk_size)
    assert (index.sha256, index.size) == (hashlib.sha256(content).hexdigest(), size)
    with TemporaryDirectory() as folder:
        store = BlobStore(Path(folder))
        chunks = list(split_chunks(content, chunk_size))
        assert store.missing_chunks(index) == list(dict.fromkeys(map(sha256_of, chunks)))
        order.shuffle(chunks)
        for chunk in chunks:
            assert not store.has(index)
            store.put_chunk(sha256_of(chunk), chunk)
            assert sha256_of(chunk) not in store.missing_chunks(index)
        path = store.assemble(index)
        assert path == store.path(index)
        assert path.read_bytes() == content
        assert store.has(index)
        assert store.read(index) == content
        assert files_below(Path(folder)) == [path]


def test_a_transfer_resumes_in_a_new_store(tmp_path: Path) -> None:
    index = index_of(CONTENT, CHUNK_SIZE)
    first, *rest = dict.fromkeys(split_chunks(CONTENT + b"x" * 2000, CHUNK_SIZE))
    BlobStore(tmp_path).put_chunk(sha256_of(first), first)
    index = index_of(CONTENT + b"x" * 2000, CHUNK_SIZE)
    resumed = BlobStore(tmp_path)
    assert resumed.missing_chunks(index) == [sha256_of(chunk) for chunk in rest]


def test_put_is_read_back_and_repeated_without_effect(store: BlobStore, tmp_path: Path) -> None:
    reference = store.put(CONTENT)
    assert reference == reference_to(CONTENT)
    assert store.read(reference) == CONTENT
    before = store.path(reference).stat().st_mtime_ns
    assert store.put(CONTENT) == reference
    assert store.path(reference).stat().st_mtime_ns == before
    assert files_below(tmp_path) == [tmp_path / reference.sha256]


def test_a_chunk_with_another_hash_is_refused_and_not_kept(store: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(CorruptContent, match=sha256_of(b"expected")[:12]):
        store.put_chunk(sha256_of(b"expected"), b"received")
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", ""])
def test_a_chunk_cannot_name_its_own_place(store: BlobStore, tmp_path: Path, name: str) -> None:
    with pytest.raises(CorruptContent):
        store.put_chunk(name, b"received")
    assert files_below(tmp_path) == []


def changed(index: BlobIndex, **fields: Any) -> BlobIndex:
    return index.model_copy(update=fields)


DIFFERING = b"".join(bytes([i]) * CHUNK_SIZE for i in range(3))


@pytest.mark.parametrize(
    "wrong",
    [
        changed(index_of(DIFFERING, CHUNK_SIZE), chunks=index_of(DIFFERING, CHUNK_SIZE).chunks[::-1]),
        changed(index_of(DIFFERING, CHUNK_SIZE), chunks=index_of(DIFFERING, CHUNK_SIZE).chunks[:2]),
        changed(index_of(DIFFERING, CHUNK_SIZE), chunks=index_of(DIFFERING, CHUNK_SIZE).chunks * 2),
        changed(index_of(DIFFERING, CHUNK_SIZE), sha256="0" * 64),
        changed(index_of(DIFFERING, CHUNK_SIZE), size=len(DIFFERING) + 1),
    ],
    ids=["order", "too few", "too many", "hash", "size"],
)
def test_an_index_that_does_not_fit_is_corrupt_and_its_chunks_go(
    store: BlobStore, tmp_path: Path, wrong: BlobIndex
) -> None:
    put_all(store, DIFFERING, CHUNK_SIZE)
    with pytest.raises(CorruptContent, match=f"{wrong.sha256[:12]} does not match its hash"):
        store.assemble(wrong)
    assert not store.has(wrong)
    assert set(wrong.chunks) <= set(store.missing_chunks(wrong))
    assert not {path.name for path in files_below(tmp_path)} & set(wrong.chunks)


def test_empty_chunks_are_corrupt(store: BlobStore) -> None:
    empty = sha256_of(b"")
    store.put_chunk(empty, b"")
    with pytest.raises(CorruptContent):
        store.assemble(BlobIndex(sha256=empty, size=1, chunk_size=CHUNK_SIZE, chunks=[empty]))


def test_one_chunk_named_many_times_is_not_read_many_times(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = b"a" * CHUNK_SIZE
    store.put_chunk(sha256_of(chunk), chunk)
    index = BlobIndex(
        sha256="0" * 64, size=CHUNK_SIZE, chunk_size=CHUNK_SIZE, chunks=[sha256_of(chunk)] * 2**16
    )
    reads = []
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or chunk)  # type: ignore[func-returns-value]
    with pytest.raises(CorruptContent):
        store.assemble(index)
    assert len(reads) == 1


def test_a_missing_chunk_is_corrupt_and_the_others_stay(store: BlobStore) -> None:
    index = index_of(DIFFERING, CHUNK_SIZE)
    store.put_chunk(index.chunks[0], DIFFERING[:CHUNK_SIZE])
    with pytest.raises(CorruptContent, match="a chunk is missing"):
        store.assemble(index)
    assert store.missing_chunks(index) == index.chunks[1:]


def fail_with_full_disk(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("action", "step"),
    [
        ("put", "replace"),
        ("put", "fsync"),
        ("put_chunk", "replace"),
        ("write_atomically", "replace"),
        ("write_atomically", "fsync"),
    ],
)
def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, action: str
) -> None:
    store = BlobStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail_with_full_disk)
        with pytest.raises(OSError, match="No space left"):
            if action == "put":
                store.put(CONTENT)
            elif action == "put_chunk":
                store.put_chunk(sha256_of(CONTENT), CONTENT)
            else:
                write_atomically(tmp_path / "folder" / "file", CONTENT)
    assert files_below(tmp_path) == []
    assert not store.has(reference_to(CONTENT))
    assert store.put(CONTENT) == reference_to(CONTENT)


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_an_interrupted_write_keeps_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, step, fail_with_full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert files_below(tmp_path) == [path]


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_full_disk_does_not_undo_a_transfer(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    index = index_of(DIFFERING, CHUNK_SIZE)
    put_all(store, DIFFERING, CHUNK_SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail_with_full_disk)
        with pytest.raises(OSError, match="No space left"):
            store.assemble(index)
    assert not store.has(index)
    assert store.missing_chunks(index) == []
    assert store.assemble(index).read_bytes() == DIFFERING


def test_content_is_on_disk_before_it_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        steps.append("fsync")
        fsync(descriptor)

    def note_replace(source: Any, target: Any) -> None:
        steps.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_atomically(tmp_path / "file", b"content")
    assert steps == ["fsync", "replace", "fsync"]


def test_a_chunk_damaged_on_disk_is_dropped_and_the_others_stay(store: BlobStore, tmp_path: Path) -> None:
    index = index_of(DIFFERING, CHUNK_SIZE)
    put_all(store, DIFFERING, CHUNK_SIZE)
    # A power cut may leave a file of the right length that was never written.
    (tmp_path / "chunks" / index.chunks[1]).write_bytes(bytes([7]) * CHUNK_SIZE)
    with pytest.raises(IncompleteContent, match="damaged"):
        store.assemble(index)
    assert store.missing_chunks(index) == [index.chunks[1]]
    put_all(store, DIFFERING, CHUNK_SIZE)
    assert store.assemble(index).read_bytes() == DIFFERING


def aged(store: BlobStore, *contents: bytes) -> list[BlobReference]:
    """The contents in the store, the first one used longest ago."""
    references = [store.put(content) for content in contents]
    for age, reference in enumerate(references):
        os.utime(store.path(reference), (age, age))
    return references


def test_room_is_made_by_dropping_what_was_used_longest_ago(store: BlobStore) -> None:
    oldest, old, recent = aged(store, b"a" * 100, b"b" * 100, b"c" * 100)
    store.read(oldest)
    wanted = reference_to(b"d" * 50)
    store.make_room(350, [wanted])
    assert all(map(store.has, [oldest, old, recent])), "300 are here, and the 50 that are wanted fit as well"
    store.make_room(349, [wanted])
    assert [store.has(reference) for reference in (oldest, old, recent)] == [True, False, True]


def test_room_is_made_of_chunks_that_nobody_came_back_for(store: BlobStore) -> None:
    index = index_of(DIFFERING, CHUNK_SIZE)
    put_all(store, DIFFERING, CHUNK_SIZE)
    store.make_room(len(DIFFERING), [reference_to(b"d")])
    assert len(store.missing_chunks(index)) == 1


def test_what_is_wanted_stays_and_what_never_fits_is_refused(store: BlobStore) -> None:
    (here,) = aged(store, b"a" * 100)
    wanted = [here, reference_to(b"d" * 50)]
    on_its_way = store.unfinished_path(wanted[1], "content")
    on_its_way.write_bytes(b"d" * 10)
    store.make_room(150, wanted)
    assert store.has(here) and on_its_way.exists()
    with pytest.raises(StorageExceeded, match="150 bytes of storage are needed, this device's quota is 149"):
        store.make_room(149, wanted)
    assert store.has(here)
    store.make_room(100, [here])
    assert not on_its_way.exists()


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


@pytest.mark.parametrize(
    "damaged",
    [flipped(CONTENT, 0), flipped(CONTENT, len(CONTENT) * 8 - 1), CONTENT[:-1], CONTENT + b"\0", b""],
    ids=["first bit", "last bit", "short", "long", "empty"],
)
def test_a_damaged_file_is_removed_and_can_be_put_again(store: BlobStore, damaged: bytes) -> None:
    reference = store.put(CONTENT)
    path = store.path(reference)
    path.write_bytes(damaged)
    with pytest.raises(CorruptContent, match="does not match its hash") as raised:
        store.read(reference)
    assert str(path) in str(raised.value)
    assert not path.exists()
    store.put(CONTENT)
    assert store.read(reference) == CONTENT


def test_content_of_another_size_is_not_there(store: BlobStore) -> None:
    reference = store.put(CONTENT)
    store.path(reference).write_bytes(CONTENT[:-1])
    assert not store.has(reference)


def test_reading_what_is_not_there_is_corrupt(store: BlobStore) -> None:
    with pytest.raises(CorruptContent, match="missing"):
        store.read(reference_to(CONTENT))


def test_remove_drops_content_and_may_be_repeated(store: BlobStore, tmp_path: Path) -> None:
    reference = store.put(CONTENT)
    other = store.put(b"other")
    store.remove(reference)
    store.remove(reference)
    assert files_below(tmp_path) == [store.path(other)]
