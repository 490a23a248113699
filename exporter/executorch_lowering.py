"""Lowering of traced programs to ExecuTorch."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import re
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeGuard, cast

import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions
from torch.export import ExportedProgram, export
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from frostline.exporter.named_tensors import register, tensors_of

aten = torch.ops.aten

_STDERR = 2

NO_KERNEL = "ExecuTorch has no kernel for it"


@dataclass(frozen=True)
class LoweredProgram:
    """A serialized ExecuTorch program and the bytes its runtime plans for intermediate tensors."""

    content: bytes
    arena_bytes: int


class UnsupportedOperators(Exception):
    """The runtime cannot execute some operators of a program.

    Attributes
    ----------
    operators : tuple of str
        Without overload and output variant, such as ``aten.cumsum``; at least one.
    reason : str
        What the runtime says about them.
    """

    def __init__(self, operators: Iterable[str], reason: str) -> None:
        self.operators = tuple(operator.replace("::", ".") for operator in operators)
        self.reason = reason
        super().__init__(f"{', '.join(self.operators)}: {reason}")


def lower_portable(
    module: nn.Module, arguments: Sequence[Tensor], written: Sequence[int] = ()
) -> LoweredProgram:
    """Lower a program whose inputs, written or not, stay in the caller's memory.

    Parameters
    ----------
    module : Module
        A flat graph of functional ATen operators that have kernels; any other module is traced first.
    arguments : sequence of Tensor
        Its inputs; only their shapes and dtypes matter.
    written : sequence of int
        Which arguments its first results are written to; what another module writes in place is found.

    Raises
    ------
    UnsupportedOperators
        If the runtime has no kernels for some operators.
    """
    graph, writes = (module, written) if _is_flat(module) else _traced(module, arguments)
    missing = missing_kernels(graph.graph)
    if missing:
        raise UnsupportedOperators(missing, NO_KERNEL)
    with quiet(), without_collection():
        from executorch.exir import ExecutorchBackendConfig
        from executorch.exir.passes import MemoryPlanningPass
        from executorch.exir.program import ExecutorchProgramManager

        from frostline.exporter.arena import plan_arena
        from frostline.exporter.executorch_dialect import execution_graph, exported, place_views

        executed = execution_graph(graph, dict(enumerate(writes)))
        MemoryPlanningPass(plan_arena, alloc_graph_input=False).run(executed)
        place_views(executed.graph)
        program = ExecutorchProgramManager({"forward": exported(executed)}, None, ExecutorchBackendConfig())
        plan = program.executorch_program.execution_plan[0]
        return LoweredProgram(bytes(program.buffer), sum(plan.non_const_buffer_sizes))


def missing_kernels(graph: fx.Graph) -> dict[str, fx.Node]:
    """The operators of a flat graph that the runtime has no kernels for, such as ``aten::cumsum``, and where each is."""
    with quiet():
        from frostline.exporter.executorch_dialect import kernels_of

    known = kernel_names()
    found = {name: node for name, node in kernels_of(graph).items() if name not in known}
    return {name.partition(".")[0]: node for name, node in found.items()}


def _is_flat(module: nn.Module) -> TypeGuard[fx.GraphModule]:
    """Whether it says of every value what it is."""
    if not isinstance(module, fx.GraphModule):
        return False
    return all("val" in node.meta for node in module.graph.nodes if node.op not in ("get_attr", "output"))


def _traced(module: nn.Module, arguments: Sequence[Tensor]) -> tuple[fx.GraphModule, list[int]]:
    """A module as a flat graph, and which arguments, written in place, its first results are written to."""
    function = torch.func.functionalize(module)
    table = dict(core_aten_decompositions())
    traced: fx.GraphModule = make_fx(function, table, tracing_mode="fake", _allow_non_fake_inputs=True)(
        *arguments
    )
    graph = traced.graph
    places = {node: place for place, node in enumerate(graph.find_nodes(op="placeholder"))}
    written: list[int] = []
    values: list[fx.Node] = []
    for write in graph.find_nodes(op="call_function", target=aten.copy_.default):
        argument, value = write.args[0], write.args[1]
        written.append(places[cast(fx.Node, argument)])
        values.append(cast(fx.Node, value))
        graph.erase_node(write)
    output = graph.output_node()
    output.args = ((*values, *pytree.tree_leaves(output.args[0])),)
    return traced, written


def lower_delegated(module: nn.Module, arguments: Sequence[Tensor]) -> LoweredProgram:
    """Lower a forward-only module with constant weights, delegated to XNNPACK where it can be."""
    with quiet(), without_collection():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes import MemoryPlanningPass

        exported = _exported(_Wrapped(module), arguments)
        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        planning = MemoryPlanningPass(alloc_graph_input=False)
        return _serialized(edge, ExecutorchBackendConfig(memory_planning_pass=planning))


def run_program(module: Any, arguments: Sequence[Tensor]) -> Sequence[Tensor]:
    """Run the method of a program that the runtime has loaded; outputs alias its memory. To be called within `quiet`.

    Raises
    ------
    UnsupportedOperators
        If an operator refuses its arguments.
    """
    try:
        outputs: Sequence[Tensor] = module.run_method("forward", tuple(arguments), clone_outputs=False)
    except RuntimeError:
        # The error is a bare number. What the runtime logs, through sys.stderr, says more: it is made to fail again.
        log = io.StringIO()
        with contextlib.redirect_stderr(log), contextlib.suppress(RuntimeError):
            module.run_method("forward", tuple(arguments), clone_outputs=False)
        operator = re.search(r"in operator (\w+::\w+)", log.getvalue())
        if operator is None:
            raise
        reason = re.search(r"Check failed \(.*\): (\S.*)", log.getvalue())
        explanation = reason[1] if reason else "it refuses its arguments"
        raise UnsupportedOperators([operator[1]], f"ExecuTorch says: {explanation}") from None
    return outputs


class _Wrapped(nn.Module):
    """A module whose tensors have plain names: XNNPACK's passes lose track of others, such as ``0.weight``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # In a list it is no child, whose tensors would be there twice.
        self._module = [module]
        tensors = tensors_of(module)
        self._names = {f"tensor_{number}": name for number, name in enumerate(tensors)}
        for own, name in self._names.items():
            register(self, own, tensors[name])

    def forward(self, *arguments: Tensor) -> Any:
        tensors = {name: getattr(self, own) for own, name in self._names.items()}
        return functional_call(self._module[0], tensors, arguments, tie_weights=False)


def _exported(module: nn.Module, arguments: Sequence[Tensor]) -> ExportedProgram:
    return export(module, tuple(arguments), strict=False)


def _serialized(edge: Any, backend: Any) -> LoweredProgram:
    try:
        program = edge.to_executorch(backend)
    except RuntimeError as error:
        if "Missing out variants" not in str(error):
            raise
        raise UnsupportedOperators(sorted(re.findall(r"\w+::\w+", str(error))), NO_KERNEL) from error
    plan = program.executorch_program.execution_plan[0]
    kernels = kernel_names()
    without = [
        each.name for each in plan.operators if not {each.name, f"{each.name}.{each.overload}"} & kernels
    ]
    if without:
        raise UnsupportedOperators(without, NO_KERNEL)
    return LoweredProgram(bytes(program.buffer), sum(plan.non_const_buffer_sizes))


def kernel_names() -> set[str]:
    """The operators the runtime has kernels for, such as ``aten::add.out``."""
    with quiet():
        from executorch.extension.pybindings._portable_lib import _get_operator_names

        return set(_get_operator_names())


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Put off garbage collection: the lowering allocates so many small objects that it takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what importing and running the exporter's libraries prints: notices no user of ours can act on.

    What they write to file descriptor 2 is dropped, so that their C++ side is covered too. Other threads are still
    heard through `sys.stderr`, which keeps progress visible. May be nested and entered by many threads. Exceptions
    pass through.
    """
    _silence.enter()
    try:
        yield
    finally:
        _silence.leave()


class _OtherThreads:
    """A `sys.stderr` that drops what the silenced threads write and hands on what the others do."""

    def __init__(self, target: TextIO, silenced: Container[int]) -> None:
        self._target = target
        self._silenced = silenced

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() in self._silenced else self._target.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


class _Silence:
    """The process-wide state behind `quiet`: on while any thread is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: Counter[int] = Counter()
        self._undo = contextlib.ExitStack()

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                with contextlib.ExitStack() as undo:
                    self._begin(undo)
                    self._undo = undo.pop_all()
            self._inside[threading.get_ident()] += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= Counter([threading.get_ident()])
            if not self._inside:
                self._undo.close()

    def _begin(self, undo: contextlib.ExitStack) -> None:
        undo.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        target = ours = sys.stderr
        with contextlib.suppress(OSError):  # The process may have been started without a standard error.
            terminal = undo.enter_context(_detached(_STDERR))
            if _writes_to(ours, _STDERR):
                ours.flush()
                target = io.TextIOWrapper(terminal, ours.encoding, ours.errors, line_buffering=True)
                undo.callback(target.detach)
        if ours is not None:
            undo.callback(setattr, sys, "stderr", ours)
            sys.stderr = cast(TextIO, _OtherThreads(target, self._inside))


@contextlib.contextmanager
def _detached(descriptor: int) -> Iterator[io.BufferedWriter]:
    """Drop what is written to `descriptor`; the stream given writes where it led before."""
    with os.fdopen(os.dup(descriptor), "wb") as before, Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), descriptor)
        try:
            yield before
        finally:
            os.dup2(before.fileno(), descriptor)


def _writes_to(stream: TextIO, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except (AttributeError, OSError, ValueError):
        return False


_silence = _Silence()
