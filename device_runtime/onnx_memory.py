"""Prints the bytes that a process grows by when it loads and runs the ONNX program on its standard input.

ONNX Runtime plans nothing beforehand: what it takes is known from running it, in a process of its own.
"""

from __future__ import annotations

import sys

import numpy as np

from frostline.device_runtime.onnx_program import OnnxProgram
from frostline.device_runtime.resident_memory import peak_growth
from frostline.protocol.tensors import Array

_RUNS = 2
_GRAIN = 2**16
"""What is measured differs by some pages from process to process."""


def arena_bytes(content: bytes) -> int:
    """What a program takes beside its inputs and outputs, rounded up to 64 KiB."""
    described = OnnxProgram(content, "measured")
    # Ones, not zeros: their pages are there before the measuring begins.
    inputs: dict[str, Array] = {
        name: np.ones(shape, dtype) for name, (shape, dtype) in described.inputs.items()
    }
    outputs: dict[str, Array] = {
        name: np.ones(shape, dtype) for name, (shape, dtype) in described.outputs.items()
    }
    for name, (_, dtype) in described.inputs.items():
        if dtype is np.int64:
            inputs[name].fill(0)
    del described

    def work() -> None:
        program = OnnxProgram(content, "measured")
        for _ in range(_RUNS):
            program.run(inputs, outputs)

    return -(-peak_growth(work) // _GRAIN) * _GRAIN


if __name__ == "__main__":
    sys.stdout.write(str(arena_bytes(sys.stdin.buffer.read())))
