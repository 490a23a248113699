"""Trains a stage with ONNX Runtime, once over the samples; prints the machine, speed and memory as JSON.

    python train.py ARTIFACT SAMPLES RATE RESULT

It needs the base install only, so that any board runs it, or an emulator of one. RESULT is a safetensors file: the trained
tensors, and the loss before each step.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import psutil

from frostline.datasets.load import load_samples
from frostline.device_runtime.engine import open_runtime
from frostline.device_runtime.feature_cache import FeatureCache
from frostline.protocol.artifact import read_artifact
from frostline.protocol.tensors import decode_tensors, encode_tensors


def main(artifact: Path, data: str, rate: float, result: Path) -> dict[str, str | float]:
    """Train and write what came of it."""
    started = time.time()
    manifest, store = read_artifact(artifact)
    samples = load_samples(data, "train")
    runtime = open_runtime("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder))
        features = cache.features(samples.x, samples.fingerprint(), manifest, runtime, store)
        session = runtime.open_stage(manifest, store)
        weights = (artifact / "weights.safetensors").read_bytes()
        session.load(decode_tensors(weights, manifest.trained, "weights"))
        losses, ended = [], []
        for start in range(0, len(samples) - manifest.batch + 1, manifest.batch):
            rows = np.split(np.arange(start, start + manifest.batch), manifest.micro_batches)
            loss, _ = session.step(
                [(np.ascontiguousarray(features[part]), samples.y[part]) for part in rows], rate
            )
            losses.append(loss)
            ended.append(time.time())
    result.write_bytes(encode_tensors({**session.trained(), "losses": np.array(losses)}))
    return {
        "machine": platform.machine(),
        "onnxruntime": onnxruntime.__version__,
        "steps": len(losses),
        "start_seconds": started - psutil.Process().create_time(),
        "first_step_seconds": ended[0] - started,
        "steps_per_second": (len(ended) - 1) / (ended[-1] - ended[0]),
        "peak_resident_bytes": _peak_resident_bytes(),
    }


def _peak_resident_bytes() -> int:
    # What getrusage tells may be the parent's peak: it outlives exec.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    _, artifact, data, rate, result = sys.argv
    sys.stdout.write(json.dumps(main(Path(artifact), data, float(rate), Path(result))))
