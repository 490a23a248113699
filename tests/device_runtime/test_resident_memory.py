"""Planned memory is what a device is admitted by; here it is held against what the system counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from frostline.exporter.artifact import ExportOptions, arrays, compile_stage
from frostline.exporter.cutting import cut
from frostline.exporter.executorch_target import EXECUTORCH
from frostline.exporter.models.lookup import build_model
from frostline.exporter.onnxruntime_target import ONNXRUNTIME
from frostline.exporter.optimizer import SGD
from frostline.exporter.stage import build_stage, statistics_tensors, trainable_tensors
from frostline.exporter.target import Target
from frostline.exporter.variant import WHOLE, Variant
from frostline.protocol.artifact import write_artifact

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

LARGE = 32_000_000
SHARE, FLOOR = 0.05, 8_000_000
"""By how much the growth may exceed the plan: a share of it, and what a process needs besides."""


def test_growth_is_the_highest_not_the_last() -> None:
    # In a process of its own: what other tests have left behind may be given back meanwhile.
    program = (
        "from frostline.device_runtime.resident_memory import peak_growth\n"
        "print(peak_growth(lambda: len(bytearray(60_000_000))), peak_growth(lambda: None))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    high, none = map(int, finished.stdout.split())
    assert 55_000_000 < high < 70_000_000
    assert none < 5_000_000


def write_stage(folder: Path, model: str, index: int, batch: int, variant: Variant, target: Target) -> int:
    """Compile a stage; returns its planned bytes."""
    spec = build_model(model, {}, None, 10)
    assert spec.default_blocks is not None
    parts = cut(spec.module, list(spec.default_blocks), spec.example(2))
    stage = build_stage(parts, index, 0)
    compiled = compile_stage(stage, ExportOptions(batch, 10, SGD(momentum=0.9), target), variant=variant)
    weights = arrays({**trainable_tensors(stage), **statistics_tensors(stage)})
    write_artifact(folder, compiled.manifest, compiled.files, weights)
    return compiled.manifest.planned.total


@pytest.mark.parametrize(
    ("index", "batch", "variant", "target"),
    [(0, 16, WHOLE, EXECUTORCH), (3, 16, Variant(2), EXECUTORCH), (0, 16, Variant(2), ONNXRUNTIME)],
    ids=["mostly activations", "mostly state, in micro-batches", "measured beforehand"],
)
def test_a_process_grows_by_the_planned_bytes(
    tmp_path: Path, index: int, batch: int, variant: Variant, target: Target
) -> None:
    write_stage(tmp_path / "small", "small_cnn", 0, 4, WHOLE, target)
    planned = write_stage(tmp_path / "large", "resnet10", index, batch, variant, target)
    assert planned > LARGE
    program = "frostline.device_runtime.artifact_memory"
    command = [sys.executable, "-m", program, str(tmp_path / "small"), str(tmp_path / "large")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    growth = int(finished.stdout)
    assert 0.7 * planned < growth <= (1 + SHARE) * planned + FLOOR
