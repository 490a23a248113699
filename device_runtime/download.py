"""Content on its way to a device: one file that fills up in any order, and goes on after a restart.

Each byte is written to flash once and hashed once: chunks go to their places in the file that is renamed when it is whole.
Beside it stands a list of the chunks that are there. What a crash, a power cut or a bad message damaged is found by the hash of
the whole, and only then looked for chunk by chunk; what comes in its place is checked as it comes, since a broker that holds a
damaged chunk would give it again.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict

from frostline.protocol.blobs import BlobStore, chunk_length, sha256_of
from frostline.protocol.errors import CorruptContent, IncompleteContent
from frostline.protocol.messages import BlobIndex

_POSITION_BYTES = 4


class Download:
    """The chunks of one content that have come so far.

    Parameters
    ----------
    store : BlobStore
        Where the content will be, and where it grows.
    index : BlobIndex
        Its chunks; as long as the whole was not checked, only what someone says of it.
    """

    def __init__(self, store: BlobStore, index: BlobIndex) -> None:
        self._store = store
        self._index = index
        self._positions: dict[str, list[int]] = defaultdict(list)
        for position, sha256 in enumerate(index.chunks):
            self._positions[sha256].append(position)
        self._content = store.unfinished_path(index, "content")
        self._list = store.unfinished_path(index, f"{index.chunk_size}.chunks")
        self._here = self._read_list() if self._content.is_file() else set()
        if not self._here:
            self._list.unlink(missing_ok=True)
        self._checks_chunks = False

    def missing(self) -> list[str]:
        """Hashes of the chunks that have not come, each once, in order."""
        return [h for h, positions in self._positions.items() if not self._here.issuperset(positions)]

    def put(self, sha256: str, chunk: bytes) -> bool:
        """Write a chunk to its place; False if it is not what it should be.

        Raises
        ------
        OSError
            If it cannot be written; it counts as missing.
        """
        positions = self._positions[sha256]
        if any(len(chunk) != chunk_length(self._index, position) for position in positions):
            return False
        if self._checks_chunks and sha256_of(chunk) != sha256:
            return False
        descriptor = os.open(self._content, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            for position in positions:
                _write_at(descriptor, chunk, position * self._index.chunk_size)
        finally:
            os.close(descriptor)
        with self._list.open("ab") as file:
            for position in positions:
                file.write(position.to_bytes(_POSITION_BYTES, "big"))
        self._here.update(positions)
        return True

    def finish(self) -> None:
        """Check the whole and give it its place in the store.

        Raises
        ------
        IncompleteContent
            If chunks are missing or not what their names say; the good ones stay.
        CorruptContent
            If all chunks are as the index names them and still not its content; nothing stays.
        """
        if self.missing():
            raise IncompleteContent(f"content {self._index.sha256[:12]}: chunks are missing")
        # A file system that lost its last writes may have left it shorter, or an index that lied, longer.
        os.truncate(self._content, self._index.size)
        with self._content.open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == self._index.sha256
        if whole:
            self._store.adopt(self._index, self._content)
        elif self._forget_damaged():
            raise IncompleteContent(f"content {self._index.sha256[:12]}: chunks were damaged")
        else:
            self._content.unlink()
        self._list.unlink(missing_ok=True)
        if not whole:
            raise CorruptContent(f"content {self._index.sha256[:12]} does not match its hash")

    def _forget_damaged(self) -> bool:
        """Take off the list what is not what its name says; whether there was any."""
        self._checks_chunks = True
        with self._content.open("r+b") as file:
            for position, sha256 in enumerate(self._index.chunks):
                file.seek(position * self._index.chunk_size)
                if sha256_of(file.read(chunk_length(self._index, position))) != sha256:
                    self._here.discard(position)
        self._list.write_bytes(b"".join(p.to_bytes(_POSITION_BYTES, "big") for p in sorted(self._here)))
        return len(self._here) < len(self._index.chunks)

    def _read_list(self) -> set[int]:
        try:
            listed = self._list.read_bytes()
        except FileNotFoundError:
            return set()
        whole = len(listed) - len(listed) % _POSITION_BYTES
        positions = {
            int.from_bytes(listed[i : i + _POSITION_BYTES], "big") for i in range(0, whole, _POSITION_BYTES)
        }
        return {position for position in positions if position < len(self._index.chunks)}


def _write_at(descriptor: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
