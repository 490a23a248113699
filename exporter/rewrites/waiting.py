"""Keeps what the backward pass computes anew from being computed before the backward pass gets there.

ONNX Runtime runs a node as soon as it likes, once its inputs are there. So the forward values that recomputation starts
from are made to wait for the gradient that the graph has reached.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from frostline.exporter.onnx_operators.waiting import AFTER

aten = torch.ops.aten


def let_recomputation_wait(graph: fx.Graph, batch: fx.Node) -> None:
    """Insert the waiting into the graph of a step over `batch`, whose nodes are in the order they are meant to run."""
    losses = graph.find_nodes(op="call_function", target=aten._log_softmax.default)
    if not losses:
        return
    activations = _depending_on(graph, {batch})
    gradients = _depending_on(graph, set(losses))
    reached: fx.Node | None = None
    recomputed: set[fx.Node] = set()
    waiting: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    for node in list(graph.nodes):
        if node in gradients and isinstance(node.meta.get("val"), Tensor):
            reached = node
        elif reached is not None and node in activations and node.op == "call_function":
            recomputed.add(node)
            for value in node.all_input_nodes:
                if value in activations and value not in recomputed:
                    _wait(graph, node, value, reached, waiting)


def _wait(
    graph: fx.Graph,
    node: fx.Node,
    value: fx.Node,
    reached: fx.Node,
    waiting: dict[tuple[fx.Node, fx.Node], fx.Node],
) -> None:
    if not isinstance(value.meta.get("val"), Tensor):
        return
    if (value, reached) not in waiting:
        with graph.inserting_before(node):
            made = graph.call_function(AFTER, (value, reached))
            made.meta["val"] = value.meta["val"]
        waiting[value, reached] = made
    node.replace_input_with(value, waiting[value, reached])


def _depending_on(graph: fx.Graph, sources: set[fx.Node]) -> set[fx.Node]:
    found = set(sources)
    for node in graph.nodes:
        if any(each in found for each in node.all_input_nodes):
            found.add(node)
    return found
