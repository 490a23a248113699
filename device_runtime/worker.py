"""Worker processes that train, so that neither a long step nor a crash of the runtime reaches the network."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

from frostline.device_runtime.training import TrainingTask, train
from frostline.protocol.errors import RunError
from frostline.protocol.messages import TrainingMetrics


class Workers:
    """A pool of training processes, shared by every agent of this process and restarted when one dies."""

    def __init__(self, count: int = 1) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    async def train(self, task: TrainingTask) -> TrainingMetrics:
        """Train `task` in a worker process.

        Raises
        ------
        RunError
            If the process died, as it does when the system runs out of memory.
        FrostlineError
            Whatever `train` raised.
        """
        pool = self._pool
        if pool is None:
            context = multiprocessing.get_context("spawn")
            pool = self._pool = ProcessPoolExecutor(self._count, context, initializer=prepare_worker)
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, train, task)
        except asyncio.CancelledError:
            # With one worker the next lease would wait behind work that nobody wants any more.
            if self._count == 1:
                self._end()
            raise
        except BrokenProcessPool:
            if self._pool is pool:
                self._pool = None
                pool.shutdown(wait=False)
            raise RunError("the training process died, as when memory runs out") from None

    def _end(self) -> None:
        if self._pool is not None:
            kill_workers(self._pool)
            self._pool = None


def kill_workers(pool: ProcessPoolExecutor) -> None:
    """End a pool at once, whatever its processes are at."""
    for process in list((pool._processes or {}).values()):
        process.kill()
    # Not waited for: before Python 3.12 the pool can wait for ever for a worker that died.
    pool.shutdown(wait=False, cancel_futures=True)


def prepare_worker() -> None:
    """Make a new process one that computes on one thread, and ends when its parent does."""
    os.environ["OMP_NUM_THREADS"] = "1"
    # A terminal sends its interrupt to every process; the agent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Whoever is killed must not leave workers behind, training for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
