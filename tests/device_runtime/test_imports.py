from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["agent", "worker", "training"])
def test_importing_the_agent_loads_no_training_framework(module: str) -> None:
    program = (
        f"import sys, frostline.device_runtime.{module}\n"
        "print(sorted({'torch', 'executorch', 'sklearn'} & sys.modules.keys()))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "[]\n", "")


def test_loading_the_engine_is_quiet() -> None:
    program = "import frostline.device_runtime.executorch_engine, sys; print('torch' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "True\n", "")
