from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from frostline.exporter.parallel import in_parallel
from frostline.protocol.errors import RunError, UsageError


def _task(number: int) -> Callable[[], tuple[int, int]]:
    # A closure over something that cannot be pickled.
    lock = threading.Lock()

    def run() -> tuple[int, int]:
        with lock:
            return number * number, os.getpid()

    return run


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_results_come_in_order(workers: int) -> None:
    done: list[int] = []
    results = in_parallel([_task(number) for number in range(5)], done.append, workers)
    assert [result for result, _ in results] == [0, 1, 4, 9, 16]
    assert sorted(done) == [0, 1, 2, 3, 4]
    assert ({pid for _, pid in results} == {os.getpid()}) == (workers == 1)


def _failing_late() -> int:
    time.sleep(0.3)
    raise UsageError("stage 'one' cannot be compiled")


def _failing() -> int:
    raise UsageError("stage 'two' cannot be compiled")


@pytest.mark.parametrize("workers", [1, 2])
def test_what_the_first_task_raises_is_raised(workers: int) -> None:
    with pytest.raises(UsageError, match="stage 'one' cannot be compiled"):
        in_parallel([_failing_late, _failing, _failing], lambda number: None, workers)


def _dying() -> int:
    os._exit(9)


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(RunError, match="process died"):
        in_parallel([_dying, _dying], lambda number: None, 2)
