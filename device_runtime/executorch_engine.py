"""The ExecuTorch engine: programs run by the portable runtime over tensors this process owns."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from frostline.device_runtime.engine import overwrite
from frostline.device_runtime.standard_error import quiet_standard_error
from frostline.protocol.blobs import BlobStore
from frostline.protocol.errors import RunError
from frostline.protocol.manifest import SEEDS, Program, StageManifest, TensorSpec
from frostline.protocol.tensors import Array

# On contended cores the runtime's own thread pool makes it 40 to 80 times slower; one thread per worker is the rule.
# It must be said before the library loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Both print notices about optional parts and the processor that no user of an agent can act on. The second needs the
# libraries that torch loads. Its public name, `portable_lib`, imports a compiler for a deprecation warning: 3 CPU seconds
# and 138 MB in every process that trains.
with quiet_standard_error():
    import torch
    from executorch.extension.pybindings._portable_lib import _load_for_executorch_from_buffer


_Argument = str | torch.Tensor


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

    The programs of a step are loaded together; that of the evaluation takes their place, since each brings an arena of
    its own.
    """

    def __init__(self, manifest: StageManifest, store: BlobStore) -> None:
        self._manifest = manifest
        self._store = store
        self._loaded: dict[str, tuple[ExecuTorchProgram, list[_Argument]]] = {}
        self._trained = _zeros(manifest.trained)
        self._optimizer_state = _zeros(manifest.optimizer_state)
        self._received = _zeros(manifest.received)
        self._held = {**self._trained, **self._optimizer_state, **self._received}
        self._seed = 0

    def load(self, tensors: Mapping[str, Array], seed: int = 0) -> None:
        """Set parameters and statistics by name and reset the optimizer's state; dropout starts from `seed`."""
        self._seed = seed
        for spec in self._manifest.trained:
            held = np.asarray(spec.held(tensors[spec.name]), order="C")
            self._trained[spec.name].copy_(torch.from_numpy(held))
        for name, tensor in self._received.items():
            tensor.copy_(self._trained[name.removeprefix("received.")])
        for tensor in self._optimizer_state.values():
            tensor.zero_()

    def step(self, parts: Iterable[tuple[Array, Array]], learning_rate: float) -> tuple[float, int]:
        """Train on one batch, given in the manifest's micro-batches: its mean loss and right answers."""
        update = self._manifest.update
        programs = {"training": self._manifest.training, **({"update": update} if update else {})}
        self._load_only(programs)
        rate = torch.tensor(learning_rate, dtype=torch.float32)
        losses: list[float] = []
        correct = 0
        for x, y in parts:
            first = torch.tensor(float(not losses))
            seed = torch.tensor(float(self._seed % SEEDS))
            self._seed += 1
            batch = {"x": torch.from_numpy(x), "y": torch.from_numpy(y)}
            loss, right = self._run(
                "training", {**batch, "learning_rate": rate, "first": first, "seed": seed}
            )
            losses.append(float(loss))
            correct += int(right)
        if update:
            self._run("update", {"learning_rate": rate})
        return sum(losses) / len(losses), correct

    def evaluate(self, x: Array) -> Array:
        """Logits (micro_batch, classes) float32, with the present state."""
        self._load_only({"evaluation": self._manifest.evaluation})
        logits: Array = self._run("evaluation", {"x": torch.from_numpy(x)})[0].numpy().copy()
        return logits

    def trained(self) -> dict[str, Array]:
        """The parameters and statistics by name; views of the session's memory."""
        return {
            spec.name: spec.travelling(self._trained[spec.name].numpy()) for spec in self._manifest.trained
        }

    def state(self) -> dict[str, Array]:
        """All that the next step depends on beside its batch; views of the session's memory, but for the seed."""
        return {
            **{name: tensor.numpy() for name, tensor in self._held.items()},
            "seed": np.array(self._seed, np.int64),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from what `state` gave, in place of `load`."""
        held = self.state()
        overwrite(held, state)
        self._seed = int(held["seed"])

    def _load_only(self, programs: Mapping[str, Program]) -> None:
        if self._loaded.keys() == programs.keys():
            return
        # The other programs' arenas are given back before these are taken.
        self._loaded.clear()
        for kind, program in programs.items():
            arguments = [self._argument(spec) for spec in program.inputs]
            self._loaded[kind] = ExecuTorchProgram(self._store.read(program.file), kind), arguments

    def _argument(self, spec: TensorSpec) -> _Argument:
        """A tensor of the stage, or one of its tiles, in place; the name of what changes with every call."""
        held = self._held.get(spec.name)
        if held is None or spec.tile is None:
            return spec.name if held is None else held
        return held.view(-1, *spec.shape)[spec.tile]

    def _run(self, kind: str, step: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        program, arguments = self._loaded[kind]
        return program.run([step[each] if isinstance(each, str) else each for each in arguments])


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
    return {spec.name: torch.zeros(spec.held_shape, dtype=getattr(torch, spec.dtype)) for spec in specs}
