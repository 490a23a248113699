"""The base install on arm64: the same stage trained there, under emulation, and on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from frostline.datasets.folder import save_samples
from frostline.datasets.load import load_samples
from frostline.protocol.tensors import Array
from tests.end_to_end.conftest import run_command

ROOT = os.environ.get("FROSTLINE_AARCH64_ROOT")
TRAIN = Path(__file__).with_name("train.py")
BATCH, STEPS, RATE = 16, 50, 0.05

pytestmark = pytest.mark.skipif(
    not ROOT, reason="FROSTLINE_AARCH64_ROOT names no arm64 userland: make aarch64"
)


def run(python: list[str], *arguments: str | Path) -> str:
    """What a Python program prints."""
    command = [*python, *map(str, arguments)]
    # From 1.29 on ONNX Runtime reports to its makers unless it is told not to.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def arm64() -> list[str]:
    """The userland's Python, on a core as that of a Raspberry Pi 4."""
    root = Path(str(ROOT)).resolve()
    emulator = ["qemu-aarch64-static", "-cpu", "cortex-a72", "-L", str(root)]
    return [*emulator, "-E", f"PYTHONPATH={root / 'site'}", str(root / "usr/bin/python3.11")]


def trained(
    python: list[str], artifact: Path, data: Path, result: Path
) -> tuple[dict[str, Any], dict[str, Array]]:
    """What train.py prints, and the tensors it ends with."""
    figures = json.loads(run(python, TRAIN, artifact, data, str(RATE), result))
    sys.stdout.write(f"{json.dumps(figures)}\n")
    return figures, safetensors.numpy.load_file(result)


def distance(got: Array, want: Array) -> float:
    """How far apart, in proportion to the size."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_arm64_trains_as_this_machine_does(arm64: list[str], tmp_path: Path) -> None:
    artifacts, data = tmp_path / "artifacts", tmp_path / "data"
    model = ["--model", "resnet10", "-O", "width=16", "--input-shape", "1,8,8", "--classes", "10"]
    size = ["--blocks", "2", "--batch", str(BATCH)]
    exported = run_command("export", *model, *size, "--engine", "onnxruntime", "--out", artifacts)
    assert exported.returncode == 0, exported.stderr
    data.mkdir()
    save_samples(load_samples("digits", "train").take(np.arange(BATCH * STEPS)), data / "samples.safetensors")

    # The second stage: a frozen block runs before it.
    stage = artifacts / "stage-2"
    there, got = trained(arm64, stage, data, tmp_path / "there.safetensors")
    _, want = trained([sys.executable], stage, data, tmp_path / "here.safetensors")
    apart = {name: distance(got[name], value) for name, value in want.items()}
    sys.stdout.write(f"apart by at most {max(apart.values()):.1e}\n")
    assert there["machine"] == "aarch64" and there["steps"] == STEPS
    assert got.keys() == want.keys()
    assert max(apart.values()) < 1e-4, apart
    assert got["losses"][-5:].mean() < 0.5 * got["losses"][:5].mean()


def test_the_agent_is_there_on_arm64(arm64: list[str]) -> None:
    agent = "import frostline.device_runtime.agent, frostline.device_runtime.worker"
    offered = "from frostline.device_runtime.engine import available_engines as engines; print(*engines())"
    assert run(arm64, "-c", f"{agent}; {offered}") == "onnxruntime\n"
    assert "--engine" in run(arm64, "-m", "frostline.cli.main", "device", "--help")
