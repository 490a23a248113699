"""Training artifacts: a stage compiled, checked and written as a manifest with content-addressed files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from frostline.exporter.executorch_lowering import LoweredProgram, lower_delegated, lower_portable
from frostline.exporter.optimizer import SGD
from frostline.exporter.parity import Parity, check_parity
from frostline.exporter.rewrites.executorch import REWRITES
from frostline.exporter.stage import Stage
from frostline.exporter.training_step import (
    StageState,
    initial_state,
    trace_evaluation,
    trace_training_step,
)
from frostline.protocol.blobs import BlobStore, reference_to, write_atomically
from frostline.protocol.errors import UsageError
from frostline.protocol.manifest import (
    DType,
    PlannedMemory,
    Program,
    StageManifest,
    TensorSpec,
    decode_manifest,
)
from frostline.protocol.tensors import Array, encode_tensors

_DTYPES: dict[torch.dtype, DType] = {torch.float32: "float32", torch.int64: "int64"}


@dataclass(frozen=True)
class ExportOptions:
    """How stages are compiled.

    Attributes
    ----------
    batch : int
        Samples in a training step; fixed in the program.
    classes : int
        Width of the logits.
    """

    batch: int
    classes: int
    optimizer: SGD = field(default_factory=SGD)


@dataclass(frozen=True)
class CompiledStage:
    """A stage's manifest, the files it names by hash, and what the parity check found."""

    manifest: StageManifest
    files: Mapping[str, bytes]
    parity: Parity


def compile_stage(
    stage: Stage, options: ExportOptions, prefix: Sequence[Program] = (), *, check: bool = True
) -> CompiledStage:
    """Compile a stage's training and evaluation programs.

    Parameters
    ----------
    prefix : sequence of Program
        The frozen blocks before the stage, compiled by `compile_prefix`.
    check : bool
        Run the training program in its runtime and compare it with eager PyTorch in float64.

    Raises
    ------
    RunError
        If the programs cannot be lowered, or differ from eager PyTorch.
    """
    state = initial_state(stage, options.optimizer)
    x = torch.zeros(options.batch, *stage.input_shape)
    y = torch.zeros(options.batch, dtype=torch.int64)
    rate = torch.tensor(0.1)
    step = trace_training_step(stage, options.optimizer, state, x, y, REWRITES)
    training = lower_portable(step, [*state.tensors, x, y, rate])
    forward = [*state.parameters.values(), *state.statistics.values(), x]
    evaluation = lower_portable(trace_evaluation(stage, state, x, REWRITES), forward)
    parity = check_parity(stage, training, state, options) if check else Parity(0.0, 0.0)

    trained = _specs(state.parameters) + _specs(state.statistics)
    inputs = [_spec("x", x), _spec("y", y)]
    scalar = [TensorSpec(name="loss", shape=()), TensorSpec(name="correct", dtype="int64", shape=())]
    manifest = StageManifest(
        stage=stage.index,
        stages=stage.count,
        name=stage.name,
        engine="executorch",
        batch=options.batch,
        classes=options.classes,
        parameters=_specs(state.parameters),
        statistics=_specs(state.statistics),
        optimizer_state=_specs(state.optimizer_state),
        training=_program(
            training,
            [*trained, *_specs(state.optimizer_state), *inputs, _spec("learning_rate", rate)],
            scalar,
        ),
        evaluation=_program(
            evaluation,
            [*trained, inputs[0]],
            [TensorSpec(name="logits", shape=(options.batch, options.classes))],
        ),
        prefix=list(prefix),
        planned=_planned(training, evaluation, state, [x, y, rate]),
    )
    contents = {reference_to(p.content).sha256: p.content for p in (training, evaluation)}
    return CompiledStage(manifest, contents, parity)


def compile_prefix(stage: Stage, batch: int) -> tuple[Program, bytes]:
    """Compile a stage's block as it stands now into a forward-only program with its weights inside.

    Its input is the features before the block, its output the features that the next stage trains on.
    """
    block = stage.model.block.eval()
    x = torch.zeros(batch, *stage.input_shape)
    with torch.no_grad():
        features = block(x)
    lowered = lower_delegated(block, [x])
    return _program(lowered, [_spec("x", x)], [_spec("features", features)]), lowered.content


def write_artifact(
    folder: Path, manifest: StageManifest, files: Mapping[str, bytes], weights: Mapping[str, Array]
) -> None:
    """Write `manifest.json`, `weights.safetensors` and `files/<sha256>` below `folder`.

    The manifest is written last: a folder without one is unfinished.
    """
    store = BlobStore(folder / "files")
    for content in files.values():
        store.put(content)
    write_atomically(folder / "weights.safetensors", encode_tensors(weights))
    write_atomically(folder / "manifest.json", manifest.encode())


def read_artifact(folder: Path) -> tuple[StageManifest, BlobStore]:
    """Open an artifact and verify every file it names.

    Raises
    ------
    UsageError
        If there is no artifact.
    CorruptContent
        If the manifest or a file is damaged.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise UsageError(f"{folder}: no artifact here: manifest.json is missing")
    manifest = decode_manifest(path.read_bytes(), str(path))
    store = BlobStore(folder / "files")
    for reference in manifest.files:
        store.read(reference)
    return manifest, store


def arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """Tensors as NumPy arrays of the same memory."""
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def _program(lowered: LoweredProgram, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> Program:
    return Program(
        file=reference_to(lowered.content), inputs=inputs, outputs=outputs, arena_bytes=lowered.arena_bytes
    )


def _planned(
    training: LoweredProgram, evaluation: LoweredProgram, state: StageState, inputs: Sequence[Tensor]
) -> PlannedMemory:
    # One of the two programs is loaded at a time, with its arena.
    return PlannedMemory(
        arena=max(training.arena_bytes, evaluation.arena_bytes),
        parameters=_size(state.parameters.values()),
        statistics=_size(state.statistics.values()),
        optimizer_state=_size(state.optimizer_state.values()),
        batch=_size(inputs),
        program=max(len(training.content), len(evaluation.content)),
    )


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _specs(tensors: Mapping[str, Tensor]) -> list[TensorSpec]:
    return [_spec(name, tensor) for name, tensor in tensors.items()]


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name=name, dtype=_DTYPES[tensor.dtype], shape=tuple(tensor.shape))
