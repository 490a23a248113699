"""How fast this device computes: a small training step, timed in a process of its own.

    python -m frostline.device_runtime.speed

prints, as JSON, what one thread does in 10^9 floating-point operations a second. An agent that waits is to stay small, and
whoever imports NumPy has as many threads as the machine has cores; so it is not measured where the agent runs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from functools import cache

import numpy as np

from frostline.protocol.tensors import Array

FASTEST = 10**7
"""No device does more, in 10^9 operations a second."""

_BATCH, _WIDTH = 64, 512
_SECONDS = 0.2
_STEPS = 5
"""Steps are timed for at least that many seconds, and at least so many of them, after as many that are not."""
_TIMEOUT_SECONDS = 60.0
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@cache
def measure_speed() -> float:
    """What one thread of this device does, in 10^9 operations a second; 0 where it cannot be measured.

    Measured once a process, which takes about half a second on a desktop.
    """
    command = [sys.executable, "-m", "frostline.device_runtime.speed"]
    environment = {**os.environ, **dict.fromkeys(_THREADS, "1")}
    try:
        measured = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_SECONDS,
            check=True,
        )
        speed = float(json.loads(measured.stdout)["gigaflops"])
    # Whatever is wrong with it, a device trains all the same.
    except (OSError, subprocess.SubprocessError, ValueError, TypeError, KeyError):
        return 0.0
    return speed if 0 < speed <= FASTEST else 0.0


def training_speed() -> float:
    """Median over training steps of a dense layer with ReLU, in 10^9 operations a second; products only are counted."""
    random = np.random.default_rng(0)
    x, gradient = (random.standard_normal((_BATCH, _WIDTH), dtype=np.float32) for _ in range(2))
    weights = random.standard_normal((_WIDTH, _WIDTH), dtype=np.float32) / np.float32(_WIDTH**0.5)
    durations: list[float] = []
    while len(durations) < 2 * _STEPS or sum(durations[_STEPS:]) < _SECONDS:
        started = time.perf_counter()
        _step(x, weights, gradient)
        durations.append(time.perf_counter() - started)
    operations = 3 * 2 * _BATCH * _WIDTH**2
    return operations / statistics.median(durations[_STEPS:]) / 10**9


def _step(x: Array, weights: Array, gradient: Array) -> Array:
    """Update the weights (inputs, outputs) in place, by the gradient of what the layer makes of `x`; that of `x`."""
    before = gradient * (x @ weights > 0)
    of_input: Array = before @ weights.T
    weights -= np.float32(1e-6) * (x.T @ before)
    return of_input


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"gigaflops": training_speed()}))
