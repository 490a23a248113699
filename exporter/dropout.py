"""Dropout in a step: what PyTorch keeps is drawn as a function of the step's seed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from frostline.exporter.rewrites.dropout import bernoulli

aten = torch.ops.aten


class SeededDropout(TorchDispatchMode):
    """Within it, all that PyTorch drops depends on `seed`, a scalar of a whole number from 0 to 2**24 - 1.

    Every kind of dropout (of values, of channels, of attention's weights, alpha dropout, stochastic depth) fills a tensor by
    `bernoulli_`, which is what is replaced here: below autograd, and inside PyTorch's own functions. Draws are told apart
    by their order.

    Attributes
    ----------
    draws : int
        How many there have been.
    """

    def __init__(self, seed: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self.draws = 0

    @contextlib.contextmanager
    def again(self, draws: int) -> Iterator[None]:
        """Draw once more what was drawn when `draws` stood there."""
        before, self.draws = self.draws, draws
        try:
            yield
        finally:
            self.draws = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not aten.bernoulli_.float:
            return func(*args, **(kwargs or {}))
        filled, probability = args[0], args[1] if len(args) > 1 else 0.5
        drawn = bernoulli(filled.shape, probability, self._seed, self.draws)
        self.draws += 1
        return filled.copy_(drawn.to(filled.dtype))
