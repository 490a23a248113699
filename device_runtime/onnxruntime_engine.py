"""The ONNX Runtime engine: programs in plain ONNX, for boards without PyTorch.

An ONNX program writes nothing in place. Whatever a step writes is held twice: the program reads one buffer and writes the
other, which then take each other's place, so that nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from frostline.device_runtime.engine import overwrite
from frostline.device_runtime.onnx_program import OnnxProgram
from frostline.protocol.blobs import BlobStore
from frostline.protocol.errors import RunError
from frostline.protocol.manifest import NEW, SEEDS, Program, StageManifest, TensorSpec
from frostline.protocol.tensors import Array


class OnnxRuntimeTrainingSession:
    """A stage trained between two sets of buffers.

    The programs of a step are loaded together; that of the evaluation takes their place, since each keeps the memory of
    its largest run.
    """

    def __init__(self, manifest: StageManifest, store: BlobStore) -> None:
        self._manifest = manifest
        self._store = store
        self._loaded: dict[str, OnnxProgram] = {}
        held = [*manifest.trained, *manifest.optimizer_state, *manifest.received]
        self._held = {spec.name: _zeros(spec) for spec in held}
        self._second: dict[str, Array] = {}
        self._seed = 0

    def load(self, tensors: Mapping[str, Array], seed: int = 0) -> None:
        """Set parameters and statistics by name and reset the optimizer's state; dropout starts from `seed`."""
        self._seed = seed
        for spec in self._manifest.trained:
            self._held[spec.name][...] = spec.held(tensors[spec.name])
        for spec in self._manifest.received:
            self._held[spec.name][...] = self._held[spec.name.removeprefix("received.")]
        for spec in self._manifest.optimizer_state:
            self._held[spec.name].fill(0)

    def step(self, parts: Iterable[tuple[Array, Array]], learning_rate: float) -> tuple[float, int]:
        """Train on one batch, given in the manifest's micro-batches: its mean loss and right answers."""
        update = self._manifest.update
        self._load_only({"training": self._manifest.training, **({"update": update} if update else {})})
        rate = np.array(learning_rate, np.float32)
        loss, right = np.zeros((), np.float32), np.zeros((), np.int64)
        losses: list[float] = []
        correct = 0
        for x, y in parts:
            first = np.array(not losses, np.float32)
            seed = np.array(self._seed % SEEDS, np.float32)
            self._seed += 1
            batch = {"x": x, "y": y, "learning_rate": rate, "first": first, "seed": seed}
            self._run("training", batch, {"loss": loss, "correct": right})
            losses.append(float(loss))
            correct += int(right)
        if update:
            self._run("update", {"learning_rate": rate}, {"applied_rate": np.zeros((), np.float32)})
        return sum(losses) / len(losses), correct

    def evaluate(self, x: Array) -> Array:
        """Logits (micro_batch, classes) float32, with the present state."""
        self._load_only({"evaluation": self._manifest.evaluation})
        logits = _zeros(self._manifest.evaluation.outputs[0])
        self._run("evaluation", {"x": x}, {"logits": logits})
        return logits

    def trained(self) -> dict[str, Array]:
        """The parameters and statistics by name; views of the session's memory."""
        return {spec.name: spec.travelling(self._held[spec.name]) for spec in self._manifest.trained}

    def state(self) -> dict[str, Array]:
        """All that the next step depends on beside its batch; views of the session's memory, but for the seed."""
        return {**self._held, "seed": np.array(self._seed, np.int64)}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from what `state` gave, in place of `load`."""
        held = self.state()
        overwrite(held, state)
        self._seed = int(held["seed"])

    def _load_only(self, programs: Mapping[str, Program]) -> None:
        if self._loaded.keys() == programs.keys():
            return
        # The other programs' memory is given back before these take theirs.
        self._loaded.clear()
        for kind, program in programs.items():
            loaded = _loaded(program, self._store, kind)
            for name in loaded.outputs:
                whole = name.removeprefix(NEW)
                if name != whole and whole not in self._second:
                    self._second[whole] = np.zeros_like(self._held[whole])
            self._loaded[kind] = loaded

    def _run(self, kind: str, step: Mapping[str, Array], results: Mapping[str, Array]) -> None:
        program = self._loaded[kind]
        new = [name for name in program.outputs if name not in results]
        written = {name: self._second[name.removeprefix(NEW)] for name in new}
        program.run({**self._held, **step}, {**results, **written})
        for name in new:
            whole = name.removeprefix(NEW)
            self._held[whole], self._second[whole] = self._second[whole], self._held[whole]


class OnnxRuntimePrefixSession:
    """A frozen block, forward only."""

    def __init__(self, program: Program, store: BlobStore) -> None:
        self._program = _loaded(program, store, "prefix")
        self._features = program.outputs[0]

    def run(self, x: Array) -> Array:
        """Features of one batch."""
        features = _zeros(self._features)
        self._program.run({"x": x}, {"features": features})
        return features


class OnnxRuntime:
    """Opens artifacts whose engine is `onnxruntime`."""

    def open_stage(self, manifest: StageManifest, store: BlobStore) -> OnnxRuntimeTrainingSession:
        """Load a stage's programs from `store`."""
        return OnnxRuntimeTrainingSession(manifest, store)

    def open_prefix(self, program: Program, store: BlobStore) -> OnnxRuntimePrefixSession:
        """Load a frozen block's program from `store`."""
        return OnnxRuntimePrefixSession(program, store)


def _loaded(program: Program, store: BlobStore, kind: str) -> OnnxProgram:
    """The program, found to take and return what the manifest says: it is given bare memory.

    Raises
    ------
    RunError
        If it does not.
    """
    loaded = OnnxProgram(store.read(program.file), kind)
    declared = {spec.name: (spec.shape, np.dtype(spec.dtype)) for spec in program.inputs}
    taken = {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in loaded.inputs.items()}
    returned = {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in loaded.outputs.items()}
    results = {spec.name: (spec.shape, np.dtype(spec.dtype)) for spec in program.outputs}
    written = {NEW + name: value for name, value in declared.items() if NEW + name in returned}
    if taken != declared or returned != {**results, **written}:
        raise RunError(f"{kind} program: it does not take and return what its manifest says; export it again")
    return loaded


def _zeros(spec: TensorSpec) -> Array:
    return np.zeros(spec.held_shape, spec.dtype)
