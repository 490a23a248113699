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

from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from frostline.exporter.rewrites import (
    axis_operators,
    elementwise_operators,
    image_operators,
    token_operators,
)
from frostline.exporter.rewrites.arrangement import Arranger, Deferred, Permuted

__all__ = ["REWRITES", "Permuted", "RewritingInterpreter"]

REWRITES: dict[Any, Callable[..., Any]] = {
    **axis_operators.REWRITES,
    **elementwise_operators.REWRITES,
    **image_operators.REWRITES,
    **token_operators.REWRITES,
}
"""For each operator a function of an `Arranger` and the operator's arguments; NotImplemented leaves it as it is."""


class RewritingInterpreter(fx.Interpreter):
    """Interprets a graph of ATen operators; trace `run` to get the rewritten graph."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self._arrange = Arranger()
        self._shared = _written_through_views(graph.graph)

    def run_node(self, n: fx.Node) -> Any:
        """Leave alone what is written through views: those of the rewrites are copies."""
        if n not in self._shared or n.op != "call_function":
            return super().run_node(n)
        args, kwargs = pytree.tree_map(self._arrange.plain, self.fetch_args_kwargs_from_env(n))
        if _is_view(n) or _written(n):
            return super().call_function(n.target, args, kwargs)
        made = self.call_function(n.target, args, kwargs)
        return pytree.tree_map(self._arrange.plain, made)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Rewrite the operator if there is a rewrite, else hand it plain tensors."""
        if target is operator.getitem:
            return args[0][args[1]]
        args, kwargs = pytree.tree_map(_computed, (args, kwargs))
        rewrite = REWRITES.get(target)
        if rewrite is not None:
            result = rewrite(self._arrange, *args, **kwargs)
            if result is not NotImplemented:
                return result
        plain_args, plain_kwargs = pytree.tree_map(self._arrange.plain, (args, kwargs))
        if _changes(target) and isinstance(args[0], Permuted):
            # The turned copy is everybody's.
            plain_args = (plain_args[0].clone(), *plain_args[1:])
        return super().call_function(target, plain_args, plain_kwargs)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The graph's results as plain tensors."""
        return super().output(target, pytree.tree_map(self._arrange.plain, args), kwargs)


def _computed(value: Any) -> Any:
    return value.tensor() if isinstance(value, Deferred) else value


def _written_through_views(graph: fx.Graph) -> set[fx.Node]:
    """The values that share memory with a view that is changed in place, and what changes it."""
    shared: set[fx.Node] = set()
    for write in graph.nodes:
        base = _written(write)
        if base is None or not _is_view(base):
            continue
        while _is_view(base) or _written(base):
            base = base.args[0]
        pending = [base]
        while pending:
            node = pending.pop()
            shared.add(node)
            pending += [
                user
                for user in node.users
                if user.args[0] is node and user not in shared and (_is_view(user) or _written(user))
            ]
    return shared


def _written(node: fx.Node) -> Any:
    """What a node changes in place, or None."""
    return node.args[0] if node.op == "call_function" and _changes(node.target) else None


def _changes(target: Any) -> bool:
    return isinstance(target, OpOverload) and target._schema.is_mutable


def _is_view(node: Any) -> bool:
    """Whether the result shares memory with the first argument, but is not changed."""
    if node.target is operator.getitem:
        return _is_view(node.args[0])
    if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
        return False
    return bool(node.target.is_view)
