"""What a training runtime must offer. Engines are imported only when an artifact asks for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Protocol

from frostline.protocol.blobs import BlobStore
from frostline.protocol.errors import UsageError
from frostline.protocol.manifest import Program, StageManifest
from frostline.protocol.messages import Engine
from frostline.protocol.tensors import Array


class TrainingSession(Protocol):
    """A stage loaded for training; its state lives in memory the session owns."""

    def load(self, tensors: Mapping[str, Array], seed: int = 0) -> None:
        """Set parameters and statistics by name and reset the optimizer's state; dropout starts from `seed`."""

    def step(self, parts: Iterable[tuple[Array, Array]], learning_rate: float) -> tuple[float, int]:
        """Train on one batch: its mean loss, and how many were right before the step.

        The batch comes in the manifest's `micro_batches` equal parts, each asked for when it is needed: `x`
        (micro_batch, *input_shape) in the dtype of the program's input, and `y` (micro_batch,) int64.
        """

    def evaluate(self, x: Array) -> Array:
        """Logits (micro_batch, classes) float32 of `x` (micro_batch, *input_shape), with the present state."""

    def trained(self) -> dict[str, Array]:
        """The parameters and statistics by name; views of the session's memory."""


class PrefixSession(Protocol):
    """A frozen block loaded for one pass over the samples."""

    def run(self, x: Array) -> Array:
        """Features of one batch, in the shape the manifest declares."""


class Runtime(Protocol):
    """A runtime that executes artifacts."""

    def open_stage(self, manifest: StageManifest, store: BlobStore) -> TrainingSession:
        """Load a stage's programs from `store`."""

    def open_prefix(self, program: Program, store: BlobStore) -> PrefixSession:
        """Load a frozen block's program from `store`."""


def available_engines() -> list[Engine]:
    """The engines whose packages are installed here; nothing is imported."""
    installed = importlib.util.find_spec("executorch") and importlib.util.find_spec("torch")
    return ["executorch"] if installed else []


def open_runtime(engine: Engine) -> Runtime:
    """Import and return the runtime of `engine`.

    Raises
    ------
    UsageError
        If it is not installed, naming the extra that brings it.
    """
    if engine not in available_engines():
        raise UsageError(
            f"engine {engine!r} is not installed on this device: pip install 'frostline[{engine}]'"
        )
    from frostline.device_runtime.executorch_engine import ExecuTorchRuntime

    return ExecuTorchRuntime()
