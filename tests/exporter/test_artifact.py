from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from frostline.device_runtime.executorch_engine import ExecuTorchRuntime
from frostline.exporter.artifact import (
    CompiledStage,
    ExportOptions,
    arrays,
    compile_prefix,
    compile_stage,
)
from frostline.exporter.cutting import CutModel, cut
from frostline.exporter.executorch_target import EXECUTORCH
from frostline.exporter.models.lookup import build_model
from frostline.exporter.optimizer import SGD, AdamW, Optimizer
from frostline.exporter.stage import (
    Stage,
    build_stage,
    load_tensors,
    statistics_tensors,
    trainable_tensors,
)
from frostline.exporter.variant import WHOLE, Variant
from frostline.protocol.artifact import read_artifact, write_artifact
from frostline.protocol.blobs import BlobStore, sha256_of
from frostline.protocol.errors import CorruptContent, FrostlineError, UsageError
from frostline.protocol.manifest import Program, StageManifest, TensorSpec
from frostline.protocol.tensors import Array
from tests.exporter.small_stages import LENGTH, WIDTH, Perceptron, token_stage

BATCH, CLASSES = 4, 10
OPTIONS = ExportOptions(BATCH, CLASSES, SGD(momentum=0.9))


@dataclass(frozen=True)
class Exported:
    stage: Stage
    compiled: CompiledStage
    prefix: tuple[Program, bytes] | None
    folder: Path

    @property
    def weights(self) -> dict[str, Array]:
        return arrays({**trainable_tensors(self.stage), **statistics_tensors(self.stage)})


def _cut(norm: str) -> CutModel:
    options = {"width": 4, "channels": 1, "input_size": 8, "norm": norm}
    spec = build_model("resnet10", options, seed=0)
    return cut(spec.module, ["layer3", "layer4"], torch.zeros(2, *spec.input_shape))


def _export(norm: str, folder: Path) -> Exported:
    parts = _cut(norm)
    prefix = compile_prefix(build_stage(parts, 0, seed=0), BATCH)
    stage = build_stage(parts, 1, seed=0)
    compiled = compile_stage(stage, OPTIONS, [prefix[0]])
    exported = Exported(stage, compiled, prefix, folder)
    files = {**compiled.files, prefix[0].file.sha256: prefix[1]}
    write_artifact(folder, compiled.manifest, files, exported.weights)
    return exported


@pytest.fixture(scope="module", params=["group", "batch"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return _export(request.param, tmp_path_factory.mktemp(request.param))


def _batch(stage: Stage) -> tuple[Array, Array]:
    random = np.random.default_rng(0)
    x = random.standard_normal((BATCH, *stage.input_shape), dtype=np.float32)
    return x, np.arange(BATCH, dtype=np.int64)


def _by_name(specs: list[TensorSpec]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {spec.name: (spec.dtype, spec.shape) for spec in specs}


def test_manifest_lists_the_tensors_in_the_order_of_the_arguments(exported: Exported) -> None:
    manifest, model = exported.compiled.manifest, exported.stage.model
    layout = EXECUTORCH.layout(model)
    assert (manifest.stage, manifest.stages, manifest.name) == (1, 2, "layer4")
    assert (manifest.engine, manifest.batch, manifest.classes) == ("executorch", BATCH, CLASSES)
    assert (manifest.variant, manifest.micro_batches, manifest.update) == ("whole", 1, None)

    travelling = {name: ("float32", tuple(p.shape)) for name, p in model.named_parameters()}
    parameters = {
        name: ("float32", tuple(layout.held(name, p).shape)) for name, p in model.named_parameters()
    }
    statistics = {
        name: ("float32", tuple(b.shape)) for name, b in model.named_buffers() if b.is_floating_point()
    }
    momentum = {f"momentum.{name}": value for name, value in parameters.items()}
    x = {"x": ("float32", (BATCH, *exported.stage.input_shape))}
    y, rate = {"y": ("int64", (BATCH,))}, {"learning_rate": ("float32", ())}
    expected = [
        (manifest.parameters, travelling),
        (manifest.statistics, statistics),
        (manifest.optimizer_state, momentum),
        (manifest.received, {}),
        (manifest.training.inputs, parameters | statistics | momentum | x | y | rate),
        (manifest.training.outputs, {"loss": ("float32", ()), "correct": ("int64", ())}),
        (manifest.evaluation.inputs, parameters | statistics | x),
        (manifest.evaluation.outputs, {"logits": ("float32", (BATCH, CLASSES))}),
        (manifest.prefix[0].inputs, {"x": ("float32", (BATCH, 1, 8, 8))}),
        (manifest.prefix[0].outputs, {"features": x["x"]}),
    ]
    for got, want in expected:
        assert list(_by_name(got).items()) == list(want.items())


def test_manifest_tells_the_order_each_parameter_is_held_in(exported: Exported) -> None:
    model, turned = exported.stage.model, 0
    for spec in exported.compiled.manifest.parameters:
        shape = model.get_parameter(spec.name).shape
        axes = spec.held_axes or range(len(shape))
        assert spec.shape == shape
        assert spec.held_shape == tuple(shape[axis] for axis in axes)
        assert (spec.held_axes is not None) == (len(shape) == 4)
        turned += spec.held_axes is not None
    assert turned > 1


def test_manifest_plans_every_byte(exported: Exported) -> None:
    manifest = exported.compiled.manifest
    planned = manifest.planned
    assert manifest.training.arena_bytes > manifest.evaluation.arena_bytes > 0
    assert planned.arena == manifest.training.arena_bytes
    for size, specs in [
        (planned.parameters, manifest.parameters),
        (planned.statistics, manifest.statistics),
        (planned.optimizer_state, manifest.optimizer_state),
    ]:
        assert size == sum(spec.size_bytes for spec in specs)
    assert planned.batch == sum(spec.size_bytes for spec in manifest.training.inputs[-3:])
    assert planned.program == max(len(content) for content in exported.compiled.files.values())
    assert planned.total == sum(planned.model_dump().values())


def test_files_are_named_by_their_hash(exported: Exported) -> None:
    manifest = exported.compiled.manifest
    assert exported.prefix is not None
    files = {**exported.compiled.files, manifest.prefix[0].file.sha256: exported.prefix[1]}
    assert {reference.sha256 for reference in manifest.files} == set(files)
    for reference in manifest.files:
        assert sha256_of(files[reference.sha256]) == reference.sha256
        assert len(files[reference.sha256]) == reference.size


def test_parity_is_tight(exported: Exported) -> None:
    parity = exported.compiled.parity
    assert 0 <= parity.loss_error < 1e-5
    assert 0 < parity.tensor_error < 1e-3


@pytest.mark.parametrize("exported", ["batch"], indirect=True)
def test_compiling_again_gives_the_same_bytes(exported: Exported) -> None:
    again = compile_stage(build_stage(_cut("batch"), 1, 0), OPTIONS, exported.compiled.manifest.prefix)
    assert again.files == exported.compiled.files
    assert again.manifest.encode() == exported.compiled.manifest.encode()


def test_trains_in_the_runtime_without_moving_its_state(exported: Exported) -> None:
    session = ExecuTorchRuntime().open_stage(*read_artifact(exported.folder))
    session.load(exported.weights)
    x, y = _batch(exported.stage)
    addresses = {name: value.ctypes.data for name, value in session.trained().items()}
    steps = [session.step([(x, y)], 0.05) for _ in range(20)]
    assert {name: value.ctypes.data for name, value in session.trained().items()} == addresses
    losses = [loss for loss, _ in steps]
    assert losses[-1] < 0.2 * losses[0]
    assert steps[-1][1] == BATCH
    unchanged = [n for n, value in session.trained().items() if np.array_equal(value, exported.weights[n])]
    assert unchanged == []


def test_evaluation_equals_eager(exported: Exported) -> None:
    session = ExecuTorchRuntime().open_stage(*read_artifact(exported.folder))
    session.load(exported.weights)
    x, y = _batch(exported.stage)
    for _ in range(3):
        session.step([(x, y)], 0.05)
    stage = Stage(1, 2, "layer4", copy.deepcopy(exported.stage.model), exported.stage.input_shape)
    load_tensors(stage, {name: torch.from_numpy(value.copy()) for name, value in session.trained().items()})
    with torch.no_grad():
        want = stage.model.eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(session.evaluate(x), want, rtol=1e-4, atol=1e-5)


def test_prefix_equals_the_eager_block(exported: Exported) -> None:
    manifest, store = read_artifact(exported.folder)
    norm = "batch" if manifest.statistics else "group"
    block = build_stage(_cut(norm), 0, seed=0).model.block.eval()
    x = np.random.default_rng(1).standard_normal((BATCH, 1, 8, 8), dtype=np.float32)
    with torch.no_grad():
        want = block(torch.from_numpy(x)).numpy()
    got = ExecuTorchRuntime().open_prefix(manifest.prefix[0], store).run(x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_read_artifact_returns_what_was_written(exported: Exported) -> None:
    manifest, store = read_artifact(exported.folder)
    assert manifest == exported.compiled.manifest
    for sha256, content in exported.compiled.files.items():
        assert (exported.folder / "files" / sha256).read_bytes() == content
    assert isinstance(store, BlobStore)


def _remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _truncate_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-100])


def _raise_schema_version(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 2}))


def _program_path(folder: Path) -> Path:
    return folder / "files" / json.loads((folder / "manifest.json").read_text())["training"]["file"]["sha256"]


def _flip_a_bit(folder: Path) -> None:
    path = _program_path(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _remove_program(folder: Path) -> None:
    _program_path(folder).unlink()


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (_remove_manifest, UsageError, "manifest.json is missing"),
        (_truncate_manifest, CorruptContent, "manifest.json: not a stage manifest"),
        (_raise_schema_version, CorruptContent, "manifest.json: not a stage manifest: schema_version"),
        (_flip_a_bit, CorruptContent, "does not match its hash"),
        (_remove_program, CorruptContent, "missing; fetch or export it again"),
    ],
)
def test_damage_is_one_clear_error(
    exported: Exported,
    tmp_path: Path,
    damage: Callable[[Path], None],
    error: type[FrostlineError],
    said: str,
) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(exported.folder, folder)
    damage(folder)
    with pytest.raises(error, match=said) as raised:
        read_artifact(folder)
    assert type(raised.value) is error
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


VARIANTS = (WHOLE, Variant(2), Variant(2, recompute=True))
OPTIMIZERS: dict[str, Optimizer] = {"SGD": SGD(momentum=0.9), "AdamW": AdamW(proximal=0.1)}


def _tokens() -> Stage:
    torch.manual_seed(0)
    return token_stage(Perceptron(), Perceptron(), classes=CLASSES)


@lru_cache
def _compiled(optimizer: str, variant: Variant) -> CompiledStage:
    return compile_stage(_tokens(), ExportOptions(8, CLASSES, OPTIMIZERS[optimizer]), variant=variant)


@pytest.fixture(params=OPTIMIZERS)
def optimizer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=VARIANTS, ids=lambda variant: variant.name)
def variant(request: pytest.FixtureRequest) -> Variant:
    found: Variant = request.param
    return found


def _programs(manifest: StageManifest) -> list[Program]:
    update = [manifest.update] if manifest.update else []
    return [manifest.training, *update, manifest.evaluation]


def _total(specs: list[TensorSpec]) -> int:
    return sum(spec.size_bytes for spec in specs)


def test_every_variant_of_every_optimizer_trains_as_eager_pytorch_does(
    optimizer: str, variant: Variant
) -> None:
    compiled = _compiled(optimizer, variant)
    assert 0 < compiled.parity.tensor_error < 1e-3
    manifest = compiled.manifest
    assert (manifest.variant, manifest.batch, manifest.classes) == (variant.name, 8, CLASSES)
    assert (manifest.micro_batches, manifest.micro_batch) == (
        variant.micro_batches,
        8 // variant.micro_batches,
    )
    assert manifest.input_shape == (LENGTH, WIDTH)
    contents = compiled.files
    assert {file.sha256 for file in manifest.files} == set(contents)
    assert len(contents) == (2 if variant == WHOLE else 3)
    assert all(len(contents[file.sha256]) == file.size for file in manifest.files)


def test_the_plan_of_a_variant_adds_up(optimizer: str, variant: Variant) -> None:
    manifest = _compiled(optimizer, variant).manifest
    planned, training, update = manifest.planned, manifest.training, manifest.update
    together = [training, *([update] if update else [])]
    assert (update is None) == (variant == WHOLE)
    # The programs of a step are loaded together, the evaluation in their place.
    arena = sum(program.arena_bytes for program in together)
    assert arena > manifest.evaluation.arena_bytes
    assert planned.arena == arena
    assert planned.program == sum(program.file.size for program in together)
    assert planned.parameters == _total(manifest.parameters)
    assert planned.optimizer_state == _total(manifest.optimizer_state)
    assert planned.received == _total(manifest.received)
    assert planned.statistics == _total(manifest.statistics) == 0
    assert planned.batch == _total([spec for spec in training.inputs if spec.name in ("x", "y")]) + 4
    assert planned.total == sum(planned.model_dump().values())


@pytest.mark.parametrize(
    ("optimizer", "micro_batches", "copies", "more"),
    [("SGD", 1, 1, 0), ("SGD", 2, 1, 0), ("AdamW", 1, 2, 4), ("AdamW", 2, 3, 4)],
)
def test_micro_batches_need_gradients_only_where_there_is_no_momentum_to_take_them(
    optimizer: str, micro_batches: int, copies: int, more: int
) -> None:
    """Momentum; mean, square and the count of steps; and the gradient."""
    planned = _compiled(optimizer, Variant(micro_batches)).manifest.planned
    assert planned.optimizer_state == copies * planned.parameters + more
    assert planned.received == (planned.parameters if optimizer == "AdamW" else 0)


def test_each_variant_takes_less_arena_than_the_one_before(optimizer: str) -> None:
    arenas = [_compiled(optimizer, variant).manifest.training.arena_bytes for variant in VARIANTS]
    assert arenas[0] > arenas[1] > arenas[2]
    whole, micro, _ = (_compiled(optimizer, variant).manifest.planned for variant in VARIANTS)
    assert micro.batch < whole.batch


def test_programs_take_only_tensors_that_the_stage_has(optimizer: str, variant: Variant) -> None:
    manifest = _compiled(optimizer, variant).manifest
    held = [*manifest.trained, *manifest.optimizer_state, *manifest.received]
    stage = _by_name(held)
    assert len(stage) == len(held)
    step: dict[str, set[str]] = {"training": {"x", "y"}, "update": {"learning_rate"}, "evaluation": {"x"}}
    step["training"] |= {"learning_rate" if variant == WHOLE else "first"}
    used: set[str] = set()
    for kind, names in step.items():
        program: Program | None = getattr(manifest, kind)
        if program is None:
            continue
        inputs = _by_name(program.inputs)
        assert len(inputs) == len(program.inputs)
        assert names <= set(inputs)
        for name in set(inputs) - names:
            assert inputs[name] == stage[name]
        used |= set(inputs)
    assert set(stage) <= used
    assert {spec.name for spec in manifest.received} == {
        f"received.{spec.name}" for spec in manifest.parameters if optimizer == "AdamW"
    }


@pytest.mark.parametrize(("batch", "micro_batches"), [(7, 2), (8, 3), (2, 4)])
def test_a_batch_that_does_not_divide_is_refused(batch: int, micro_batches: int) -> None:
    with pytest.raises(
        UsageError,
        match=rf"batch of {batch} cannot be trained in {micro_batches} equal parts; "
        rf"use a multiple of {micro_batches}$",
    ):
        compile_stage(_tokens(), ExportOptions(batch, CLASSES), variant=Variant(micro_batches))
