"""Traces a model once into a graph of operators, with the shape of every value at an example batch.

The trace is torch.fx's symbolic one (Reed et al., "torch.fx: Practical Program Capture and Transformation for Deep
Learning in Python", MLSys 2022): it follows the model's ``forward`` with stand-in values, so a branch that depends
on a tensor's content cannot be followed and is reported instead.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from frostline.protocol.errors import UsageError


@dataclass(frozen=True)
class TensorSize:
    """Size of one traced tensor at the example batch.

    Attributes
    ----------
    shape
        With the batch as the first dimension.
    nbytes
        Bytes of its elements; zero for a view of another value.
    dtype
        Element type.
    """

    shape: tuple[int, ...]
    nbytes: int
    dtype: torch.dtype


@dataclass(frozen=True)
class TracedModel:
    """A model as a sequence of steps.

    Attributes
    ----------
    module
        The model itself; the steps refer to its children by qualified name.
    source
        The node that stands for the model's input.
    steps
        The nodes that compute, in the order they run.
    result
        The node whose value the model returns.
    sizes
        Size of each node's value, for the nodes whose value is a tensor.
    calls
        For each child by qualified name the nodes its calls returned, in order; ``None`` for a call that returned
        something other than one tensor. Inner children come before those that contain them.
    constants
        Tensors that ``forward`` made without using its input, by the name the graph gives them.
    batch
        Samples in the example.
    """

    module: nn.Module
    source: fx.Node
    steps: tuple[fx.Node, ...]
    result: fx.Node
    sizes: Mapping[fx.Node, TensorSize]
    calls: Mapping[str, tuple[fx.Node | None, ...]]
    constants: Mapping[str, torch.Tensor]
    batch: int

    def is_shape(self, node: fx.Node) -> bool:
        """Tell whether a node only reads the shape of a tensor, or one entry of it.

        Parameters
        ----------
        node
            Any node of the graph.

        Returns
        -------
        bool
            True for ``x.shape``, ``x.size()``, ``x.size(1)``, ``x.shape[1]`` of a tensor whose first dimension is
            the batch; such a node can be repeated on any other tensor of the same batch.
        """
        try:
            tensor, _ = shape_read(node)
        except ValueError:
            return False
        return tensor in self.sizes and self.sizes[tensor].shape[:1] == (self.batch,)


def shape_read(node: fx.Node) -> tuple[fx.Node, int | None]:
    """Resolve a node that reads a shape.

    Parameters
    ----------
    node
        Any node of the graph.

    Returns
    -------
    tuple[fx.Node, int | None]
        The node whose shape is read, and the dimension, or ``None`` where the whole shape is.

    Raises
    ------
    ValueError
        The node does something else.
    """
    first = node.args[0] if node.args else None
    if isinstance(first, fx.Node):
        whole = (node.target is getattr and node.args[1:] == ("shape",)) or (
            node.target == "size" and len(node.args) == 1 and not node.kwargs
        )
        if whole:
            return first, None
        index = node.args[1] if len(node.args) == 2 else None
        if isinstance(index, int):
            if node.op == "call_method" and node.target == "size":
                return first, index
            if node.target is operator.getitem:
                tensor, dimension = shape_read(first)
                if dimension is None:
                    return tensor, index
    raise ValueError(f"{node.name} reads no shape")


def describe(node: fx.Node) -> str:
    """Name a node in the terms of the model: the child it calls, or the operator and the child it is in.

    Parameters
    ----------
    node
        Any node of the graph.

    Returns
    -------
    str
        For example ``'layer1.0.conv1'`` or ``'add_1' in 'layer1.0'``.
    """
    if node.op == "call_module":
        return f"'{node.target}'"
    if node.op == "placeholder":
        return "the model's input"
    owner = _owner(node)
    return f"'{node.name}' in '{owner}'" if owner else f"'{node.name}' in the model's forward"


def trace(module: nn.Module, example: torch.Tensor, whole: Collection[str]) -> TracedModel:
    """Trace ``module`` and measure every value at ``example``.

    The model runs once on ``example``, in evaluation mode and without gradients; its parameters, buffers and mode
    are the same afterwards.

    Parameters
    ----------
    module
        A model of one tensor in, one tensor out; further arguments of ``forward`` keep their defaults.
    example
        One batch of input, the batch as the first dimension, on the model's device.
    whole
        Qualified names of children to keep as one step each instead of tracing into them.

    Returns
    -------
    TracedModel
        Steps that refer to the children of ``module``.

    Raises
    ------
    UsageError
        The model cannot be traced, takes or returns more than one tensor, behaves differently in training in a way
        the graph cannot hold, or does not run on ``example``.
    """
    title = type(module).__name__
    _check_inputs(module)
    with mode(module, training=True):
        training = _trace_once(module, whole)
    with mode(module, training=False):
        evaluation = _trace_once(module, whole)
        _check_same_in_both_modes(title, training.graph, evaluation.graph)
        sizes = _measure(module, evaluation, example)
    result = _result(title, evaluation.graph, sizes)
    nodes = tuple(evaluation.graph.nodes)
    return TracedModel(
        module=module,
        source=nodes[0],
        steps=tuple(node for node in nodes if node.op.startswith("call_")),
        result=result,
        sizes=sizes,
        calls={name: tuple(outputs) for name, outputs in evaluation.calls.items()},
        constants=evaluation.constants,
        batch=example.shape[0],
    )


class _ModelTracer(fx.Tracer):
    """Keeps torch's layers and the children in ``whole`` as single steps and records what each child returned."""

    def __init__(self, whole: Collection[str]) -> None:
        super().__init__()
        self.whole = whole
        self.calls: dict[str, list[fx.Node | None]] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        inside = any(name.startswith(f"{module_qualified_name}.") for name in self.whole)
        if inside:
            return False
        return module_qualified_name in self.whole or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        # fx would make an input of every argument; called with one, forward fills in its own defaults.
        def forward(module: nn.Module, model_input: Any) -> Any:
            return root_fn(module, model_input)

        return super().create_args_for_root(forward, is_module, concrete_args)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or name
            raise
        self.calls.setdefault(name, []).append(result.node if isinstance(result, fx.Proxy) else None)
        return result


def _trace_once(module: nn.Module, whole: Collection[str]) -> _ModelTracer:
    title = type(module).__name__
    tracer = _ModelTracer(whole)
    before = set(vars(module))
    try:
        tracer.trace(module)
    except Exception as error:  # tracing runs the model's code, which may raise anything
        where = f"module '{tracer.failed}'" if tracer.failed else "its forward"
        raise UsageError(
            f"model {title} cannot be traced, in {where}: {first_line(error)}: make it independent of tensor "
            "values, or name a block that contains it, which is then kept whole"
        ) from error
    finally:
        # fx leaves the tensors it met on the model; the model is the caller's, so they move to the tracer.
        for name in set(vars(module)) - before:
            tracer.constants[name] = vars(module).pop(name)
    return tracer


def _check_inputs(module: nn.Module) -> None:
    required = [
        each.name
        for each in inspect.signature(module.forward).parameters.values()
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    if len(required) > 1:
        raise UsageError(
            f"model {type(module).__name__} takes {len(required)} inputs ({', '.join(required)}): "
            "make its forward take one tensor"
        )


def _check_same_in_both_modes(title: str, training: fx.Graph, evaluation: fx.Graph) -> None:
    for one, other in zip_longest(training.nodes, evaluation.nodes):
        if one is None or other is None or one.format_node() != other.format_node():
            node = one or other
            raise UsageError(
                f"model {title} runs differently in training and evaluation at {describe(node)}: use a layer such as "
                "nn.Dropout there instead of asking self.training, or name a block that contains it"
            )


class _SizeRecorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.sizes: dict[fx.Node, TensorSize] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            nbytes = 0 if self._is_view(n, value) else value.numel() * value.element_size()
            self.sizes[n] = TensorSize(tuple(value.shape), nbytes, value.dtype)
        return value

    def _is_view(self, node: fx.Node, value: torch.Tensor) -> bool:
        inputs = pytree.tree_leaves([self.env.get(each) for each in node.all_input_nodes])
        memory = {_memory(each) for each in inputs if isinstance(each, torch.Tensor)}
        return _memory(value) in memory


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _measure(module: nn.Module, tracer: _ModelTracer, example: torch.Tensor) -> dict[fx.Node, TensorSize]:
    graph = tracer.graph
    attributes: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            attributes[node.target] = find_attribute(module, tracer.constants, node.target)
    recorder = _SizeRecorder(_executable(attributes, graph))
    try:
        with torch.no_grad():
            recorder.run(example)
    except Exception as error:  # running the model raises whatever its operators raise
        raise UsageError(
            f"model {type(module).__name__} does not run on an input of shape {list(example.shape)}, "
            f"{str(example.dtype).removeprefix('torch.')}: {first_line(error)}: {_hint(error, example)}"
        ) from error
    return recorder.sizes


def _hint(error: Exception, example: torch.Tensor) -> str:
    if "indices" in str(error) and torch.is_floating_point(example):
        return "give its vocabulary, if it takes token ids"
    return "correct the input shape or the model"


def _executable(attributes: dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    executable = fx.GraphModule(attributes, graph)
    executable.training = False
    return executable


def find_attribute(module: nn.Module, constants: Mapping[str, torch.Tensor], target: str) -> Any:
    """Return the child, parameter, buffer or constant a node refers to.

    Parameters
    ----------
    module
        The traced model.
    constants
        `TracedModel.constants`.
    target
        Qualified name.

    Returns
    -------
    Any
        The object itself, not a copy.
    """
    return constants[target] if target in constants else operator.attrgetter(target)(module)


def _result(title: str, graph: fx.Graph, sizes: Mapping[fx.Node, TensorSize]) -> fx.Node:
    output = next(iter(reversed(graph.nodes)))
    result = output.args[0]
    if not isinstance(result, fx.Node) or result not in sizes:
        kind = (
            "something other than a tensor" if isinstance(result, fx.Node) else f"a {type(result).__name__}"
        )
        raise UsageError(f"model {title} returns {kind}: make its forward return one tensor")
    return result


def _owner(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


@contextmanager
def mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a module and its children in training or evaluation mode for a while; each gets its own mode back."""
    before = {child: child.training for child in module.modules()}
    try:
        module.train(training)
        yield
    finally:
        for child, mode in before.items():
            child.training = mode


def first_line(error: Exception) -> str:
    """Return what an error says, cut to its first line.

    Parameters
    ----------
    error
        Any error, including those whose message is empty or spans lines.

    Returns
    -------
    str
        The first line, or the error's type where it says nothing.
    """
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
