"""Part of a captured model as a module: the operators between two boundaries, over the model's own tensors."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from frostline.exporter.capture import (
    Call,
    Capture,
    calls_of,
    capture,
    grad_mode_kept,
    is_in_place,
    is_size,
    is_view,
    leave_grad_mode,
    name_of,
    shape_of,
)
from frostline.exporter.named_tensors import register, tensors_of
from frostline.protocol.errors import UsageError

aten = torch.ops.aten


@dataclass(frozen=True)
class Feature:
    """A value that crosses a boundary, for one sample.

    Attributes
    ----------
    name : str
        The call that returned it, or the operator.
    shape : tuple of int
        Without the batch.
    batch_axis : int
        Where the batch is in the model's own value.
    step : int
        The step of the model in training that makes it; -1 for the model's input.
    trained : bool
        Whether it is computed with anything that trains, as features are and masks are not.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    batch_axis: int = 0
    step: int = -1
    trained: bool = True

    @property
    def size(self) -> int:
        """Numbers a sample."""
        return math.prod(self.shape)


BEFORE = "before:"
"""What the name of a boundary in front of a call begins with."""


@dataclass(frozen=True)
class Boundary:
    """A place in a model's forward pass, found again in every capture of it.

    Attributes
    ----------
    call : Call or None
        The call it is behind; None for the start of the forward pass.
    before : bool
        Whether it is in front of the call rather than behind it.
    operators : tuple of str
        The name of an operator behind that call that still lies before it, once for each time that it has run by then.
    within : frozenset of Call
        The calls that run between the call and the place, in training: elsewhere an operator of that name is another one.
    otherwise : Boundary or None
        Where it is in captures in which the call computes nothing, as a layer of noise in evaluation.
    """

    call: Call | None
    operators: tuple[str, ...] = ()
    otherwise: Boundary | None = None
    within: frozenset[Call] = frozenset()
    before: bool = False

    @property
    def name(self) -> str:
        """Such as ``layer1``, ``conv2+add`` or ``before:layer2``."""
        path = self.call.path if self.call else ""
        count = f"@{self.call.count}" if self.call and self.call.count else ""
        return "+".join([BEFORE * self.before + path + count, *self.operators])

    def position(self, steps: Sequence[fx.Node]) -> int:
        """The number of the last step before it; -1 if there is none.

        Raises
        ------
        UsageError
            If it is not in the graph.
        """
        last = -1
        if self.call is not None:
            inside = [index for index, node in enumerate(steps) if self.call in calls_of(node)]
            if not inside and self.otherwise is None:
                raise UsageError(f"block {self.name!r} computes nothing: name another child")
            if self.before:
                return inside[0] - 1
            last = inside[-1] if inside else self.otherwise.position(steps)  # type: ignore[union-attr]
        around = {*self.within, *(calls_of(steps[last]) if last >= 0 else ())}
        for wanted in self.operators:
            beyond = last + 1
            while beyond < len(steps) and around.issuperset(calls_of(steps[beyond])):
                if name_of(steps[beyond]) == wanted:
                    break
                beyond += 1
            else:
                raise UsageError(
                    f"the model runs differently in training and evaluation before the end of block {self.name!r}: "
                    "end the block elsewhere, or train all in one with blocks = 1"
                )
            last = beyond
        while last + 1 < len(steps) and steps[last + 1].target is leave_grad_mode:
            last += 1
        return last


def is_packed(features: Sequence[Feature]) -> bool:
    """Whether a boundary's values are handed on side by side in one tensor (N, numbers)."""
    (first, *others) = features
    return bool(others) or first.batch_axis != 0 or not first.dtype.is_floating_point


def handed_on(features: Sequence[Feature]) -> tuple[int, ...]:
    """The shape of one sample of what is handed on over a boundary."""
    return (sum(each.size for each in features),) if is_packed(features) else features[0].shape


class Captures:
    """A model's captures, each made when it is first needed."""

    def __init__(self, module: nn.Module, example: Tensor, vocabulary: int | None = None) -> None:
        self.module, self.vocabulary = module, vocabulary
        self._example = example
        self._made: dict[tuple[bool, int], Capture] = {}

    def of(self, *, training: bool, batch: int | None = None) -> Capture:
        """The capture that holds for batches of a size; by default for that of the example."""
        batch = len(self._example) if batch is None else batch
        in_mode = [made for (mode, _), made in self._made.items() if mode == training]
        for made in in_mode:
            if made.holds(batch):
                return made
        rows = torch.arange(batch) % len(self._example)
        # A second open one would hold for other sizes than the first.
        opened = any(made.open_batch for made in in_mode)
        made = capture(self.module, self._example[rows], training=training, open_batch=not opened)
        self._made[training, batch] = made
        return made


@dataclass(frozen=True)
class PartGraph:
    """A part's operators as a function of its input and its tensors.

    Attributes
    ----------
    run : GraphModule
        Without attributes of its own.
    names : tuple of str
        The tensors it takes after the input.
    constants : tuple of Tensor
        What it takes after those.
    batch : int or None
        The size of batch it is for; None for those that the open capture holds for.
    """

    run: fx.GraphModule
    names: tuple[str, ...]
    constants: tuple[Tensor, ...]
    batch: int | None

    def in_precision(self, dtype: torch.dtype) -> PartGraph:
        """The same in float64, or in float32 as it is."""
        if dtype == torch.float32:
            return self
        run = fx.GraphModule(nn.Module(), fx.Graph())
        run.graph.output(run.graph.graph_copy(self.run.graph, {}))

        def swapped(each: Any) -> Any:
            return dtype if each is torch.float32 else each

        for node in run.graph.nodes:
            node.args, node.kwargs = pytree.tree_map(swapped, (node.args, node.kwargs))
            makes_floats = name_of(node) in _OF_DEFAULT_DTYPE and "dtype" not in node.kwargs
            if node.op == "call_function" and makes_floats and node.meta["val"].dtype == torch.float32:
                node.kwargs = {**node.kwargs, "dtype": dtype}
        run.recompile()
        constants = tuple(each.to(dtype) if each.dtype == torch.float32 else each for each in self.constants)
        return PartGraph(run, self.names, constants, self.batch)


_OF_DEFAULT_DTYPE = {
    *(
        "zeros",
        "ones",
        "empty",
        "full",
        "rand",
        "randn",
        "arange",
        "linspace",
        "logspace",
        "eye",
        "normal",
        "scalar_tensor",
    ),
    *("hann_window", "hamming_window", "tri", "triu_indices", "tril_indices"),
}
"""Operators that make float32 tensors unless they are told otherwise."""


class Span:
    """What a part is of which model: its boundaries, and its graphs once they are needed; copies of a part share it."""

    def __init__(
        self,
        captures: Captures,
        start: Boundary | None,
        end: Boundary | None,
        inputs: Sequence[Feature],
        outputs: Sequence[Feature],
    ) -> None:
        self.captures = captures
        self.start, self.end = start, end
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._graphs: dict[tuple[bool, int | None, torch.dtype], PartGraph] = {}

    def __deepcopy__(self, memo: object) -> Self:
        return self

    @property
    def written(self) -> frozenset[str]:
        """The buffers that its operators write in training."""
        made = self.captures.of(training=True)
        first, last = self.bounds(made)
        return frozenset(
            made.tensors[each]
            for node in made.steps[first:last]
            for each in writes_of(node)
            if each in made.tensors
        )

    def bounds(self, made: Capture) -> tuple[int, int]:
        """Its first step, and the one behind its last."""
        steps = made.steps
        first = self.start.position(steps) + 1 if self.start else 0
        return first, self.end.position(steps) + 1 if self.end else len(steps)

    def graph(
        self, *, training: bool, batch: int | None = None, dtype: torch.dtype = torch.float32
    ) -> PartGraph:
        """The operators for batches of a size, by default of any."""
        made = self.captures.of(training=training, batch=batch)
        key = training, None if made.open_batch else made.batch
        if (*key, dtype) not in self._graphs:
            if (*key, torch.float32) not in self._graphs:
                self._graphs[*key, torch.float32] = self._sliced(made)
            self._graphs[*key, dtype] = self._graphs[*key, torch.float32].in_precision(dtype)
        return self._graphs[*key, dtype]

    def _sliced(self, made: Capture) -> PartGraph:
        steps = made.steps
        first, last = self.bounds(made)
        inputs = crossing(made, first - 1) if self.start else [made.source]
        outputs = crossing(made, last - 1) if self.end else [made.result]
        for boundary, expected, found in (
            (self.start, self.inputs, inputs),
            (self.end, self.outputs, outputs),
        ):
            if boundary and [each.shape for each in expected] != [sample_shape(made, each) for each in found]:
                raise UsageError(
                    f"the model hands on other values in training than in evaluation at the end of block {boundary.name!r}: "
                    "end the block elsewhere, or train all in one with blocks = 1"
                )
        slicer = _Slicer(made, self.inputs if self.start else ())
        return slicer.sliced(steps[first:last], inputs, outputs, self.outputs if self.end else ())


class Part(nn.Module):
    """Runs part of a model, over parameters and buffers that it shares with it, under the model's own names.

    In training mode it is what the model computes in training, in evaluation mode what it computes there.

    Parameters
    ----------
    span : Span
        Which part.
    tensors : mapping
        The model's parameters and buffers by name, those of the part.
    saved : collection of str
        The names that the model's state_dict has.
    """

    def __init__(self, span: Span, tensors: Mapping[str, Tensor], saved: Collection[str]) -> None:
        super().__init__()
        self.span = span
        for name, tensor in tensors.items():
            register(self, name, tensor, saved=name in saved)
        self.names = tuple(tensors)

    def forward(self, x: Tensor) -> Tensor:
        r"""What is handed on to the part, (N, \*input_shape), to what it hands on, (N, \*output_shape)."""
        return self.over(self, x)

    def over(self, holder: nn.Module, x: Tensor) -> Tensor:
        """The same, over the tensors of another module by the same names."""
        made = self.graph_for(x)
        arguments = (x, *(operator.attrgetter(name)(holder) for name in made.names), *made.constants)
        visit = VISITOR.get()
        with grad_mode_kept():
            # Not a call of a module: its hooks, as those that count operations, would take the tensors for its inputs.
            run = made.run.forward if visit is None else _Visiting(made.run, visit).run
            result: Tensor = run(*arguments)
        return result

    def prepare(self, batch: int) -> None:
        """Capture what batches of a size run through in the present mode: it cannot be done while a program is traced."""
        self.span.graph(training=self.training, batch=batch)

    def convolved_tensors(self) -> Iterator[tuple[str, fx.Node]]:
        """The parameters that inputs are convolved with as they are, and the convolution of each."""
        made = self.span.graph(training=True)
        _, *taken = made.run.graph.find_nodes(op="placeholder")
        names = dict(zip(taken, made.names, strict=False))
        for node in made.run.graph.nodes:
            if name_of(node).startswith("conv") and node.op == "call_function" and node.args[1] in names:
                name = names[node.args[1]]
                if isinstance(operator.attrgetter(name)(self), nn.Parameter):
                    yield name, node

    def graph_for(self, x: Tensor) -> PartGraph:
        """The operators that a batch runs through."""
        floats = (each.dtype for each in (*self.parameters(), *self.buffers(), x) if each.is_floating_point())
        return self.span.graph(
            training=self.training, batch=int(x.shape[0]), dtype=next(floats, torch.float32)
        )


def joined(parts: Sequence[Part]) -> Part:
    """Parts that follow each other as one."""
    first, last = parts[0].span, parts[-1].span
    span = Span(first.captures, first.start, last.end, first.inputs, last.outputs)
    tensors = {name: each for part in parts for name, each in tensors_of(part).items()}
    saved = [name for part in parts for name in part.state_dict()]
    return Part(span, tensors, saved).train(parts[0].training)


def prepare_parts(model: nn.Module, batch: int) -> None:
    """Have every part of a model ready for batches of a size, in the mode that the model is in."""
    for module in model.modules():
        if isinstance(module, Part):
            module.prepare(batch)


VISITOR: ContextVar[Callable[[fx.Node], None] | None] = ContextVar("visitor", default=None)
"""Called with the node of each operator that a part runs, before it runs."""


class _Visiting(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, visit: Callable[[fx.Node], None]) -> None:
        super().__init__(module)
        self._visit = visit

    def run_node(self, n: fx.Node) -> Any:
        self._visit(n)
        return super().run_node(n)


def crossing(made: Capture, last: int) -> list[fx.Node]:
    """The values made up to a step that later steps use, in the order they are made."""
    until = last_uses(made)
    return [node for node in [made.source, *made.steps[: last + 1]] if last < until[node]]


def last_uses(made: Capture) -> dict[fx.Node, int]:
    """For the input and each step the last step that uses it: -1 without any, their number for what is returned."""
    steps = made.steps
    position = {node: index for index, node in enumerate(steps)}

    def last_use(node: fx.Node) -> int:
        uses = (len(steps) if user.op == "output" else position[user] for user in readers(node))
        return max(uses, default=-1)

    return {node: last_use(node) for node in (made.source, *steps)}


def readers(node: fx.Node) -> list[fx.Node]:
    """What uses a value; what only uses its size is left out."""
    return [user for user in node.users if not is_size(user)]


def sample_shape(made: Capture, node: fx.Node) -> tuple[int, ...] | None:
    """The shape of one sample of a value; None where no axis is the batch."""
    value = node.meta.get("val")
    axis = made.batch_axis(node) if isinstance(value, Tensor) else None
    if axis is None:
        return None
    lengths = [length for index, length in enumerate(shape_of(node)) if index != axis]
    return tuple(int(each) for each in lengths) if all(isinstance(each, int) for each in lengths) else None


class _Slicer:
    """Copies the steps between two boundaries into a graph of their own."""

    def __init__(self, made: Capture, unpacked: Sequence[Feature]) -> None:
        self._made = made
        self._unpacked = unpacked
        self._graph = fx.Graph()
        self._x = self._graph.placeholder("features")
        self._copies: dict[fx.Node, Any] = {}
        self._tensors: dict[fx.Node, fx.Node] = {}
        self._constants: dict[fx.Node, fx.Node] = {}

    def sliced(
        self,
        steps: Sequence[fx.Node],
        inputs: Sequence[fx.Node],
        outputs: Sequence[fx.Node],
        packed: Sequence[Feature],
    ) -> PartGraph:
        """The graph of the steps, from what crosses the boundary before them to what crosses the one behind."""
        taken = self._placeholders(steps, outputs)
        x = self._x
        if _writes_to(inputs, steps):
            x = self._call(aten.clone.default, x, like=inputs[0].meta["val"])
        if self._unpacked and is_packed(self._unpacked):
            self._copies.update(zip(inputs, self._unpack(x), strict=True))
        else:
            self._copies[inputs[0]] = x
        for node in steps:
            self._copies[node] = self._graph.node_copy(node, self._copy)
        values = [self._copy(node) for node in outputs]
        self._graph.output(self._pack(values, packed) if packed and is_packed(packed) else values[0])
        self._graph.lint()
        made = self._made
        return PartGraph(
            fx.GraphModule(nn.Module(), self._graph),
            tuple(made.tensors[node] for node in taken if node in made.tensors),
            tuple(made.constants[node] for node in taken if node in made.constants),
            None if made.open_batch else made.batch,
        )

    def _placeholders(self, steps: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> list[fx.Node]:
        """Placeholders for what the steps take of the model: parameters and buffers, then constants."""
        used = {each for node in (*steps, *outputs) for each in (node, *node.all_input_nodes)}
        taken = [node for node in (*self._made.tensors, *self._made.constants) if node in used]
        for index, node in enumerate(taken):
            self._copies[node] = self._graph.placeholder(f"tensor_{index}")
            self._copies[node].meta = dict(node.meta)
        return taken

    def _copy(self, node: fx.Node) -> Any:
        """A node's copy; sizes are computed from what the part has."""
        if node not in self._copies:
            self._copies[node] = self._size(node)
        return self._copies[node]

    def _size(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        if not isinstance(value, torch.SymInt):
            return value
        if value.node.expr == self._batch:
            return self._call(aten.sym_size.int, self._x, 0, like=value)
        if name_of(node) == "sym_size" and node.args[0] not in self._copies:
            raise UsageError(
                f"a size of {value} is handed on between blocks: compute it from the values of one block"
            )
        return self._graph.node_copy(node, self._copy)

    @property
    def _batch(self) -> Any:
        length = self._made.source.meta["val"].shape[0]
        return length.node.expr if isinstance(length, torch.SymInt) else None

    def _batch_size(self) -> Any:
        """The batch, as a number or as a node."""
        length = self._made.source.meta["val"].shape[0]
        return self._call(aten.sym_size.int, self._x, 0, like=length) if self._batch is not None else length

    def _unpack(self, x: fx.Node) -> list[fx.Node]:
        """The values of a boundary, from their numbers side by side."""
        batch, start, values = self._batch_size(), 0, []
        for feature in self._unpacked:
            part = self._call(aten.slice.Tensor, x, 1, start, start + feature.size)
            part = self._call(aten.reshape.default, part, [batch, *feature.shape])
            if feature.batch_axis:
                part = self._call(aten.movedim.int, part, 0, feature.batch_axis)
                part = self._call(aten.contiguous.default, part)
            if not feature.dtype.is_floating_point:
                part = self._call(aten.to.dtype, part, feature.dtype)
            values.append(part)
            start += feature.size
        return values

    def _pack(self, values: Sequence[fx.Node], features: Sequence[Feature]) -> fx.Node:
        batch, rows = self._batch_size(), []
        for value, feature in zip(values, features, strict=True):
            if not feature.dtype.is_floating_point:
                value = self._call(aten.to.dtype, value, torch.float32)
            if feature.batch_axis:
                value = self._call(aten.movedim.int, value, feature.batch_axis, 0)
            rows.append(self._call(aten.reshape.default, value, [batch, feature.size]))
        return self._call(aten.cat.default, rows, 1) if len(rows) > 1 else rows[0]

    def _call(self, target: Any, *args: Any, like: Any = None) -> fx.Node:
        node = self._graph.call_function(target, args)
        if like is not None:
            node.meta["val"] = like
        return node


def writes_of(node: fx.Node) -> list[fx.Node]:
    """What a step changes in place: placeholders, and values that are no views."""
    changed = [node.args[0]] if is_in_place(node) else []
    if name_of(node) in ("batch_norm", "instance_norm") and node.args[5]:
        changed = [each for each in node.args[3:5] if each is not None]
    return [base_of(each) for each in changed if isinstance(each, fx.Node)]


def base_of(node: fx.Node) -> fx.Node:
    """What a view, or what was changed in place, is a view of."""
    while node.op == "call_function" and (is_view(node) or is_in_place(node)):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _writes_to(inputs: Sequence[fx.Node], steps: Sequence[fx.Node]) -> bool:
    """Whether any of the steps changes what the part is given."""
    return any(base in inputs for node in steps for base in writes_of(node))
