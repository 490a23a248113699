"""Compiling for ONNX Runtime: boards that have NumPy and a plain `onnxruntime`, and no PyTorch."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, fx, nn

from frostline.exporter.executorch_lowering import UnsupportedOperators
from frostline.exporter.layout import MODEL_ORDER, Layout
from frostline.exporter.onnx_lowering import lower_to_onnx
from frostline.exporter.rewrites.onnxruntime import rewrite_for_onnxruntime
from frostline.exporter.target import LoweredProgram, Run
from frostline.exporter.training_step import TracedProgram, trace_frozen
from frostline.protocol.errors import RunError
from frostline.protocol.manifest import NEW
from frostline.protocol.messages import Engine
from frostline.protocol.tensors import Array


class OnnxRuntimeTarget:
    """Programs in plain ONNX, which return the new values of what they would write."""

    engine: Engine = "onnxruntime"
    writes_in_place = False
    recomputes = True
    delegates = False

    def layout(self, model: nn.Module) -> Layout:
        """The model's own order: it is that of ONNX."""
        return MODEL_ORDER

    def rewrite(self, graph: fx.GraphModule, arguments: Sequence[Tensor]) -> fx.GraphModule:
        """In the operators that can be said in ONNX."""
        return rewrite_for_onnxruntime(graph, arguments)

    def lower(
        self, program: TracedProgram, tensors: Mapping[str, Tensor], results: Sequence[str]
    ) -> LoweredProgram:
        """A program whose memory is measured, since ONNX Runtime finds its own when it runs."""
        arguments = program.arguments(tensors)
        content = lower_to_onnx(program, arguments, results)
        try:
            arena = _measured_arena(content)
        except RunError as error:
            raise _at_fault(lower_to_onnx(program, arguments, results, traceable=True), error) from error
        return LoweredProgram(content, program.inputs, arena, program.written)

    def lower_frozen(
        self, block: nn.Module, x: Tensor, calibration: Tensor | None = None, *, delegated: bool = True
    ) -> LoweredProgram:
        """A float32 program with constant weights, which ONNX Runtime rearranges for the processor when it loads."""
        program = trace_frozen(block, x, rewrite_for_onnxruntime)
        return self.lower(program, {"x": x}, ["features"])

    def load(self, program: LoweredProgram) -> Run:
        """The program in the ONNX Runtime that is installed here."""
        from frostline.device_runtime.onnx_program import OnnxProgram

        loaded = OnnxProgram(program.content, "lowered")

        def run(tensors: Mapping[str, Tensor]) -> Sequence[Tensor]:
            outputs: dict[str, Array] = {
                name: np.zeros(shape, dtype) for name, (shape, dtype) in loaded.outputs.items()
            }
            loaded.run({name: tensors[name].numpy() for name in program.inputs}, outputs)
            for name in program.inputs:
                if NEW + name in outputs:
                    tensors[name].copy_(torch.from_numpy(outputs.pop(NEW + name)))
            return [torch.from_numpy(value) for value in outputs.values()]

        return run


def _at_fault(traceable: bytes, error: RunError) -> Exception:
    """What ONNX Runtime refuses, by the operator of the model where it names one."""
    try:
        _measured_arena(traceable)
    except RunError as refusal:
        named = re.search(r"(aten\.\w+)#\d+", str(refusal))
        if named is not None:
            return UnsupportedOperators([named[1]], f"ONNX Runtime says: {_reason(refusal)}")
    return error


def _reason(refusal: RunError) -> str:
    """What it says, without codes and names that only it knows."""
    said = re.sub(r".*\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(refusal))
    return re.sub(r"\s*(in )?node( with name)?\s*\W?aten\.\w+#\d+\W?", "", said).strip()


def _measured_arena(content: bytes) -> int:
    """Bytes by which a process grows that loads and runs a program, beside the arrays it is given."""
    command = [sys.executable, "-m", "frostline.device_runtime.onnx_memory"]
    measured = subprocess.run(command, input=content, capture_output=True, check=False)
    if measured.returncode:
        reason = measured.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise RunError(f"ONNX Runtime cannot run the program: {reason}")
    return int(measured.stdout)


ONNXRUNTIME = OnnxRuntimeTarget()
