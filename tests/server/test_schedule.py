"""The growing schedule: what is frozen stays, what is left is handed on, and the parts make up the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from frostline.datasets.samples import Samples
from frostline.exporter import planning
from frostline.exporter.artifact import CompiledStage, ExportOptions
from frostline.exporter.cutting import cut
from frostline.exporter.models.lookup import build_model
from frostline.exporter.output_module import OutputModuleKind
from frostline.exporter.parity import Parity
from frostline.exporter.stage import Stage, build_stage, load_tensors, statistics_tensors, trainable_tensors
from frostline.exporter.target import Target
from frostline.exporter.variant import Variant
from frostline.protocol.blobs import reference_to
from frostline.protocol.manifest import PlannedMemory, Program
from frostline.protocol.tensors import Array
from frostline.server import compilation
from frostline.server.schedule import GrowingSchedule
from tests.server.builders import BATCH, planned, program, stage_manifest

torch.set_num_threads(1)

CLASSES = 3
SHAPE = (1, 8, 8)
SEED = 5


def held_out(count: int = 300) -> Samples:
    random = np.random.default_rng(0)
    x = random.normal(size=(count, *SHAPE)).astype(np.float32)
    return Samples(x, random.integers(0, CLASSES, count), CLASSES)


@dataclass
class Grown:
    """A schedule with the model it trains."""

    schedule: GrowingSchedule
    model: nn.Module
    test: Samples | None


def build(
    norm: str = "batch",
    blocks: int = 3,
    test: Samples | None = None,
    name: str = "resnet10",
    output_module: OutputModuleKind = "convolutions",
) -> Grown:
    spec = build_model(name, {"width": 4, "norm": norm}, SHAPE, CLASSES, seed=1)
    parts = cut(spec.module, blocks, torch.zeros(2, *SHAPE))
    options = ExportOptions(batch=BATCH, classes=CLASSES)
    schedule = GrowingSchedule(spec, parts, options, SEED, test, output_module=output_module)
    return Grown(schedule, spec.module, test)


def fake_program(name: str, shape: tuple[int, ...]) -> tuple[Program, bytes]:
    content = name.encode()
    return program(content, shape), content


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that name their stage: lowering takes seconds a stage and is not what these tests are about."""

    def compile_stage(stage: Stage, options: ExportOptions, *, variant: Variant) -> CompiledStage:
        training, content = fake_program(f"stage {stage.name} {variant.name}", stage.input_shape)
        whole = variant.micro_batches == 1
        manifest = stage_manifest(
            (stage.index + 1) * (1000 if whole else 500),
            stage=stage.index,
            stages=stage.count,
            name=stage.name,
            variant=variant.name,
            batch=options.batch,
            classes=options.classes,
            training=training,
        )
        return CompiledStage(manifest, {training.file.sha256: content}, Parity(0.0, 0.0))

    def compile_prefix(
        stage: Stage, batch: int, target: Target, calibration: torch.Tensor | None
    ) -> tuple[Program, bytes]:
        return fake_program(f"prefix {stage.name}", stage.input_shape)

    monkeypatch.setattr(planning, "compile_stage", compile_stage)
    monkeypatch.setattr(compilation, "compile_prefix", compile_prefix)


def trained(weights: Mapping[str, Array], seed: int) -> dict[str, Array]:
    """Other values, as training would leave them."""
    random = np.random.default_rng(seed)
    return {
        # A running variance has to stay positive.
        name: (value + np.abs(random.normal(0, 0.1, value.shape))).astype(np.float32)
        for name, value in weights.items()
    }


def run_all(grown: Grown) -> list[dict[str, Array]]:
    """Train and freeze every stage; returns the weights each was frozen with."""
    frozen = []
    for index in range(len(grown.schedule)):
        weights = trained(grown.schedule.prepare(index, "executorch").weights, index)
        grown.schedule.accuracy(index, weights)
        grown.schedule.freeze(index, weights)
        frozen.append(weights)
    return frozen


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_weights_are_named_for_what_a_stage_trains(norm: str) -> None:
    grown = build(norm)
    untouched = build(norm)
    for index in range(3):
        weights = grown.schedule.prepare(index, "executorch").weights
        parts = cut(untouched.model, 3, torch.zeros(2, *SHAPE))
        stage = build_stage(parts, index, SEED)
        assert weights.keys() == {**trainable_tensors(stage), **statistics_tensors(stage)}.keys()
        assert all(name.startswith(("block.", "output_module.")) for name in weights)
        assert any("running_mean" in name for name in weights) is (norm == "batch")
        assert not any("num_batches" in name for name in weights)
        stand_ins = {name.split(".")[1] for name in weights if "stand_in" in name}
        assert stand_ins == {f"stand_in_{later}" for later in range(index + 1, 3)}


@pytest.mark.usefixtures("without_compiler")
def test_a_budget_gets_the_fastest_variant_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def estimate(stage: Stage, options: ExportOptions, variant: Variant) -> PlannedMemory:
        return planned(900 if variant.micro_batches == 1 else 400)

    monkeypatch.setattr(planning, "estimate_stage", estimate)
    state = planned(parameters=300)
    monkeypatch.setattr(planning, "_planned_state", lambda stage, options, variant: state)
    schedule = build().schedule

    def variant_within(budget: int) -> str | None:
        prepared = schedule.prepare_within(0, "executorch", budget)
        return prepared.manifest.variant if prepared else None

    assert variant_within(1000) == "whole"
    # Estimated to fit, but not once it is compiled.
    assert variant_within(999) == "micro2"
    assert variant_within(500) == "micro2"
    assert variant_within(499) is None
    assert variant_within(299) is None


@pytest.mark.usefixtures("without_compiler")
def test_plans_are_made_once() -> None:
    schedule = build().schedule
    assert schedule.plan(2, "executorch").arena == 3000
    assert schedule.plan(2, "executorch") is schedule.plan(2, "executorch")
    assert schedule.estimate_whole_model() is schedule.estimate_whole_model()


@pytest.mark.usefixtures("without_compiler")
def test_prepared_weights_are_copies() -> None:
    grown = build()
    weights = grown.schedule.prepare(0, "executorch").weights
    for value in weights.values():
        value.fill(7)
    again = grown.schedule.prepare(0, "executorch").weights
    assert not all((value == 7).all() for value in again.values())


@pytest.mark.usefixtures("without_compiler")
def test_the_output_module_is_handed_on_by_name() -> None:
    grown = build()
    for index in range(2):
        later = grown.schedule.prepare(index + 1, "executorch").weights
        weights = trained(grown.schedule.prepare(index, "executorch").weights, index)
        grown.schedule.freeze(index, weights)
        now = grown.schedule.prepare(index + 1, "executorch").weights
        shared = now.keys() & weights.keys()
        assert {name for name in now if name.startswith("output_module.")} == shared
        assert all(np.array_equal(now[name], weights[name]) for name in shared)
        blocks = {name for name in now if name.startswith("block.")}
        assert blocks
        assert all(np.array_equal(now[name], later[name]) for name in blocks)


@pytest.mark.usefixtures("without_compiler")
def test_a_linear_output_module_is_begun_afresh_at_each_stage() -> None:
    grown, untouched = (build(test=held_out(20), output_module="linear") for _ in range(2))
    frozen = run_all(grown)
    for index, layer in enumerate(["linear_0.", "linear_1.", "head."]):
        begun = grown.schedule.prepare(index, "executorch").weights.keys()
        names = {name for name in begun if name.startswith("output_module.")}
        assert names and all(name.startswith(f"output_module.{layer}") for name in names)
        want = untouched.schedule.prepare(index, "executorch").weights
        assert all(np.array_equal(trained(want, index)[name], frozen[index][name]) for name in names)
    head = {name.removeprefix("output_module.head."): frozen[2][name] for name in names}
    assert all(np.array_equal(grown.model.state_dict()[name], value) for name, value in head.items())


@pytest.mark.usefixtures("without_compiler")
def test_a_frozen_block_stays_as_it_was_frozen() -> None:
    grown = build("batch", blocks=4, test=held_out(20))
    frozen = run_all(grown)
    state = {name: value.numpy() for name, value in grown.model.state_dict().items()}
    statistics = 0
    for weights in frozen:
        for name, value in weights.items():
            part, _, key = name.partition(".")
            if part == "block":
                np.testing.assert_array_equal(state[key], value, err_msg=name)
                statistics += "running_" in name
    assert statistics == sum("running_" in name for name in state) > 0
    head = {
        name.removeprefix("output_module.head."): value
        for name, value in frozen[-1].items()
        if name.startswith("output_module.head.")
    }
    assert all(np.array_equal(state[name], value) for name, value in head.items())
    assert head


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("count", [5, 300], ids=["less than a batch", "more than a batch"])
def test_accuracy_is_that_of_the_chain(count: int) -> None:
    test = held_out(count)
    grown = build("batch", test=test)
    parts = cut(build("batch").model, 3, torch.zeros(2, *SHAPE))
    stages = [build_stage(parts, index, SEED) for index in range(3)]
    features = torch.from_numpy(test.x)
    for index, stage in enumerate(stages):
        weights = trained(grown.schedule.prepare(index, "executorch").weights, index)
        load_tensors(stage, {name: torch.from_numpy(value) for name, value in weights.items()})
        stage.model.eval()
        with torch.no_grad():
            expected = (stage.model(features).argmax(1).numpy() == test.y).mean()
            features = stage.model.block(features)
        assert grown.schedule.accuracy(index, weights) == pytest.approx(expected)
        grown.schedule.freeze(index, weights)


@pytest.mark.usefixtures("without_compiler")
def test_there_is_no_accuracy_without_samples() -> None:
    grown = build()
    assert grown.schedule.accuracy(0, grown.schedule.prepare(0, "executorch").weights) is None


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_trained_model_is_the_chain_of_trained_parts(norm: str) -> None:
    test = held_out(12)
    grown = build(norm, test=test)
    frozen = run_all(grown)
    parts = cut(build(norm).model, 3, torch.zeros(2, *SHAPE))
    features = torch.from_numpy(test.x)
    for index, weights in enumerate(frozen):
        stage = build_stage(parts, index, SEED)
        load_tensors(stage, {name: torch.from_numpy(value) for name, value in weights.items()})
        stage.model.eval()
        with torch.no_grad():
            logits = stage.model(features)
            features = stage.model.block(features)
    model = grown.schedule.trained_model()
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(torch.from_numpy(test.x)), logits)


@pytest.mark.usefixtures("without_compiler")
def test_the_prefix_grows_by_each_frozen_block_but_the_last() -> None:
    grown = build()
    names = [grown.schedule.name(index) for index in range(3)]
    assert len(set(names)) == len(grown.schedule) == 3
    for index in range(3):
        prepared = grown.schedule.prepare(index, "executorch")
        expected = [reference_to(f"prefix {name}".encode()) for name in names[:index]]
        assert [program.file for program in prepared.manifest.prefix] == expected
        assert {reference.sha256 for reference in prepared.manifest.files} == prepared.files.keys()
        assert all(reference_to(content).sha256 == h for h, content in prepared.files.items())
        assert prepared.manifest.sample_shape == SHAPE
        grown.schedule.freeze(index, prepared.weights)
    assert len(grown.schedule.prepare(0, "executorch").manifest.prefix) == 2


@pytest.mark.usefixtures("without_compiler")
def test_a_reopened_block_is_trained_again_behind_those_before_it() -> None:
    grown, straight = (build(test=held_out(20)) for _ in range(2))
    first, second, third = run_all(grown)
    grown.schedule.reopen(1)
    prefix = grown.schedule.prepare(1, "executorch").manifest.prefix
    assert [program.file for program in prefix] == [
        reference_to(b"prefix " + grown.schedule.name(0).encode())
    ]
    begun = grown.schedule.prepare(1, "executorch").weights
    assert all(np.array_equal(begun[name], value) for name, value in second.items() if name in begun)
    again = trained(second, 9)
    straight.schedule.freeze(0, first)
    for schedule in (grown.schedule, straight.schedule):
        schedule.freeze(1, again)
    assert grown.schedule.accuracy(2, third) == straight.schedule.accuracy(2, third)
    assert len(grown.schedule.prepare(2, "executorch").manifest.prefix) == 2


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize(("output_module", "layer"), [("convolutions", "head"), ("linear", "linear_0")])
def test_the_last_layer_is_that_nearest_to_the_logits(output_module: OutputModuleKind, layer: str) -> None:
    schedule = build(output_module=output_module).schedule
    names = schedule.last_layer(0)
    assert names
    assert all(name.startswith(f"output_module.{layer}") for name in names)
    assert set(names) <= schedule.prepare(0, "executorch").weights.keys()
    assert {schedule.prepare(0, "executorch").weights[name].shape[0] for name in names} == {CLASSES}


def test_a_compiled_schedule_plans_trains_and_freezes() -> None:
    grown = build("group", blocks=2, test=held_out(8), name="small_cnn")
    planned = grown.schedule.plan(0, "executorch")
    assert planned.total > 0
    assert grown.schedule.plan(0, "executorch") is planned
    first = grown.schedule.prepare(0, "executorch")
    assert {spec.name: spec.shape for spec in first.manifest.trained} == {
        name: value.shape for name, value in first.weights.items()
    }
    weights = trained(first.weights, 0)
    assert grown.schedule.accuracy(0, weights) is not None
    grown.schedule.freeze(0, weights)
    second = grown.schedule.prepare(1, "executorch")
    (prefix,) = second.manifest.prefix
    assert prefix.outputs[0].shape[1:] == second.manifest.input_shape
    assert second.manifest.sample_shape == SHAPE
    assert {reference.sha256 for reference in second.manifest.files} == second.files.keys()
