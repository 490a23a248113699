"""The rewrites of the ONNX lowering: what ONNX has no operator for becomes operators that it has.

PyTorch brings decompositions of nearly all backward operators; they are taken but for those that ONNX Runtime is faster at
another way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

from frostline.exporter.onnx_operators.table import OPERATORS
from frostline.exporter.rewrites import attention
from frostline.exporter.rewrites.waiting import let_recomputation_wait
from frostline.exporter.training_step import INPUT

aten = torch.ops.aten


def rewrite_for_onnxruntime(graph: fx.GraphModule, arguments: Sequence[Tensor]) -> fx.GraphModule:
    """The same graph in operators that `frostline.exporter.onnx_operators` knows, if it can be.

    Parameters
    ----------
    graph : GraphModule
        A flat graph of ATen operators, as `make_fx` traces it.
    arguments : sequence of Tensor
        Its inputs; only their shapes and dtypes matter.
    """
    _name_what_is_written(graph)
    run = _Interpreter(graph).run
    traced = make_fx(
        torch.func.functionalize(run) if _changes_any(graph.graph) else run,
        decomposition_table=_decompositions(),
        tracing_mode="fake",
        _allow_non_fake_inputs=True,
    )
    rewritten: fx.GraphModule = traced(*arguments)
    rewritten.graph.eliminate_dead_code()
    before, after = (each.graph.find_nodes(op="placeholder") for each in (graph, rewritten))
    for old, new in zip(before, after, strict=True):
        if old.meta.get(INPUT) == "x":
            let_recomputation_wait(rewritten.graph, new)
    rewritten.recompile()
    return rewritten


class _Interpreter(fx.Interpreter):
    """Views of values that lie in memory otherwise than PyTorch's operators leave them are copies."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An operator."""
        if target in (aten.view.default, aten._unsafe_view.default):
            return args[0].reshape(args[1])
        return super().call_function(target, args, kwargs)


def _name_what_is_written(graph: fx.GraphModule) -> None:
    """`native_batch_norm` writes its running statistics but does not say so; another operator does the same and says."""
    for node in graph.graph.find_nodes(op="call_function", target=aten.native_batch_norm.default):
        x, weight, bias, mean, _variance, *rest = node.args
        if mean is None:
            node.target = aten._native_batch_norm_legit.no_stats
            node.args = (x, weight, bias, *rest)
        else:
            node.target = aten._native_batch_norm_legit.default
    graph.recompile()


def _changes_any(graph: fx.Graph) -> bool:
    operators = [node.target for node in graph.nodes if isinstance(node.target, OpOverload)]
    return any(operator._schema.is_mutable for operator in operators)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    table = {**core_aten_decompositions(), **get_decompositions(_BESIDE_THE_CORE), **_OURS}
    return {operator: function for operator, function in table.items() if operator not in OPERATORS}


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    return attention.attention(query, key, value, attn_mask, causal, _scale(query, scale))


def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logarithms: Tensor,
    dropout: float,
    causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return attention.attention_backward(
        grad, query, key, value, output, logarithms, attn_mask, causal, _scale(query, scale)
    )


def _scale(query: Tensor, scale: float | None) -> float:
    return float(query.shape[-1] ** -0.5) if scale is None else scale


_BESIDE_THE_CORE = [
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_functional,
    aten._prelu_kernel,
    aten.addmm,
    aten.baddbmm,
    aten.elu,
    aten.hardsigmoid,
    aten.hardswish,
    aten.mish,
    aten.native_batch_norm,
    aten.native_group_norm,
    aten.native_layer_norm,
    aten.silu,
    aten.softplus,
]

_OURS: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
}
