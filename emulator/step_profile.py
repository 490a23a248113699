"""How long training takes on this machine: the unit that simulated time is counted in.

Every program is timed once, in the runtime that devices use, and the figure kept in a file: runs that share the file
count time alike, whatever else the machine was doing.
"""

from __future__ import annotations

import fcntl
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from frostline.device_runtime.engine import open_runtime
from frostline.protocol.blobs import BlobStore
from frostline.protocol.manifest import Program, StageManifest, TensorSpec
from frostline.protocol.tensors import Array

TIMED_CALLS = 11


class StepProfile:
    """Seconds a step of each stage, and a batch of each frozen block, takes on this machine with one thread.

    Parameters
    ----------
    path : Path
        The file of known figures, a JSON object; several processes may share it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, float] = {}

    def step_seconds(self, manifest: StageManifest, store: BlobStore) -> float:
        """The median of a few training steps on random values; the programs are in `store`."""
        shapes = [list(spec.shape) for spec in manifest.trained]
        seen = list(manifest.evaluation.inputs[-1].shape)
        key = _key(
            manifest.engine, manifest.variant, manifest.name, manifest.batch, manifest.stages, seen, shapes
        )
        return self._look_up(key, lambda: _time_step(manifest, store))

    def block_seconds(self, program: Program, manifest: StageManifest, store: BlobStore) -> float:
        """The same of one batch through a frozen block."""
        shapes = [list(spec.shape) for spec in (*program.inputs, *program.outputs)]
        key = _key(manifest.engine, "frozen", shapes)
        return self._look_up(key, lambda: _time_block(program, manifest, store))

    def _look_up(self, key: str, measure: Callable[[], float]) -> float:
        if key not in self._known:
            with self._path.open("a+", encoding="utf-8") as file:
                # Whoever measures first decides for all.
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                self._known = json.loads(file.read() or "{}")
                if key not in self._known:
                    self._known[key] = measure()
                    file.seek(0)
                    file.truncate()
                    file.write(json.dumps(self._known, indent=1, sort_keys=True) + "\n")
        return self._known[key]


def _key(*parts: object) -> str:
    return json.dumps(parts)


def _time_step(manifest: StageManifest, store: BlobStore) -> float:
    session = open_runtime(manifest.engine).open_stage(manifest, store)
    random = np.random.default_rng(0)
    session.load({spec.name: _small(spec, random) for spec in manifest.trained}, 0)
    x = _input(manifest.evaluation.inputs[-1], random)
    y = random.integers(0, manifest.classes, manifest.micro_batch)

    def step() -> None:
        session.step(((x, y) for _ in range(manifest.micro_batches)), 1e-6)

    return _median_seconds(step)


def _time_block(program: Program, manifest: StageManifest, store: BlobStore) -> float:
    session = open_runtime(manifest.engine).open_prefix(program, store)
    x = _input(program.inputs[0], np.random.default_rng(0))
    return _median_seconds(lambda: session.run(x))


def _small(spec: TensorSpec, random: np.random.Generator) -> Array:
    return (0.01 * random.standard_normal(spec.shape)).astype(np.float32)


def _input(spec: TensorSpec, random: np.random.Generator) -> Array:
    if spec.dtype == "int64":
        return random.integers(0, spec.vocabulary or 1, spec.shape)
    return random.standard_normal(spec.shape).astype(np.float32)


def _median_seconds(call: Callable[[], object]) -> float:
    call()
    taken = []
    for _ in range(TIMED_CALLS):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
