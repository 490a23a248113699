"""Batches of a model's input: float32 features, or int64 token ids where there is a vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


def zero_inputs(batch: int, shape: tuple[int, ...], vocabulary: int | None) -> Tensor:
    r"""Return an input (batch, \*shape) of zeros: int64 with a vocabulary, else float32."""
    return torch.zeros(batch, *shape, dtype=torch.float32 if vocabulary is None else torch.int64)


def random_inputs(
    batch: int, shape: tuple[int, ...], vocabulary: int | None, generator: torch.Generator
) -> Tensor:
    r"""Return an input (batch, \*shape) of float32 normal deviates, or of int64 ids below the vocabulary."""
    if vocabulary is None:
        return torch.randn(batch, *shape, generator=generator)
    return torch.randint(0, vocabulary, (batch, *shape), generator=generator)


def pad(x: Tensor) -> Tensor:
    r"""Set the end of every other sample of (N, \*shape) to zero: a third of one axis, of each axis in turn."""
    x = x.clone()
    axes = x.dim() - 1
    for index in range(1, len(x), 2) if axes else ():
        axis = index // 2 % axes
        length = x.shape[axis + 1]
        x[index].narrow(axis, length - length // 3, length // 3).zero_()
    return x
