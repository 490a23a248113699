"""Compiling the stages of a run, in this process or in one of its own.

In one of its own neither a long lowering nor a crash of a compiler reaches the rounds. PyTorch traces one program at a time in a process, and patches what every module call goes through while it does; so a
server that trains on while it compiles for a new engine has to do so elsewhere.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from frostline.exporter.artifact import CompiledStage, ExportOptions, compile_prefix
from frostline.exporter.cutting import CutModel, cut
from frostline.exporter.models.lookup import ModelSpec, build_model
from frostline.exporter.output_module import OutputModuleKind
from frostline.exporter.planning import StageVariants
from frostline.exporter.stage import Stage, build_stage, load_tensors
from frostline.exporter.targets import target_of
from frostline.protocol.errors import FrostlineError, RunError
from frostline.protocol.manifest import Program
from frostline.protocol.messages import Engine
from frostline.protocol.tensors import Array
from frostline.server.config import ModelTable

if TYPE_CHECKING:
    from frostline.server.compiler_process import CompilerProcess


class StageCompiler(Protocol):
    """Compiles the stages of one model; each method raises a FrostlineError where it cannot."""

    def begin(self, index: int, engine: Engine) -> None:
        """Have a stage compiled in one piece meanwhile, for `whole` to find, where that can go on by itself."""

    def whole(self, index: int, engine: Engine) -> CompiledStage:
        """A stage in one piece."""

    def fastest(
        self, index: int, engine: Engine, budget: int, prefix: Sequence[Program]
    ) -> CompiledStage | None:
        """A stage, behind these frozen blocks, in the fastest variant that fits a budget in bytes; None if none does."""

    def smallest(self, index: int, engine: Engine) -> CompiledStage:
        """A stage in the variant that takes least."""

    def frozen(
        self, index: int, engine: Engine, block: Mapping[str, Array], calibration: Array | None
    ) -> tuple[Program, bytes]:
        """A stage's block with the values of its tensors given, forward only; see `compile_prefix`."""

    def close(self) -> None:
        """Compile nothing more; what is being compiled ends with an error."""


class LocalCompiler:
    """Compiles in this process, each form when it is first asked for, and once; failures too are remembered."""

    def __init__(self, stages: Sequence[Stage], options: ExportOptions) -> None:
        self._stages = stages
        self._options = options
        self._variants: dict[tuple[int, Engine], StageVariants] = {}
        self._failures: dict[tuple[int, Engine], FrostlineError] = {}

    def begin(self, index: int, engine: Engine) -> None:
        """Do nothing: nothing goes on by itself here."""

    def whole(self, index: int, engine: Engine) -> CompiledStage:
        """A stage in one piece."""
        key = index, engine
        if key in self._failures:
            raise self._failures[key]
        try:
            return self._of(index, engine).compiled()
        except FrostlineError as error:
            self._failures[key] = error
            raise

    def fastest(
        self, index: int, engine: Engine, budget: int, prefix: Sequence[Program]
    ) -> CompiledStage | None:
        """A stage, behind these frozen blocks, in the fastest variant that fits a budget in bytes; None if none does."""
        return self._of(index, engine).fastest(budget, prefix)

    def smallest(self, index: int, engine: Engine) -> CompiledStage:
        """A stage in the variant that takes least."""
        return self._of(index, engine).smallest()

    def frozen(
        self, index: int, engine: Engine, block: Mapping[str, Array], calibration: Array | None
    ) -> tuple[Program, bytes]:
        """A stage's block with the values of its tensors given, forward only; see `compile_prefix`."""
        stage = self._stages[index]
        load_tensors(stage, {name: torch.from_numpy(value) for name, value in block.items()})
        samples = None if calibration is None else torch.from_numpy(calibration)
        return compile_prefix(stage, self._options.batch, target_of(engine), samples)

    def close(self) -> None:
        """Do nothing: nothing is being compiled then."""

    def _of(self, index: int, engine: Engine) -> StageVariants:
        """The variants of a stage for an engine; a stage is the same on all."""
        key = index, engine
        if key not in self._variants:
            options = replace(self._options, target=target_of(engine))
            self._variants[key] = StageVariants(self._stages[index], options)
        return self._variants[key]


@dataclass(frozen=True)
class StageSource:
    """All it takes to build the same stages in any process: models are built from a seed and nothing else.

    Attributes
    ----------
    input_shape, classes
        What the held-out samples or the configuration say of them.
    """

    model: ModelTable
    input_shape: tuple[int, ...] | None
    classes: int | None
    seed: int

    def build(self) -> ModelSpec:
        """The model.

        Raises
        ------
        UsageError
            If it cannot be built.
        """
        table = self.model
        shape, classes = self.input_shape, self.classes
        return build_model(table.name, table.options, shape, classes, self.seed, table.vocabulary)

    def cut(self, spec: ModelSpec) -> CutModel:
        """The model in its blocks.

        Raises
        ------
        UsageError
            If it cannot be cut there.
        """
        return cut(spec.module, self.model.blocks, spec.example(2), spec.vocabulary, spec.classes)


def build_stages(parts: CutModel, seed: int, output_module: OutputModuleKind) -> list[Stage]:
    """One stage a block, with output modules of values from `seed`."""
    return [build_stage(parts, index, seed, output_module) for index in range(len(parts.blocks))]


class RemoteCompiler:
    """Compiles in a process that builds the stages itself.

    Parameters
    ----------
    source : StageSource
        What the stages of this process were built from.
    """

    def __init__(self, process: CompilerProcess, source: StageSource, options: ExportOptions) -> None:
        self._process = process
        self._order = _Order(uuid.uuid4().hex, source, options)
        self._known: dict[tuple[int, Engine], CompiledStage | FrostlineError] = {}

    def begin(self, index: int, engine: Engine) -> None:
        """Have a stage compiled in one piece meanwhile, for `whole` to find."""
        self._process.begin(_answer, self._order, "whole", (index, engine))

    def whole(self, index: int, engine: Engine) -> CompiledStage:
        """A stage in one piece."""
        # Asked again whenever the stage is prepared, which must not wait for what is being compiled then; and what killed
        # the process would do so again.
        key = index, engine
        if key not in self._known:
            try:
                self._known[key] = self._process.call(_answer, self._order, "whole", key)
            except FrostlineError as error:
                self._known[key] = error
        known = self._known[key]
        if isinstance(known, FrostlineError):
            raise known
        return known

    def fastest(
        self, index: int, engine: Engine, budget: int, prefix: Sequence[Program]
    ) -> CompiledStage | None:
        """A stage, behind these frozen blocks, in the fastest variant that fits a budget in bytes; None if none does."""
        found: CompiledStage | None = self._process.call(
            _answer, self._order, "fastest", (index, engine, budget, list(prefix))
        )
        return found

    def smallest(self, index: int, engine: Engine) -> CompiledStage:
        """A stage in the variant that takes least."""
        found: CompiledStage = self._process.call(_answer, self._order, "smallest", (index, engine))
        return found

    def frozen(
        self, index: int, engine: Engine, block: Mapping[str, Array], calibration: Array | None
    ) -> tuple[Program, bytes]:
        """A stage's block with the values of its tensors given, forward only; see `compile_prefix`."""
        arguments = index, engine, dict(block), calibration
        found: tuple[Program, bytes] = self._process.call(_answer, self._order, "frozen", arguments)
        return found

    def close(self) -> None:
        """End the process, for every model that it compiles."""
        self._process.close()


@dataclass(frozen=True)
class _Order:
    """What a process compiles from, told apart by a key."""

    key: str
    source: StageSource
    options: ExportOptions


_compilers: dict[str, LocalCompiler] = {}
"""In the compiler's process: one for each order."""


def _answer(order: _Order, method: str, arguments: tuple[object, ...]) -> object:
    """In the compiler's process: what a `LocalCompiler` returns or raises."""
    if order.key not in _compilers:
        torch.set_num_threads(1)
        source = order.source
        parts = source.cut(source.build())
        stages = build_stages(parts, source.seed, source.model.output_module)
        _compilers[order.key] = LocalCompiler(stages, order.options)
    compile_form: Callable[..., object] = getattr(_compilers[order.key], method)
    try:
        return compile_form(*arguments)
    except FrostlineError:
        raise
    except Exception as error:
        # Not every exception survives the way to another process, and none is of use to whoever waits there.
        reason = str(error).strip().partition("\n")[0]
        raise RunError(f"the compiler failed: {type(error).__name__}: {reason}") from None
