from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["agent", "worker", "training"])
def test_importing_the_agent_loads_no_training_framework(module: str) -> None:
    program = (
        f"import sys, frostline.device_runtime.{module}\n"
        "print(sorted({'torch', 'executorch', 'onnxruntime', 'sklearn'} & sys.modules.keys()))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "[]\n", "")


@pytest.mark.parametrize(("engine", "needs_torch"), [("executorch", True), ("onnxruntime", False)])
def test_loading_an_engine_is_quiet(engine: str, needs_torch: bool) -> None:
    program = (
        "import sys; from frostline.device_runtime.engine import open_runtime\n"
        f"open_runtime({engine!r}); print(bool({{'torch', 'executorch'}} & sys.modules.keys()))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, f"{needs_torch}\n", "")


@pytest.mark.parametrize(
    "module",
    ["device_runtime.onnxruntime_engine", "exporter.onnxruntime_target", "device_runtime.onnx_memory"],
)
def test_onnxruntime_is_told_not_to_report_before_it_is_imported(module: str) -> None:
    program = (
        "import builtins, os, sys\n"
        "load = builtins.__import__\n"
        "def watched(name, *rest):\n"
        "    if name == 'onnxruntime' and name not in sys.modules:\n"
        "        print(os.environ.get('ORT_DISABLE_TELEMETRY'))\n"
        "    return load(name, *rest)\n"
        "builtins.__import__ = watched\n"
        f"import frostline.{module}\n"
        "import onnxruntime\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment
    )
    assert (finished.returncode, finished.stdout.split()[:1]) == (0, ["1"])
