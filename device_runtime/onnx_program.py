"""Programs in ONNX, run by any ONNX Runtime over memory that this process owns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime

from frostline.protocol.errors import RunError
from frostline.protocol.tensors import Array

_DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
_ERRORS_ONLY = 3


class OnnxProgram:
    """A loaded program.

    Attributes
    ----------
    inputs, outputs : dict
        Shape and dtype of each by name, in the program's order.

    Raises
    ------
    RunError
        If ONNX Runtime cannot load it.
    """

    def __init__(self, content: bytes, name: str) -> None:
        self._name = name
        options = onnxruntime.SessionOptions()
        # A worker trains on one thread: a fleet of them shares the machine.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        # The pattern of the first run would be taken as one more block of the same size beside the arena.
        options.enable_mem_pattern = False
        options.log_severity_level = _ERRORS_ONLY
        try:
            # Equal values that are computed twice are so on purpose: to be let go in between.
            self._session: Any = onnxruntime.InferenceSession(
                content,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=["CommonSubexpressionElimination"],
            )
        except Exception as error:  # its exceptions share no base
            raise RunError(f"{name} program: {_explained(error)}") from None
        self.inputs = _described(self._session.get_inputs())
        self.outputs = _described(self._session.get_outputs())
        self._binding: Any = self._session.io_binding()

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Execute over `inputs`, writing every output into the array of its name; contiguous, of its shape and dtype."""
        for name, (shape, dtype) in self.inputs.items():
            self._binding.bind_input(name, "cpu", 0, dtype, shape, inputs[name].ctypes.data)
        for name, (shape, dtype) in self.outputs.items():
            self._binding.bind_output(name, "cpu", 0, dtype, shape, outputs[name].ctypes.data)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # its exceptions share no base
            raise RunError(f"{self._name} program: ONNX Runtime failed: {_first_line(error)}") from None


def _described(arguments: Any) -> dict[str, tuple[tuple[int, ...], type]]:
    return {each.name: (tuple(each.shape), _DTYPES[each.type]) for each in arguments}


def _explained(error: Exception) -> str:
    text = _first_line(error)
    if "opset" in text or "IR version" in text or "ir_version" in text:
        return (
            f"ONNX Runtime {onnxruntime.__version__} is too old for it: pip install --upgrade onnxruntime "
            f"({text})"
        )
    return f"ONNX Runtime cannot load it: {text}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
