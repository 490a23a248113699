"""Lowering of traced programs to ExecuTorch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram, export


@dataclass(frozen=True)
class LoweredProgram:
    """A serialized ExecuTorch program and the bytes its runtime plans for intermediate tensors."""

    content: bytes
    arena_bytes: int


def lower_portable(module: nn.Module, arguments: Sequence[Tensor]) -> LoweredProgram:
    """Lower a traced program whose inputs, mutated or not, stay in the caller's memory."""
    with quiet():
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
        from executorch.exir.passes import MemoryPlanningPass

        # The traced graph holds copying variants and in-place copies that the core-ATen check does not list.
        edge = to_edge(
            _exported(module, arguments), compile_config=EdgeCompileConfig(_check_ir_validity=False)
        )
        planning = MemoryPlanningPass(alloc_graph_input=False)
        return _serialized(edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning)))


def lower_delegated(module: nn.Module, arguments: Sequence[Tensor]) -> LoweredProgram:
    """Lower a forward-only module with constant weights, delegated to XNNPACK where it can be."""
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes import MemoryPlanningPass

        edge = to_edge_transform_and_lower(_exported(module, arguments), partitioner=[XnnpackPartitioner()])
        planning = MemoryPlanningPass(alloc_graph_input=False)
        return _serialized(edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning)))


def _exported(module: nn.Module, arguments: Sequence[Tensor]) -> ExportedProgram:
    return export(module, tuple(arguments), strict=False)


def _serialized(program: Any) -> LoweredProgram:
    plan = program.executorch_program.execution_plan[0]
    return LoweredProgram(bytes(program.buffer), sum(plan.non_const_buffer_sizes))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what importing and running the exporter's libraries prints: notices no user of ours can act on."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
