from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frostline.device_runtime.engine import TrainingSession, open_runtime
from frostline.exporter.artifact import CompiledStage, ExportOptions, arrays, compile_stage
from frostline.exporter.dropout import SeededDropout
from frostline.exporter.executorch_target import EXECUTORCH
from frostline.exporter.optimizer import SGD
from frostline.exporter.output_module import OutputModule
from frostline.exporter.parity import train_eagerly
from frostline.exporter.rewrites.executorch import rewrite_for_executorch
from frostline.exporter.stage import Stage, StageModel, statistics_tensors, trainable_tensors
from frostline.exporter.tiles import pick
from frostline.exporter.training_step import (
    StageState,
    TracedProgram,
    initial_state,
    trace_accumulation,
    trace_evaluation,
    trace_training_step,
    trace_update,
)
from frostline.exporter.variant import WHOLE, Variant
from frostline.protocol.blobs import BlobStore
from frostline.protocol.errors import RunError
from frostline.protocol.manifest import SEEDS
from frostline.protocol.tensors import Array
from tests.exporter.small_stages import WIDTH, token_stage

BATCH, CLASSES, RATE, STEPS = 4, 3, 0.125, 3
OPTIMIZER = SGD(momentum=0.9)
OPTIONS = ExportOptions(BATCH, CLASSES, OPTIMIZER)
VARIANTS = (WHOLE, Variant(2), Variant(recompute=True), Variant(2, recompute=True))


def image_stage() -> Stage:
    """Dropout of values and of channels in the block, of values in the head."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), nn.Dropout(0.2), nn.Conv2d(4, 4, 1), nn.GELU()]
    block = nn.Sequential(*convolutions, nn.Dropout2d(0.4), nn.Conv2d(4, 4, 1))
    head = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, CLASSES))
    return Stage(0, 1, "images", StageModel(block, OutputModule({}, head)), (1, 4, 4))


class Attention(nn.Module):
    """Causal attention of two heads with dropped weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(WIDTH, 3 * WIDTH)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.inward(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        dropped = self.dropout.p if self.training else 0.0
        output = F.scaled_dot_product_attention(*heads, dropout_p=dropped, is_causal=True)
        return x + self.dropout(output.transpose(1, 2).flatten(2))


def attention_stage() -> Stage:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.2, batch_first=True, norm_first=True)
    return token_stage(Attention(), encoder, nn.Linear(WIDTH, WIDTH), classes=CLASSES)


STAGES = {"images": image_stage, "attention": attention_stage}


def _batch(stage: Stage, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, *stage.input_shape, generator=random, dtype=dtype)
    return x, torch.randint(0, CLASSES, (BATCH,), generator=random)


class Traced:
    """The programs of a step in float64."""

    def __init__(self, stage: Stage, variant: Variant = WHOLE) -> None:
        stage.model.double()
        self.state: StageState = initial_state(stage, OPTIMIZER, variant, EXECUTORCH.layout(stage.model))
        self._parts = variant.micro_batches
        self._calls = 0
        x, y = (each[: BATCH // self._parts] for each in _batch(stage, 99))
        rewrite = rewrite_for_executorch
        self.update: TracedProgram | None = None
        if self._parts == 1:
            self.training = trace_training_step(stage, OPTIMIZER, self.state, x, y, rewrite, variant)
        else:
            self.training = trace_accumulation(stage, OPTIMIZER, self.state, x, y, rewrite, variant)
            self.update = trace_update(stage, OPTIMIZER, self.state, rewrite)

    def step(self, x: Tensor, y: Tensor) -> list[float]:
        """The loss of each micro-batch; seeds count from 0."""
        losses = []
        rate = torch.tensor(RATE)
        for part_x, part_y in self.split(x, y):
            scalars = {"learning_rate": rate, "first": torch.tensor(float(not losses))}
            seed = torch.tensor(float(self._calls))
            losses.append(self.run(self.training, x=part_x, y=part_y, seed=seed, **scalars))
            self._calls += 1
        if self.update:
            self.run(self.update, learning_rate=rate)
        return losses

    def split(self, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(x.chunk(self._parts), y.chunk(self._parts), strict=True))

    def run(self, program: TracedProgram, **step: Tensor) -> float:
        tensors = {**self.state.by_name, **step}
        return float(program(*(pick(tensors, name) for name in program.inputs))[0])


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
@pytest.mark.parametrize("make_stage", STAGES.values(), ids=STAGES)
def test_the_step_is_that_of_eager_pytorch_with_the_same_seeds(
    make_stage: Callable[[], Stage], variant: Variant
) -> None:
    stage = make_stage()
    traced = Traced(stage, variant)
    batches = [_batch(stage, seed) for seed in range(STEPS)]
    losses = [loss for x, y in batches for loss in traced.step(x, y)]
    parts = [traced.split(x, y) for x, y in batches]
    eager = list(train_eagerly(stage, OPTIMIZER, parts, RATE))
    assert losses == pytest.approx([loss for step in eager for loss in step.losses])
    want = eager[-1].tensors
    for name, held in traced.state.parameters.items():
        torch.testing.assert_close(
            traced.state.layout.model(name, held), want[name], msg=lambda t, name=name: f"{name}: {t}"
        )


def test_programs_take_a_seed_only_for_dropout() -> None:
    stage = image_stage()
    assert "seed" in Traced(stage).training.inputs
    evaluation = trace_evaluation(
        stage, initial_state(stage, OPTIMIZER), _batch(stage, 0)[0], rewrite_for_executorch
    )
    assert "seed" not in evaluation.inputs
    for module in stage.model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    assert "seed" not in Traced(stage).training.inputs


def test_the_loss_of_a_step_depends_on_its_seed() -> None:
    stage = image_stage()
    x, y = _batch(stage, 0)
    losses = []
    for seed in (0, 0, 1, SEEDS - 1):
        traced = Traced(stage)
        tensors = {"x": x, "y": y, "learning_rate": torch.tensor(RATE), "seed": torch.tensor(float(seed))}
        losses.append(traced.run(traced.training, **tensors))
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def _dropped(function: Callable[[], Tensor], seed: int = 0) -> Tensor:
    with SeededDropout(torch.tensor(float(seed))):
        return function()


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.8])
def test_values_are_dropped_as_often_as_asked_and_the_others_scaled(probability: float) -> None:
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    y = _dropped(lambda: F.dropout(x, probability))
    kept = y != 0
    assert kept.double().mean().item() == pytest.approx(1 - probability, abs=0.02)
    torch.testing.assert_close(y, torch.where(kept, x / (1 - probability), 0.0))


@pytest.mark.parametrize(
    ("drop", "shape"),
    [(F.dropout1d, (32, 64, 3)), (F.dropout2d, (32, 64, 2, 3)), (F.dropout3d, (32, 64, 2, 2, 2))],
)
def test_channels_are_dropped_whole(drop: Callable[[Tensor, float], Tensor], shape: tuple[int, ...]) -> None:
    channels = _dropped(lambda: drop(torch.ones(shape), 0.5)).flatten(2)
    assert channels.unique().tolist() == [0, 2]
    assert torch.equal(channels, channels[..., :1].expand_as(channels))
    assert channels.mean().item() == pytest.approx(1, abs=0.1)


def test_weights_of_attention_are_dropped_and_scaled() -> None:
    random = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 4, 32, 8, generator=random)
    values = torch.eye(32).expand(2, 4, 32, 32)
    weights = F.scaled_dot_product_attention(query, key, values, scale=0.2)
    dropped = _dropped(lambda: F.scaled_dot_product_attention(query, key, values, dropout_p=0.25, scale=0.2))
    kept = dropped != 0
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(dropped, torch.where(kept, weights / 0.75, 0.0))


def test_alpha_dropout_keeps_mean_and_variance() -> None:
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    y = _dropped(lambda: F.alpha_dropout(x, 0.3, training=True))
    assert y.mean().item() == pytest.approx(0, abs=0.02)
    assert y.var().item() == pytest.approx(1, abs=0.03)


def test_draws_differ_between_layers_and_seeds_and_are_repeated() -> None:
    x = torch.ones(64, 64)
    with SeededDropout(torch.tensor(7.0)) as dropout:
        first, second = F.dropout(x, 0.5), F.dropout(x, 0.5)
        with dropout.again(0):
            assert torch.equal(F.dropout(x, 0.5), first)
        assert dropout.draws == 2
    assert torch.equal(_dropped(lambda: F.dropout(x, 0.5), 7), first)
    for one, other in [(first, second), (first, _dropped(lambda: F.dropout(x, 0.5), 8))]:
        assert (one == other).double().mean().item() == pytest.approx(0.5, abs=0.05)


def test_nothing_is_drawn_where_nothing_or_all_is_dropped() -> None:
    x = torch.ones(8, 8)
    with SeededDropout(torch.tensor(0.0)) as dropout:
        assert torch.equal(F.dropout(x, 0.0), x)
        assert torch.equal(F.dropout(x, 0.5, training=False), x)
        assert torch.equal(F.dropout(x, 1.0), torch.zeros_like(x))
        assert dropout.draws == 0


class Counts(nn.Module):
    """Adds numbers of a Poisson distribution."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.poisson(x.detach().abs())


def test_other_random_numbers_are_refused_in_one_line_that_names_the_stage() -> None:
    with pytest.raises(
        RunError, match=r"stage 'tokens' cannot be compiled: aten.poisson .* in module '1'.* step's seed"
    ) as raised:
        token_stage(nn.Linear(WIDTH, WIDTH), Counts(), classes=CLASSES)
    assert "\n" not in str(raised.value)


class Device:
    """A compiled stage in the runtime."""

    def __init__(self, stage: Stage, compiled: CompiledStage, folder: Path) -> None:
        self._stage, self._manifest = stage, compiled.manifest
        self._weights = arrays({**trainable_tensors(stage), **statistics_tensors(stage)})
        self._store = BlobStore(folder)
        for content in compiled.files.values():
            self._store.put(content)

    def session(self, seed: int) -> TrainingSession:
        session = open_runtime("executorch").open_stage(self._manifest, self._store)
        session.load(self._weights, seed)
        return session

    def step(self, session: TrainingSession, rate: float = RATE) -> float:
        x, y = (each.numpy() for each in _batch(self._stage, 0, torch.float32))
        count = self._manifest.micro_batches
        return session.step(zip(np.split(x, count), np.split(y, count), strict=True), rate)[0]

    def trained(self, seed: int) -> dict[str, Array]:
        """Copies of what two steps make of the weights."""
        session = self.session(seed)
        for _ in range(2):
            self.step(session)
        return {name: value.copy() for name, value in session.trained().items()}


def _same(one: dict[str, Array], other: dict[str, Array]) -> bool:
    return all(np.array_equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module", params=STAGES)
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Device:
    stage = STAGES[request.param]()
    compiled = compile_stage(
        stage, OPTIONS, variant=Variant(2) if request.param == "images" else Variant(recompute=True)
    )
    manifest = compiled.manifest
    # Only rounding is between the programs and eager PyTorch.
    assert compiled.parity.loss_error < 1e-5
    assert compiled.parity.tensor_error < 1e-3
    assert [spec.name for spec in manifest.training.inputs if spec.shape == ()][-1] == "seed"
    assert "seed" not in [spec.name for spec in manifest.evaluation.inputs]
    return Device(stage, compiled, tmp_path_factory.mktemp(request.param))


def test_a_device_trains_the_same_from_the_same_seed_alone(device: Device) -> None:
    trained = device.trained(5)
    assert _same(trained, device.trained(5))
    assert _same(trained, device.trained(5 + SEEDS))
    assert not _same(trained, device.trained(6))


def test_each_call_has_a_seed_of_its_own(device: Device) -> None:
    """With a learning rate of 0 the parameters stay, and what differs between losses is what was dropped."""
    session = device.session(SEEDS - 3)
    losses = [device.step(session, 0.0) for _ in range(6)]
    assert len(set(losses)) == len(losses)
    session.load(device._weights, SEEDS - 3)
    assert [device.step(session, 0.0) for _ in range(6)] == losses
    calls = device._manifest.micro_batches
    later = device.session(SEEDS - 3 + 2 * calls)
    assert [device.step(later, 0.0) for _ in range(4)] == losses[2:]


def test_evaluation_drops_nothing(device: Device) -> None:
    x, _ = _batch(device._stage, 1, torch.float32)
    x = x[: device._manifest.micro_batch]
    with torch.no_grad():
        want = device._stage.model.eval()(x).numpy()
    for seed in (0, 1):
        np.testing.assert_allclose(device.session(seed).evaluate(x.numpy()), want, rtol=1e-4, atol=1e-5)
