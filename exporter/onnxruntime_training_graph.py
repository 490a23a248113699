"""A training graph of ONNX Runtime made fit and fast for its CPU kernels.

Batch norm has no gradient kernel there and group norm no gradient at all, so gradients are built over a node that stands
in for them, and both nodes are replaced here by operators over (N, C, P), P the pixels of a channel: forward three that
write a tensor of that size, backward five, which automatic differentiation of the same formulas would make three times as
many. The formulas are those of Ioffe and Szegedy, "Batch Normalization", ICML 2015, section 3, with sums over groups of
channels in place of the batch for group norm.

The slow kernels of ReLU's gradient, and of a convolution's where few pixels are left, are replaced as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from frostline.exporter.onnxruntime_training_functions import STAND_IN

STAND_IN_GRADIENT = "BatchNormalizationGrad"
MICROSOFT = "com.microsoft"

FEW_PIXELS = 16
"""Convolutions whose output has at most so many pixels a channel get the gradient of their input by other operators."""


@dataclass(frozen=True)
class Norm:
    """What the stand-in of one norm stands for.

    Attributes
    ----------
    groups : int
        Groups of channels, or 0 for a norm over the batch.
    shape : tuple of int
        Of its input, (N, C, ...).
    """

    groups: int
    shape: tuple[int, ...]
    epsilon: float
    momentum: float


def prepare_gradients(model: ModelProto) -> dict[str, Norm]:
    """Make a forward graph one that gradients can be built over, in place.

    Layer norms hand out their means and deviations, which the gradients ask for; stand-ins lose the attributes that the
    runtime does not know.

    Returns
    -------
    dict
        The norms by the fourth output of their stand-ins.
    """
    norms: dict[str, Norm] = {}
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            node.output.extend(
                f"{node.output[0]}.{kind}" for kind in ("mean", "deviation")[len(node.output) - 1 :]
            )
        if node.op_type == STAND_IN:
            given = {each.name: helper.get_attribute_value(each) for each in node.attribute}
            norms[node.output[3]] = Norm(
                given["groups"], tuple(given["shape"]), given["epsilon"], given["momentum"]
            )
            known = [each for each in node.attribute if each.name in ("epsilon", "momentum")]
            del node.attribute[:]
            node.attribute.extend(known)
    if norms and not any(each.domain == MICROSOFT for each in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return norms


def expand_training_graph(model: ModelProto, norms: Mapping[str, Norm]) -> None:
    """Put operators in the place of norms' stand-ins and of slow kernels, in place."""
    expanded: list[NodeProto] = []
    constants: list[TensorProto] = []
    forward: dict[str, _NormNodes] = {}
    shapes = _shapes(model)
    for index, node in enumerate(model.graph.node):
        writer = _Writer(f"expanded.{index}", expanded, constants)
        if node.op_type == STAND_IN:
            forward[node.output[3]] = _NormNodes(norms[node.output[3]], writer)
            forward[node.output[3]].forward(node)
        elif node.op_type == STAND_IN_GRADIENT:
            forward[node.input[3]].backward(node, writer)
        elif node.op_type == "ReluGrad":
            _relu_gradient(node, writer)
        elif node.op_type == "ConvGrad" and _has_few_pixels(node, shapes):
            _convolution_gradient(node, shapes, writer)
        else:
            expanded.append(node)
    del model.graph.node[:]
    model.graph.node.extend(expanded)
    model.graph.initializer.extend(constants)
    # Inferred for nodes that are gone.
    made = {name for node in expanded for name in node.output}
    kept = [each for each in model.graph.value_info if each.name in made]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)


Shapes = Mapping[str, tuple[int, ...]]


def _shapes(model: ModelProto) -> Shapes:
    graph = model.graph
    return {
        each.name: tuple(axis.dim_value for axis in each.type.tensor_type.shape.dim)
        for each in [*graph.input, *graph.value_info]
    }


class _Writer:
    """Adds nodes and constants under names of their own."""

    def __init__(self, prefix: str, nodes: list[NodeProto], constants: list[TensorProto]) -> None:
        self._prefix = prefix
        self._nodes = nodes
        self._constants = constants
        self._count = itertools.count()

    def copied(self, node: NodeProto) -> NodeProto:
        """A copy of a node, added."""
        copy = NodeProto()
        copy.CopyFrom(node)
        self._nodes.append(copy)
        return copy

    def constant(self, value: Any) -> str:
        name = self._name()
        self._constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def __call__(self, operator: str, *inputs: str, result: str = "", **attributes: Any) -> str:
        """The name of a new node's result."""
        result = result or self._name()
        self._nodes.append(helper.make_node(operator, inputs, [result], name=self._name(), **attributes))
        return result

    def scaled(self, tensor: str, factor: float, result: str = "") -> str:
        return self("Mul", tensor, self.constant(np.float32(factor)), result=result)

    def reshaped(self, tensor: str, shape: Iterable[int], result: str = "") -> str:
        return self("Reshape", tensor, self.constant(np.array([*shape], np.int64)), result=result)

    def summed(self, tensor: str, axis: int) -> str:
        return self("ReduceSum", tensor, self.constant(np.array([axis], np.int64)), keepdims=1)

    def _name(self) -> str:
        return f"{self._prefix}.{next(self._count)}"


class _NormNodes:
    """The operators of one norm. Statistics are (N, G, 1) or (1, C, 1); spread, (N, C, 1) or (1, C, 1)."""

    def __init__(self, norm: Norm, writer: _Writer) -> None:
        self._norm = norm
        self._add = writer
        self._samples, self._channels, *pixels = norm.shape
        self._pixels = math.prod(pixels)
        shared = self._channels // norm.groups if norm.groups else self._samples
        self._count = shared * self._pixels

    def forward(self, node: NodeProto) -> None:
        """Y = (x - mean) · deviation⁻¹ · weight + bias, and the running statistics."""
        add = self._add
        x, weight, bias, running_mean, running_variance = node.input
        y, new_mean, new_variance, *_ = node.output
        x = add.reshaped(x, self._flat)
        mean = add.scaled(self._pooled(add.summed(x, 2)), 1 / self._count)
        # Kept for the backward pass in place of x. In two passes: a difference of sums would cancel.
        self._centred = add("Sub", x, self._spread(mean))
        squares = add("ReduceSumSquare", self._centred, axes=[2], keepdims=1)
        squares = self._pooled(squares)
        variance = add.scaled(squares, 1 / self._count)
        deviation = add("Sqrt", add("Add", variance, add.constant(np.float32(self._norm.epsilon))))
        self._inverse = add("Div", add.constant(np.float32(1)), deviation)
        self._weight = add.reshaped(weight, (1, self._channels, 1))
        self._factor = add("Mul", self._spread(self._inverse), self._weight)
        scaled = add("Mul", self._centred, self._factor)
        shifted = add("Add", scaled, add.reshaped(bias, (1, self._channels, 1)))
        add.reshaped(shifted, self._norm.shape, result=y)
        if not self._norm.groups:
            unbiased = add.scaled(squares, 1 / max(self._count - 1, 1))
            self._running(running_mean, mean, new_mean)
            self._running(running_variance, unbiased, new_variance)

    def backward(self, node: NodeProto, add: _Writer) -> None:
        """The gradients of x, weight and bias, those that are asked for."""
        self._add = add
        of_x, of_weight, of_bias = [*node.output, "", ""][:3]
        gradient = add.reshaped(node.input[0], self._flat)
        sums = add.summed(gradient, 2)
        products = add.summed(add("Mul", gradient, self._centred), 2)
        channels = (self._channels,)
        if of_bias:
            add.reshaped(add.summed(sums, 0), channels, result=of_bias)
        if of_weight:
            normalised = add("Mul", products, self._spread(self._inverse))
            add.reshaped(add.summed(normalised, 0), channels, result=of_weight)
        if of_x:
            self._backward_of_x(gradient, sums, products, of_x)

    def _backward_of_x(self, gradient: str, sums: str, products: str, result: str) -> None:
        # With g the gradient of y, w the weight, d the centred x and s the inverse deviation:
        # g·w·s - s·mean(g·w) - d·s³·mean(g·w·d)
        add = self._add
        mean = add.scaled(self._pooled(add("Mul", sums, self._weight)), -1 / self._count)
        product = add.scaled(self._pooled(add("Mul", products, self._weight)), -1 / self._count)
        cube = add("Mul", add("Mul", self._inverse, self._inverse), self._inverse)
        offset = self._spread(add("Mul", mean, self._inverse))
        slope = self._spread(add("Mul", product, cube))
        direct = add("Mul", gradient, self._factor)
        total = add("Add", direct, add("Mul", self._centred, slope))
        add.reshaped(add("Add", total, offset), self._norm.shape, result=result)

    def _running(self, before: str, now: str, result: str) -> None:
        add, momentum = self._add, self._norm.momentum
        now = add.scaled(add.reshaped(now, (self._channels,)), momentum)
        add("Add", add.scaled(before, 1 - momentum), now, result=result)

    def _pooled(self, sums: str) -> str:
        """Sums of each sample's channels, (N, C, 1), to sums over what shares statistics."""
        groups = self._norm.groups
        if not groups:
            return self._add.summed(sums, 0)
        return self._add.summed(self._add.reshaped(sums, (self._samples, groups, -1)), 2)

    def _spread(self, statistics: str) -> str:
        groups = self._norm.groups
        if not groups or groups == self._channels:
            return statistics
        wide = (self._samples, groups, self._channels // groups)
        expanded = self._add("Expand", statistics, self._add.constant(np.array(wide, np.int64)))
        return self._add.reshaped(expanded, (self._samples, self._channels, 1))

    @property
    def _flat(self) -> Sequence[int]:
        return self._samples, self._channels, self._pixels


def _has_few_pixels(node: NodeProto, shapes: Shapes) -> bool:
    """Whether a convolution's gradient asks for that of an input, and its output is small."""
    gradient, x, weight = (shapes.get(name, ()) for name in node.input)
    known = len(gradient) == len(x) == len(weight) > 2 and min(*gradient, *x) > 0
    # In groups, the kernel has fewer channels than the input.
    return bool(node.output[0]) and known and weight[1] == x[1] and math.prod(gradient[2:]) <= FEW_PIXELS


def _convolution_gradient(node: NodeProto, shapes: Shapes, add: _Writer) -> None:
    """The gradient of a convolution's input, by two products over the whole batch.

    The kernel of ConvGrad goes through the weights once for each sample, which takes longer than to multiply by so few
    pixels. Here the first product turns the gradient (N P, O) into what each of the K places of the kernel says of each
    channel (N P, C K); the second, with ones where a place of the kernel meets a pixel of x, adds up what is said of it.
    """
    gradient, x, weight = node.input
    samples, _, *pixels = shapes[gradient]
    outputs, channels, *kernel = shapes[weight]
    count, places = math.prod(pixels), math.prod(kernel)
    of_pixels = add("Transpose", add.reshaped(gradient, (samples, outputs, count)), perm=[0, 2, 1])
    of_pixels = add.reshaped(of_pixels, (samples * count, outputs))
    said = add("MatMul", of_pixels, add.reshaped(weight, (outputs, channels * places)))
    said = add.reshaped(said, (samples, count, channels, places))
    said = add.reshaped(add("Transpose", said, perm=[0, 2, 1, 3]), (samples * channels, count * places))
    meets = add.constant(_meetings(node, shapes[x][2:], pixels, kernel))
    add.reshaped(add("MatMul", said, meets), shapes[x], result=node.output[0])
    if any(node.output[1:]):
        rest = add.copied(node)
        rest.output[0] = ""


def _meetings(
    node: NodeProto, size: Sequence[int], pixels: Sequence[int], kernel: Sequence[int]
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """1 where a pixel of the output (P), at a place of the kernel (K), reads a pixel of x (Q), as (P K, Q), else 0."""
    given = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    axes = range(len(size))
    strides, dilations = given.get("strides", [1 for _ in axes]), given.get("dilations", [1 for _ in axes])
    pads = given.get("pads", [0 for _ in axes])
    meetings = np.zeros((*pixels, *kernel, *size), np.float32)
    for pixel in np.ndindex(*pixels):
        for place in np.ndindex(*kernel):
            read = tuple(pixel[i] * strides[i] + place[i] * dilations[i] - pads[i] for i in axes)
            if all(0 <= read[i] < size[i] for i in axes):
                meetings[(*pixel, *place, *read)] = 1
    return meetings.reshape(math.prod(pixels) * math.prod(kernel), math.prod(size))


def _relu_gradient(node: NodeProto, add: _Writer) -> None:
    # The kernel of ReluGrad branches on every value; these three are four times as fast together.
    gradient, x_or_y = node.input
    positive = add("Greater", x_or_y, add.constant(np.float32(0)))
    add("Mul", gradient, add("Cast", positive, to=TensorProto.FLOAT), result=node.output[0])
