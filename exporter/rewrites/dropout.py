"""Random numbers as functions of a seed: the same in PyTorch and in the runtime, drawn nowhere.

Every value is a whole number below 2**24, so float32 arithmetic is exact whoever does it. Rows and columns get numbers
modulo a prime from rounds of adding a key and cubing, the construction of the MiMC cipher (Albrecht et al., ASIACRYPT
2016), which a seed and a layer key. What decides about a value is a cubic polynomial of the sum of a row's and a column's
number, with one coefficient of the row's and one of the column's: rows and columns are uniform each by itself, pairs of
values independent, and no product of a row's and a column's pattern remains. It costs 15 cheap operators a
value, about 5 ns on an x86 server.

Two such numbers are the digits of a uniform one, from which the others are made by their textbook formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PRIME = 4091
"""The largest prime below 2**12 that cubing permutes the numbers modulo."""

_ROUNDING = 1.5 * 2.0**23
"""Added to a float32 and subtracted again, it leaves the nearest whole number, three times faster than `round`."""

_BELOW_ONE = (1 - 2.0**-23) / PRIME**2
"""Turns numbers below the square of the prime into some below 1, after rounding too."""

_WIDEST = 4096
_ROUND_KEYS = (1187, -1523, 421, 1999, -733)


def bernoulli(shape: Sequence[int], probability: float, seed: Tensor, layer: int) -> Tensor:
    """1 with `probability`, else 0, float32 of `shape`.

    Parameters
    ----------
    shape : sequence of int
        Of the tensor of zeros and ones.
    probability : float
        Of a one, rounded to 1 / 4091.
    seed : Tensor
        A whole number from 0 to 2**24 - 1, a scalar float32 or int64; another one for each step.
    layer : int
        Tells the draws of one step apart, below 4091.
    """
    ones = round(probability * PRIME)
    if ones in (0, PRIME):
        return torch.full(list(shape), float(ones == PRIME))
    drawn = _drawn(shape, seed, layer)
    # Whole numbers around zero: the highest `ones` of them are clipped to 1, the others to 0.
    return torch.nn.functional.hardtanh(drawn + (ones - PRIME // 2), 0.0, 1.0).reshape(list(shape))


def uniform(shape: Sequence[int], seed: Tensor, layer: int) -> Tensor:
    """Numbers between 0 and 1, neither of them included, float32 of `shape`; takes two layers."""
    # What is drawn can be one beyond the last remainder, and is the first one then.
    high, low = (_modulo(_drawn(shape, seed, each)) + PRIME // 2 for each in (layer, layer + 1))
    return ((high * PRIME + low + 0.5) * _BELOW_ONE).reshape(list(shape))


def normal(shape: Sequence[int], seed: Tensor, layer: int) -> Tensor:
    """Numbers of mean 0 and deviation 1 (Box & Muller 1958), float32 of `shape`; takes four layers."""
    radius = torch.sqrt(-2 * torch.log(uniform(shape, seed, layer)))
    return radius * torch.cos(2 * math.pi * uniform(shape, seed, layer + 2))


def exponential(shape: Sequence[int], seed: Tensor, layer: int) -> Tensor:
    """Numbers above 0 of mean 1, float32 of `shape`; takes two layers."""
    return -torch.log(uniform(shape, seed, layer))


def whole_numbers(shape: Sequence[int], low: int, high: int, seed: Tensor, layer: int) -> Tensor:
    """Whole numbers from `low` to below `high`, not more than 2**24 of them, int64 of `shape`; takes two layers."""
    count = high - low
    places = torch.floor(uniform(shape, seed, layer) * count)
    return torch.clamp(places, max=count - 1).to(torch.int64) + low


def permutation(count: int, seed: Tensor, layer: int) -> Tensor:
    """The numbers below `count` in some order, (count,) int64; takes two layers."""
    drawn = uniform([count], seed, layer)
    order = torch.arange(count)
    first = (drawn < drawn[:, None]) | ((drawn == drawn[:, None]) & (order < order[:, None]))
    return first.sum(1)


def _drawn(shape: Sequence[int], seed: Tensor, layer: int) -> Tensor:
    """Numbers modulo the prime, around zero: float32, a row for each of the first axes."""
    columns = _columns(shape)
    rows = math.prod(shape) // columns
    numbers = _numbers(2 * (rows + columns), seed.to(torch.float32), layer)
    row, slope, column, offset = torch.split(numbers, [rows, rows, columns, columns])
    place = row.reshape(-1, 1) + column
    return _modulo((_modulo(place * place) + slope.reshape(-1, 1)) * place + offset)


def _columns(shape: Sequence[int]) -> int:
    """The values of a row: as many of the last axes as stay below `_WIDEST`."""
    columns = 1
    for size in reversed(shape):
        if columns * size > _WIDEST:
            break
        columns *= size
    return columns


def _numbers(count: int, seed: Tensor, layer: int) -> Tensor:
    """`count` numbers modulo the prime, around zero, float32."""
    low, high = _split(torch.arange(count, dtype=torch.float32))
    seed_low, seed_high = _split(seed)
    first = _mixed(seed_low, [seed_high, float(layer - PRIME // 2), seed_low])
    second = _mixed(first, [seed_high, seed_low])
    return _mixed(low, [first, second, high, first])


def _mixed(x: Tensor, keys: Sequence[Tensor | float]) -> Tensor:
    """Rounds of adding a key and a constant, and cubing."""
    for key, constant in zip(keys, _ROUND_KEYS, strict=False):
        x = _cube(_modulo(x + key) + constant)
    return x


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from 0 as remainder, around zero, and quotient."""
    quotient = torch.floor(x * (1 / PRIME))
    return _modulo(x - quotient * PRIME), quotient


def _cube(x: Tensor) -> Tensor:
    return _modulo(_modulo(x * x) * x)


def _modulo(x: Tensor) -> Tensor:
    """The remainder nearest to zero."""
    quotient = (x * (1 / PRIME) + _ROUNDING) - _ROUNDING
    return x - quotient * PRIME
