"""From flat ATen graphs to ExecuTorch's execution dialect, node by node.

ExecuTorch's own way there runs the graph anew in each of some thirty passes, to find out the shapes and dtypes that a traced
graph tells already. Here each node is turned once: views share their base's memory or are copies, scalars are constants,
tensors of one operator have one dtype, and what an operator returns is written to memory allocated before it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
from executorch.exir import memory
from executorch.exir.dialects.edge.op.api import to_variant
from executorch.exir.operator.convert import get_out_args_from_opoverload
from executorch.exir.tensor import TensorSpec
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND as PROMOTION
from torch._prims_common import elementwise_dtypes
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree
from torchgen.model import SchemaKind

aten = torch.ops.aten

_SAME = (aten.alias.default, aten.clone.default, aten.detach.default, aten.lift_fresh_copy.default)
"""What returns its argument: no value is changed while it is read."""

_MOVING_AXES = (aten.permute.default, aten.permute_copy.default, aten.t.default, aten.t_copy.default)
_OF_ONE_DTYPE = {
    aten.add.Tensor: PROMOTION.DEFAULT,
    aten.div.Tensor: PROMOTION.INT_TO_FLOAT,
    aten.minimum.default: PROMOTION.DEFAULT,
    aten.mul.Tensor: PROMOTION.DEFAULT,
    aten.sub.Tensor: PROMOTION.DEFAULT,
}
"""Operators whose portable kernels are slow, or missing, where dtypes are mixed."""

Number = bool | int | float


def outputs_of(graph: fx.Graph) -> list[fx.Node]:
    """What a graph returns, in order."""
    returned = graph.output_node().args[0]
    return [returned] if isinstance(returned, fx.Node) else list(cast(Sequence[fx.Node], returned))


def kernels_of(graph: fx.Graph) -> dict[str, fx.Node]:
    """The runtime's operators, such as ``aten::add.out``, that a graph would call, each with the first node that does."""
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, OpOverload) and not _is_free(node):
            variant = _out_variant(_copying(node.target))
            name = _qualified(variant[0] if variant else node.target)
            found.setdefault(name, node)
    return found


def execution_graph(module: fx.GraphModule, written: Mapping[int, int]) -> fx.GraphModule:
    """The graph over the caller's memory.

    Parameters
    ----------
    module : GraphModule
        Of functional ATen operators that have kernels, each node with its fake value; views and constants are allowed.
    written : mapping of int to int
        For results that are new values of arguments, by their place: which argument. They are written as soon as the old
        value has been read for the last time, and not returned.
    """
    builder = _Builder(module, written)
    for node in module.graph.nodes:
        builder.take(node)
    return builder.finished()


def place_views(graph: fx.Graph) -> None:
    """Once memory is planned, tell where views lie: where their bases do."""
    for view in graph.find_nodes(op="call_function", target=memory.view):
        base, spec = view.all_input_nodes[0].meta["spec"], view.meta["spec"]
        for each in ("const", "mem_id", "mem_obj_id", "mem_offset", "storage"):
            setattr(spec, each, getattr(base, each))


def exported(module: fx.GraphModule) -> ExportedProgram:
    """An execution graph as what ExecuTorch's emitter takes."""
    arguments = module.graph.find_nodes(op="placeholder")
    results = outputs_of(module.graph)
    signature = ExportGraphSignature(
        [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in arguments],
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results],
    )
    inputs = pytree.tree_structure((tuple(range(len(arguments))), {}))
    outputs = pytree.tree_structure(tuple(range(len(results))))
    call = ModuleCallEntry("", ModuleCallSignature([], [], inputs, outputs))
    return _Executed(module, module.graph, signature, {}, {}, [call])


class _Executed(ExportedProgram):
    """A program that is emitted as it is."""

    def validate(self) -> None:
        """Let everything pass: what PyTorch checks is another dialect."""


class _Builder:
    """The new graph while it grows."""

    def __init__(self, module: fx.GraphModule, written: Mapping[int, int]) -> None:
        self._module = module
        self._written = written
        self._root = nn.Module()
        self._graph = fx.Graph()
        self._made: dict[fx.Node, Any] = {}
        self._constants: dict[tuple[Number, torch.dtype], fx.Node] = {}
        self._results: list[fx.Node] = []
        outputs = outputs_of(module.graph)
        self._returned = {node for place, node in enumerate(outputs) if place not in written}

    def take(self, node: fx.Node) -> None:
        """Add what a node of the old graph becomes."""
        if node.op == "output":
            self._results = [self._made[each] for each in outputs_of(self._module.graph)]
        elif node.op == "placeholder":
            made = self._graph.placeholder(node.name)
            made.meta["spec"] = _spec(node.meta["val"])
            self._made[node] = made
        elif node.op == "get_attr":
            self._made[node] = self._constant(getattr(self._module, str(node.target)).detach())
        elif node.target is operator.getitem:
            source, index = node.args
            self._made[node] = self._item(self._made[cast(fx.Node, source)], cast(int, index))
        else:
            self._made[node] = self._call(node)

    def finished(self) -> fx.GraphModule:
        """The whole, with arguments written."""
        arguments = self._graph.find_nodes(op="placeholder")
        returned = [value for place, value in enumerate(self._results) if place not in self._written]
        writes = [(arguments[argument], self._results[place]) for place, argument in self._written.items()]
        writes = [(argument, self._apart(value)) for argument, value in writes if value is not argument]
        position = {node: index for index, node in enumerate(self._graph.nodes)}
        for argument, value in writes:
            # At the end, every new value would have to be kept until then.
            last = max([value, *_readers(argument)], key=position.__getitem__)
            with self._graph.inserting_after(last):
                write = self._graph.call_function(aten.copy_.default, (argument, value))
            write.meta["spec"] = argument.meta["spec"]
        output = self._graph.output(tuple(returned))
        output.meta["spec"] = tuple(value.meta["spec"] for value in returned)
        return fx.GraphModule(self._root, self._graph)

    def _apart(self, value: fx.Node) -> fx.Node:
        """The value in memory that is no argument's, which may be written before it is read."""
        base = value.all_input_nodes[0] if value.target is memory.view else value
        if base.op != "placeholder":
            return value
        shape = list(value.meta["spec"].shape)
        like = torch.empty(shape, dtype=value.meta["spec"].dtype, device="meta")
        return self._computed(aten.view_copy.default, (base, shape), {}, like)

    def _call(self, node: fx.Node) -> Any:
        target = cast(OpOverload, node.target)
        if _is_free(node):
            source: fx.Node = self._made[node.all_input_nodes[0]]
            return source if target in _SAME and node not in self._returned else self._view(node, source)
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._made.__getitem__)
        return self._computed(_copying(target), args, kwargs, node.meta["val"])

    def _view(self, node: fx.Node, source: fx.Node) -> fx.Node:
        """The same values in another shape."""
        value: Tensor = node.meta["val"]
        base = source.all_input_nodes[0] if source.target is memory.view else source
        if node in self._returned:
            # The memory of what is returned is the caller's.
            return self._computed(aten.view_copy.default, (base, list(value.shape)), {}, value)
        return self._shaped(base, list(value.shape))

    def _shaped(self, base: fx.Node, shape: list[int]) -> fx.Node:
        if list(base.meta["spec"].shape) == shape:
            return base
        made = self._graph.call_function(memory.view, (base, shape))
        made.meta["spec"] = TensorSpec(base.meta["spec"].dtype, torch.Size(shape))
        return made

    def _item(self, source: Any, index: int) -> Any:
        if isinstance(source, list | tuple):
            return source[index]
        made = self._graph.call_function(operator.getitem, (source, index))
        made.meta["spec"] = source.meta["spec"][index]
        return made

    def _computed(
        self, target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> fx.Node:
        """An operator that writes what it returns to memory of its own."""
        args, kwargs = self._with_tensors(target, args, kwargs)
        variant = _out_variant(target)
        assert variant is not None, f"{target} has been found to have no kernel"
        function, outs = variant
        known = {argument.name for argument in function._schema.arguments}
        options = {name: option for name, option in kwargs.items() if name in known}
        values = value if isinstance(value, list | tuple) else [value]
        if len(outs) == 1 and isinstance(value, list | tuple):
            options[outs[0]] = self._graph.call_function(
                memory.alloc, ([_allocation(each) for each in values],)
            )
        else:
            for name, each in zip(outs, values, strict=True):
                options[name] = (
                    None if each is None else self._graph.call_function(memory.alloc, (_allocation(each),))
                )
        made = self._graph.call_function(function, args, options)
        specs = [None if each is None else _spec(each) for each in values]
        made.meta["spec"] = specs if isinstance(value, list | tuple) else specs[0]
        return made

    def _with_tensors(
        self, target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with tensors where the operator takes tensors, of one dtype where it wants that."""
        promotion = _OF_ONE_DTYPE.get(target)
        common = None
        if promotion is not None:
            samples = [_sample(arg) for arg in args[:2]]
            common = elementwise_dtypes(*samples, type_promotion_kind=promotion)[1]

        def converted(name: str, place: int | None, arg: Any) -> Any:
            if not _takes_tensor(target, name, place):
                return arg
            if isinstance(arg, Number):
                return self._number(arg, common or torch.tensor(arg).dtype)
            if common is not None and isinstance(arg, fx.Node) and arg.meta["spec"].dtype != common:
                like = torch.empty(arg.meta["spec"].shape, dtype=common, device="meta")
                return self._computed(aten._to_copy.default, (arg,), {"dtype": common}, like)
            return arg

        return (
            tuple(converted("", place, arg) for place, arg in enumerate(args)),
            {name: converted(name, None, arg) for name, arg in kwargs.items()},
        )

    def _number(self, number: Number, dtype: torch.dtype) -> fx.Node:
        key = (number, dtype)
        if key not in self._constants:
            self._constants[key] = self._constant(torch.tensor(number, dtype=dtype))
        return self._constants[key]

    def _constant(self, value: Tensor) -> fx.Node:
        """Constants come first: one serves wherever it is read."""
        name = f"constant_{len(dict(self._root.named_buffers()))}"
        held = value.clone(memory_format=torch.contiguous_format)
        self._root.register_buffer(name, held)
        first = next(iter(self._graph.nodes), None)
        with self._graph.inserting_before(first):
            made = self._graph.get_attr(name)
        made.meta["spec"] = TensorSpec.from_tensor(held, const=True)
        return made


def _readers(node: fx.Node) -> Iterable[fx.Node]:
    """The nodes that read a value, also through views."""
    for user in node.users:
        yield user
        if user.target is memory.view:
            yield from _readers(user)


def _is_free(node: fx.Node) -> bool:
    """Whether nothing has to be computed, since the values lie in memory as they are wanted."""
    target = node.target
    if not isinstance(target, OpOverload) or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if target in _SAME:
        return True
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if target is aten._to_copy.default:
        return before.dtype == after.dtype
    return _RESHAPING.get(target, _never)(node, before, after)


def _never(node: fx.Node, before: Tensor, after: Tensor) -> bool:
    return False


def _always(node: fx.Node, before: Tensor, after: Tensor) -> bool:
    return True


def _keeps_order(node: fx.Node, before: Tensor, after: Tensor) -> bool:
    axes = node.args[1] if len(node.args) > 1 else range(before.dim())[::-1]
    moved = [axis % before.dim() for axis in cast(Sequence[int], axes) if before.shape[axis] != 1]
    return moved == sorted(moved)


def _swaps_nothing(node: fx.Node, before: Tensor, after: Tensor) -> bool:
    axes = list(range(before.dim()))
    first, second = cast(tuple[int, int], node.args[1:3])
    axes[first], axes[second] = axes[second], axes[first]
    moved = [axis for axis in axes if before.shape[axis] != 1]
    return moved == sorted(moved)


def _keeps_size(node: fx.Node, before: Tensor, after: Tensor) -> bool:
    return before.numel() == after.numel()


_RESHAPING: dict[Any, Callable[[fx.Node, Tensor, Tensor], bool]] = {
    aten._unsafe_view.default: _always,
    aten.expand.default: _keeps_size,
    aten.expand_copy.default: _keeps_size,
    aten.permute.default: _keeps_order,
    aten.permute_copy.default: _keeps_order,
    aten.select.int: _keeps_size,
    aten.select_copy.int: _keeps_size,
    aten.slice.Tensor: _keeps_size,
    aten.slice_copy.Tensor: _keeps_size,
    aten.squeeze.default: _always,
    aten.squeeze.dim: _always,
    aten.squeeze.dims: _always,
    aten.t.default: _keeps_order,
    aten.t_copy.default: _keeps_order,
    aten.transpose.int: _swaps_nothing,
    aten.transpose_copy.int: _swaps_nothing,
    aten.unsqueeze.default: _always,
    aten.view.default: _always,
    aten.view_copy.default: _always,
}
"""Whether an operator leaves the values as they lie."""


@cache
def _copying(target: OpOverload) -> OpOverload:
    """The variant of a view operator that copies."""
    if not target.is_view:
        return target
    packet = getattr(aten, f"{target._schema.name.partition('::')[2]}_copy", None)
    return target if packet is None else getattr(packet, target._overloadname)


@cache
def _out_variant(target: OpOverload) -> tuple[OpOverload, tuple[str, ...]] | None:
    """The variant that writes to memory it is given, and the names of those arguments."""
    try:
        function = to_variant(target, SchemaKind.out)
    except (AssertionError, AttributeError, RuntimeError):
        return None
    return function, tuple(get_out_args_from_opoverload(function))


@cache
def _takes_tensor(target: OpOverload, name: str, place: int | None) -> bool:
    """Whether an argument, by name or place, is a tensor."""
    for index, argument in enumerate(target._schema.arguments):
        if argument.name == name or index == place:
            kind = argument.type
            return isinstance(kind, torch.TensorType) or str(kind) == "Optional[Tensor]"
    return False


def _qualified(target: OpOverload) -> str:
    overload = target._overloadname
    return target._schema.name if overload == "default" else f"{target._schema.name}.{overload}"


def _sample(arg: Any) -> Any:
    """Something that promotes as an argument does."""
    if not isinstance(arg, fx.Node):
        return arg
    spec = arg.meta["spec"]
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")


def _allocation(value: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(value.shape), value.dtype


def _spec(value: Tensor) -> TensorSpec:
    """What the runtime needs to know of a tensor; all of them are contiguous."""
    return TensorSpec(value.dtype, value.shape)
