"""Features of the frozen prefix, computed once for each sample and kept on flash, memory-mapped."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from frostline.device_runtime.engine import Runtime
from frostline.protocol.blobs import BlobStore
from frostline.protocol.manifest import Program, StageManifest
from frostline.protocol.tensors import Array


class FeatureCache:
    """The inputs of each stage for one device's samples.

    The features after a chain of frozen blocks are keyed by the hashes of the chain's programs and the samples'
    fingerprint, and computed from the longest shorter chain that is already here. Once a chain is whole all others
    are dropped: the frost line only moves deeper, and samples that changed do not change back.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def features(
        self, x: Array, fingerprint: str, manifest: StageManifest, runtime: Runtime, store: BlobStore
    ) -> Array:
        """The stage's input for every row of `x` (samples, *sample_shape), in the dtype the model takes.

        Returns
        -------
        numpy.ndarray
            (samples, *input_shape) float32; `x` itself when nothing is frozen yet, else a read-only memory map.
        """
        chain = [program.file.sha256 for program in manifest.prefix]
        if not chain:
            return x
        known, features = self._longest(x, manifest.prefix, chain, fingerprint)
        for count in range(known, len(chain)):
            features = self._extend(
                features, manifest.prefix[count], chain[: count + 1], fingerprint, runtime, store
            )
        kept = self._path(chain, fingerprint)
        for path in self._folder.iterdir():
            if path != kept:
                path.unlink(missing_ok=True)
        return features

    def _longest(
        self, x: Array, prefix: list[Program], chain: list[str], fingerprint: str
    ) -> tuple[int, Array]:
        """How much of the chain is here already, and the features after it."""
        for count in range(len(chain), 0, -1):
            path = self._path(chain[:count], fingerprint)
            shape = (len(x), *prefix[count - 1].outputs[0].shape[1:])
            try:
                features = self._open(path)
            except FileNotFoundError:
                continue
            except (ValueError, EOFError):
                features = None
            if features is not None and features.shape == shape and features.dtype == np.float32:
                return count, features
            # Damaged by the file system; computing it again is all it takes.
            path.unlink()
        return 0, x

    def _extend(
        self,
        features: Array,
        program: Program,
        chain: list[str],
        fingerprint: str,
        runtime: Runtime,
        store: BlobStore,
    ) -> Array:
        """Run one more frozen block over all samples into a new file."""
        session = runtime.open_prefix(program, store)
        batch, *shape = program.outputs[0].shape
        path = self._path(chain, fingerprint)
        # A worker whose lease ran out may still be writing the same features: each process has its own file.
        unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
        mapped = np.lib.format.open_memmap(unfinished, "w+", np.float32, (len(features), *shape))
        for start in range(0, len(features), batch):
            rows = features[start : start + batch]
            # The program's batch is fixed; the last one is filled up with zeros.
            padded = np.zeros((batch, *features.shape[1:]), features.dtype)
            padded[: len(rows)] = rows
            mapped[start : start + len(rows)] = session.run(padded)[: len(rows)]
        mapped.flush()
        del mapped
        unfinished.replace(path)
        return self._open(path)

    @staticmethod
    def _open(path: Path) -> Array:
        mapped: Array = np.load(path, mmap_mode="r", allow_pickle=False)
        return mapped

    def _path(self, chain: list[str], fingerprint: str) -> Path:
        key = hashlib.sha256(" ".join([fingerprint, *chain]).encode()).hexdigest()
        return self._folder / f"{key}.npy"
