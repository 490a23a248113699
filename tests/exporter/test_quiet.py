from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from frostline.exporter.executorch_lowering import lower_portable, quiet


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _speak_everywhere() -> None:
    os.write(2, b"descriptor ")
    _write("stream ")
    warnings.warn("warning", UserWarning, stacklevel=1)
    logging.getLogger("library").warning("record")


def test_nothing_is_heard_from_inside(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet():
        with quiet():
            _speak_everywhere()
        _speak_everywhere()
    os.write(2, b"after ")
    _write("all")
    assert capfd.readouterr().err == "after all"


def test_other_threads_are_heard(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet():
        thread = threading.Thread(target=_write, args=("progress",))
        thread.start()
        thread.join()
        assert capfd.readouterr().err == "progress"


def test_one_thread_leaving_does_not_unmute_another(capfd: pytest.CaptureFixture[str]) -> None:
    entered, may_leave = threading.Event(), threading.Event()

    def stay() -> None:
        with quiet():
            entered.set()
            may_leave.wait(10)
            os.write(2, b"still inside")

    thread = threading.Thread(target=stay)
    with quiet():
        thread.start()
        assert entered.wait(10)
    may_leave.set()
    thread.join()
    os.write(2, b"after")
    assert capfd.readouterr().err == "after"


def test_exceptions_pass_and_restore_everything(capfd: pytest.CaptureFixture[str]) -> None:
    before = (sys.stderr, logging.root.manager.disable, len(list(Path("/dev/fd").iterdir())))
    with pytest.raises(ValueError, match="mine"), quiet():
        raise ValueError("mine")
    assert (sys.stderr, logging.root.manager.disable, len(list(Path("/dev/fd").iterdir()))) == before
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_lowering_fails_loudly_and_collects_garbage_again() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError("cannot be traced")

    with pytest.raises(ArithmeticError, match="cannot be traced"):
        lower_portable(Broken(), [torch.zeros(1)])
    assert gc.isenabled()
