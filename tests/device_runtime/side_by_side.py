"""Trains one stage with every engine, 100 steps of the same batches; prints how far their tensors end up apart, as JSON.

Run by test_engines.py in a process of its own, whose onnxruntime is that of onnxruntime-training.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from frostline.device_runtime.engine import ENGINES, open_runtime
from frostline.exporter.artifact import ExportOptions, arrays, compile_stage
from frostline.exporter.cutting import cut
from frostline.exporter.models.lookup import build_model
from frostline.exporter.optimizer import SGD
from frostline.exporter.stage import build_stage, statistics_tensors, trainable_tensors
from frostline.exporter.targets import target_of
from frostline.protocol.artifact import read_artifact, write_artifact
from frostline.protocol.messages import Engine
from frostline.protocol.tensors import Array

BATCH, CLASSES, STEPS, RATE = 8, 5, 100, 0.05


def trained(engine: Engine) -> tuple[dict[str, Array], float, int]:
    """The tensors after the last step, its loss, and how many operations a step is said to take."""
    spec = build_model("resnet10", {"width": 8, "input_size": 8}, None, CLASSES, seed=0)
    stage = build_stage(cut(spec.module, 2, spec.example(2)), 1, seed=0)
    weights = arrays({**trainable_tensors(stage), **statistics_tensors(stage)})
    compiled = compile_stage(stage, ExportOptions(BATCH, CLASSES, SGD(), target_of(engine)))
    with tempfile.TemporaryDirectory() as folder:
        write_artifact(Path(folder), compiled.manifest, compiled.files, weights)
        manifest, store = read_artifact(Path(folder))
        session = open_runtime(engine).open_stage(manifest, store)
        session.load(weights)
        random = np.random.default_rng(0)
        loss = 0.0
        for _ in range(STEPS):
            x = random.standard_normal((BATCH, *stage.input_shape), dtype=np.float32)
            loss, _ = session.step([(x, random.integers(0, CLASSES, BATCH))], RATE)
        tensors = {name: np.array(value) for name, value in session.trained().items()}
        return tensors, loss, manifest.flops


def main() -> dict[str, dict[str, float]]:
    """For each engine but the first, its largest relative distances from the first."""
    torch.set_num_threads(1)
    (want, want_loss, want_flops), *others = (trained(engine) for engine in ENGINES)
    return {
        engine: {
            "tensors": max(
                float(np.linalg.norm(value - want[name]) / np.linalg.norm(want[name]))
                for name, value in tensors.items()
            ),
            "loss": abs(loss - want_loss) / want_loss,
            "flops": abs(flops - want_flops) / want_flops,
        }
        for engine, (tensors, loss, flops) in zip(ENGINES[1:], others, strict=True)
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main()))
