"""Fits training into a memory budget: where to cut a model, and which variant of each stage to compile.

Lowering a stage takes seconds, tracing it a fraction of one; so candidates are judged by what is alive at a time in the
traced graph, and only those chosen are compiled, which gives the exact figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from frostline.exporter.artifact import (
    CompiledStage,
    ExportOptions,
    StageTensors,
    compile_stage,
    planned_memory,
    trace_training,
)
from frostline.exporter.cutting import CutModel, Cutter
from frostline.exporter.optimizer import SGD
from frostline.exporter.output_module import OutputModuleKind
from frostline.exporter.stage import Stage, build_stage
from frostline.exporter.training_step import TracedProgram
from frostline.exporter.variant import WHOLE, Variant, variants_of
from frostline.protocol.errors import RunError, UsageError
from frostline.protocol.manifest import PlannedMemory, Program
from frostline.protocol.sizes import format_size

aten = torch.ops.aten

NODE_BYTES = 180
"""What an operator takes in a serialized program, measured on ResNet-18's stages: 176 to 190."""

ALIASES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.detach.default)
"""Operators whose results share their argument's memory in the runtime."""


MOST_BLOCKS = 32
"""More blocks than this are not tried: output modules stand in for what follows, and cost more than they save."""

SMALL_BATCH = 4
"""The batch proposed where nothing else makes a model fit."""

CERTAIN = 0.8
"""The share of an estimate that a lowered stage takes at least: below it nothing is compiled to find out."""

HEADROOM = 1.15
"""How much more than estimated a lowered stage may take, when a budget is proposed."""


class StageVariants:
    """The variants of one stage, each estimated and compiled when it is first asked for, and once.

    Parameters
    ----------
    notify : callable
        Told what is being compiled, a line for a person.
    """

    def __init__(
        self, stage: Stage, options: ExportOptions, notify: Callable[[str], None] = lambda text: None
    ) -> None:
        self._stage = stage
        self._options = options
        self._notify = notify
        self._estimates: dict[Variant, int | None] = {}
        self._compiled: dict[Variant, CompiledStage] = {}

    def compiled(self, variant: Variant = WHOLE) -> CompiledStage:
        """The stage compiled in a variant."""
        if variant not in self._compiled:
            self._notify(f"compiling {self._stage.name}, {variant.name}")
            self._compiled[variant] = compile_stage(self._stage, self._options, variant=variant)
        return self._compiled[variant]

    def fastest(self, budget: int, prefix: Sequence[Program] = ()) -> CompiledStage | None:
        """The stage, behind these frozen blocks, in the fastest variant that fits a budget in bytes; None if none does."""
        for variant in _variants(self._options):
            # Tracing takes its time; adding up the state takes none.
            if _planned_state(self._stage, self._options, variant).total > budget:
                continue
            least = self._least(variant)
            if least is not None and least <= budget / CERTAIN:
                compiled = self._attempt(variant)
                if compiled is None:
                    continue
                if compiled.manifest.planned.behind(prefix).total <= budget:
                    return compiled
        return None

    def smallest(self) -> CompiledStage:
        """The stage in the variant that takes least: no smaller budget has a `fastest`.

        Whatever may take less than the least so far is compiled. Estimates may be near each other, and ONNX Runtime's arenas
        of small stages are mostly its own blocks.
        """
        found = {variant: self._least(variant) for variant in _variants(self._options)}
        estimates = {variant: each for variant, each in found.items() if each is not None}
        smallest: CompiledStage | None = None
        for variant in sorted(estimates, key=estimates.__getitem__):
            if smallest is None or estimates[variant] <= _total(smallest) / CERTAIN:
                compiled = self._attempt(variant)
                if compiled and (smallest is None or _total(compiled) < _total(smallest)):
                    smallest = compiled
        # Where none can be traced, compiling the whole says why.
        return smallest or self.compiled(WHOLE)

    def _attempt(self, variant: Variant) -> CompiledStage | None:
        """The stage compiled in a variant; None if it cannot be, where the whole batch may be."""
        try:
            return self.compiled(variant)
        except RunError:
            # What the whole batch cannot do, no part of it can; a part may fail where others do not.
            if variant == WHOLE:
                raise
            return None

    def _least(self, variant: Variant) -> int | None:
        """What the variant takes at least, exactly if it is compiled; None if it cannot be traced."""
        if variant in self._compiled:
            return self._compiled[variant].manifest.planned.total
        return self._estimate(variant)

    def _estimate(self, variant: Variant) -> int | None:
        """What the variant takes by estimate; None if it cannot be traced, as batch norm cannot over a single value."""
        if variant not in self._estimates:
            planned = _estimated(self._stage, self._options, variant)
            self._estimates[variant] = planned.total if planned else None
        return self._estimates[variant]


@dataclass(frozen=True)
class FittedModel:
    """A model cut and compiled for a budget.

    Attributes
    ----------
    stages : list of CompiledStage
        One a block, each in the fastest variant that fits.
    """

    cut: CutModel
    stages: list[CompiledStage]


class BudgetPlanner:
    """Finds cuts and variants under which every stage's planned memory stays within a budget.

    Parameters
    ----------
    budget : int
        Bytes a device may take for training.
    seed : int
        Of the output modules' values.
    notify : callable
        Told what is being tried, a line for a person.
    """

    def __init__(
        self,
        options: ExportOptions,
        budget: int,
        seed: int = 0,
        notify: Callable[[str], None] = lambda text: None,
        output_module: OutputModuleKind = "convolutions",
    ) -> None:
        self._options = options
        self._output_module = output_module
        self._budget = budget
        self._seed = seed
        self._notify = notify

    def fit(self, cuts: Iterable[CutModel]) -> FittedModel:
        """The first of `cuts` of which every stage fits.

        Raises
        ------
        UsageError
            If none does; saying what came closest, and what would make it fit.
        """
        misfits = []
        for parts in cuts:
            found = self._try(parts)
            if isinstance(found, FittedModel):
                return found
            misfits.append(found)
        raise UsageError(
            self._explain(self._worst(min(misfits, key=lambda misfit: misfit.planned.total).parts))
        )

    def _try(self, parts: CutModel) -> FittedModel | _Misfit:
        stages = self._stages(parts)
        for stage in stages:
            # Adding up the state takes no time; most cuts that cannot fit fail here.
            state = _planned_state(stage, self._options, WHOLE)
            if state.total > self._budget:
                return _Misfit(parts, stage, state)
        for stage in stages:
            self._notify(f"trying {_blocks(len(stages))}: {stage.name}")
            smallest = self._smallest(stage, self._options)
            if smallest.total > self._budget / CERTAIN:
                return _Misfit(parts, stage, smallest)
        compiled = []
        for stage in stages:
            fitting = StageVariants(stage, self._options, self._notify).fastest(self._budget)
            if fitting is None:
                return _Misfit(parts, stage, self._smallest(stage, self._options))
            compiled.append(fitting)
        return FittedModel(parts, compiled)

    def _worst(self, parts: CutModel) -> _Misfit:
        """The stage of a cut that takes the most."""
        found = [_Misfit(parts, stage, self._smallest(stage, self._options)) for stage in self._stages(parts)]
        return max(found, key=lambda misfit: misfit.planned.total)

    def _stages(self, parts: CutModel) -> list[Stage]:
        count = len(parts.blocks)
        return [build_stage(parts, index, self._seed, self._output_module) for index in range(count)]

    @staticmethod
    def _smallest(stage: Stage, options: ExportOptions) -> PlannedMemory:
        """The least any variant takes, by estimate."""
        variants = _variants(options)
        # More parts take less, unless the gradients they accumulate need memory of their own.
        candidates = variants[-1:]
        if _planned_state(stage, options, candidates[0]).total > _planned_state(stage, options, WHOLE).total:
            candidates.append(Variant(recompute=options.target.recomputes))
        found = [each for each in (_estimated(stage, options, v) for v in candidates) if each is not None]
        # A part may be too small for batch norm: the next larger one that is not, and in the end the whole.
        larger = (_estimated(stage, options, v) for v in reversed(variants[1:-1]))
        if not found:
            found.append(
                next((each for each in larger if each), None) or estimate_stage(stage, options, WHOLE)
            )
        return min(found, key=lambda planned: planned.total)

    def _explain(self, misfit: _Misfit) -> str:
        planned = misfit.planned
        state = planned.parameters + planned.statistics + planned.optimizer_state + planned.received
        ways = [f"--memory-budget {format_size(int(planned.total * HEADROOM))}"]
        for way, options in self._frugal():
            if self._smallest(misfit.stage, options).total * HEADROOM <= self._budget:
                ways.append(way)
        return (
            f"the model does not fit {format_size(self._budget)}: with {_blocks(misfit.stage.count)}, which comes "
            f"closest, stage {misfit.stage.name!r} takes about "
            f"{format_size(planned.total)} in its smallest variant, {format_size(state)} of it parameters and optimizer "
            f"state; it would with {' or with '.join(ways)}"
            + ("" if len(ways) > 1 else ", a narrower model, or other cuts by --blocks")
        )

    def _frugal(self) -> Iterator[tuple[str, ExportOptions]]:
        """Settings that take less, and how to ask for them."""
        options = self._options
        if not isinstance(options.optimizer, SGD) or options.optimizer.momentum:
            yield "--optimizer sgd --momentum 0", replace(options, optimizer=SGD())
        if options.batch > SMALL_BATCH:
            yield f"--batch {SMALL_BATCH}", replace(options, batch=SMALL_BATCH)


@dataclass(frozen=True)
class _Misfit:
    """The stage at which a cut failed, with the least it takes."""

    parts: CutModel
    stage: Stage
    planned: PlannedMemory


def balanced_cuts(cutter: Cutter, most: int = MOST_BLOCKS) -> Iterator[CutModel]:
    """A model in 1, 2, 3 ... blocks of balanced cost, as far as its boundaries allow."""
    yield cutter.cut(1)
    for count in range(2, most + 1):
        try:
            yield cutter.cut(count)
        except UsageError:
            return


def _variants(options: ExportOptions) -> list[Variant]:
    """Those that the target has, fastest first."""
    return [each for each in variants_of(options.batch) if options.target.recomputes or not each.recompute]


def _total(stage: CompiledStage) -> int:
    return stage.manifest.planned.total


def _blocks(count: int) -> str:
    return f"{count} block{'s' if count > 1 else ''}"


def _planned_state(stage: Stage, options: ExportOptions, variant: Variant) -> PlannedMemory:
    """The part of a stage's memory that is known without tracing it: its state."""
    tensors = StageTensors.of(stage, options, variant)
    return planned_memory(tensors, (), arena=0, program=0).model_copy(update={"batch": 0})


def estimate_stage(stage: Stage, options: ExportOptions, variant: Variant) -> PlannedMemory:
    """What training a stage takes, without lowering it: the state exactly, arena and program within about a tenth."""
    tensors = StageTensors.of(stage, options, variant)
    traced = trace_training(stage, options, tensors, variant)
    arena = sum(estimate_arena(program) for program in traced)
    nodes = sum(len(program.graph_module.graph.nodes) for program in traced)
    written = {name for program in traced for name in program.written}
    return planned_memory(
        tensors,
        () if options.target.writes_in_place else written,
        arena=arena,
        program=nodes * NODE_BYTES,
    )


def _estimated(stage: Stage, options: ExportOptions, variant: Variant) -> PlannedMemory | None:
    """The same; None for a variant that PyTorch refuses to run, as batch norm refuses a single value a channel."""
    try:
        return estimate_stage(stage, options, variant)
    except UsageError:
        return None


def estimate_arena(program: TracedProgram) -> int:
    """The most bytes that are alive at a time among the values a program makes."""
    graph = program.graph_module.graph
    position = {node: index for index, node in enumerate(graph.nodes)}
    owner: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    for node, index in position.items():
        owner[node] = owner[node.all_input_nodes[0]] if node.target in ALIASES else node
        for used in node.all_input_nodes:
            if node.op != "output":
                last[owner[used]] = index
    _keep_until_written(program, owner, last)
    change = [0] * (len(position) + 1)
    for node, index in position.items():
        if node.op == "call_function" and owner[node] is node:
            size = _bytes(node)
            change[index] += size
            change[last.get(node, index) + 1] -= size
    alive = peak = 0
    for each in change:
        alive += each
        peak = max(peak, alive)
    return peak


def _keep_until_written(
    program: TracedProgram, owner: dict[fx.Node, fx.Node], last: dict[fx.Node, int]
) -> None:
    """A new value is kept until the argument it replaces has been read for the last time; results to the end."""
    graph = program.graph_module.graph
    arguments = dict(zip(program.inputs, graph.find_nodes(op="placeholder"), strict=True))
    returned = graph.output_node().args[0]
    assert isinstance(returned, list | tuple)
    for index, value in enumerate(returned):
        if isinstance(value, fx.Node):
            written = arguments[program.written[index]] if index < len(program.written) else None
            until = last.get(written, 0) if written is not None else len(graph.nodes) - 1
            last[owner[value]] = max(last.get(owner[value], 0), until)


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    tensors = value if isinstance(value, list | tuple) else [value]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
