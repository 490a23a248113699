"""Moves a parameter's update to where its gradient is known.

Autograd hands a parameter's gradient out late where the model does not use the parameter itself but a view of it, made
before the forward pass began. Until then the gradient, or all that it is computed from, would be held.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import cast

from torch import fx

from frostline.exporter.capture import users_through_views
from frostline.exporter.part import base_of
from frostline.exporter.rewrites.functional import written_by
from frostline.exporter.tiles import split_name


def update_early(graph: fx.Graph, written: Sequence[str]) -> None:
    """Reorder a step's graph; what it computes stays the same.

    Parameters
    ----------
    graph : Graph
        Returns the new values of `written`, then its results.
    written : sequence of str
        Parameters and what optimizers keep of them, in tiles where they are held so, and statistics.
    """
    position = {node: index for index, node in enumerate(graph.nodes)}
    writes = _writes(graph)
    for nodes in _serving_one(graph, written).values():
        inputs = {source for node in nodes for source in node.all_input_nodes}
        # A result of several operators' is not the last of them: it must not be moved to before the others.
        sources = inputs - set(nodes)
        # What is written in place is read only after that.
        bases = {base_of(node) for node in (*inputs, *nodes)} & writes.keys()
        until = position[nodes[-1]]
        sources |= {write for base in bases for write in writes[base] if position[write] < until}
        # What reads the value that is written over, or a view of it, comes before that.
        sources |= _read_before(nodes, position)
        last = max(sources, key=lambda node: position[node], default=None)
        if last is None or last.op == "placeholder":
            continue
        for node in reversed([node for node in nodes if position[node] > position[last]]):
            last.append(node)


def _read_before(nodes: Sequence[fx.Node], position: Mapping[fx.Node, int]) -> set[fx.Node]:
    """The other nodes that read what some nodes write to, before it is written."""
    found: set[fx.Node] = set()
    for node in nodes:
        for changed in written_by(node):
            readers = users_through_views(base_of(changed))
            found.update(each for each in readers if position[each] < position[node])
    return found - set(nodes)


def _writes(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The operators that write to a value or to a view of it, by the value."""
    found: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        for changed in written_by(node):
            found[base_of(changed)].append(node)
    return found


def _serving_one(graph: fx.Graph, written: Sequence[str]) -> dict[str, list[fx.Node]]:
    """For each tensor of the model the nodes, in order, that nothing but its new values depends on."""
    output = graph.output_node()
    values = cast(Sequence[fx.Node], output.args[0])
    results = [f"result {index}" for index in range(len(values) - len(written))]
    serves: defaultdict[fx.Node, set[str]] = defaultdict(set)
    for value, name in zip(values, [*_of_model(written), *results], strict=True):
        serves[value].add(name)
    found: defaultdict[str, list[fx.Node]] = defaultdict(list)
    for node in reversed(graph.nodes):
        for source in node.all_input_nodes if node is not output else ():
            serves[source] |= serves[node]
        if node.op == "call_function" and len(serves[node]) == 1:
            found[next(iter(serves[node]))].append(node)
    return {name: nodes[::-1] for name, nodes in found.items()}


def _of_model(written: Sequence[str]) -> list[str]:
    """The model's tensors that these are part of or, as `<kind>.<name>`, kept for."""
    wholes = [split_name(name)[0] for name in written]
    known = set(wholes)
    kept_for = [whole.partition(".")[2] for whole in wholes]
    return [model if model in known else whole for whole, model in zip(wholes, kept_for, strict=True)]
