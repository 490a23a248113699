"""All operators that can be written as ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from frostline.exporter.onnx_operators import (
    arranging,
    convolution,
    elementwise,
    pooling,
    reducing,
    resampling,
)

OPERATORS: dict[Any, Callable[..., Any]] = {
    **arranging.OPERATORS,
    **convolution.OPERATORS,
    **elementwise.OPERATORS,
    **pooling.OPERATORS,
    **reducing.OPERATORS,
    **resampling.OPERATORS,
}
"""For each a function of the graph, what PyTorch returns (for its shape and dtype) and the operator's arguments.

It returns the names of its results, or NotImplemented where ONNX cannot say it.
"""

IN_SINGLE_PRECISION = {
    *convolution.OPERATORS,
    *elementwise.IN_SINGLE_PRECISION,
    *pooling.OPERATORS,
    *resampling.OPERATORS,
}
"""Operators that ONNX Runtime computes in float32 alone."""
