"""The engine `onnxruntime-training`: its four files, run with its own CheckpointState, Module and Optimizer."""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from frostline.device_runtime.engine import INSTALL, PrefixSession, overwrite
from frostline.device_runtime.standard_error import quiet_standard_error
from frostline.protocol.blobs import BlobStore
from frostline.protocol.errors import RunError, UsageError
from frostline.protocol.manifest import NEW, SEEDS, Program, StageManifest, TensorSpec
from frostline.protocol.tensors import Array

PACKAGE = "onnxruntime.training"
ERRORS_ONLY = 3
"""The runtime's level of logging."""

_Result = TypeVar("_Result")


def _import_api() -> Any:
    """Import `onnxruntime.training.api` without the rest of its package, which would bring torch and onnx along.

    The package is entered with its path alone, so that its modules are still found by their names; what the runtime tries
    on its own, `ortmodule`, is marked as absent.
    """
    found = importlib.util.find_spec("onnxruntime")
    if found is None or found.submodule_search_locations is None:
        raise ImportError("no module named 'onnxruntime'")
    folders = [str(Path(each, "training")) for each in found.submodule_search_locations]
    if not any(Path(each, "api").is_dir() for each in folders):
        raise ImportError("the onnxruntime installed here is not that of onnxruntime-training")
    if PACKAGE not in sys.modules:
        package = ModuleType(PACKAGE)
        package.__path__ = folders
        sys.modules[PACKAGE] = package
        sys.modules.setdefault(f"{PACKAGE}.ortmodule", None)  # type: ignore[arg-type]
    return importlib.import_module(f"{PACKAGE}.api")


with quiet_standard_error():
    try:
        api = _import_api()
        import onnxruntime
    except ImportError as error:
        raise UsageError(
            f"engine 'onnxruntime-training' cannot be loaded: {error}; {INSTALL['onnxruntime-training']}"
        ) from None


# After the package has been entered.
from frostline.device_runtime.onnxruntime_engine import OnnxRuntimePrefixSession  # noqa: E402


@dataclass(frozen=True)
class ArtifactPaths:
    """Where the four files are; their names do not matter."""

    training: Path
    evaluation: Path
    optimizer: Path
    checkpoint: Path


class OnnxRuntimeTraining:
    """Opens artifacts whose engine is `onnxruntime-training`."""

    def open_stage(self, manifest: StageManifest, store: BlobStore) -> OnnxRuntimeTrainingSession:
        """Load a stage's four files from `store`."""
        assert manifest.update is not None and manifest.checkpoint is not None
        files = (manifest.training.file, manifest.evaluation.file, manifest.update.file, manifest.checkpoint)
        for file in files:
            # Found whole before the runtime opens it by its path.
            store.read(file)
        statistics = [spec.name for spec in manifest.training.outputs if spec.name.startswith(NEW)]
        return OnnxRuntimeTrainingSession(
            ArtifactPaths(*(store.path(file) for file in files)),
            manifest.trained,
            [name.removeprefix(NEW) for name in statistics],
        )

    def open_prefix(self, program: Program, store: BlobStore) -> PrefixSession:
        """Load a frozen block's program from `store`: it is plain ONNX."""
        return OnnxRuntimePrefixSession(program, store)


class OnnxRuntimeTrainingSession:
    """A stage trained by onnxruntime-training.

    Its tensors live in the runtime's checkpoint state; those that no model of the stage reads stay here.

    Parameters
    ----------
    trained : sequence of TensorSpec
        The parameters and statistics that travel, in the model's order and shapes.
    statistics : sequence of str
        Names of the buffers whose new values the training model returns after the loss and the logits.
    """

    def __init__(
        self, paths: ArtifactPaths, trained: Sequence[TensorSpec], statistics: Sequence[str] = ()
    ) -> None:
        self._paths = paths
        self._trained = list(trained)
        self._statistics = list(statistics)
        self._unread: dict[str, Array] = {}
        self._seed = 0
        self._fresh = False
        self._state: Any = None
        self._module: Any = None
        self._optimizer: Any = None
        self._open()

    def load(self, tensors: Mapping[str, Array], seed: int = 0) -> None:
        """Set parameters and statistics by name and reset the optimizer's state; dropout starts from `seed`."""
        self._seed = seed
        if not self._fresh:
            # The optimizer's state is the checkpoint state's, which has no way to reset it.
            self._open()
        parameters = self._state.parameters
        for spec in self._trained:
            value: Array = np.ascontiguousarray(tensors[spec.name], np.float32).reshape(spec.shape)
            if spec.name in parameters:
                _guarded("loading", partial(parameters.__setitem__, spec.name, value))
            else:
                self._unread[spec.name] = value.copy()

    def step(self, parts: Iterable[tuple[Array, Array]], learning_rate: float) -> tuple[float, int]:
        """Train on one batch, given in micro-batches: its mean loss and right answers."""
        self._fresh = False
        self._module.train()
        # What a step that was broken off has accumulated is dropped as well.
        self._module.lazy_reset_grad()
        loss, correct = 0.0, 0
        for x, y in parts:
            step: dict[str, Array] = {"x": x, "y": y, "seed": np.array(self._seed % SEEDS, np.float32)}
            self._seed += 1
            share, logits, *statistics = self._run([step[name] for name in self._inputs])
            loss += share.item()
            correct += int((logits.argmax(1) == y).sum())
            for name, value in zip(self._statistics, statistics, strict=True):
                self._state.parameters[name] = value
        self._optimizer.set_learning_rate(learning_rate)
        _guarded("the update", self._optimizer.step)
        return loss, correct

    def evaluate(self, x: Array) -> Array:
        """Logits (micro_batch, classes) float32, with the present state."""
        self._module.eval()
        (logits,) = self._run([x])
        return np.array(logits)

    def trained(self) -> dict[str, Array]:
        """The parameters and statistics by name; views of the session's memory."""
        parameters = self._state.parameters
        return {
            spec.name: parameters[spec.name].data if spec.name in parameters else self._unread[spec.name]
            for spec in self._trained
        }

    def state(self) -> dict[str, Array]:
        """All that the next step depends on beside its batch: the runtime's own checkpoint and what no model reads."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "checkpoint")
            save = api.CheckpointState.save_checkpoint
            _guarded("saving", lambda: save(self._state, str(path), include_optimizer_state=True))
            checkpoint = np.fromfile(path, np.uint8)
        return {**self._unread, "checkpoint": checkpoint, "seed": np.array(self._seed, np.int64)}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from what `state` gave, in place of `load`."""
        others = {name: array for name, array in state.items() if name != "checkpoint"}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "checkpoint")
            state["checkpoint"].tofile(path)
            self._open(path)
        self._fresh = False
        held = {**self._unread, "seed": np.array(self._seed, np.int64)}
        overwrite(held, others)
        self._seed = int(held["seed"])

    def _open(self, checkpoint: Path | None = None) -> None:
        # What was open is given back before the same is taken again.
        self._state = self._module = self._optimizer = None
        paths, options, path = self._paths, _options(), str(checkpoint or self._paths.checkpoint)
        self._state = _guarded("loading", lambda: api.CheckpointState.load_checkpoint(path))
        self._module = _guarded(
            "loading",
            lambda: api.Module(
                str(paths.training), self._state, str(paths.evaluation), session_options=options
            ),
        )
        self._optimizer = _guarded("loading", lambda: api.Optimizer(str(paths.optimizer), self._module))
        self._inputs = [str(name) for name in self._module.input_names()]
        self._unread = {
            spec.name: np.zeros(spec.shape, np.float32)
            for spec in self._trained
            if spec.name not in self._state.parameters
        }
        self._fresh = True

    def _run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        results: Any = _guarded(
            "the step", lambda: self._module(*(np.ascontiguousarray(each) for each in inputs))
        )
        return results if isinstance(results, tuple) else (results,)


def _options() -> Any:
    options = onnxruntime.SessionOptions()
    # One worker process trains one stage; its thread pool would spin while it waits.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    # The pattern of the first run would be taken as one more block of the same size beside the arena.
    options.enable_mem_pattern = False
    options.log_severity_level = ERRORS_ONLY
    return options


def _guarded(what: str, call: Callable[[], _Result]) -> _Result:
    """Call the runtime; its error becomes one line."""
    try:
        return call()
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        # Before it stands where in the runtime's sources the error was raised.
        said = re.sub(r"^.*?\[ONNXRuntimeError\] : \d+ : ", "", line)
        raise RunError(f"onnxruntime-training failed in {what}: {said}") from None
