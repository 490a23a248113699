from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from frostline.exporter.artifact import ExportOptions, plan_stage
from frostline.exporter.cutting import CutModel, Cutter, cut
from frostline.exporter.models.lookup import ModelSpec, build_model
from frostline.exporter.optimizer import SGD, AdamW
from frostline.exporter.planning import (
    BudgetPlanner,
    StageVariants,
    balanced_cuts,
    estimate_arena,
    estimate_stage,
)
from frostline.exporter.stage import Stage, build_stage
from frostline.exporter.training_step import TracedProgram
from frostline.exporter.variant import WHOLE, Variant
from frostline.protocol.errors import UsageError

OPTIONS = ExportOptions(8, 10, SGD(momentum=0.9))


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return build_model("small_cnn", {"width": 8}, (1, 16, 16), 10)


def stage_of(spec: ModelSpec, index: int = 0, blocks: int = 2) -> Stage:
    return build_stage(parts_of(spec, blocks), index, 0)


def parts_of(spec: ModelSpec, blocks: int) -> CutModel:
    return cut(spec.module, blocks, spec.example(2))


def traced(function: object, *arguments: Tensor, written: tuple[str, ...] = ()) -> TracedProgram:
    graph = make_fx(function, tracing_mode="fake")(*arguments)  # type: ignore[arg-type]
    names = [f"a{index}" for index in range(len(arguments))]
    return TracedProgram(graph, names, written)


X = torch.zeros(100)
BYTES = 400


def test_arena_of_a_chain_is_two_values() -> None:
    assert estimate_arena(traced(lambda x: [(((x + 1) * 2) - 3) * 4], X)) == 2 * BYTES


def test_arena_counts_what_is_kept_for_later() -> None:
    def keeps(x: Tensor) -> list[Tensor]:
        a = x + 1
        b = a * 2
        c = b - 3
        return [c * a]

    # a is needed at the end: a, b, c; then a, c, and their product.
    assert estimate_arena(traced(keeps, X)) == 3 * BYTES


def test_views_share_memory_in_the_arena() -> None:
    assert estimate_arena(traced(lambda x: [(x + 1).view(10, 10) * 2], X)) == 2 * BYTES


def test_arguments_are_the_callers() -> None:
    assert estimate_arena(traced(lambda x, y: [x + y], X, X)) == BYTES


def test_a_written_argument_waits_for_its_last_reader() -> None:
    def writes(x: Tensor) -> list[Tensor]:
        new = x + 1
        return [new, (x * 2).sum()]

    # The new value is kept while x is read: beside x * 2.
    assert estimate_arena(traced(writes, X, written=("a0",))) == 2 * BYTES


@pytest.mark.parametrize("variant", [WHOLE, Variant(4), Variant(8, recompute=True)], ids=lambda v: v.name)
def test_estimates_are_near_what_is_planned(spec: ModelSpec, variant: Variant) -> None:
    stage = stage_of(spec)
    estimate, planned = estimate_stage(stage, OPTIONS, variant), plan_stage(stage, OPTIONS, variant)
    exact = ("parameters", "statistics", "optimizer_state", "received", "batch")
    assert all(getattr(estimate, kind) == getattr(planned, kind) for kind in exact)
    assert 0.75 < estimate.arena / planned.arena <= 1.05
    assert 0.7 < estimate.program / planned.program < 1.4


def test_the_fastest_variant_that_fits_is_chosen_and_compiled_once(spec: ModelSpec) -> None:
    notes: list[str] = []
    variants = StageVariants(stage_of(spec), OPTIONS, notes.append)
    whole = variants.compiled()
    total = whole.manifest.planned.total
    assert variants.fastest(total) is whole
    smaller = variants.fastest(total - 1)
    assert smaller is not None
    assert smaller.manifest.planned.total < total
    assert smaller.manifest.variant != "whole"
    assert variants.fastest(total - 1) is smaller
    assert len(notes) == len(set(notes))
    assert variants.fastest(smaller.manifest.planned.parameters) is None


def test_a_frozen_prefix_counts_against_the_budget(spec: ModelSpec) -> None:
    from frostline.exporter.artifact import compile_prefix

    variants = StageVariants(stage_of(spec, 1), OPTIONS)
    total = variants.compiled().manifest.planned.total
    program, _ = compile_prefix(stage_of(spec), OPTIONS.batch)
    large = program.model_copy(update={"arena_bytes": 10 * total})
    assert variants.fastest(total) is not None
    assert variants.fastest(total, [large]) is None


def test_a_model_that_fits_whole_is_not_cut(spec: ModelSpec) -> None:
    fitted = BudgetPlanner(OPTIONS, 10**9).fit(balanced_cuts(Cutter(spec.module, spec.example(2))))
    assert len(fitted.cut.blocks) == 1
    assert [each.manifest.variant for each in fitted.stages] == ["whole"]


def test_every_stage_stays_within_the_budget(spec: ModelSpec) -> None:
    smallest = [
        estimate_stage(stage_of(spec, i), OPTIONS, Variant(8, recompute=True)).total for i in range(2)
    ]
    budget = int(max(smallest) * 1.3)
    fitted = BudgetPlanner(OPTIONS, budget).fit([parts_of(spec, 2)])
    assert len(fitted.stages) == 2
    assert all(each.manifest.planned.total <= budget for each in fitted.stages)
    assert fitted.stages[0].manifest.variant != "whole"


def test_a_budget_that_nothing_meets_says_what_would() -> None:
    spec = build_model("small_cnn", {"width": 8}, (1, 16, 16), 10)
    with pytest.raises(UsageError) as caught:
        BudgetPlanner(OPTIONS, 100_000).fit(balanced_cuts(Cutter(spec.module, spec.example(2))))
    message = str(caught.value)
    assert re.search(
        r"does not fit 100 kB: with \d blocks?, which comes closest, stage '\w+' takes about", message
    )
    assert re.search(r"--memory-budget \d+ kB", message)
    assert "\n" not in message


def test_cheaper_optimizers_are_proposed_where_they_help(spec: ModelSpec) -> None:
    options = ExportOptions(8, 10, AdamW())
    parts = mostly_parameters(spec)
    stage = build_stage(parts, 0, 0)
    plain = estimate_stage(stage, ExportOptions(8, 10, SGD()), Variant(8, recompute=True)).total
    with pytest.raises(UsageError, match="--optimizer sgd --momentum 0"):
        BudgetPlanner(options, int(plain * 1.16)).fit([parts])


def mostly_parameters(spec: ModelSpec) -> CutModel:
    """A model whose one block is parameters rather than activations."""
    model = nn.Sequential(nn.Flatten(2), nn.Linear(256, 256), nn.Linear(256, 10), nn.Flatten())
    return cut(model, ["1"], spec.example(2))
