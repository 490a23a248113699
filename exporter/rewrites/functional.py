"""Graphs without side effects: what an operator writes becomes a value of its own.

PyTorch's models write in place everywhere: running statistics, dropout's masks, the gates of recurrent layers, slices of a
tensor. Its functionalization follows every view of what is written; two things it is told here, since it cannot see them:
which constants are written, and that `native_batch_norm` writes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten

Decompositions = Mapping[Any, Callable[..., Any]]
"""For operators that are taken apart, functions of their arguments."""


PASSES = 3
"""Parts of what is taken apart may be taken apart, or write in place, themselves."""


class LiftingInterpreter(fx.Interpreter):
    """Constants are values like any other: a copy of one may be written, as batch norm's counter is."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A tensor with fixed values."""
        value = super().get_attr(target, args, kwargs)
        return aten.lift_fresh_copy.default(value) if isinstance(value, Tensor) else value


def functional(
    graph: fx.GraphModule,
    arguments: Sequence[Tensor],
    decompositions: Decompositions,
    interpreter: type[LiftingInterpreter] | None = None,
) -> fx.GraphModule:
    """The same graph without operators that write.

    Parameters
    ----------
    graph : GraphModule
        A flat graph of ATen operators; it may be changed.
    arguments : sequence of Tensor
        Its inputs; only their shapes and dtypes matter.
    decompositions : mapping
        Of operators that are taken apart on the way.
    interpreter : type, optional
        Rewrites operators on the way.
    """
    name_what_is_written(graph)
    if _writes_what_is_viewed(graph):
        graph = _retraced(graph, arguments, {}, LiftingInterpreter)
    if interpreter is not None:
        graph = _retraced(graph, arguments, decompositions, interpreter)
    for _ in range(PASSES):
        taken_apart = interpreter is None and any(node.target in decompositions for node in graph.graph.nodes)
        if not taken_apart and not writes(graph):
            break
        graph = _retraced(graph, arguments, decompositions, LiftingInterpreter)
    return graph


def writes(graph: fx.GraphModule) -> bool:
    """Whether any operator of a graph changes a tensor in place."""
    return any(written_by(node) for node in graph.graph.nodes)


def _retraced(
    graph: fx.GraphModule,
    arguments: Sequence[Tensor],
    decompositions: Decompositions,
    interpreter: type[LiftingInterpreter],
) -> fx.GraphModule:
    run = interpreter(graph).run
    traced = make_fx(
        torch.func.functionalize(run) if writes(graph) else run,
        decomposition_table=dict(decompositions),
        tracing_mode="fake",
        _allow_non_fake_inputs=True,
    )
    result: fx.GraphModule = traced(*arguments)
    for before, after in zip(
        *(each.graph.find_nodes(op="placeholder") for each in (graph, result)), strict=True
    ):
        after.meta = {**before.meta, **after.meta}
    _leave_inputs(result)
    return result


def _leave_inputs(graph: fx.GraphModule) -> None:
    """What a model writes to a parameter itself is read by the rest of the step, which returns its new value."""
    for write in graph.graph.find_nodes(op="call_function", target=aten.copy_.default):
        if write.args[0].op == "placeholder":
            write.replace_all_uses_with(write.args[1])
            graph.graph.erase_node(write)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _writes_what_is_viewed(graph: fx.GraphModule) -> bool:
    """Whether views are written, or views are taken of what is written.

    Memory is then shared as it was when the graph was recorded: operators that were taken apart can return values that lie
    otherwise, of which views would be copies.
    """
    written = {value for node in graph.graph.nodes for value in written_by(node)}
    return any(_is_view(value) or any(_is_view(user) for user in value.users) for value in written)


def written_by(node: fx.Node) -> list[fx.Node]:
    """The values that a node changes in place."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return []
    arguments = node.target._schema.arguments
    given = {a.name: value for a, value in zip(arguments, node.args, strict=False)} | dict(node.kwargs)
    changed = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return [value for value in changed if isinstance(value, fx.Node)]


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return _is_view(node.args[0])  # type: ignore[arg-type]
    return isinstance(node.target, OpOverload) and node.target.is_view


def name_what_is_written(graph: fx.GraphModule) -> None:
    """In training `native_batch_norm` writes its running statistics and does not say so; another operator says it."""
    for node in graph.graph.find_nodes(op="call_function", target=aten.native_batch_norm.default):
        _x, _weight, _bias, mean, _variance, training, *_rest = node.args
        if training and mean is not None:
            node.target = aten._native_batch_norm_legit.default
    graph.recompile()
