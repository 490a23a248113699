"""Training artifacts on disk: a manifest, the content-addressed files it names, and the first weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from frostline.protocol.blobs import BlobStore, write_atomically
from frostline.protocol.errors import UsageError
from frostline.protocol.manifest import StageManifest, decode_manifest
from frostline.protocol.tensors import Array, encode_tensors


def write_artifact(
    folder: Path, manifest: StageManifest, files: Mapping[str, bytes], weights: Mapping[str, Array]
) -> None:
    """Write `manifest.json`, `weights.safetensors` and `files/<sha256>` below `folder`.

    The manifest is written last: a folder without one is unfinished.
    """
    store = BlobStore(folder / "files")
    for content in files.values():
        store.put(content)
    write_atomically(folder / "weights.safetensors", encode_tensors(weights))
    write_atomically(folder / "manifest.json", manifest.encode())


def read_artifact(folder: Path) -> tuple[StageManifest, BlobStore]:
    """Open an artifact and verify every file it names.

    Raises
    ------
    UsageError
        If there is no artifact.
    CorruptContent
        If the manifest or a file is damaged.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise UsageError(f"{folder}: no artifact here: manifest.json is missing")
    manifest = decode_manifest(path.read_bytes(), str(path))
    store = BlobStore(folder / "files")
    for reference in manifest.files:
        store.read(reference)
    return manifest, store
