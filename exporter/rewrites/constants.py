"""What a graph computes from nothing but constants is computed once, when it is compiled.

Tables of positions, masks and indices are often made by operators that no runtime for devices has, in dtypes that it does
not know.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

aten = torch.ops.aten

SMALL = 2**16
"""Values of a constant that is stored although the runtime could compute it."""

_UNSET = {
    aten._efficientzerotensor.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_permuted.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
"""Operators whose results have no values of their own, or none that are held."""

LARGEST = 2**26
"""Values of what is computed here at all."""

_Known = dict[fx.Node, Tensor]


def fold_constants(graph: fx.GraphModule, executable: Container[Any]) -> None:
    """Replace what depends on no input by its values, in place.

    Large constants that operators in `executable` can make are left to them, and one number repeated becomes `full`: a
    program need not be larger for them.
    """
    known: _Known = {}
    made: dict[fx.Node, bool] = {}
    for node in graph.graph.nodes:
        value = _value(graph, node, known)
        if value is not None:
            known[node] = value
            simple = node.op == "get_attr" or node.target in executable
            made[node] = simple and all(made[each] for each in node.all_input_nodes)
    for node, value in known.items():
        if node.op == "call_function" and any(user not in known for user in node.users):
            _store(graph, node, value, executable=made[node])
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _value(graph: fx.GraphModule, node: fx.Node, known: _Known) -> Tensor | None:
    if node.op == "get_attr":
        attribute = getattr(graph, str(node.target), None)
        return attribute if isinstance(attribute, Tensor) else None
    meant = node.meta.get("val")
    if (
        not isinstance(node.target, OpOverload)
        or not isinstance(meant, Tensor)
        or meant.numel() > LARGEST
        or node.target._schema.is_mutable
        or node.target in _UNSET
        or torch.Tag.nondeterministic_seeded in node.target.tags
        or any(each not in known for each in node.all_input_nodes)
    ):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
    with torch.no_grad():
        value: Tensor = node.target(*args, **kwargs)
    return value


def _store(graph: fx.GraphModule, node: fx.Node, value: Tensor, *, executable: bool) -> None:
    """Put a constant in the place of a node."""
    with graph.graph.inserting_before(node):
        if value.numel() > 1 and _repeats_one_number(value):
            number = value.flatten()[0].item()
            stored = graph.graph.call_function(
                aten.full.default, (list(value.shape), number), {"dtype": value.dtype}
            )
        elif executable and value.numel() > SMALL:
            return
        else:
            name = _free_name(graph)
            graph.register_buffer(name, value.detach().clone(memory_format=torch.contiguous_format))
            stored = graph.graph.get_attr(name)
    stored.meta = dict(node.meta)
    node.replace_all_uses_with(stored)


def _repeats_one_number(value: Tensor) -> bool:
    return bool((value == value.flatten()[0]).all())


def _free_name(graph: fx.GraphModule) -> str:
    count = 0
    while hasattr(graph, f"folded{count}"):
        count += 1
    return f"folded{count}"
