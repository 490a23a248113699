"""Tells training that has diverged: it ends a run, since what comes after is of no use to anybody."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from frostline.protocol.tensors import Array

LARGEST_LOSS = 1000.0
"""Above so many times the loss of a guess among the classes nothing is learnt any more: it is in no relation to a bad first
round, which stays below some ten times."""

NOT_FINITE = "not finite"
"""What a device says of a loss or an update that it gives up for, among other words."""


def divergence(loss: float, weights: Mapping[str, Array], classes: int) -> str:
    """What shows that training has diverged; empty if nothing does.

    Parameters
    ----------
    loss : float
        A round's mean cross-entropy a sample.
    weights : mapping of str to array
        The aggregated weights after it.
    """
    if not math.isfinite(loss):
        return f"its loss is {loss}"
    for name, value in weights.items():
        if not np.isfinite(value).all():
            return f"tensor {name!r} is not finite"
    guess = math.log(classes)
    if loss > LARGEST_LOSS * guess:
        return f"its loss is {loss:.3g}, where a guess among {classes} classes has {guess:.2f}"
    return ""


def diverged(stage: str, number: int, sign: str, learning_rate: float, clip_norm: float) -> str:
    """What a person is told: where, by what sign, and what to change. `number` counts rounds from 0."""
    clip = (
        f"training.clip_norm (now {clip_norm:g})"
        if clip_norm
        else "training.clip_norm, such as 1.0, to clip gradients"
    )
    return (
        f"stage {stage!r} diverged in round {number + 1}: {sign}; begin the run again with a lower training.learning_rate "
        f"(now {learning_rate:g}), or {'a lower' if clip_norm else 'set'} {clip}"
    )
