"""Compiling for ExecuTorch: phones and boards, every byte of memory planned beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, fx, nn

from frostline.exporter.executorch_lowering import lower_delegated, lower_portable, quiet, run_program
from frostline.exporter.layout import Layout
from frostline.exporter.quantization import quantized
from frostline.exporter.rewrites.executorch import rewrite_for_executorch
from frostline.exporter.target import LoweredProgram, Run
from frostline.exporter.tiles import pick
from frostline.exporter.training_step import TracedProgram, trace_frozen
from frostline.protocol.messages import Engine


class ExecuTorchTarget:
    """Programs for ExecuTorch's portable runtime, which write their arguments in place; frozen blocks for XNNPACK."""

    engine: Engine = "executorch"
    writes_in_place = True
    recomputes = True
    delegates = True

    def layout(self, model: nn.Module) -> Layout:
        """Channels last, large kernels in tiles."""
        return Layout.channels_last(model)

    def rewrite(self, graph: fx.GraphModule, arguments: Sequence[Tensor]) -> fx.GraphModule:
        """In the operators whose portable kernels are fast."""
        return rewrite_for_executorch(graph, arguments)

    def lower(
        self, program: TracedProgram, tensors: Mapping[str, Tensor], results: Sequence[str]
    ) -> LoweredProgram:
        """A program whose arena is planned by ExecuTorch."""
        written = [program.inputs.index(name) for name in program.written]
        lowered = lower_portable(program.graph_module, program.arguments(tensors), written)
        return LoweredProgram(lowered.content, program.inputs, lowered.arena_bytes)

    def lower_frozen(
        self, block: nn.Module, x: Tensor, calibration: Tensor | None = None, *, delegated: bool = True
    ) -> LoweredProgram:
        """A program delegated to XNNPACK where it can be, in int8 if there is a calibration sample."""
        if not delegated:
            return self.lower(trace_frozen(block, x, self.rewrite), {"x": x}, ["features"])
        lowered = lower_delegated(block if calibration is None else quantized(block, x, calibration), [x])
        return LoweredProgram(lowered.content, ("x",), lowered.arena_bytes)

    def load(self, program: LoweredProgram) -> Run:
        """The program in the portable runtime."""
        with quiet():
            from executorch.extension.pybindings._portable_lib import _load_for_executorch_from_buffer

            module = _load_for_executorch_from_buffer(program.content)

        def run(tensors: Mapping[str, Tensor]) -> Sequence[Tensor]:
            with quiet():
                # The program is read in place: `program` is kept as long as `run` is.
                return run_program(module, [pick(tensors, name) for name in program.inputs])

        return run


EXECUTORCH = ExecuTorchTarget()
