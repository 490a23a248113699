"""What the built-in models share: the choice of normalisation and the checks of their size options."""

from __future__ import annotations

import math

from torch import nn

from frostline.protocol.errors import UsageError

GROUPS = 8
"""Normalisation groups wherever eight divides the channel count."""

NORMS = ("group", "batch")


def normalisation(kind: str, channels: int, dimensions: int = 2) -> nn.Module:
    r"""Build the normalisation layer of a built-in model.

    Parameters
    ----------
    kind
        ``"group"`` (Wu & He, "Group Normalization", ECCV 2018), which keeps no running statistics and so needs
        no synchronisation between devices, or ``"batch"`` (Ioffe & Szegedy, ICML 2015).
    channels
        Channels of the (batch, channels, \*spatial) input. Group normalisation takes eight groups, or the greatest
        common divisor of eight and ``channels``.
    dimensions
        Spatial dimensions of the input: two for images, one for series.

    Returns
    -------
    nn.Module
        A layer that keeps the shape and dtype of its input.

    Raises
    ------
    UsageError
        ``kind`` is neither of the two.
    """
    if kind == "group":
        return nn.GroupNorm(math.gcd(GROUPS, channels), channels)
    if kind == "batch":
        return nn.BatchNorm1d(channels) if dimensions == 1 else nn.BatchNorm2d(channels)
    raise UsageError(f"model option 'norm' is {kind!r}: give one of {', '.join(NORMS)}")


def check_sizes(**sizes: object) -> None:
    """Check that every size option of a built-in model is a whole number of at least one.

    Parameters
    ----------
    **sizes
        Option values by option name.

    Raises
    ------
    UsageError
        A value is not an ``int`` or is below one.
    """
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"model option {name!r} is {value!r}: give a whole number of at least 1")


def initialise_convolutions(module: nn.Module) -> None:
    """Draw every convolution weight of ``module`` from He's normal distribution, in place.

    Variance 2 / fan-out, which keeps the gradient's scale through ReLU (He et al., "Delving Deep into Rectifiers",
    ICCV 2015, section 2.2). Uses torch's global CPU generator.

    Parameters
    ----------
    module
        Any module; layers other than ``nn.Conv1d`` and ``nn.Conv2d`` are left as they are.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
