"""Arrays the server keeps for itself between restarts, as content-addressed tensor files."""

from __future__ import annotations

from collections.abc import Mapping

import safetensors.numpy

from frostline.protocol.blobs import BlobStore
from frostline.protocol.messages import BlobReference
from frostline.protocol.tensors import Array, encode_tensors


def store_arrays(store: BlobStore, arrays: Mapping[str, Array]) -> BlobReference:
    """Write arrays; equal arrays give the same reference."""
    return store.put(encode_tensors(arrays))


def read_arrays(store: BlobStore, reference: BlobReference) -> dict[str, Array]:
    """Read arrays back.

    Raises
    ------
    CorruptContent
        If the file is missing or damaged.
    """
    arrays: dict[str, Array] = safetensors.numpy.load(store.read(reference))
    return arrays
