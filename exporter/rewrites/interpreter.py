"""Runs a traced graph again with its values held the way the runtime is fast.

PyTorch's graphs hold images as (N, C, *spatial); the runtime is fast when a pixel's channels lie side by side. So the
graph is interpreted once more: operators take and return `Permuted` values, computed by the rewrites of this folder, and a
value is only turned where an operator needs it the other way. In the same manner transposed matrices, the heads of
attention and the kernels of convolutions stay as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from frostline.exporter.rewrites import (
    axis_operators,
    elementwise_operators,
    image_operators,
    ordering,
    token_operators,
)
from frostline.exporter.rewrites.arrangement import Arranger, Deferred, Permuted
from frostline.exporter.rewrites.extremes import holds_far_values
from frostline.exporter.rewrites.strides import STRIDED, owner

__all__ = ["REWRITES", "Permuted", "RewritingInterpreter"]

REWRITES: dict[Any, Callable[..., Any]] = {
    **axis_operators.REWRITES,
    **elementwise_operators.REWRITES,
    **image_operators.REWRITES,
    **ordering.REWRITES,
    **token_operators.REWRITES,
}
"""For each operator a function of an `Arranger` and the operator's arguments; NotImplemented leaves it as it is."""


class RewritingInterpreter(fx.Interpreter):
    """Interprets a graph of ATen operators that changes no value; trace `run` to get the rewritten graph."""

    def __init__(self, graph: fx.GraphModule) -> None:
        # Where memory was seen with other strides, its first owner is asked for again.
        super().__init__(graph, garbage_collect_values=False)
        self._arrange = Arranger(far_values=holds_far_values(graph))
        self._arguments: set[int] = set()

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An argument of the program."""
        argument = super().placeholder(target, args, kwargs)
        self._arguments.add(id(argument))
        return argument

    def run_node(self, n: fx.Node) -> Any:
        """Look up what strides mean where the graph speaks of them: values here have none."""
        rewrite = STRIDED.get(n.target)
        if rewrite is None:
            return super().run_node(n)
        seen = n.all_input_nodes[0]
        base = owner(seen)
        (_, *args), _ = self.fetch_args_kwargs_from_env(n)
        held = _computed(self.env[base])
        return rewrite(self._arrange, held, base.meta["val"], seen.meta["val"], *args)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Rewrite the operator if there is a rewrite, else hand it plain tensors."""
        if target is operator.getitem:
            return args[0][args[1]]
        if target not in image_operators.IGNORES_PLACES:
            args, kwargs = pytree.tree_map(_computed, (args, kwargs))
        rewrite = REWRITES.get(target)
        if rewrite is not None:
            result = rewrite(self._arrange, *args, **kwargs)
            if result is not NotImplemented:
                return result
        plain_args, plain_kwargs = pytree.tree_map(self._arrange.plain, (args, kwargs))
        if "memory_format" in plain_kwargs:
            plain_kwargs = {**plain_kwargs, "memory_format": torch.contiguous_format}
        return super().call_function(target, plain_args, plain_kwargs)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The graph's results as plain tensors, none of them an argument's memory."""
        return super().output(target, pytree.tree_map(self._result, args), kwargs)

    def _result(self, value: Any) -> Any:
        plain = self._arrange.plain(value)
        return plain.clone() if id(plain) in self._arguments else plain


def _computed(value: Any) -> Any:
    return value.tensor() if isinstance(value, Deferred) else value
