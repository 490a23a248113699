"""Training and evaluation mode of a module and its children."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a module and its children in training or evaluation mode for a while; each gets its own mode back."""
    with modes_kept(module):
        module.train(training)
        yield


@contextlib.contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Whatever happens within it, a module and its children are in the same modes afterwards."""
    before = {child: child.training for child in module.modules()}
    try:
        yield
    finally:
        for child, was in before.items():
            child.training = was
