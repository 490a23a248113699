"""The ExecuTorch engine: programs run by the portable runtime over tensors this process owns."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from frostline.device_runtime.standard_error import quiet_standard_error
from frostline.protocol.blobs import BlobStore
from frostline.protocol.errors import RunError
from frostline.protocol.manifest import Program, StageManifest, TensorSpec
from frostline.protocol.tensors import Array

# On contended cores the runtime's own thread pool makes it 40 to 80 times slower; one thread per worker is the rule.
# It must be said before the library loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Both print notices about optional parts and the processor that no user of an agent can act on.
with quiet_standard_error():
    import torch
    from executorch.extension.pybindings.portable_lib import _load_for_executorch_from_buffer


class ExecuTorchProgram:
    """A loaded program with one method, `forward`."""

    def __init__(self, content: bytes, name: str) -> None:
        # The runtime reads the program in place: it must outlive the module.
        self._content = content
        self._name = name
        # The runtime sets itself up, and asks about the processor, when a method is first called.
        self._ready = False
        try:
            with quiet_standard_error():
                self._module: Any = _load_for_executorch_from_buffer(content)
        except RuntimeError as error:
            raise RunError(f"{name} program: ExecuTorch cannot load it: {error}") from None

    def run(self, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Execute over `arguments`, mutating those the program mutates; outputs alias the runtime's memory."""
        try:
            with nullcontext() if self._ready else quiet_standard_error():
                outputs: list[torch.Tensor] = self._module.run_method(
                    "forward", tuple(arguments), clone_outputs=False
                )
        except RuntimeError as error:
            raise RunError(f"{self._name} program: ExecuTorch failed: {error}") from None
        self._ready = True
        return outputs


class ExecuTorchTrainingSession:
    """A stage trained in place.

    One of its two programs is loaded at a time, since each brings an arena of its own.
    """

    def __init__(self, manifest: StageManifest, store: BlobStore) -> None:
        self._manifest = manifest
        self._store = store
        self._loaded: tuple[str, ExecuTorchProgram] | None = None
        self._trained = _zeros(manifest.trained)
        self._optimizer_state = _zeros(manifest.optimizer_state)

    def load(self, tensors: Mapping[str, Array]) -> None:
        """Set parameters and statistics by name and reset the optimizer's state."""
        for name, tensor in self._trained.items():
            tensor.copy_(torch.from_numpy(np.array(tensors[name])))
        for tensor in self._optimizer_state.values():
            tensor.zero_()

    def step(self, x: Array, y: Array, learning_rate: float) -> tuple[float, int]:
        """Train on one batch: the loss, and how many were right before the step."""
        program = self._program("training", self._manifest.training)
        state = [*self._trained.values(), *self._optimizer_state.values()]
        rate = torch.tensor(learning_rate, dtype=torch.float32)
        loss, correct = program.run([*state, torch.from_numpy(x), torch.from_numpy(y), rate])[-2:]
        return float(loss), int(correct)

    def evaluate(self, x: Array) -> Array:
        """Logits (batch, classes) float32 of one batch, with the present state."""
        program = self._program("evaluation", self._manifest.evaluation)
        logits: Array = program.run([*self._trained.values(), torch.from_numpy(x)])[-1].numpy().copy()
        return logits

    def trained(self) -> dict[str, Array]:
        """The parameters and statistics by name; views of the session's memory."""
        return {name: tensor.numpy() for name, tensor in self._trained.items()}

    def _program(self, kind: str, program: Program) -> ExecuTorchProgram:
        if self._loaded is None or self._loaded[0] != kind:
            # The other program's arena is given back before this one's is taken.
            self._loaded = None
            self._loaded = kind, ExecuTorchProgram(self._store.read(program.file), kind)
        return self._loaded[1]


class ExecuTorchPrefixSession:
    """A frozen block, forward only."""

    def __init__(self, program: Program, store: BlobStore) -> None:
        self._program = ExecuTorchProgram(store.read(program.file), "prefix")

    def run(self, x: Array) -> Array:
        """Features of one batch."""
        features: Array = self._program.run([torch.from_numpy(x)])[-1].numpy().copy()
        return features


class ExecuTorchRuntime:
    """Opens artifacts whose engine is `executorch`."""

    def open_stage(self, manifest: StageManifest, store: BlobStore) -> ExecuTorchTrainingSession:
        """Load a stage's programs from `store`."""
        return ExecuTorchTrainingSession(manifest, store)

    def open_prefix(self, program: Program, store: BlobStore) -> ExecuTorchPrefixSession:
        """Load a frozen block's program from `store`."""
        return ExecuTorchPrefixSession(program, store)


def _zeros(specs: Sequence[TensorSpec]) -> dict[str, torch.Tensor]:
    return {spec.name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in specs}
