"""Keeps native libraries quiet while they load."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_standard_error() -> Iterator[None]:
    """Hold back what this process writes to standard error; it is written after all if the block raises.

    Descriptor 2 itself is redirected, since C++ libraries know nothing of `sys.stderr`. Other threads are held back
    with it, so this belongs in worker processes, around little.
    """
    try:
        kept = os.dup(2)
    except OSError:  # Standard error is closed: there is nothing to hold back.
        yield
        return
    with tempfile.TemporaryFile() as held:
        _flush()
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            _flush()
            os.dup2(kept, 2)
            held.seek(0)
            with os.fdopen(os.dup(2), "wb", closefd=True) as standard_error:
                standard_error.write(held.read())
            raise
        finally:
            _flush()
            os.dup2(kept, 2)
            os.close(kept)


def _flush() -> None:
    if sys.stderr is not None:
        sys.stderr.flush()
