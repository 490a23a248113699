"""Graphs without side effects: what an operator writes becomes a value of its own.

PyTorch's models write in place everywhere: running statistics, dropout's masks, the gates of recurrent layers, slices of a
tensor. Its functionalization follows every view of what is written; two things it is told here, since it cannot see them:
which constants are written, and that `native_batch_norm` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


def functional(
    graph: fx.GraphModule,
    arguments: Sequence[Tensor],
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> fx.GraphModule:
    """The same graph without operators that write, or `graph` itself if there are none.

    Parameters
    ----------
    graph : GraphModule
        A flat graph of ATen operators; it may be changed.
    arguments : sequence of Tensor
        Its inputs; only their shapes and dtypes matter.
    decompositions : mapping, optional
        Of operators that are taken apart on the way.
    """
    _name_what_is_written(graph)
    if not writes(graph):
        return graph
    run = torch.func.functionalize(_Lifting(graph).run)
    traced = make_fx(
        run,
        decomposition_table=None if decompositions is None else dict(decompositions),
        tracing_mode="fake",
        _allow_non_fake_inputs=True,
    )
    result: fx.GraphModule = traced(*arguments)
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


def writes(graph: fx.GraphModule) -> bool:
    """Whether any operator of a graph changes a tensor in place."""
    operators = [node.target for node in graph.graph.nodes if isinstance(node.target, OpOverload)]
    return any(operator._schema.is_mutable for operator in operators)


class _Lifting(fx.Interpreter):
    """Constants are values like any other: a copy of one may be written, as batch norm's counter is."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A tensor with fixed values."""
        value = super().get_attr(target, args, kwargs)
        return aten.lift_fresh_copy.default(value) if isinstance(value, Tensor) else value


def _name_what_is_written(graph: fx.GraphModule) -> None:
    """In training `native_batch_norm` writes its running statistics and does not say so; another operator says it."""
    for node in graph.graph.find_nodes(op="call_function", target=aten.native_batch_norm.default):
        _x, _weight, _bias, mean, _variance, training, *_rest = node.args
        if training and mean is not None:
            node.target = aten._native_batch_norm_legit.default
    graph.recompile()
