"""A stage's manifest and files for onnxruntime-training, checked and measured before they ship."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from frostline.exporter.artifact import CompiledStage, ExportOptions, arrays, checked
from frostline.exporter.flops import step_flops
from frostline.exporter.onnxruntime_training import TrainingArtifacts, generate_training_artifacts
from frostline.exporter.optimizer import AdamW
from frostline.exporter.stage import Stage, statistics_tensors, trainable_tensors
from frostline.exporter.variant import Variant
from frostline.protocol.artifact import write_artifact
from frostline.protocol.blobs import reference_to
from frostline.protocol.errors import RunError, UsageError
from frostline.protocol.manifest import NEW, PlannedMemory, Program, StageManifest, TensorSpec


def compile_artifacts(
    stage: Stage, options: ExportOptions, prefix: Sequence[Program], variant: Variant
) -> CompiledStage:
    """Compile a stage and compare it with eager PyTorch, as `frostline.exporter.artifact.compile_stage` does.

    Raises
    ------
    UsageError
        If onnxruntime-training lacks the optimizer or the variant, or is not installed.
    RunError
        If the stage cannot be exported, or does not train as eager PyTorch does.
    """
    if variant.recompute:
        raise UsageError(
            "engine 'onnxruntime-training' recomputes nothing: use micro-batches, or onnxruntime"
        )
    made = generate_training_artifacts(stage, options, variant.micro_batches)
    contents = (made.training, made.evaluation, made.optimizer, made.checkpoint)
    files = {reference_to(content).sha256: content for content in contents}
    manifest = _manifest(stage, options, variant, made)
    with tempfile.TemporaryDirectory() as folder:
        values = {**trainable_tensors(stage), **statistics_tensors(stage)}
        write_artifact(Path(folder), manifest, files, arrays(values))
        manifest = manifest.model_copy(update={"planned": _planned(manifest, options, Path(folder))})
    parity = checked(stage, options, variant, manifest, files)
    return CompiledStage(manifest.behind(prefix), files, parity)


def _manifest(
    stage: Stage, options: ExportOptions, variant: Variant, made: TrainingArtifacts
) -> StageManifest:
    samples = options.batch // variant.micro_batches
    batch = {
        "x": TensorSpec(
            name="x",
            dtype="float32" if stage.vocabulary is None else "int64",
            shape=(samples, *stage.input_shape),
            vocabulary=stage.vocabulary,
        ),
        "y": TensorSpec(name="y", dtype="int64", shape=(samples,)),
        "seed": TensorSpec(name="seed", shape=()),
    }
    logits = TensorSpec(name="logits", shape=(samples, options.classes))
    statistics = _specs(statistics_tensors(stage))
    shapes = {spec.name: spec.shape for spec in statistics}
    updated = [TensorSpec(name=NEW + name, shape=shapes[name]) for name in made.statistics]
    rate = TensorSpec(name="learning_rate", shape=())
    loss = TensorSpec(name="loss", shape=())
    return StageManifest(
        stage=stage.index,
        stages=stage.count,
        name=stage.name,
        engine=options.target.engine,
        variant=variant.name,
        batch=options.batch,
        micro_batches=variant.micro_batches,
        classes=options.classes,
        parameters=_specs(trainable_tensors(stage)),
        statistics=statistics,
        optimizer_state=[],
        received=[],
        training=_program(made.training, [batch[name] for name in made.inputs], [loss, logits, *updated]),
        update=_program(made.optimizer, [rate], []),
        evaluation=_program(made.evaluation, [batch["x"]], [logits]),
        checkpoint=reference_to(made.checkpoint),
        prefix=[],
        planned=PlannedMemory(
            arena=0, parameters=0, statistics=0, optimizer_state=0, received=0, batch=0, program=0
        ),
        flops=step_flops(stage, options.batch),
    )


def _program(content: bytes, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> Program:
    return Program(file=reference_to(content), inputs=inputs, outputs=outputs, arena_bytes=0)


def _specs(tensors: Mapping[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name=name, shape=tuple(tensor.shape)) for name, tensor in tensors.items()]


def _planned(manifest: StageManifest, options: ExportOptions, artifact: Path) -> PlannedMemory:
    """What a process was measured to grow by while it trained the artifact; the arena is what is not known otherwise."""
    command = [sys.executable, "-m", "frostline.device_runtime.artifact_memory", str(artifact)]
    measured = subprocess.run(command, capture_output=True, check=False)
    if measured.returncode:
        reason = measured.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise RunError(f"stage {manifest.name!r} cannot be measured: {reason}")
    parameters = sum(spec.size_bytes for spec in manifest.parameters)
    moments = 2 if isinstance(options.optimizer, AdamW) else 0
    x, *_ = manifest.evaluation.inputs
    known = {
        "parameters": parameters,
        "statistics": sum(spec.size_bytes for spec in manifest.statistics),
        "optimizer_state": moments * parameters,
        "received": 0,
        "batch": x.size_bytes + 8 * manifest.micro_batch,
        "program": sum(file.size for file in manifest.files)
        - (manifest.checkpoint or manifest.files[0]).size,
    }
    return PlannedMemory(arena=max(int(measured.stdout) - sum(known.values()), 0), **known)
