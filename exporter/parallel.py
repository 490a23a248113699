"""Several things at a time, each in a copy of this process: a cut model is no data that could be sent to another."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from frostline.protocol.errors import RunError

T = TypeVar("T")


def in_parallel(
    tasks: Sequence[Callable[[], T]], done: Callable[[int], None], workers: int | None = None
) -> list[T]:
    """What each task returns, in their order; several run at a time where the platform can copy a process.

    Parameters
    ----------
    tasks
        They change nothing that others see. What they return, or raise, is sent back.
    done
        Called with a task's number when it has returned.
    workers
        At a time; by default the cores this process may use.

    Raises
    ------
    RunError
        If a process died, as when memory runs out.
    Exception
        Whatever the first of the tasks, in their order, that failed raised.
    """
    # Elsewhere a copy of a process that has loaded libraries is not safe to use, or cannot be made.
    if sys.platform != "linux":
        return _one_by_one(tasks, done)
    count = min(workers or len(os.sched_getaffinity(0)), len(tasks))
    if count < 2:
        return _one_by_one(tasks, done)
    with ProcessPoolExecutor(
        count, multiprocessing.get_context("fork"), initializer=_inherit, initargs=(tasks,)
    ) as pool:
        numbers: dict[Future[T], int] = {pool.submit(_run, number): number for number in range(len(tasks))}
        for future in as_completed(numbers):
            if future.exception() is not None:
                # They begin in their order: what comes before one that failed is done or will be.
                pool.shutdown(wait=True, cancel_futures=True)
                break
            done(numbers[future])
        try:
            return [future.result() for future in numbers]
        except BrokenProcessPool:
            raise RunError("a compiler's process died, as when memory runs out") from None


def _one_by_one(tasks: Sequence[Callable[[], T]], done: Callable[[int], None]) -> list[T]:
    results = []
    for number, task in enumerate(tasks):
        results.append(task())
        done(number)
    return results


_inherited: Sequence[Callable[[], Any]] = ()


def _inherit(tasks: Sequence[Callable[[], Any]]) -> None:
    import torch

    global _inherited
    _inherited = tasks
    # The threads that PyTorch may have begun are not there in a copy.
    torch.set_num_threads(1)


def _run(number: int) -> Any:
    return _inherited[number]()
