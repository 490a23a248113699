"""The rewrites of the ExecuTorch lowering."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from frostline.exporter.rewrites.interpreter import RewritingInterpreter

aten = torch.ops.aten

_EMPTY = (aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)


def rewrite_for_executorch(graph: fx.GraphModule, arguments: Sequence[Tensor]) -> fx.GraphModule:
    """The same graph in the operators that ExecuTorch's portable runtime executes fast.

    Parameters
    ----------
    graph : GraphModule
        A flat graph of ATen operators, as `make_fx` traces it; it may be changed.
    arguments : sequence of Tensor
        Its inputs; only their shapes and dtypes matter.
    """
    _take_fillings(graph)
    traced = make_fx(
        RewritingInterpreter(graph).run,
        tracing_mode="fake",
        _allow_non_fake_inputs=True,
    )
    rewritten: fx.GraphModule = traced(*arguments)
    _join_linear(rewritten.graph)
    rewritten.graph.eliminate_dead_code()
    rewritten.recompile()
    return rewritten


def _take_fillings(graph: fx.GraphModule) -> None:
    """What is copied over a tensor without values, as dropout's draws are, takes its place."""
    for write in graph.graph.find_nodes(op="call_function", target=aten.copy_.default):
        filled, values = write.args
        if filled.target not in _EMPTY or len(filled.users) > 1:
            continue
        if all(
            getattr(filled.meta["val"], what) == getattr(values.meta["val"], what)
            for what in ("shape", "dtype")
        ):
            write.replace_all_uses_with(values)
            graph.graph.erase_node(write)
            graph.graph.erase_node(filled)
    graph.recompile()


def _join_linear(graph: fx.Graph) -> None:
    """Products by a transposed matrix become `linear`, which the runtime executes without turning the matrix.

    It cannot be traced as such: it is a composite operator, and tracing takes those apart.
    """
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        rows, matrix = node.args
        if isinstance(matrix, fx.Node) and matrix.target is aten.t.default:
            node.target = aten.linear.default
            node.args = (rows, matrix.args[0])
