"""Prints by how many bytes a process grows that trains an artifact as a device does.

    python -m frostline.device_runtime.artifact_memory ARTIFACT ...

The artifacts before the last one load what any training loads, the runtime's own code among it; only the last one counts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from frostline.device_runtime.engine import open_runtime
from frostline.device_runtime.resident_memory import peak_growth
from frostline.protocol.artifact import read_artifact
from frostline.protocol.tensors import Array, decode_tensors

STEPS = 3
LEARNING_RATE = 1e-4


def training_growth(folder: Path) -> int:
    """Bytes by which the process grows while it opens an artifact and trains it on zeros for some steps."""
    manifest, store = read_artifact(folder)
    runtime = open_runtime(manifest.engine)
    weights = decode_tensors((folder / "weights.safetensors").read_bytes(), manifest.trained, "weights")
    x = manifest.evaluation.inputs[-1]

    def train() -> None:
        session = runtime.open_stage(manifest, store)
        session.load(weights)
        for _ in range(STEPS):
            session.step(batch(), LEARNING_RATE)

    def batch() -> Iterator[tuple[Array, Array]]:
        for _ in range(manifest.micro_batches):
            yield np.zeros(x.shape, x.dtype), np.zeros(x.shape[0], np.int64)

    return peak_growth(train)


if __name__ == "__main__":
    sys.stdout.write(str([training_growth(Path(folder)) for folder in sys.argv[1:]][-1]))
