"""An ONNX graph under construction, and the tensors in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

ELEMENT_TYPES: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8,
    torch.int16: TensorProto.INT16,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}


@dataclass(frozen=True)
class Value:
    """A tensor of the graph, by its name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def dim(self) -> int:
        """How many axes it has."""
        return len(self.shape)


Name = str
Operand = Value | Name | None


class OnnxGraph:
    """Nodes and constants in the order they are added; every value has a name of its own.

    Attributes
    ----------
    origin : str
        The operator whose nodes are being added.
    places_in_whole : dict
        For the places of maxima, counted through each image, the same places counted through the whole tensor.
    """

    def __init__(self) -> None:
        self.origin = ""
        self.places_in_whole: dict[Name, Name] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self._names: dict[tuple[Any, ...], Name] = {}
        self._origins: list[str] = []
        self._count = 0
        self._made: set[Name] = set()
        self._outputs: dict[Name, Name] = {}
        self._returned: list[Name] = []

    def add(self, operator: str, *operands: Operand, **attributes: Any) -> Name:
        """A node with one result, whose name is returned; None stands for an optional input left out."""
        return self.add_several(operator, operands, 1, **attributes)[0]

    def add_several(
        self, operator: str, operands: Sequence[Operand], results: int, **attributes: Any
    ) -> list[Name]:
        """A node with several results."""
        inputs = [each.name if isinstance(each, Value) else each or "" for each in operands]
        outputs = [self._name() for _ in range(results)]
        self.nodes.append(helper.make_node(operator, inputs, outputs, **attributes))
        self._origins.append(self.origin)
        self._made.update(outputs)
        return outputs

    def constant(self, tensor: Tensor) -> Name:
        """A tensor whose values are fixed; equal ones are stored once."""
        array = tensor.detach().contiguous().numpy()
        key = (array.tobytes(), array.dtype.str, array.shape)
        if key not in self._names:
            name = self._names[key] = self._name()
            self.constants.append(
                numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
            )
        return self._names[key]

    def scalar(self, value: float, dtype: torch.dtype) -> Name:
        """A number as a tensor without axes."""
        return self.constant(torch.tensor(value, dtype=dtype))

    def integers(self, values: Sequence[int]) -> Name:
        """Sizes, axes or places, as many operators take them."""
        return self.constant(torch.tensor(list(values), dtype=torch.int64))

    def reshaped(self, operand: Value | Name, shape: Sequence[int]) -> Name:
        """The same values in another shape."""
        return self.add("Reshape", operand, self.integers(shape), allowzero=1)

    def cast(self, operand: Value | Name, dtype: torch.dtype) -> Name:
        """The same values in another dtype."""
        return self.add("Cast", operand, to=ELEMENT_TYPES[dtype])

    def returned(self, value: Value, name: Name) -> None:
        """Make a value an output of the graph by a name of its own."""
        made = value.name in self._made and value.name not in self._outputs
        if made:
            self._outputs[value.name] = name
            self._returned.append(value.name)
        else:
            # An input, a constant, or an output already.
            self.nodes.append(helper.make_node("Identity", [value.name], [name]))
            self._returned.append(name)

    def name_nodes(self) -> None:
        """Name the nodes, so that what ONNX Runtime says about one tells the operator."""
        for index, (node, origin) in enumerate(zip(self.nodes, self._origins, strict=False)):
            node.name = f"{origin}#{index}"

    def finished(self) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
        """The nodes, with the outputs' names, and the constants: those that an output depends on."""
        needed = set(self._returned)
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        for node in kept:
            for names in (node.input, node.output):
                names[:] = [self._outputs.get(name, name) for name in names]
        return kept[::-1], [each for each in self.constants if each.name in needed]

    def _name(self) -> Name:
        self._count += 1
        return f"v{self._count}"
