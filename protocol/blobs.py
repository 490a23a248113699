"""Content-addressed files and their chunks on disk.

A file is named by its SHA-256 and is either whole and verified or not there: content is written beside its place,
flushed and renamed. Chunks of an unfinished file wait in a folder of their own, so a transfer resumes after a restart. They
are renamed into place too but not flushed, which a device with slow flash would feel at every chunk: what a power cut
damages is found when the chunks are joined, and fetched again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from frostline.protocol.errors import CorruptContent, IncompleteContent, StorageExceeded
from frostline.protocol.messages import BlobIndex, BlobReference


def sha256_of(content: bytes) -> str:
    """SHA-256 of `content` as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def reference_to(content: bytes) -> BlobReference:
    """Hash and size of `content`."""
    return BlobReference(sha256=sha256_of(content), size=len(content))


def split_chunks(content: bytes, chunk_size: int) -> Iterator[bytes]:
    """`content` in pieces of `chunk_size` bytes, the last one shorter."""
    for start in range(0, len(content), chunk_size):
        yield content[start : start + chunk_size]


def index_of(content: bytes, chunk_size: int) -> BlobIndex:
    """The index of `content` cut into chunks of `chunk_size` bytes."""
    chunks = [sha256_of(chunk) for chunk in split_chunks(content, chunk_size)]
    return BlobIndex(sha256=sha256_of(content), size=len(content), chunk_size=chunk_size, chunks=chunks)


def chunk_count(size: int, chunk_size: int) -> int:
    """How many chunks content of `size` bytes has."""
    return -(-size // chunk_size)


def chunk_length(index: BlobIndex, position: int) -> int:
    """How many bytes the chunk at `position` has."""
    return min(index.chunk_size, index.size - position * index.chunk_size)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, content, flush=True)
    _flush_folder(path.parent)


def _write(path: Path, content: bytes, *, flush: bool) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def _matches(content: bytes, reference: BlobReference) -> bool:
    return len(content) == reference.size and sha256_of(content) == reference.sha256


def _flush_folder(folder: Path) -> None:
    """A rename survives a power cut only once its folder is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class BlobStore:
    """Verified content by hash below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._chunks = folder / "chunks"
        self._chunks.mkdir(parents=True, exist_ok=True)

    def path(self, reference: BlobReference) -> Path:
        """Where `reference`'s content is, or would be."""
        return self._folder / reference.sha256

    def has(self, reference: BlobReference) -> bool:
        """Whether the whole content is here."""
        path = self.path(reference)
        return path.is_file() and path.stat().st_size == reference.size

    def put(self, content: bytes) -> BlobReference:
        """Store `content`."""
        reference = reference_to(content)
        if not self.has(reference):
            write_atomically(self.path(reference), content)
        return reference

    def read(self, reference: BlobReference) -> bytes:
        """Return the content, verified; what is read stays longest when room is made.

        Raises
        ------
        CorruptContent
            If it is missing or does not match its hash; a damaged file is removed so that it can be fetched again.
        """
        path = self.path(reference)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise CorruptContent(f"{path}: missing; fetch or export it again") from None
        if not _matches(content, reference):
            path.unlink(missing_ok=True)
            raise CorruptContent(f"{path}: does not match its hash; fetch or export it again")
        with contextlib.suppress(OSError):  # An artifact's folder may be read-only.
            os.utime(path)
        return content

    def missing_chunks(self, index: BlobIndex) -> list[str]:
        """Hashes of the chunks of `index` that are not here yet, each once, in order."""
        return [h for h in dict.fromkeys(index.chunks) if not (self._chunks / h).is_file()]

    def put_chunk(self, sha256: str, chunk: bytes) -> None:
        """Keep a chunk until its file is whole.

        Raises
        ------
        CorruptContent
            If `chunk` does not match `sha256`.
        """
        if sha256_of(chunk) != sha256:
            raise CorruptContent(f"chunk {sha256[:12]} does not match its hash")
        _write(self._chunks / sha256, chunk, flush=False)

    def assemble(self, index: BlobIndex) -> Path:
        """Join the chunks of `index` into its file, verify it and drop the chunks.

        Raises
        ------
        IncompleteContent
            If a chunk is missing or damaged; the good ones stay.
        CorruptContent
            If the chunks are as the index names them and still not its content; all of them go.
        """
        paths = [self._chunks / h for h in index.chunks]
        try:
            # Sizes first: an index that names one chunk a thousand times must not fill the memory.
            fits = sum(path.stat().st_size for path in paths) == index.size
            content = b"".join(path.read_bytes() for path in paths) if fits else b""
        except FileNotFoundError:
            raise IncompleteContent(f"content {index.sha256[:12]}: a chunk is missing") from None
        if not _matches(content, index):
            if self._drop_damaged(index):
                raise IncompleteContent(f"content {index.sha256[:12]}: a chunk was damaged on disk")
            self.drop_chunks(index)
            raise CorruptContent(f"content {index.sha256[:12]} does not match its hash")
        # Written before the chunks go, so that a full disk or a crash does not undo the transfer.
        write_atomically(self.path(index), content)
        self.drop_chunks(index)
        return self.path(index)

    def remove(self, reference: BlobReference) -> None:
        """Drop the content if it is here."""
        self.path(reference).unlink(missing_ok=True)

    def drop_chunks(self, index: BlobIndex) -> None:
        """Drop the chunks of content that is not wanted any more."""
        for h in set(index.chunks):
            (self._chunks / h).unlink(missing_ok=True)

    def unfinished_path(self, reference: BlobReference, what: str) -> Path:
        """Where something of content that is still on its way may be kept; it counts when room is made."""
        return self._folder / f"{reference.sha256}.{what}"

    def adopt(self, reference: BlobReference, path: Path) -> None:
        """Give a verified file of this folder its place."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        path.replace(self.path(reference))
        _flush_folder(self._folder)

    def make_room(self, quota: int, wanted: Iterable[BlobReference]) -> None:
        """Drop what was used longest ago, and not what is `wanted`, until that fits into `quota` bytes with the rest.

        Raises
        ------
        StorageExceeded
            If it does not fit even alone.
        """
        references = {reference.sha256: reference for reference in wanted}
        needed = sum(reference.size for reference in references.values())
        if needed > quota:
            raise StorageExceeded(
                f"{needed} bytes of storage are needed, this device's quota is {quota}; raise its --storage"
            )
        others = [path for path in self._folder.rglob("*") if path.is_file() and path.stem not in references]
        used = sum(path.stat().st_size for path in others)
        for path in sorted(others, key=lambda path: path.stat().st_mtime_ns):
            if used + needed <= quota:
                return
            used -= path.stat().st_size
            path.unlink()

    def _drop_damaged(self, index: BlobIndex) -> bool:
        """Drop the chunks that are not what their names say; whether there were any."""
        paths = [self._chunks / h for h in set(index.chunks)]
        damaged = [path for path in paths if sha256_of(path.read_bytes()) != path.name]
        for path in damaged:
            path.unlink()
        return bool(damaged)

    def clear(self) -> None:
        """Drop all content and chunks."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._chunks.mkdir(parents=True, exist_ok=True)
