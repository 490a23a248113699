"""Random numbers of a model's own code while it is run to be looked at: seeded, and nobody else's."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def seeded(seed: int = 0) -> Iterator[Callable[[], bool]]:
    """PyTorch's, Python's and NumPy's random numbers are those of a seed within, and go on behind as if nothing had happened.

    Yields
    ------
    callable
        Says whether any of Python's or NumPy's have been drawn, which no compiled step has.
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        start = _foreign_state()
        try:
            yield lambda: _foreign_state() != start
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _foreign_state() -> tuple[Any, ...]:
    _, key, *position = np.random.get_state()
    return random.getstate(), np.asarray(key).tobytes(), *position
