"""The rewrites of the ONNX lowering: what ONNX has no operator for becomes operators that it has.

PyTorch brings decompositions of nearly all backward operators; they are taken but for those that ONNX Runtime is faster at
another way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions

from frostline.exporter.decompositions.gradients import GRADIENTS
from frostline.exporter.decompositions.indexing import as_strided
from frostline.exporter.decompositions.table import DECOMPOSITIONS
from frostline.exporter.onnx_operators.table import OPERATORS
from frostline.exporter.rewrites import attention
from frostline.exporter.rewrites.constants import fold_constants
from frostline.exporter.rewrites.functional import LiftingInterpreter, functional
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
    rewritten = functional(graph, arguments, _decompositions(), _Interpreter)
    fold_constants(rewritten, OPERATORS)
    for batch in rewritten.graph.find_nodes(op="placeholder"):
        if batch.meta.get(INPUT) == "x":
            let_recomputation_wait(rewritten.graph, batch)
    rewritten.recompile()
    return rewritten


class _Interpreter(LiftingInterpreter):
    """Views are of values, not of memory: what is rewritten lies there in another order."""

    def run_node(self, n: fx.Node) -> Any:
        """Tell what a view by strides was recorded over."""
        if n.op == "call_function" and n.target is aten.as_strided.default:
            args, _ = self.fetch_args_kwargs_from_env(n)
            return as_strided(*args, recorded=n.args[0].meta["val"])  # type: ignore[union-attr]
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An operator."""
        if target in (aten.view.default, aten._unsafe_view.default):
            return args[0].reshape(args[1])
        if target in GRADIENTS:
            return GRADIENTS[target](*args, **kwargs)
        return super().call_function(target, args, kwargs)


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    theirs = {**core_aten_decompositions(), **get_decompositions(_BESIDE_THE_CORE)}
    table = {**theirs, **DECOMPOSITIONS, **_OURS}
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
    key, value = _for_each_head(query, key), _for_each_head(query, value)
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
    grad_query, *grads = attention.attention_backward(
        grad,
        query,
        _for_each_head(query, key),
        _for_each_head(query, value),
        output,
        logarithms,
        attn_mask,
        causal,
        _scale(query, scale),
    )
    grad_key, grad_value = (
        g.unflatten(1, (x.shape[1], -1)).sum(2) if g.shape != x.shape else g
        for g, x in zip(grads, (key, value), strict=True)
    )
    return grad_query, grad_key, grad_value


def _for_each_head(query: Tensor, x: Tensor) -> Tensor:
    """Keys or values (N, H', S, d) that several heads of `query` (N, H, T, d) share, for each of those."""
    shared = query.shape[1] // x.shape[1]
    return x if shared == 1 else x.unsqueeze(2).expand(-1, -1, shared, -1, -1).flatten(1, 2)


def _scale(query: Tensor, scale: float | None) -> float:
    return float(query.shape[-1] ** -0.5) if scale is None else scale


_BESIDE_THE_CORE = [
    aten._batch_norm_no_update,
    aten._batch_norm_with_update_functional,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_functional,
    aten.addmm,
    aten.addmv,
    aten.baddbmm,
    aten.dist,
    aten.float_power,
    aten.ldexp,
    aten.mish,
    aten.native_batch_norm,
    aten.native_group_norm,
    aten.native_layer_norm,
    aten.nansum,
    aten.rrelu_with_noise_backward,
    aten.silu,
    aten.softplus,
]


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What is written over all of a tensor is it from then on."""
    return source.to(x.dtype).expand(x.shape)


_OURS: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
    aten.copy.default: _copy,
}
