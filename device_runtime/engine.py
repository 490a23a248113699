"""What a training runtime must offer. Engines are imported only when an artifact asks for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol, get_args

from frostline.protocol.blobs import BlobStore
from frostline.protocol.errors import CorruptContent, UsageError
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

    def state(self) -> dict[str, Array]:
        """All that the next step depends on beside its batch, by the engine's own names; views where it can be."""

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from what `state` gave, in place of `load`.

        Raises
        ------
        FrostlineError
            If it is not of this stage; the session is to be loaded then.
        """


class PrefixSession(Protocol):
    """A frozen block loaded for one pass over the samples."""

    def run(self, x: Array) -> Array:
        """Features of one batch, in the shape the manifest declares."""


def overwrite(held: Mapping[str, Array], state: Mapping[str, Array]) -> None:
    """Copy a state into the arrays that are held by the same names.

    Raises
    ------
    CorruptContent
        If names, dtypes or shapes are not the same; nothing is copied then.
    """
    described = [{name: (a.dtype, a.shape) for name, a in each.items()} for each in (held, state)]
    if described[0] != described[1]:
        raise CorruptContent("a checkpoint's tensors are not those of the stage")
    for name, array in held.items():
        array[...] = state[name]


class Runtime(Protocol):
    """A runtime that executes artifacts."""

    def open_stage(self, manifest: StageManifest, store: BlobStore) -> TrainingSession:
        """Load a stage's programs from `store`."""

    def open_prefix(self, program: Program, store: BlobStore) -> PrefixSession:
        """Load a frozen block's program from `store`."""


ENGINES: tuple[Engine, ...] = get_args(Engine)
"""Every engine there is, those preferred first."""

INSTALL: dict[Engine, str] = {
    "executorch": "pip install 'frostline[executorch]'",
    "onnxruntime": "pip install onnxruntime",
    # Both bring the package `onnxruntime`: the one has to go first.
    "onnxruntime-training": "pip uninstall onnxruntime, then pip install onnxruntime-training-cpu==1.19.2",
}
"""What brings each."""


def available_engines() -> list[Engine]:
    """The engines whose packages are installed here; nothing is imported."""
    onnxruntime = importlib.util.find_spec("onnxruntime")
    folders = [Path(folder) for folder in (onnxruntime and onnxruntime.submodule_search_locations) or []]
    installed: dict[Engine, bool] = {
        "executorch": all(importlib.util.find_spec(name) for name in ("executorch", "torch")),
        "onnxruntime": onnxruntime is not None,
        "onnxruntime-training": any((folder / "training" / "api").is_dir() for folder in folders),
    }
    return [engine for engine in ENGINES if installed[engine]]


def check_engine(engine: str) -> Engine:
    """The engine of that name, if it can be used on this device.

    Raises
    ------
    UsageError
        If there is no such engine, or it is not installed; naming what brings it.
    """
    known = next((each for each in ENGINES if each == engine), None)
    if known is None:
        raise UsageError(f"there is no engine {engine!r}; use one of {', '.join(ENGINES)}")
    if known not in available_engines():
        raise UsageError(f"engine {engine!r} is not installed on this device: {INSTALL[known]}")
    return known


def open_runtime(engine: Engine) -> Runtime:
    """Import and return the runtime of `engine`.

    Raises
    ------
    UsageError
        If it is not installed, naming what brings it.
    """
    if check_engine(engine) == "executorch":
        from frostline.device_runtime.executorch_engine import ExecuTorchRuntime

        return ExecuTorchRuntime()
    if engine == "onnxruntime-training":
        from frostline.device_runtime.onnxruntime_training_engine import OnnxRuntimeTraining

        return OnnxRuntimeTraining()
    from frostline.device_runtime.onnxruntime_engine import OnnxRuntime

    return OnnxRuntime()
