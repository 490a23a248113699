"""Features of the frozen prefix, computed once for each sample and kept on flash, memory-mapped."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from frostline.device_runtime.engine import Runtime
from frostline.protocol.blobs import BlobStore
from frostline.protocol.manifest import Program, StageManifest
from frostline.protocol.tensors import Array


class FeatureCache:
    """The inputs of each stage for one device's samples.

    The features after a chain of frozen blocks are keyed by the hashes of the chain's programs and the samples'
    fingerprint, and computed from the longest shorter chain that is already here. Once a longer chain is whole the
    shorter ones are dropped: the frost line only moves deeper.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def features(
        self, x: Array, fingerprint: str, manifest: StageManifest, runtime: Runtime, store: BlobStore
    ) -> Array:
        """The stage's input for every row of `x` (samples, *sample_shape) float32.

        Returns
        -------
        numpy.ndarray
            (samples, *input_shape) float32; `x` itself when nothing is frozen yet, else a read-only memory map.
        """
        chain = [program.file.sha256 for program in manifest.prefix]
        if not chain:
            return x
        known = next(
            n for n in range(len(chain), -1, -1) if n == 0 or self._path(chain[:n], fingerprint).exists()
        )
        features = x if known == 0 else self._open(chain[:known], fingerprint)
        for count in range(known, len(chain)):
            features = self._extend(
                features, manifest.prefix[count], chain[: count + 1], fingerprint, runtime, store
            )
        for count in range(1, len(chain)):
            self._path(chain[:count], fingerprint).unlink(missing_ok=True)
        return features

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
        unfinished = path.with_suffix(".unfinished")
        mapped = np.lib.format.open_memmap(unfinished, "w+", np.float32, (len(features), *shape))
        for start in range(0, len(features), batch):
            rows = features[start : start + batch]
            # The program's batch is fixed; the last one is filled up with zeros.
            padded = np.zeros((batch, *features.shape[1:]), np.float32)
            padded[: len(rows)] = rows
            mapped[start : start + len(rows)] = session.run(padded)[: len(rows)]
        mapped.flush()
        del mapped
        unfinished.replace(path)
        return self._open(chain, fingerprint)

    def _open(self, chain: list[str], fingerprint: str) -> Array:
        mapped: Array = np.load(self._path(chain, fingerprint), mmap_mode="r", allow_pickle=False)
        return mapped

    def _path(self, chain: list[str], fingerprint: str) -> Path:
        key = hashlib.sha256(" ".join([fingerprint, *chain]).encode()).hexdigest()
        return self._folder / f"{key}.npy"
