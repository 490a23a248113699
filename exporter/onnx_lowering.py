"""Lowering of traced programs to ONNX.

A program in ONNX writes nothing: the new values of what it would write are outputs, named for the inputs they follow.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from frostline.exporter.executorch_lowering import UnsupportedOperators
from frostline.exporter.onnx_operators.graph import ELEMENT_TYPES, OnnxGraph, Value
from frostline.exporter.onnx_operators.table import IN_SINGLE_PRECISION, OPERATORS
from frostline.exporter.training_step import TracedProgram
from frostline.protocol.manifest import NEW

OPSET = 18
"""The first with reductions in scatters, and read by every ONNX Runtime since 1.14 (February 2023)."""

IR_VERSION = 8
"""The one that came with the operator set."""

NO_OPERATOR = "ONNX has no operator for it"
NOT_SO = "ONNX cannot say it with these arguments"

aten = torch.ops.aten


def lower_to_onnx(
    program: TracedProgram, arguments: Sequence[Tensor], results: Sequence[str], *, traceable: bool = False
) -> bytes:
    """Write a traced program as an ONNX model, whose nodes are named for the operators they come from if `traceable`.

    Its inputs are the program's, by name and in order. Its outputs are what the program returns, named `results`, then
    `new.<input>` for each input that it writes.

    Raises
    ------
    UnsupportedOperators
        If ONNX cannot say some operators.
    """
    graph = program.graph_module
    emitter = _Emitter(graph, dict(zip(_placeholders(graph), program.inputs, strict=True)))
    values = emitter.run(*arguments)
    named = [*(NEW + name for name in program.written), *results]
    outputs = [emitter.named(value, name) for value, name in zip(values, named, strict=True)]
    written = len(program.written)
    inputs = [
        _described(Value(n, tuple(t.shape), t.dtype)) for n, t in zip(program.inputs, arguments, strict=True)
    ]
    if traceable:
        emitter.onnx_graph.name_nodes()
    return _serialized(
        emitter.onnx_graph, inputs, [_described(v) for v in outputs[written:] + outputs[:written]]
    )


def _placeholders(graph: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.find_nodes(op="placeholder")]


def _described(value: Value) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(value.name, ELEMENT_TYPES[value.dtype], value.shape)


def _serialized(
    graph: OnnxGraph, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]
) -> bytes:
    nodes, constants = graph.finished()
    whole = helper.make_graph(nodes, "program", inputs, outputs, constants)
    model = helper.make_model(
        whole,
        producer_name="frostline",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    return bytes(model.SerializeToString(deterministic=True))


class _Emitter(fx.Interpreter):
    """Interprets a graph over names: each operator adds its nodes."""

    def __init__(self, graph: fx.GraphModule, inputs: Mapping[str, str]) -> None:
        super().__init__(graph)
        self.onnx_graph = OnnxGraph()
        self._inputs = inputs

    def run_node(self, n: fx.Node) -> Any:
        """Add a node's ONNX nodes; what it returns is known from the trace."""
        self._result: Any = n.meta.get("val")
        return super().run_node(n)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Value:
        """An input."""
        argument = super().placeholder(target, args, kwargs)
        return Value(self._inputs[target], tuple(argument.shape), argument.dtype)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Value:
        """A tensor with fixed values."""
        tensor = super().get_attr(target, args, kwargs)
        # NumPy, which writes the constants, does not know bfloat16.
        stored = tensor.to(torch.float32) if tensor.dtype == torch.bfloat16 else tensor
        value = Value(self.onnx_graph.constant(stored), tuple(tensor.shape), stored.dtype)
        return self._cast(value, tensor.dtype)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An operator."""
        if target is operator.getitem:
            return args[0][args[1]]
        options = {name: value for name, value in kwargs.items() if name not in _PLACEMENT}
        self.onnx_graph.origin = _name(target)
        elsewhere = (
            {} if target in _MOVING else _COMPUTED_IN | (_SINGLE if target in IN_SINGLE_PRECISION else {})
        )
        given = pytree.tree_leaves((args, options, self._result))
        if not elsewhere or not any(getattr(each, "dtype", None) in elsewhere for each in given):
            return self._emitted(target, args, options, self._result)
        return self._emitted_in(elsewhere, target, args, options)

    def _emitted(self, target: Any, args: Any, options: Any, result: Any) -> Any:
        """The results of an operator, which PyTorch returns as `result`."""
        emit = OPERATORS.get(target)
        try:
            made = NotImplemented if emit is None else emit(self.onnx_graph, result, *args, **options)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise UnsupportedOperators([_name(target)], NOT_SO) from error
        if made is NotImplemented:
            raise UnsupportedOperators([_name(target)], NO_OPERATOR if emit is None else NOT_SO)
        if isinstance(made, str | Value):
            return _standing_for(made, result)
        return [
            None if name is None else _standing_for(name, each)
            for name, each in zip(made, result, strict=False)
        ]

    def _emitted_in(
        self, dtypes: Mapping[torch.dtype, torch.dtype], target: Any, args: Any, options: Any
    ) -> Any:
        """The results of an operator computed in other dtypes, rounded to those asked for."""

        def before(value: Any) -> Any:
            if isinstance(value, torch.dtype):
                return dtypes.get(value, value)
            dtype = dtypes.get(value.dtype) if isinstance(value, Value | Tensor) else None
            if dtype is None:
                return value
            if isinstance(value, Tensor):
                return torch.empty(value.shape, dtype=dtype, device="meta")
            return self._cast(value, dtype)

        args, options, result = pytree.tree_map(before, (args, options, self._result))
        made = self._emitted(target, args, options, result)
        if isinstance(made, Value):
            return self._cast(made, self._result.dtype)
        return [
            None if value is None else self._cast(value, each.dtype)
            for value, each in zip(made, self._result, strict=False)
        ]

    def _cast(self, value: Value, dtype: torch.dtype) -> Value:
        if value.dtype == dtype:
            return value
        return Value(self.onnx_graph.cast(value, dtype), value.shape, dtype)

    def output(self, target: Any, args: Any, kwargs: Any) -> list[Value]:
        """The graph's results."""
        return list(pytree.tree_leaves(args))

    def named(self, value: Value, name: str) -> Value:
        """The same value under a name of its own."""
        self.onnx_graph.returned(value, name)
        return Value(name, value.shape, value.dtype)


_PLACEMENT = {"device", "layout", "memory_format", "pin_memory", "non_blocking"}

_COMPUTED_IN = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.int16: torch.int32,
    torch.int8: torch.int32,
    torch.uint8: torch.int32,
}
"""Dtypes that ONNX Runtime has few operators for, and those that it has them for."""

_SINGLE = {torch.float64: torch.float32}

_MOVING = {aten._to_copy.default, aten.alias.default, aten.clone.default, aten.detach.default}
"""Operators that take any dtype."""


def _standing_for(made: str | Value, result: Tensor) -> Value:
    name = made if isinstance(made, str) else made.name
    return Value(name, tuple(result.shape), result.dtype)


def _name(target: Any) -> str:
    return target._schema.name.replace("::", ".") if isinstance(target, OpOverload) else str(target)
