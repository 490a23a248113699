"""Values that the fast ways to compute are wrong for: far apart, without bound, or with a slope without bound.

Gates are products and maxima are sums of differences, because comparing and selecting take many times as long. Zero times
infinity is no number, and a small value is lost beside one of -1e9. Few models have either; these are told by their graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from frostline.exporter.capture import name_of

aten = torch.ops.aten

FAR = 1e4
"""Constants of at least this size are taken for stand-ins of infinity, as those that mask attention and padding are."""

_VALUES = {
    *("full", "full_like", "new_full", "fill", "masked_fill", "where", "scalar_tensor", "clamp", "clamp_min"),
    *(
        "clamp_max",
        "add",
        "sub",
        "rsub",
        "mul",
        "constant_pad_nd",
        "masked_fill_",
        "fill_",
        "lift_fresh_copy",
    ),
}
"""Operators whose numbers are values, not shapes or places."""

_STEEP = {"sqrt", "log", "log2", "log10", "log1p", "reciprocal", "rsqrt", "acos", "asin", "acosh", "atanh"}
"""Operators whose slope is infinite at the edge of where they are defined."""

_GATES = (aten.threshold_backward.default, aten.hardtanh_backward.default, aten.leaky_relu_backward.default)


def holds_far_values(graph: fx.GraphModule) -> bool:
    """Whether a graph has constants that stand for infinity, or are infinite."""
    return any(_is_far(each) for node in graph.graph.nodes for each in _numbers(graph, node))


def _numbers(graph: fx.GraphModule, node: fx.Node) -> list[Any]:
    if node.op == "get_attr":
        return [getattr(graph, str(node.target), None)]
    if node.op == "call_function" and name_of(node) in _VALUES:
        return [*node.args, *node.kwargs.values()]
    return []


def _is_far(value: Any) -> bool:
    if isinstance(value, Tensor) and value.is_floating_point():
        return bool((value.abs() >= FAR).any())
    return isinstance(value, int | float) and not math.isnan(value) and abs(value) >= FAR


def bound_gradients(graph: fx.GraphModule) -> None:
    """Make the gradients that gates may shut finite, where the graph has slopes without bound.

    A closed gate is a product by zero.
    """
    if not any(_is_steep(node) for node in graph.graph.nodes):
        return
    largest = torch.finfo(torch.float32).max
    for node in [each for gate in _GATES for each in graph.graph.find_nodes(op="call_function", target=gate)]:
        with graph.graph.inserting_before(node):
            bounded = graph.graph.call_function(aten.clamp.default, (node.args[0], -largest, largest))
        bounded.meta["val"] = node.args[0].meta["val"]
        node.args = (bounded, *node.args[1:])
    graph.recompile()


def _is_steep(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is aten.pow.Tensor_Scalar:
        exponent: Any = node.args[1]
        return bool(exponent < 1)
    return name_of(node) in _STEEP
