"""The grow-front-to-back schedule: one block after another is trained, frozen, and put behind the frost line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from frostline.datasets.samples import Samples
from frostline.exporter.artifact import CompiledStage, ExportOptions, arrays, plan_stage
from frostline.exporter.cutting import CutModel
from frostline.exporter.inputs import random_inputs
from frostline.exporter.models.lookup import ModelSpec
from frostline.exporter.output_module import OutputModuleKind
from frostline.exporter.planning import estimate_stage
from frostline.exporter.quantization import in_batches
from frostline.exporter.stage import (
    Stage,
    build_whole_model,
    load_tensors,
    statistics_tensors,
    trainable_tensors,
)
from frostline.exporter.target import LoweredProgram
from frostline.exporter.targets import target_of
from frostline.exporter.variant import WHOLE
from frostline.protocol.errors import FrostlineError, RunError
from frostline.protocol.manifest import PlannedMemory, Program, StageManifest
from frostline.protocol.messages import Engine
from frostline.protocol.tensors import Array
from frostline.server.compilation import LocalCompiler, StageCompiler, build_stages

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
    """The stages of a run, one after another.

    What compiles raises a FrostlineError where a stage cannot be: for that engine and form, not for others.
    """

    def __len__(self) -> int:
        """How many there are."""

    def name(self, index: int) -> str:
        """The name of a stage's block."""

    def weights(self, index: int) -> dict[str, Array]:
        """What a stage starts from: its parameters and statistics."""

    def begin(self, index: int, engine: Engine) -> None:
        """Have a stage compiled meanwhile, for `plan` and `prepare` to find; returns at once."""

    def plan(self, index: int, engine: Engine) -> PlannedMemory:
        """What training a stage in one piece takes on a device; compiles the stage on first use."""

    def estimate_whole_model(self) -> PlannedMemory:
        """About what training the whole model at once would take, by the same count.

        Estimated where lowering takes long and memory is planned, as for ExecuTorch: within about a tenth.
        """

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

    def close(self) -> None:
        """Compile nothing more, and give up what is being compiled."""


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
    output_module : "convolutions", "dense" or "linear"
        What stands in for the blocks to come; a linear one is begun afresh at each stage.
    compiler : StageCompiler or None
        What compiles the stages; this process if None.
    engines : sequence of Engine
        The run's, that of `options` if empty: the whole model is estimated for the first that can express it.
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
        compiler: StageCompiler | None = None,
        engines: Sequence[Engine] = (),
    ) -> None:
        self._spec = spec
        self._cut = cut
        self._options = options
        self._stages = build_stages(cut, seed, output_module)
        self._engines = engines or [options.target.engine]
        self._compiler = compiler or LocalCompiler(self._stages, options)
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

    def weights(self, index: int) -> dict[str, Array]:
        """What a stage starts from: its parameters and statistics."""
        stage = self._stages[index]
        return arrays({**trainable_tensors(stage), **statistics_tensors(stage)})

    def begin(self, index: int, engine: Engine) -> None:
        """Have a stage compiled meanwhile, for `plan` and `prepare` to find; returns at once."""
        self._compiler.begin(index, engine)

    def plan(self, index: int, engine: Engine) -> PlannedMemory:
        """What training a stage in one piece takes on a device; compiles the stage on first use."""
        return self._compiler.whole(index, engine).manifest.planned

    def estimate_whole_model(self) -> PlannedMemory:
        """About what training the whole model at once would take, by the same count.

        Estimated where lowering takes long and memory is planned, as for ExecuTorch: within about a tenth.
        """
        if self._whole is None:
            self._whole = self._estimated_whole_model()
        return self._whole

    def _estimated_whole_model(self) -> PlannedMemory:
        failure: Exception | None = None
        for engine in self._engines:
            try:
                # Of a model in one block the only stage is the whole model, and is compiled anyway.
                return self.plan(0, engine) if len(self) == 1 else self._estimated_for(engine)
            except (
                Exception
            ) as error:  # Tracing runs the model's own code, and rewrites refuse what they do not know.
                failure = failure or error
        reason = str(failure).strip().partition("\n")[0]
        raise RunError(f"what the whole model would take cannot be estimated: {reason}") from failure

    def _estimated_for(self, engine: Engine) -> PlannedMemory:
        options, whole = replace(self._options, target=target_of(engine)), build_whole_model(self._cut)
        if options.target.writes_in_place:
            return estimate_stage(whole, options, WHOLE)
        # A runtime that finds its memory as it runs takes blocks of its own, which no graph shows; it is soon lowered for.
        return plan_stage(whole, options)

    def prepare(self, index: int, engine: Engine) -> PreparedStage:
        """The stage for an engine, trained in one piece, behind the blocks that are frozen by now."""
        return self._prepared(index, self._compiler.whole(index, engine))

    def prepare_within(self, index: int, engine: Engine, budget: int) -> PreparedStage | None:
        """The same in the fastest variant that fits a budget in bytes; None if none does. May compile some."""
        prefix = [program for program, _ in self._prefix(engine)]
        compiled = self._compiler.fastest(index, engine, budget, prefix)
        return self._prepared(index, compiled) if compiled else None

    def smallest(self, index: int, engine: Engine) -> PreparedStage:
        """The variant that takes least. May compile some."""
        return self._prepared(index, self._compiler.smallest(index, engine))

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

    def _prefix(self, engine: Engine) -> list[tuple[Program, bytes]]:
        """The frozen blocks for an engine."""
        # A block that is reopened meanwhile takes these with it: what is added to them then is not found any more.
        known, frozen = self._prefixes, range(self._frozen)
        for index in frozen:
            if (index, engine) not in known:
                weights = self.weights(index)
                block = {name: value for name, value in weights.items() if name.startswith("block.")}
                samples = self._calibrations.get(index)
                calibration = None if samples is None else samples.numpy()
                known[index, engine] = self._compiler.frozen(index, engine, block, calibration)
        return [known[index, engine] for index in frozen]

    def _prepared(self, index: int, compiled: CompiledStage) -> PreparedStage:
        prefix = self._prefix(compiled.manifest.engine)
        manifest = compiled.manifest.behind([program for program, _ in prefix])
        files = {program.file.sha256: content for program, content in prefix}
        return PreparedStage(manifest, {**compiled.files, **files}, self.weights(index))

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
        change = self._accuracy_change(stage) if self._in_int8 else None
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

    def _accuracy_change(self, stage: Stage) -> float | None:
        """What the program that devices run in the block's place changes of the stage's accuracy."""
        if self._test is None or self._features is None:
            return None
        try:
            program, content = self._prefix(self._options.target.engine)[-1]
        except FrostlineError:
            # Whoever prepares the next stage for that engine meets it again, and says so.
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

    def close(self) -> None:
        """Compile nothing more, and give up what is being compiled."""
        self._compiler.close()

    def _load(self, index: int, weights: Mapping[str, Array]) -> torch.nn.Module:
        stage = self._stages[index]
        load_tensors(stage, {name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in weights.items()})
        return stage.model

    @staticmethod
    def _forward(module: torch.nn.Module, x: Tensor | None) -> Tensor:
        assert x is not None
        with torch.inference_mode():
            return torch.cat([module(rows) for rows in x.split(EVALUATION_BATCH)])
