"""Captures what a model computes, in training and in evaluation, as flat graphs of ATen operators.

The capture is `torch.export`'s, non-strict and before autograd: the model's own Python runs, with all that it asks of shapes,
of its mode and of itself, and what is left is what it computed. A graph keeps the model's tensors by their names, the
module each operator ran in, and regions without gradients. Shapes stay open in the batch where the model's code allows it;
where it does not, the model is captured anew for every size of a batch.
"""

from __future__ import annotations

import contextlib
import operator
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.jit import ScriptModule
from torch.nn.modules.module import register_module_buffer_registration_hook
from torch.overrides import TorchFunctionMode

from frostline.exporter.executorch_lowering import quiet
from frostline.exporter.modes import modes_kept
from frostline.exporter.random_numbers import seeded
from frostline.protocol.errors import UsageError, first_line

aten = torch.ops.aten

SMALLEST_OPEN_BATCH = 2
"""Graphs whose batch is open hold for batches of at least this: PyTorch takes a size of 1 for one that broadcasts."""

BY_VALUES = (
    "a compiled step has fixed shapes and no branches; use operators such as torch.where, which keep the shape, and leave "
    "checks of values out"
)
"""What to do about code that depends on what a tensor holds."""


def enter_grad_mode(enabled: bool) -> bool:
    """Switch gradients on or off; what they were before."""
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(enabled)
    return before


def leave_grad_mode(before: bool) -> None:
    """Switch gradients back."""
    torch.set_grad_enabled(before)


@dataclass(frozen=True)
class Call:
    """One call of a child.

    Attributes
    ----------
    path : str
        Its qualified name; empty for the model itself.
    count : int
        How often it had been called before.
    """

    path: str
    count: int = 0


@dataclass(frozen=True)
class Capture:
    """A model in one of its modes, as the operators that it ran on one batch.

    Attributes
    ----------
    graph : fx.Graph
        Placeholders for the tensors and for the input, then the steps, in the order they ran.
    tensors : mapping
        The placeholders of parameters and buffers, by name in the model.
    constants : mapping
        The placeholders of tensors that `forward` made itself, with their values.
    source, result : fx.Node
        The input, and what the model returns.
    batch : int
        Samples in the captured batch.
    open_batch : bool
        Whether the graph holds for batches of other sizes, too: those that `holds` is true of.
    asked : tuple
        What the model's code found true of an open batch, as expressions of `size`.
    """

    graph: fx.Graph
    tensors: Mapping[fx.Node, str]
    constants: Mapping[fx.Node, Tensor]
    source: fx.Node
    result: fx.Node
    batch: int
    open_batch: bool
    size: Any = None
    asked: tuple[Any, ...] = ()

    def holds(self, batch: int) -> bool:
        """Whether the model would run the same operators on a batch of that size.

        What its code asked of the batch's size, as a branch on it or a number rounded up does, has to have the same answer.
        """
        if batch == self.batch:
            return True
        if not self.open_batch or min(batch, self.batch) < SMALLEST_OPEN_BATCH:
            return False
        # One that only some sizes can be written as, such as a multiple, is no symbol.
        return bool(self.size.is_symbol) and all(
            each.subs(self.size, batch) == sympy.true for each in self.asked
        )

    @property
    def steps(self) -> list[fx.Node]:
        """The operators in the order they run, without those that only compute sizes."""
        return [node for node in self.graph.nodes if node.op == "call_function" and not is_size(node)]

    def batch_axis(self, node: fx.Node) -> int | None:
        """The only axis of a value that is as long as the batch."""
        lengths = shape_of(node)
        if self.open_batch:
            # All open sizes follow from the batch; one that is as long need not be written as the batch itself.
            found = [
                axis
                for axis, length in enumerate(lengths)
                if isinstance(length, torch.SymInt) and length.node.hint == self.batch
            ]
        else:
            found = [axis for axis, length in enumerate(lengths) if length == self.batch]
        return found[0] if found and (self.open_batch or found[0] == 0 or len(found) == 1) else None


def is_size(node: fx.Node) -> bool:
    """Whether a node computes a size rather than a tensor."""
    return isinstance(
        node.meta.get("val"), int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool
    )


def shape_of(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """The shape of a node's tensor."""
    return tuple(node.meta["val"].shape)


def sizes_of(node: fx.Node) -> list[int]:
    """The shape of a node's tensor for the captured batch."""
    return [int(each.node.hint) if isinstance(each, torch.SymInt) else each for each in shape_of(node)]


def is_tensor(node: Any) -> bool:
    """Whether a node stands for one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def calls_of(node: fx.Node) -> list[Call]:
    """The calls a step ran in, from the model's own to the innermost."""
    found = []
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        if not key.startswith("_empty"):
            counted = re.search(r"@(\d+)$", key)
            found.append(Call(path.partition("@")[0], int(counted[1]) if counted else 0))
    return found


def name_of(node: fx.Node) -> str:
    """What a step does, such as ``conv2d``."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.partition("::")[2] if schema else getattr(node.target, "__name__", str(node.target))


def place_of(node: fx.Node) -> str:
    """Where a step ran, for a person: the module's qualified name and the line of its author's code."""
    calls = calls_of(node)
    path = calls[-1].path if calls else ""
    line = line_of(node)
    return (f"module '{path}'" if path else "the model's own forward") + (f" ({line})" if line else "")


def line_of(node: fx.Node) -> str:
    """The line of the author's code that a step comes from, such as ``nets.py:12``; empty where it is not known."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    theirs = [(file, line) for file, line in frames if "/torch/" not in file]
    return "{}:{}".format(theirs[-1][0].rpartition("/")[2], theirs[-1][1]) if theirs else ""


@contextlib.contextmanager
def authors_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a model in training or evaluation mode for a while, as its author meant it.

    Children that were left in evaluation while the model trains stay there, as frozen batch norm does; so do those that a
    ``train`` of their own or of the model's leaves there.
    """
    with modes_kept(module):
        left = [child for child in module.modules() if not child.training] if module.training else []
        module.train(training)
        for child in left:
            child.training = False
        yield


@contextlib.contextmanager
def followed(
    module: nn.Module, enter: Callable[[str], None], leave: Callable[[str, Any], object]
) -> Iterator[None]:
    """Tell of the calls of a model's children, by qualified name: when one begins, and what it returned.

    One that fails returned None.
    """

    # What a hook returns takes the place of what a child is given, or returned: these return nothing.
    def entered(name: str) -> None:
        enter(name)

    def left(name: str, result: Any) -> None:
        leave(name, result)

    handles = []
    for name, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(lambda *_, name=name: entered(name)))
        handles.append(
            child.register_forward_hook(lambda *given, name=name: left(name, given[-1]), always_call=True)
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def capture(module: nn.Module, example: Tensor, *, training: bool, open_batch: bool = True) -> Capture:
    r"""Capture a model in one of its modes.

    Parameters
    ----------
    module
        A model of one tensor in and one out; further arguments of ``forward`` keep their defaults. Its tensors and modes are
        the same afterwards.
    example
        A batch (N, \*input_shape) of its input.
    training
        Whether ``module.train()`` comes first, or ``module.eval()``: what the author made of them is kept.
    open_batch
        Whether the graph is to hold for batches of other sizes, too, if that can be.

    Raises
    ------
    UsageError
        The model cannot be captured, does not run on ``example``, returns something other than one tensor, or computes in
        another precision; naming the module and line.
    """
    batch = len(example)
    exported = None
    if open_batch and batch >= SMALLEST_OPEN_BATCH:
        with contextlib.suppress(Exception):  # whatever keeps the batch from being open is met again below
            exported = _exported(module, example, training, open_batch=True)
    if exported is None or not _is_open(exported) or _rounds_sizes(exported):
        try:
            exported = _exported(module, example, training, open_batch=False)
        except UsageError:
            raise
        except Exception as error:  # capturing runs the model's code, which may raise anything
            raise _refusal(module, example, error) from error
    return _flattened(module, exported, batch)


def _exported(module: nn.Module, example: Tensor, training: bool, *, open_batch: bool) -> ExportedProgram:
    shapes = ({0: Dim.AUTO},) if open_batch else None
    attention = torch.backends.mha.get_fastpath_enabled()
    with (
        authors_mode(module, training=training),
        quiet(),
        torch.enable_grad(),
        _assignments_written(module),
        _Detaching(),
    ):
        # In evaluation PyTorch's transformer layers are one fused operator, which no engine knows.
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with seeded():
                return torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
        finally:
            torch.backends.mha.set_fastpath_enabled(attention)


class _Detaching(TorchFunctionMode):
    """What a model reads as ``.data`` is recorded as detached: export would take it for a constant."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == _DATA:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


@contextlib.contextmanager
def _assignments_written(module: nn.Module) -> Iterator[None]:
    """A child's buffer that is assigned a new tensor is written: export sees that of the model's own buffers only."""
    assigned: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def note(child: nn.Module, name: str, value: Any) -> None:
        before = child._buffers.get(name)
        if child is module or before is None or value is before or not isinstance(value, Tensor):
            return
        original, _ = assigned.get((id(child), name), (before, before))
        assigned[id(child), name] = original, value.detach()

    def write(*_: object) -> None:
        # At the end: until then the tensor that was there has its values, in views of it, too.
        for original, value in assigned.values():
            original.copy_(value)

    hooks = register_module_buffer_registration_hook(note), module.register_forward_hook(write)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_open(exported: ExportedProgram) -> bool:
    length = _source(exported).meta["val"].shape[0]
    # One that the model's code has fixed on the way still looks open.
    return isinstance(length, torch.SymInt) and not length.node.expr.is_number


def _rounds_sizes(exported: ExportedProgram) -> bool:
    """Whether sizes are computed by way of fractions, as a share of the batch is: no graph can be written with these."""
    values = (node.meta.get("val") for node in exported.graph.nodes)
    symbols = (each.node.expr for each in values if isinstance(each, torch.SymInt))
    return any(isinstance(node.meta.get("val"), torch.SymFloat) for node in exported.graph.nodes) or any(
        "Float" in str(each) or "Trunc" in str(each) for each in symbols
    )


def _source(exported: ExportedProgram) -> fx.Node:
    (name,) = exported.graph_signature.user_inputs
    source: fx.Node = next(node for node in exported.graph.nodes if node.name == name)
    return source


def _refusal(module: nn.Module, example: Tensor, error: Exception) -> UsageError:
    title = type(module).__name__
    scripted = next((name for name, each in module.named_modules() if isinstance(each, ScriptModule)), None)
    if scripted is not None:
        return UsageError(
            f"module '{scripted}' of model {title} is compiled by torch.jit.script, which cannot be captured: build the model "
            "of the plain module that it was made of"
        )
    if "fake tensor" in str(error) and "constant" in str(error):
        return UsageError(
            f"model {title} differentiates in its forward, as torch.autograd.grad does, or keeps what it makes there: a "
            "compiled step has one backward pass and no memory of its own; write the derivative in plain operators"
        )
    if isinstance(error, GuardOnDataDependentSymNode) or "data-dependent" in str(error):
        return UsageError(
            f"model {title} decides by the values of a tensor{raised_at(error, module)}: {BY_VALUES}"
        )
    return UsageError(
        f"model {title} does not run on an input of shape {list(example.shape)}, "
        f"{str(example.dtype).removeprefix('torch.')}{raised_at(error, module)}: {_in_numbers(error, len(example))}: {_hint(error, example)}"
    )


def _in_numbers(error: Exception, batch: int) -> str:
    """What an error says, without the name that export gives to the batch."""
    return re.sub(r"\bs\d+\b", str(batch), first_line(error))


def raised_at(error: BaseException, module: nn.Module) -> str:
    """Where in a model an error came from, such as `` in module 'fc' (nets.py:12)``; empty where it is not known."""
    names = {id(child): name for name, child in module.named_modules()}
    path, line, inside = "", "", False
    for frame, number in traceback.walk_tb(error.__traceback__):
        own = id(frame.f_locals.get("self"))
        if own in names:
            path, inside = names[own], True
        if inside and _is_authors(frame):
            line = f"{frame.f_code.co_filename.rpartition('/')[2]}:{number}"
    return (f" in module '{path}'" if path else "") + (f" ({line})" if line else "")


def authors_line() -> str:
    """The line of a model's code that is running, such as ``nets.py:12``; empty where none is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_authors(frame):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}" if frame else ""


def _is_authors(frame: FrameType) -> bool:
    """Whether a frame runs the code of a model rather than ours or PyTorch's."""
    name = frame.f_globals.get("__name__", "")
    ours = name.startswith("frostline.") and not name.startswith("frostline.exporter.models.")
    return not ours and "/torch/" not in frame.f_code.co_filename


def _hint(error: Exception, example: Tensor) -> str:
    if "indices" in str(error) and torch.is_floating_point(example):
        return "give its vocabulary, if it takes token ids"
    if "numpy" in str(error).lower():
        return "compute with PyTorch's operators, which can be captured, rather than NumPy's"
    return "correct the input shape or the model"


def _flattened(module: nn.Module, exported: ExportedProgram, batch: int) -> Capture:
    """An exported program as one graph: regions inlined, in-place operators on values of their own made functional."""
    signature = exported.graph_signature
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    outputs = _inline(exported.graph_module, graph, copies)
    named = {node.name: copies[node] for node in exported.graph.find_nodes(op="placeholder")}
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    first_names = {id(child): path for path, child in module.named_modules()}
    tensors = {named[key]: _renamed(module, name, first_names) for key, name in names.items()}
    constants = {
        named[key]: exported.constants[name]
        for key, name in signature.inputs_to_lifted_tensor_constants.items()
    }
    _write_early(graph, tensors)
    _make_dense(graph)
    _forget_unused(graph)
    graph.output(_result(module, exported, outputs))
    _without_in_place(graph)
    result = graph.output_node().args[0]
    assert isinstance(result, fx.Node)
    graph.lint()
    source = named[signature.user_inputs[0]]
    if not _is_open(exported):
        return Capture(graph, tensors, constants, source, result, batch, open_batch=False)
    length = source.meta["val"].shape[0].node
    asked = tuple(guard.expr for guard in length.shape_env.guards)
    return Capture(graph, tensors, constants, source, result, batch, True, length.expr, asked)


def _renamed(module: nn.Module, name: str, first_names: Mapping[int, str]) -> str:
    """A tensor's name by the first name of the child that holds it."""
    path, _, own = name.rpartition(".")
    first = first_names[id(module.get_submodule(path))]
    return f"{first}.{own}" if first else own


def _result(module: nn.Module, exported: ExportedProgram, outputs: Any) -> fx.Node:
    returned = exported.call_spec.out_spec
    if not returned.is_leaf() or not is_tensor(outputs[0]):
        kind = "something other than a tensor" if returned.is_leaf() else f"a {returned.type.__name__}"
        raise UsageError(
            f"model {type(module).__name__} returns {kind}: make its forward return one tensor, the logits"
        )
    node: fx.Node = outputs[0]
    return node


_NOTHING = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)
"""What export adds to check itself."""

_TO_PYTHON = (aten.item.default, aten._local_scalar_dense.default)


def _inline(source: fx.GraphModule, graph: fx.Graph, copies: dict[fx.Node, Any]) -> Any:
    """Copy a graph's nodes, those of regions in their places; what the graph returns."""

    def copied(node: fx.Node) -> Any:
        return copies[node]

    for node in source.graph.nodes:
        if node.op == "output":
            return fx.map_arg(node.args[0], copied)
        if node.op == "get_attr":
            copies[node] = getattr(source, str(node.target))
        elif node.op == "placeholder":
            if node not in copies:
                copies[node] = graph.node_copy(node)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            copies[node] = _region(node, graph, copies)
        elif node.target is operator.getitem and not isinstance(copies[node.args[0]], fx.Node):
            copies[node] = copies[node.args[0]][node.args[1]]
        elif node.target in _TO_PYTHON and node.users:
            raise UsageError(
                f"{place_of(node)} makes numbers of Python's of a tensor, so that what follows depends on its values: {BY_VALUES}"
            )
        elif node.target not in _NOTHING:
            copies[node] = graph.node_copy(node, copied)
    raise AssertionError("a graph ends with its output")


def _region(node: fx.Node, graph: fx.Graph, copies: Mapping[fx.Node, Any]) -> Any:
    """What a region of the model's code becomes: its operators, between switching gradients off and on again."""
    assert isinstance(node.target, torch._ops.HigherOrderOperator)
    name = node.target.name()
    arguments: list[Any] = [copies[each] if isinstance(each, fx.Node) else each for each in node.args]
    if name == "wrap_with_set_grad_enabled":
        enabled, body, *operands = arguments
        before = graph.call_function(enter_grad_mode, (enabled,))
        made = _inlined(body, operands, graph)
        after = graph.call_function(leave_grad_mode, (before,))
        for marker in (before, after):
            marker.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
        return made
    if name == "wrap_with_autocast":
        _, dtype, enabled, _, body, *operands = arguments
        if not enabled:
            return _inlined(body, operands, graph)
        inner = next((each for each in body.graph.nodes if each.op == "call_function"), node)
        raise UsageError(
            f"{place_of(inner)} computes in {str(dtype).removeprefix('torch.')} by autocast: devices train float32; take "
            "torch.autocast out of the model"
        )
    raise UsageError(
        f"{place_of(node)} uses {name}, which cannot be trained on devices: write it in plain operators"
    )


def _inlined(body: fx.GraphModule, operands: Sequence[Any], graph: fx.Graph) -> Any:
    return _inline(body, graph, dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True)))


def _write_early(graph: fx.Graph, tensors: Mapping[fx.Node, str]) -> None:
    """Move what assigns a buffer, which export puts at the end, behind the value that is assigned."""
    position = {node: index for index, node in enumerate(graph.nodes)}
    for write in graph.find_nodes(op="call_function", target=aten.copy_.default):
        buffer, value = write.args[:2]
        if buffer in tensors and isinstance(value, fx.Node) and not write.users:
            if value is buffer or value.target in _changing(buffer):
                # The value was written there already.
                graph.erase_node(write)
                continue
            others = [value, *(user for user in users_through_views(buffer) if user is not write)]
            max(others, key=lambda node: position[node]).append(write)


def users_through_views(tensor: fx.Node) -> list[fx.Node]:
    """What takes a tensor or a view of it."""
    found = list(tensor.users)
    return found + [reader for user in found if is_view(user) for reader in users_through_views(user)]


def _forget_unused(graph: fx.Graph) -> None:
    """Leave out results that nobody takes of operators with several, such as the places of maxima."""
    for node in reversed(graph.find_nodes(op="call_function", target=operator.getitem)):
        if not node.users:
            graph.erase_node(node)


def _make_dense(graph: fx.Graph) -> None:
    """Tables whose gradients are sparse get dense ones, of the same values: devices know no others."""
    for node in graph.nodes:
        if name_of(node) in ("embedding", "embedding_bag") and node.op == "call_function":
            names = [each.name for each in node.target._schema.arguments]
            place = names.index("sparse")
            node.args = (*node.args[:place], *[False] * (len(node.args) > place), *node.args[place + 1 :])
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "sparse"}


def _changing(buffer: fx.Node) -> set[Any]:
    """The operators that change a buffer in place."""
    return {user.target for user in buffer.users if user.args[:1] == (buffer,) and is_in_place(user)}


def is_in_place(node: fx.Node) -> bool:
    """Whether a step changes its first argument in place and says so."""
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and name_of(node).endswith("_")
        and node.target._schema.is_mutable
    )


def _without_in_place(graph: fx.Graph) -> None:
    """Make in-place operators functional where what they change is nobody else's: a value, not a view of one.

    Two names for one value would look like two values to whoever cuts the graph.
    """
    position = {node: index for index, node in enumerate(graph.nodes)}
    for node in position:
        if node.op != "call_function" or not is_in_place(node):
            continue
        changed = node.args[0]
        functional = _functional(node.target)
        # What is still changed in place is the model's own, or shared.
        shared = changed.op == "placeholder" or _has_views(changed) or is_in_place(changed)
        if functional is None or shared:
            continue
        node.target = functional
        for user in list(changed.users):
            if position[user] > position[node]:
                user.replace_input_with(changed, node)


def _functional(changing: Any) -> Any:
    """The operator that returns what another one writes; None if there is none."""
    packet = getattr(aten, changing._schema.name.partition("::")[2].removesuffix("_"), None)
    if packet is None or changing._overloadname not in packet.overloads():
        return None
    functional = getattr(packet, changing._overloadname)
    # `pow_` of a tensor by a number has the overload's name that `pow` of a number by a tensor has.
    ours, theirs = ([str(each.type) for each in f._schema.arguments] for f in (functional, changing))
    return functional if ours == theirs else None


def _has_views(node: fx.Node) -> bool:
    """Whether a value is a view of another, or has views itself."""
    return is_view(node) or any(is_view(user) and user.args[:1] == (node,) for user in node.users)


def is_view(node: fx.Node) -> bool:
    """Whether a step's result may share memory with its first argument."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return bool(node.op == "call_function" and name_of(node) == "getitem")
    if target._schema.is_mutable:
        return False
    # Composite operators such as `reshape` do not say that they may return a view.
    return bool(target.is_view) or name_of(node) in _MAY_BE_VIEWS


_MAY_BE_VIEWS = {
    *(
        "reshape",
        "flatten",
        "contiguous",
        "to",
        "type_as",
        "float",
        "unflatten",
        "view_as",
        "reshape_as",
        "expand_as",
    ),
    *(
        "chunk",
        "split",
        "split_with_sizes",
        "tensor_split",
        "unbind",
        "narrow",
        "movedim",
        "moveaxis",
        "swapaxes",
    ),
    *(
        "swapdims",
        "squeeze",
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "detach",
        "ravel",
        "numpy_T",
        "mT",
        "adjoint",
    ),
    *(
        "atleast_1d",
        "atleast_2d",
        "atleast_3d",
        "broadcast_to",
        "hsplit",
        "vsplit",
        "dsplit",
        "real",
        "positive",
        "tile",
    ),
}


@contextlib.contextmanager
def grad_mode_kept() -> Iterator[None]:
    """Whatever happens within it, gradients are on or off afterwards as before."""
    before = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(before)
