"""All decompositions of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from frostline.exporter.decompositions import activations, bags, distances, indexing, padding, scanning

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    **activations.DECOMPOSITIONS,
    **bags.DECOMPOSITIONS,
    **distances.DECOMPOSITIONS,
    **indexing.DECOMPOSITIONS,
    **padding.DECOMPOSITIONS,
    **scanning.DECOMPOSITIONS,
}
"""For each operator of ATen a function of its arguments, in operators that PyTorch's decompositions lead to."""
