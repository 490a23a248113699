"""Compiling stages: a manifest and the programs it names, checked before they ship."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import torch
from torch import Tensor

from frostline.exporter.executorch_lowering import quiet
from frostline.exporter.executorch_target import EXECUTORCH
from frostline.exporter.flops import forward_flops, step_flops
from frostline.exporter.inputs import zero_inputs
from frostline.exporter.layout import Layout
from frostline.exporter.lowering_cache import LoweringCache
from frostline.exporter.onnxruntime_training_target import OnnxRuntimeTrainingTarget
from frostline.exporter.optimizer import SGD, Optimizer
from frostline.exporter.parity import (
    Parity,
    check_evaluation,
    check_parity,
    check_prefix,
    device_session,
    train_on_device,
)
from frostline.exporter.stage import Stage, statistics_tensors, trainable_tensors
from frostline.exporter.support import check_dtypes, explain
from frostline.exporter.target import LoweredProgram, Target
from frostline.exporter.tiles import pick, split_name
from frostline.exporter.training_step import (
    StageState,
    TracedProgram,
    initial_state,
    step_inputs,
    trace_accumulation,
    trace_evaluation,
    trace_training_step,
    trace_update,
)
from frostline.exporter.variant import WHOLE, Variant
from frostline.protocol.blobs import reference_to
from frostline.protocol.errors import FrostlineError, RunError, UsageError
from frostline.protocol.manifest import (
    DType,
    PlannedMemory,
    Program,
    StageManifest,
    TensorSpec,
)
from frostline.protocol.tensors import Array

_DTYPES: dict[torch.dtype, DType] = {torch.float32: "float32", torch.int64: "int64"}


PREFIX_BATCH = 8
"""Samples a frozen block takes at a time: it runs once over all of them, and with little memory."""


@dataclass(frozen=True)
class ExportOptions:
    """How stages are compiled.

    Attributes
    ----------
    batch : int
        Samples in a training step; fixed in the programs.
    classes : int
        Width of the logits.
    target : Target
        The engine of the devices.
    cache : LoweringCache or None
        Where lowered programs are kept from one run to the next.
    """

    batch: int
    classes: int
    optimizer: Optimizer = field(default_factory=SGD)
    target: Target = EXECUTORCH
    cache: LoweringCache | None = None


@dataclass(frozen=True)
class CompiledStage:
    """A stage's manifest, the files it names by hash, and what the parity check found."""

    manifest: StageManifest
    files: Mapping[str, bytes]
    parity: Parity


def compile_stage(
    stage: Stage, options: ExportOptions, prefix: Sequence[Program] = (), variant: Variant = WHOLE
) -> CompiledStage:
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
    if isinstance(options.target, OnnxRuntimeTrainingTarget):
        # It builds on this module.
        from frostline.exporter.onnxruntime_training_artifact import compile_artifacts

        return compile_artifacts(stage, options, prefix, variant)
    tensors = StageTensors.of(stage, options, variant)
    with _explained(stage):
        programs = _LoweredStage(
            *_lower_training(stage, options, tensors, variant),
            evaluation=_lower_evaluation(stage, options, tensors),
        )
        flops = step_flops(stage, options.batch, recompute=variant.recompute)
    manifest = _manifest(stage, options, variant, tensors, programs, flops)
    contents = {reference_to(p.content).sha256: p.content for p in programs.all}
    with _explained(stage), _diagnosed(options.target, programs, tensors):
        parity = checked(stage, options, variant, manifest, contents)
    return CompiledStage(manifest.behind(prefix), contents, parity)


def checked(
    stage: Stage,
    options: ExportOptions,
    variant: Variant,
    manifest: StageManifest,
    files: Mapping[str, bytes],
) -> Parity:
    """Run a stage's artifact as a device does, and compare it with eager PyTorch."""
    values = {**trainable_tensors(stage), **statistics_tensors(stage)}
    with device_session(manifest, files, values) as session:
        parity = check_parity(
            stage, options, variant.micro_batches, partial(train_on_device, session, values)
        )
        session.load(arrays(values))
        check_evaluation(stage, options, variant.micro_batches, session)
    return parity


@contextlib.contextmanager
def _diagnosed(target: Target, programs: _LoweredStage, tensors: StageTensors) -> Iterator[None]:
    """Where a runtime fails on a program, find which operator it was that failed: devices only see that one did."""
    try:
        yield
    except RunError:
        for program in programs.all:
            target.load(program)(tensors.by_name)
        raise


def plan_stage(stage: Stage, options: ExportOptions, variant: Variant = WHOLE) -> PlannedMemory:
    """What training a stage takes, without an artifact to show for it: evaluation needs no more than training."""
    if isinstance(options.target, OnnxRuntimeTrainingTarget):
        return compile_stage(stage, options, variant=variant).manifest.planned
    tensors = StageTensors.of(stage, options, variant)
    with _explained(stage):
        return _planned(_lower_training(stage, options, tensors, variant), tensors)


def compile_prefix(
    stage: Stage, batch: int, target: Target = EXECUTORCH, calibration: Tensor | None = None
) -> tuple[Program, bytes]:
    """Compile a stage's block as it stands now into a forward-only program with its weights inside.

    Its input is the features before the block, its output the features that the next stage trains on. With `calibration`,
    samples (M, *input_shape) of that input, targets that can do so compile it in int8.
    """
    block = stage.model.block.eval()
    x = zero_inputs(min(batch, PREFIX_BATCH), stage.input_shape, stage.vocabulary)
    with torch.no_grad():
        features = block(x)

    def compiled(*, delegated: bool) -> tuple[Program, bytes]:
        lowered = target.lower_frozen(block, x, calibration, delegated=delegated)
        inputs = [_spec("x", x, stage.vocabulary)]
        program = _program(lowered, inputs, [_spec("features", features)])
        if calibration is None:
            check_prefix(stage, target.engine, program, lowered.content)
        return program, lowered.content

    with _explained(stage):
        if calibration is not None or not target.delegates:
            program, content = compiled(delegated=target.delegates)
        else:
            try:
                # What a delegate's kernels say of arguments they do not take is for nobody.
                with quiet():
                    program, content = compiled(delegated=True)
            except Exception:  # it may raise anything for what it does not know, or compute something else
                program, content = compiled(delegated=False)
    return program.model_copy(update={"flops": forward_flops(block, x)}), content


def arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """Tensors as NumPy arrays of the same memory."""
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def _program(lowered: LoweredProgram, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> Program:
    return Program(
        file=reference_to(lowered.content), inputs=inputs, outputs=outputs, arena_bytes=lowered.arena_bytes
    )


@dataclass(frozen=True)
class StageTensors:
    """All that a stage's programs take: its state, and one micro-batch of zeros, with the vocabulary of token ids."""

    state: StageState
    x: Tensor
    y: Tensor
    vocabulary: int | None

    @classmethod
    def of(cls, stage: Stage, options: ExportOptions, variant: Variant) -> Self:
        """The tensors of one variant.

        Raises
        ------
        UsageError
            If the batch does not divide into the variant's micro-batches, or a tensor of the model is not float32.
        """
        check_dtypes(stage.model)
        samples, rest = divmod(options.batch, variant.micro_batches)
        if rest:
            raise UsageError(
                f"a batch of {options.batch} cannot be trained in {variant.micro_batches} equal parts; "
                f"use a multiple of {variant.micro_batches}"
            )
        x = zero_inputs(samples, stage.input_shape, stage.vocabulary)
        y = torch.zeros(samples, dtype=torch.int64)
        state = initial_state(stage, options.optimizer, variant, options.target.layout(stage.model))
        return cls(state, x, y, stage.vocabulary)

    @property
    def by_name(self) -> dict[str, Tensor]:
        """Every input a program may name."""
        return {**self.state.by_name, **step_inputs(self.x, self.y)}


def trace_training(
    stage: Stage, options: ExportOptions, tensors: StageTensors, variant: Variant
) -> list[TracedProgram]:
    """The programs of a step: one, or one for a micro-batch and one for the update."""
    optimizer, rewrite = options.optimizer, options.target.rewrite
    state, x, y = tensors.state, tensors.x, tensors.y
    if variant.micro_batches == 1:
        return [trace_training_step(stage, optimizer, state, x, y, rewrite, variant)]
    return [
        trace_accumulation(stage, optimizer, state, x, y, rewrite, variant),
        trace_update(stage, optimizer, state, rewrite),
    ]


@dataclass(frozen=True)
class _LoweredStage:
    training: LoweredProgram
    update: LoweredProgram | None = None
    evaluation: LoweredProgram = field(kw_only=True)

    @property
    def of_a_step(self) -> list[LoweredProgram]:
        """Those that are loaded together to train."""
        return [self.training, *([self.update] if self.update else [])]

    @property
    def all(self) -> list[LoweredProgram]:
        return [*self.of_a_step, self.evaluation]


def _lower_training(
    stage: Stage, options: ExportOptions, tensors: StageTensors, variant: Variant
) -> list[LoweredProgram]:
    programs = trace_training(stage, options, tensors, variant)
    results = [["loss", "correct"], ["applied_rate"]]
    return [
        _lower(program, options, tensors, names) for program, names in zip(programs, results, strict=False)
    ]


def _lower_evaluation(stage: Stage, options: ExportOptions, tensors: StageTensors) -> LoweredProgram:
    program = trace_evaluation(stage, tensors.state, tensors.x, options.target.rewrite)
    return _lower(program, options, tensors, ["logits"])


def _lower(
    program: TracedProgram, options: ExportOptions, tensors: StageTensors, results: Sequence[str]
) -> LoweredProgram:
    if options.cache is None:
        return options.target.lower(program, tensors.by_name, results)
    return options.cache.lower(options.target, program, tensors.by_name, results)


@contextlib.contextmanager
def _explained(stage: Stage) -> Iterator[None]:
    """What PyTorch and ExecuTorch raise becomes one line that names the stage."""
    try:
        yield
    except FrostlineError:
        raise
    except Exception as error:
        x = zero_inputs(2, stage.input_shape, stage.vocabulary)
        raise RunError(
            f"stage {stage.name!r} cannot be compiled: {explain(error, stage.model, x)}"
        ) from error


def _manifest(
    stage: Stage,
    options: ExportOptions,
    variant: Variant,
    tensors: StageTensors,
    programs: _LoweredStage,
    flops: int,
) -> StageManifest:
    state = tensors.state
    results = [TensorSpec(name="loss", shape=()), TensorSpec(name="correct", dtype="int64", shape=())]
    logits = TensorSpec(name="logits", shape=(len(tensors.x), options.classes))
    update = programs.update
    return StageManifest(
        stage=stage.index,
        stages=stage.count,
        name=stage.name,
        engine=options.target.engine,
        variant=variant.name,
        batch=options.batch,
        micro_batches=variant.micro_batches,
        classes=options.classes,
        parameters=[_travelling(spec, state.layout) for spec in _specs(state.parameters)],
        statistics=_specs(state.statistics),
        optimizer_state=_specs(state.optimizer_state),
        received=_specs(state.received),
        training=_stage_program(programs.training, tensors, results),
        update=_stage_program(update, tensors, [TensorSpec(name="applied_rate", shape=())])
        if update
        else None,
        evaluation=_stage_program(programs.evaluation, tensors, [logits]),
        prefix=[],
        planned=_planned(programs.of_a_step, tensors, programs.evaluation),
        flops=flops,
    )


def _stage_program(program: LoweredProgram, tensors: StageTensors, outputs: list[TensorSpec]) -> Program:
    inputs = [_input_spec(name, tensors) for name in program.inputs]
    return _program(program, inputs, outputs)


def _input_spec(name: str, tensors: StageTensors) -> TensorSpec:
    whole, tile = split_name(name)
    vocabulary = tensors.vocabulary if name == "x" else None
    return _spec(whole, pick(tensors.by_name, name), vocabulary).model_copy(update={"tile": tile})


def _planned(
    step: Sequence[LoweredProgram],
    tensors: StageTensors,
    evaluation: LoweredProgram | None = None,
) -> PlannedMemory:
    # The programs of a step are loaded together, that of the evaluation in their place.
    loaded = [list(step), [evaluation] if evaluation else []]
    return planned_memory(
        tensors,
        {name for program in step for name in program.written},
        arena=max(sum(program.arena_bytes for program in programs) for programs in loaded),
        program=max(sum(len(program.content) for program in programs) for programs in loaded),
    )


def planned_memory(
    tensors: StageTensors, written: Iterable[str], *, arena: int, program: int
) -> PlannedMemory:
    """The whole of it, from the bytes of the arenas and programs loaded together.

    Parameters
    ----------
    written : iterable of str
        What has a second buffer, since the programs do not write in place.
    """
    state = tensors.state
    return PlannedMemory(
        arena=arena,
        parameters=_size(state.parameters.values()),
        statistics=_size(state.statistics.values()),
        optimizer_state=_size(state.optimizer_state.values()),
        received=_size(state.received.values()),
        second_buffers=_size(pick(tensors.by_name, name) for name in written),
        batch=_size([tensors.x, tensors.y, torch.tensor(0.1)]),
        program=program,
    )


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _travelling(held: TensorSpec, layout: Layout) -> TensorSpec:
    """A parameter's spec from that of the tensor a device holds."""
    axes = layout.axes.get(held.name)
    if axes is None:
        return held
    shape = tuple(held.shape[axes.index(axis)] for axis in range(len(axes)))
    return held.model_copy(update={"shape": shape, "held_axes": axes})


def _specs(tensors: Mapping[str, Tensor]) -> list[TensorSpec]:
    return [_spec(name, tensor) for name, tensor in tensors.items()]


def _spec(name: str, tensor: Tensor, vocabulary: int | None = None) -> TensorSpec:
    dtype, shape = _DTYPES[tensor.dtype], tuple(tensor.shape)
    return TensorSpec(name=name, dtype=dtype, shape=shape, vocabulary=vocabulary)
