"""The rewrites of the ExecuTorch lowering."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from frostline.exporter.rewrites.decompositions import decompositions
from frostline.exporter.rewrites.functional import functional
from frostline.exporter.rewrites.interpreter import REWRITES, RewritingInterpreter
from frostline.exporter.rewrites.strides import STRIDED

aten = torch.ops.aten


def rewrite_for_executorch(graph: fx.GraphModule, arguments: Sequence[Tensor]) -> fx.GraphModule:
    """The same graph in the operators that ExecuTorch's portable runtime executes fast.

    Parameters
    ----------
    graph : GraphModule
        A flat graph of ATen operators, as `make_fx` traces it; it may be changed.
    arguments : sequence of Tensor
        Its inputs; only their shapes and dtypes matter.
    """
    # What is taken apart first is rewritten in its parts.
    others = {each: f for each, f in decompositions().items() if each not in REWRITES and each not in STRIDED}
    run = RewritingInterpreter(functional(graph, arguments, others)).run
    traced = make_fx(run, decompositions(), tracing_mode="fake", _allow_non_fake_inputs=True)
    rewritten: fx.GraphModule = traced(*arguments)
    _join_linear(rewritten.graph)
    rewritten.graph.eliminate_dead_code()
    rewritten.recompile()
    return rewritten


def _join_linear(graph: fx.Graph) -> None:
    """Products by a transposed matrix become `linear`, which the runtime executes without turning the matrix.

    It cannot be traced as such: it is a composite operator, and tracing takes those apart.
    """
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        rows, matrix = node.args
        if isinstance(matrix, fx.Node) and matrix.target is aten.permute.default:
            node.target = aten.linear.default
            node.args = (rows, matrix.args[0])
