"""The grow-front-to-back schedule: one block after another is trained, frozen, and put behind the frost line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from frostline.datasets.samples import Samples
from frostline.exporter.artifact import (
    CompiledStage,
    ExportOptions,
    arrays,
    compile_prefix,
    plan_stage,
)
from frostline.exporter.cutting import CutModel
from frostline.exporter.inputs import random_inputs
from frostline.exporter.models.lookup import ModelSpec
from frostline.exporter.output_module import OutputModuleKind
from frostline.exporter.planning import StageVariants
from frostline.exporter.quantization import in_batches
from frostline.exporter.stage import (
    Stage,
    build_stage,
    build_whole_model,
    load_tensors,
    statistics_tensors,
    trainable_tensors,
)
from frostline.exporter.target import LoweredProgram
from frostline.exporter.targets import target_of
from frostline.protocol.manifest import PlannedMemory, Program, StageManifest
from frostline.protocol.messages import Engine
from frostline.protocol.tensors import Array

EVALUATION_BATCH = 256
CALIBRATION = 64
"""Samples that int8 blocks are calibrated on."""


@dataclass(frozen=True)
class PreparedStage:
    """A stage as devices get it: the manifest with its prefix, every file it names, and the first weights.

    Attributes
    ----------
    width : float
        The share of the channels that this form of the stage trains.
    """

    manifest: StageManifest
    files: Mapping[str, bytes]
    weights: dict[str, Array]
    width: float = 1.0


class Schedule(Protocol):
    """The stages of a run, one after another."""

    def __len__(self) -> int:
        """How many there are."""

    def name(self, index: int) -> str:
        """The name of a stage's block."""

    def plan(self, index: int) -> PlannedMemory:
        """What training a stage in one piece takes on a device; compiles the stage on first use."""

    def plan_whole_model(self) -> PlannedMemory:
        """What training the whole model at once would take, by the same count."""

    def prepare(self, index: int, engine: Engine) -> PreparedStage:
        """The stage for an engine, trained in one piece, behind the blocks that are frozen by now."""

    def prepare_within(self, index: int, engine: Engine, budget: int) -> PreparedStage | None:
        """The same in the fastest form that fits a budget in bytes; None if none does. May compile some."""

    def smallest(self, index: int, engine: Engine) -> PreparedStage:
        """The form that takes least. May compile some."""

    def narrower(self, index: int, engine: Engine) -> list[PreparedStage]:
        """The forms that train a part of the channels: on offer from the start, since updates of each may be awaited."""

    def last_layer(self, index: int) -> list[str]:
        """Names of the tensors of the stage's last layer."""

    def accuracy(self, index: int, weights: Mapping[str, Array]) -> float | None:
        """Fraction of the held-out samples the stage classifies correctly; None without any."""

    def freeze(self, index: int, weights: Mapping[str, Array]) -> float | None:
        """Fix a stage's block, move the frost line behind it and hand its output module on.

        Returns
        -------
        float or None
            What the block in int8 changes of the stage's accuracy; None if it is not, or without held-out samples.
        """

    def reopen(self, index: int) -> None:
        """Take the frost line back before a block that was frozen last."""

    def trained_model(self) -> torch.nn.Module:
        """The whole model with every frozen block and the last head in place."""

    def example(self, batch: int) -> Tensor:
        """A batch of zeros as the model takes it."""


class GrowingSchedule:
    """Trains the blocks of a model front to back (SmartFreeze, Wu et al., IWQoS 2024; ProFL's growing phase).

    The output module is carried over: the stand-ins that remain and the head start a stage with the values they ended
    the stage before with.

    Parameters
    ----------
    test : Samples or None
        The server's held-out samples, for `accuracy`.
    int8_prefix : bool
        Whether frozen blocks are compiled in int8 where the target can; calibrated on held-out samples, or without any
        on synthetic ones.
    output_module : "convolutions" or "linear"
        What stands in for the blocks to come; a linear one is begun afresh at each stage.
    """

    def __init__(
        self,
        spec: ModelSpec,
        cut: CutModel,
        options: ExportOptions,
        seed: int,
        test: Samples | None,
        *,
        int8_prefix: bool = False,
        output_module: OutputModuleKind = "convolutions",
    ) -> None:
        self._spec = spec
        self._cut = cut
        self._options = options
        self._stages = [build_stage(cut, index, seed, output_module) for index in range(len(cut.blocks))]
        self._variants: dict[tuple[int, Engine], StageVariants] = {}
        self._whole: PlannedMemory | None = None
        self._frozen = 0
        self._prefixes: dict[tuple[int, Engine], tuple[Program, bytes]] = {}
        self._test = test
        self._features = torch.from_numpy(test.x) if test else None
        self._calibrations: dict[int, Tensor] = {}
        self._calibration: Tensor | None = None
        if int8_prefix:
            synthetic = torch.Generator().manual_seed(seed)
            drawn = random_inputs(CALIBRATION, spec.input_shape, spec.vocabulary, synthetic)
            self._calibration = drawn if self._features is None else self._features[:CALIBRATION]

    def __len__(self) -> int:
        return len(self._stages)

    def name(self, index: int) -> str:
        """The name of a stage's block."""
        return self._stages[index].name

    def plan(self, index: int) -> PlannedMemory:
        """What training a stage in one piece takes on a device; compiles the stage on first use."""
        return self._compiled(index, self._options.target.engine).compiled().manifest.planned

    def plan_whole_model(self) -> PlannedMemory:
        """What training the whole model at once would take, by the same count."""
        if self._whole is None:
            self._whole = plan_stage(build_whole_model(self._cut), self._options)
        return self._whole

    def prepare(self, index: int, engine: Engine) -> PreparedStage:
        """The stage for an engine, trained in one piece, behind the blocks that are frozen by now."""
        return self._prepared(index, self._compiled(index, engine).compiled())

    def prepare_within(self, index: int, engine: Engine, budget: int) -> PreparedStage | None:
        """The same in the fastest variant that fits a budget in bytes; None if none does. May compile some."""
        prefix = [program for program, _ in self._prefix(engine)]
        compiled = self._compiled(index, engine).fastest(budget, prefix)
        return self._prepared(index, compiled) if compiled else None

    def smallest(self, index: int, engine: Engine) -> PreparedStage:
        """The variant that takes least. May compile some."""
        return self._prepared(index, self._compiled(index, engine).smallest())

    def narrower(self, index: int, engine: Engine) -> list[PreparedStage]:
        """None: every form of a stage trains all of it."""
        return []

    def shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """The shapes of a stage's trained tensors by name."""
        stage = self._stages[index]
        tensors = {**trainable_tensors(stage), **statistics_tensors(stage)}
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def last_layer(self, index: int) -> list[str]:
        """Names of the tensors of the stage's last layer with weights."""
        names = [name for name, p in self._stages[index].model.named_parameters() if p.requires_grad]
        layer = names[-1].rpartition(".")[0]
        return [name for name in names if name.rpartition(".")[0] == layer]

    def _compiled(self, index: int, engine: Engine) -> StageVariants:
        """The variants of a stage for an engine; a stage is the same on all."""
        key = index, engine
        if key not in self._variants:
            options = replace(self._options, target=target_of(engine))
            self._variants[key] = StageVariants(self._stages[index], options)
        return self._variants[key]

    def _prefix(self, engine: Engine) -> list[tuple[Program, bytes]]:
        """The frozen blocks for an engine."""
        for index in range(self._frozen):
            if (index, engine) not in self._prefixes:
                compiled = compile_prefix(
                    self._stages[index],
                    self._options.batch,
                    target_of(engine),
                    self._calibrations.get(index),
                )
                self._prefixes[index, engine] = compiled
        return [self._prefixes[index, engine] for index in range(self._frozen)]

    def _prepared(self, index: int, compiled: CompiledStage) -> PreparedStage:
        stage = self._stages[index]
        weights = arrays({**trainable_tensors(stage), **statistics_tensors(stage)})
        prefix = self._prefix(compiled.manifest.engine)
        manifest = compiled.manifest.behind([program for program, _ in prefix])
        files = {program.file.sha256: content for program, content in prefix}
        return PreparedStage(manifest, {**compiled.files, **files}, weights)

    def accuracy(self, index: int, weights: Mapping[str, Array]) -> float | None:
        """Fraction of the held-out samples the stage classifies correctly; None without any."""
        if self._test is None:
            return None
        model = self._load(index, weights).eval()
        logits = self._forward(model, self._features)
        return float((logits.argmax(1).numpy() == self._test.y).mean())

    def freeze(self, index: int, weights: Mapping[str, Array]) -> float | None:
        """Fix a stage's block, move the frost line behind it and hand its output module on.

        Returns
        -------
        float or None
            What the block in int8 changes of the stage's accuracy; None if it is not, or without held-out samples.
        """
        self._load(index, weights)
        stage = self._stages[index]
        if index + 1 == len(self):
            self._cut.head.load_state_dict(stage.model.output_module.head.state_dict())
            return None
        self._frozen = index + 1
        if self._calibration is not None:
            self._calibrations[index] = self._calibration
            self._calibration = self._forward(stage.model.block.eval(), self._calibration)
        prefix = self._prefix(self._options.target.engine)
        change = self._accuracy_change(stage, *prefix[-1]) if self._in_int8 else None
        if self._features is not None:
            self._features = self._forward(stage.model.block.eval(), self._features)
        load_tensors(self._stages[index + 1], {**trainable_tensors(stage), **statistics_tensors(stage)})
        return change

    def reopen(self, index: int) -> None:
        """Take the frost line back before a block that was frozen last."""
        self._frozen = index
        self._prefixes = {key: each for key, each in self._prefixes.items() if key[0] < index}
        if index in self._calibrations:
            self._calibration = self._calibrations.pop(index)
        if self._test is not None:
            self._features = torch.from_numpy(self._test.x)
            for stage in self._stages[:index]:
                self._features = self._forward(stage.model.block.eval(), self._features)

    @property
    def _in_int8(self) -> bool:
        return bool(self._calibrations) and self._options.target.engine == "executorch"

    def _accuracy_change(self, stage: Stage, program: Program, content: bytes) -> float | None:
        """What the program that devices run in the block's place changes of the stage's accuracy."""
        if self._test is None or self._features is None:
            return None
        x, y = self._features[:EVALUATION_BATCH], self._test.y[:EVALUATION_BATCH]
        lowered = LoweredProgram(content, ("x",), program.arena_bytes)
        run = self._options.target.load(lowered)
        size = program.inputs[0].shape[0]
        features = torch.cat([run({"x": batch})[-1].clone() for batch in in_batches(x, size)])[: len(x)]
        right = [
            (self._forward(part, given).argmax(1).numpy() == y).mean()
            for part, given in ((stage.model.output_module.eval(), features), (stage.model.eval(), x))
        ]
        return float(right[0] - right[1])

    def trained_model(self) -> torch.nn.Module:
        """The whole model with every frozen block and the last head in place."""
        return self._spec.module.eval()

    def example(self, batch: int) -> Tensor:
        """A batch of zeros as the model takes it."""
        return self._spec.example(batch)

    def _load(self, index: int, weights: Mapping[str, Array]) -> torch.nn.Module:
        stage = self._stages[index]
        load_tensors(stage, {name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in weights.items()})
        return stage.model

    @staticmethod
    def _forward(module: torch.nn.Module, x: Tensor | None) -> Tensor:
        assert x is not None
        with torch.inference_mode():
            return torch.cat([module(rows) for rows in x.split(EVALUATION_BATCH)])
