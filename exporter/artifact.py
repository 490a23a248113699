"""Compiling stages: a manifest and the programs it names, checked before they ship."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from frostline.exporter.executorch_lowering import LoweredProgram, lower_delegated, lower_portable
from frostline.exporter.optimizer import SGD
from frostline.exporter.parity import Parity, check_parity
from frostline.exporter.rewrites.executorch import rewrite_for_executorch
from frostline.exporter.stage import Stage
from frostline.exporter.training_step import (
    StageState,
    initial_state,
    trace_evaluation,
    trace_training_step,
)
from frostline.protocol.blobs import reference_to
from frostline.protocol.errors import FrostlineError, RunError
from frostline.protocol.manifest import (
    DType,
    PlannedMemory,
    Program,
    StageManifest,
    TensorSpec,
)
from frostline.protocol.tensors import Array

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


def compile_stage(stage: Stage, options: ExportOptions, prefix: Sequence[Program] = ()) -> CompiledStage:
    """Compile a stage's training and evaluation programs, and check the former against eager PyTorch.

    Parameters
    ----------
    prefix : sequence of Program
        The frozen blocks before the stage, compiled by `compile_prefix`.

    Raises
    ------
    RunError
        If the programs cannot be lowered, or do not train as eager PyTorch does.
    """
    tensors = _StageTensors.of(stage, options)
    with _explained(stage):
        training = _lower_training(stage, options, tensors)
        evaluation = _lower_evaluation(stage, tensors)
    parity = check_parity(stage, training, tensors.state, options)
    manifest = _manifest(stage, options, prefix, tensors, training, evaluation)
    contents = {reference_to(p.content).sha256: p.content for p in (training, evaluation)}
    return CompiledStage(manifest, contents, parity)


def plan_stage(stage: Stage, options: ExportOptions) -> PlannedMemory:
    """What training a stage takes, without an artifact to show for it: evaluation needs no more than training."""
    tensors = _StageTensors.of(stage, options)
    with _explained(stage):
        training = _lower_training(stage, options, tensors)
    return _planned(training, training, tensors)


def compile_prefix(stage: Stage, batch: int) -> tuple[Program, bytes]:
    """Compile a stage's block as it stands now into a forward-only program with its weights inside.

    Its input is the features before the block, its output the features that the next stage trains on.
    """
    block = stage.model.block.eval()
    x = torch.zeros(batch, *stage.input_shape)
    with torch.no_grad():
        features = block(x)
    with _explained(stage):
        lowered = lower_delegated(block, [x])
    return _program(lowered, [_spec("x", x)], [_spec("features", features)]), lowered.content


def arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """Tensors as NumPy arrays of the same memory."""
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def _program(lowered: LoweredProgram, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> Program:
    return Program(
        file=reference_to(lowered.content), inputs=inputs, outputs=outputs, arena_bytes=lowered.arena_bytes
    )


@dataclass(frozen=True)
class _StageTensors:
    """The arguments of a stage's training step: its state and one batch of zeros."""

    state: StageState
    x: Tensor
    y: Tensor
    learning_rate: Tensor

    @classmethod
    def of(cls, stage: Stage, options: ExportOptions) -> Self:
        x = torch.zeros(options.batch, *stage.input_shape)
        y = torch.zeros(options.batch, dtype=torch.int64)
        return cls(initial_state(stage, options.optimizer), x, y, torch.tensor(0.1))


def _lower_training(stage: Stage, options: ExportOptions, tensors: _StageTensors) -> LoweredProgram:
    step = trace_training_step(
        stage, options.optimizer, tensors.state, tensors.x, tensors.y, rewrite_for_executorch
    )
    return lower_portable(step, [*tensors.state.tensors, tensors.x, tensors.y, tensors.learning_rate])


def _lower_evaluation(stage: Stage, tensors: _StageTensors) -> LoweredProgram:
    state = tensors.state
    traced = trace_evaluation(stage, state, tensors.x, rewrite_for_executorch)
    return lower_portable(traced, [*state.parameters.values(), *state.statistics.values(), tensors.x])


@contextlib.contextmanager
def _explained(stage: Stage) -> Iterator[None]:
    """What PyTorch and ExecuTorch raise becomes one line that names the stage."""
    try:
        yield
    except FrostlineError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        hint = "; dropout cannot be trained yet, leave it out" if "bernoulli" in str(error) else ""
        raise RunError(f"stage {stage.name!r} cannot be compiled: {reason[0]}{hint}") from error


def _manifest(
    stage: Stage,
    options: ExportOptions,
    prefix: Sequence[Program],
    tensors: _StageTensors,
    training: LoweredProgram,
    evaluation: LoweredProgram,
) -> StageManifest:
    state = tensors.state
    parameters = [_with_axes(spec, stage) for spec in _specs(state.parameters)]
    trained = parameters + _specs(state.statistics)
    x, y, rate = _spec("x", tensors.x), _spec("y", tensors.y), _spec("learning_rate", tensors.learning_rate)
    results = [TensorSpec(name="loss", shape=()), TensorSpec(name="correct", dtype="int64", shape=())]
    logits = TensorSpec(name="logits", shape=(options.batch, options.classes))
    return StageManifest(
        stage=stage.index,
        stages=stage.count,
        name=stage.name,
        engine="executorch",
        batch=options.batch,
        classes=options.classes,
        parameters=parameters,
        statistics=_specs(state.statistics),
        optimizer_state=_specs(state.optimizer_state),
        training=_program(training, [*trained, *_specs(state.optimizer_state), x, y, rate], results),
        evaluation=_program(evaluation, [*trained, x], [logits]),
        prefix=list(prefix),
        planned=_planned(training, evaluation, tensors).behind(prefix),
    )


def _planned(training: LoweredProgram, evaluation: LoweredProgram, tensors: _StageTensors) -> PlannedMemory:
    state = tensors.state
    # One of the two programs is loaded at a time, with its arena.
    return PlannedMemory(
        arena=max(training.arena_bytes, evaluation.arena_bytes),
        parameters=_size(state.parameters.values()),
        statistics=_size(state.statistics.values()),
        optimizer_state=_size(state.optimizer_state.values()),
        batch=_size([tensors.x, tensors.y, tensors.learning_rate]),
        program=max(len(training.content), len(evaluation.content)),
    )


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _with_axes(spec: TensorSpec, stage: Stage) -> TensorSpec:
    axes = stage.layout.axes.get(spec.name)
    return spec.model_copy(update={"model_axes": axes}) if axes else spec


def _specs(tensors: Mapping[str, Tensor]) -> list[TensorSpec]:
    return [_spec(name, tensor) for name, tensor in tensors.items()]


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name=name, dtype=_DTYPES[tensor.dtype], shape=tuple(tensor.shape))
