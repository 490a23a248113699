"""Traced graphs without in-place operators: each value is computed once and never changed.

Rewrites hold values in orders of their own, where a view is no window into another value's memory any more. So what is
written in place, or through views, is made a new value first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


PASSES = 3
"""Parts may be taken apart, or write in place, themselves."""

Decompositions = Mapping[Any, Callable[..., Any]]


def functional(
    graph: fx.GraphModule, arguments: Sequence[Tensor], decompositions: Decompositions
) -> fx.GraphModule:
    """The same graph without in-place operators, but for writing arguments back at its end.

    Parameters
    ----------
    graph : GraphModule
        A flat graph of ATen operators, as `make_fx` traces it; it may be changed.
    arguments : sequence of Tensor
        Its inputs; only their shapes and dtypes matter.
    decompositions : mapping
        Of operators that are taken apart on the way.
    """
    _name_what_is_written(graph)
    for _ in range(PASSES):
        if not any(_changes(node) or node.target in decompositions for node in graph.graph.nodes):
            break
        graph = _traced(graph, arguments, decompositions)
    return graph


def _traced(
    graph: fx.GraphModule, arguments: Sequence[Tensor], decompositions: Decompositions
) -> fx.GraphModule:
    run = torch.func.functionalize(_Interpreter(graph).run)
    trace = make_fx(run, decompositions, tracing_mode="fake", _allow_non_fake_inputs=True)
    traced: fx.GraphModule = trace(*arguments)
    traced.graph.eliminate_dead_code()
    return traced


class _Interpreter(fx.Interpreter):
    """Constants are inputs like any other: what is written is a copy."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A constant."""
        value = super().get_attr(target, args, kwargs)
        return aten.lift_fresh_copy(value) if isinstance(value, Tensor) else value


def _name_what_is_written(graph: fx.GraphModule) -> None:
    """In training `native_batch_norm` writes its running statistics and does not say so; another operator says it."""
    for node in graph.graph.find_nodes(op="call_function", target=aten.native_batch_norm.default):
        _x, _weight, _bias, mean, _variance, training, *_rest = node.args
        if training and mean is not None:
            node.target = aten._native_batch_norm_legit.default


def _changes(node: fx.Node) -> bool:
    """Whether it changes a value in place that is no argument."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return False
    return node.target is not aten.copy_.default or node.all_input_nodes[0].op != "placeholder"
