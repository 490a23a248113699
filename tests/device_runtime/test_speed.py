from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from frostline.device_runtime import speed
from frostline.device_runtime.speed import measure_speed


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What other tests measured is of no use here, nor what these do elsewhere."""
    measure_speed.cache_clear()
    yield
    measure_speed.cache_clear()


def test_it_is_positive_and_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure_speed()
    assert 0.01 < first < 10_000
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **rest: pytest.fail("measured again"))
    assert measure_speed() == first


def test_it_is_that_of_one_thread_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], env: dict[str, str], **rest: Any) -> subprocess.CompletedProcess[bytes]:
        assert command == [sys.executable, "-m", "frostline.device_runtime.speed"]
        assert env["OMP_NUM_THREADS"] == env["OPENBLAS_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "1"
        assert rest["timeout"] > 0
        return subprocess.CompletedProcess(command, 0, b'{"gigaflops": 3.5}')

    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(subprocess, "run", run)
    assert measure_speed() == 3.5


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(1)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "print()",
        "print([1.0])",
        "print({})",
        "print('{\"gigaflops\": null}')",
        "print('{\"gigaflops\": NaN}')",
        "print('{\"gigaflops\": Infinity}')",
        "print('{\"gigaflops\": -1}')",
        "import sys; sys.stdout.buffer.write(bytes([255]))",
        "import time; time.sleep(60)",
    ],
)
def test_a_measurement_that_fails_gives_zero(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    run = subprocess.run
    monkeypatch.setattr(speed, "_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(
        subprocess, "run", lambda command, **rest: run([sys.executable, "-c", program], **rest)
    )
    assert measure_speed() == 0.0


@pytest.mark.parametrize("executable", [None, "", "/nowhere/python"])
def test_without_an_interpreter_to_start_it_is_not_known(
    monkeypatch: pytest.MonkeyPatch, executable: str | None
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    assert measure_speed() == 0.0
