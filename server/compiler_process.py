"""The process that a server compiles in. Imports nothing heavy, so that it starts while the server still does."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from frostline.device_runtime.engine import open_runtime
from frostline.device_runtime.worker import kill_workers, prepare_worker
from frostline.protocol.errors import RunError, UsageError
from frostline.protocol.messages import Engine


class CompilerProcess:
    """One process, started at once, that does one thing after another; begun anew when it dies.

    A context manager: the process ends with the `with` block, whatever it is at. Callers wait in threads of their own.

    Parameters
    ----------
    engine : Engine
        The one that it is to compile for first.
    """

    def __init__(self, engine: Engine) -> None:
        self._one_at_a_time = threading.Lock()
        self._closed = False
        self._pool: ProcessPoolExecutor | None = None
        self.begin(_import_compiler, engine)

    def __enter__(self) -> CompilerProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def begin(self, function: Callable[..., object], *arguments: object) -> None:
        """Have a function called in the process, whatever comes of it."""
        self._submit(function, *arguments)

    def call(self, function: Callable[..., object], *arguments: object) -> Any:
        """What a function returns in the process.

        Raises
        ------
        RunError
            If the process died, as it does when memory runs out or a compiler crashes; the next call finds a new one.
        Exception
            Whatever the function raised.
        """
        # One at a time, so that a process that dies takes only that with it which killed it.
        with self._one_at_a_time:
            try:
                return self._submit(function, *arguments).result()
            except (BrokenProcessPool, CancelledError):
                if self._pool is not None:
                    self._pool.shutdown(wait=False)
                    self._pool = None
                raise RunError(
                    "the compiler's process died, as when memory runs out or a compiler crashes"
                ) from None

    def close(self) -> None:
        """End the process, and with an error whatever waits for it."""
        self._closed = True
        if self._pool is not None:
            kill_workers(self._pool)

    def _submit(self, function: Callable[..., object], *arguments: object) -> Future[Any]:
        if self._closed:
            raise RunError("the compiler's process was ended")
        if self._pool is not None:
            # What was begun may have killed it before anybody waited.
            with contextlib.suppress(BrokenProcessPool):
                return self._pool.submit(function, *arguments)
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, initializer=_prepare)
        return self._pool.submit(function, *arguments)


def _prepare() -> None:
    """Make a new process one that computes on one thread, and leaves nothing behind when it is killed."""
    prepare_worker()
    # torch.fx shows progress by tqdm, whose lock of the system's would be reported as leaked.
    with contextlib.suppress(ImportError):
        importlib.import_module("tqdm").tqdm.set_lock(threading.RLock())


def _import_compiler(engine: Engine) -> None:
    """Load what takes seconds, before there is anything to compile."""
    import torch._dynamo  # noqa: F401

    import frostline.server.compilation  # noqa: F401

    # What tracing imports at its first step, and the parity check at its.
    with contextlib.suppress(UsageError):
        open_runtime(engine)
