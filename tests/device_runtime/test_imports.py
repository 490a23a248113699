from __future__ import annotations

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
