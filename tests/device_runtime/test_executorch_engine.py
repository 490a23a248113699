from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from frostline.device_runtime.engine import TrainingSession, open_runtime
from frostline.protocol.artifact import read_artifact
from frostline.protocol.blobs import BlobStore, reference_to
from frostline.protocol.manifest import PlannedMemory, Program, StageManifest, TensorSpec
from frostline.protocol.tensors import Array, decode_tensors

BATCH, CLASSES, RATE, STEPS = 4, 3, 0.1, 6


class Opened:
    """An artifact's session, loaded with the weights it came with."""

    def __init__(self, folder: Path) -> None:
        self.manifest, store = read_artifact(folder)
        self.weights = decode_tensors(
            (folder / "weights.safetensors").read_bytes(), self.manifest.trained, "weights"
        )
        self.session: TrainingSession = open_runtime("executorch").open_stage(self.manifest, store)
        self.session.load(self.weights)

    def step(self, seed: int) -> tuple[float, int]:
        """Train on a random batch."""
        return self.session.step(self._parts(seed), RATE)

    def _parts(self, seed: int) -> Iterator[tuple[Array, Array]]:
        x, y = batch(seed)
        count = self.manifest.micro_batches
        yield from zip(np.split(x, count), np.split(y, count), strict=True)

    def trained(self) -> dict[str, Array]:
        """Copies of what the session holds."""
        return {name: value.copy() for name, value in self.session.trained().items()}


def batch(seed: int) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    x = random.standard_normal((BATCH, 1, 8, 8), dtype=np.float32)
    return x, random.integers(0, CLASSES, BATCH)


def assert_close(got: dict[str, Array], want: dict[str, Array]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def assert_equal(got: dict[str, Array], want: dict[str, Array]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.fixture(params=["whole", "micro2"])
def opened(request: pytest.FixtureRequest, variants: Path) -> Opened:
    return Opened(variants / str(request.param))


def test_micro_batches_train_as_the_whole_batch_does(variants: Path) -> None:
    whole, parts = Opened(variants / "whole"), Opened(variants / "micro2")
    assert (whole.manifest.micro_batch, parts.manifest.micro_batch) == (BATCH, BATCH // 2)
    for seed in range(STEPS):
        (loss, right), (want_loss, want_right) = parts.step(seed), whole.step(seed)
        assert loss == pytest.approx(want_loss, rel=1e-4)
        assert right == want_right
    assert_close(parts.trained(), whole.trained())
    assert not any(np.array_equal(value, whole.weights[name]) for name, value in whole.trained().items())


def test_evaluation_between_steps_changes_nothing(opened: Opened, variants: Path) -> None:
    plain = Opened(variants / opened.manifest.variant)
    x, _ = batch(99)
    x = x[: opened.manifest.micro_batch]
    seen = []
    for seed in range(STEPS):
        assert opened.step(seed) == plain.step(seed)
        before = opened.trained()
        logits = opened.session.evaluate(x)
        seen.append(logits)
        assert logits.shape == (opened.manifest.micro_batch, CLASSES)
        assert_equal(opened.trained(), before)
        # The logits are of the present values, not of those at the start.
        other = Opened(variants / opened.manifest.variant)
        other.session.load(before)
        np.testing.assert_array_equal(other.session.evaluate(x), logits)
    assert not np.allclose(seen[0], seen[-1])
    assert_equal(opened.trained(), plain.trained())


def test_the_state_stays_where_it_is(opened: Opened) -> None:
    addresses = {name: value.ctypes.data for name, value in opened.session.trained().items()}
    for seed in range(2):
        opened.step(seed)
        opened.session.evaluate(batch(0)[0][: opened.manifest.micro_batch])
    assert {name: value.ctypes.data for name, value in opened.session.trained().items()} == addresses


def test_training_stays_near_the_values_received(opened: Opened) -> None:
    """With FedProx's term, and as eager PyTorch does."""
    import torch
    from torch import nn
    from torch.nn import functional

    layers = [nn.Conv2d(1, 4, 3, stride=2, bias=False), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(36, CLASSES)).double()
    names = ["block.0.weight", "block.1.weight", "block.1.bias"]
    names += [f"output_module.head.1.{name}" for name in ("weight", "bias")]
    parameters = dict(zip(names, model.parameters(), strict=True))
    assert set(parameters) == set(opened.weights)
    # Values far from those of the artifact, so that it matters which ones are drawn to.
    received = {name: value + np.float32(0.5) for name, value in opened.weights.items()}
    opened.session.load(received)
    held = {name: torch.from_numpy(received[name]).double() for name in names}
    for name, parameter in parameters.items():
        value = held[name].permute(0, 3, 1, 2) if parameter.dim() == 4 else held[name]
        parameter.data.copy_(value)
    start = [p.detach().clone() for p in parameters.values()]
    optimizer = torch.optim.SGD(parameters.values(), RATE, 0.9, weight_decay=0.01)
    for seed in range(STEPS):
        x, y = batch(seed)
        loss = functional.cross_entropy(model(torch.from_numpy(x).double()), torch.from_numpy(y))
        pairs = zip(parameters.values(), start, strict=True)
        proximal = 0.25 * sum(((p - value) ** 2).sum() for p, value in pairs)
        optimizer.zero_grad()
        (loss + proximal).backward()
        optimizer.step()
        assert opened.step(seed)[0] == pytest.approx(loss.item(), rel=1e-4)
    for name, value in opened.trained().items():
        want = parameters[name].detach()
        want = want.permute(0, 2, 3, 1) if want.dim() == 4 else want
        np.testing.assert_allclose(value, want.numpy(), rtol=1e-3, atol=1e-5, err_msg=name)


def test_loading_forgets_all_that_was_before(opened: Opened, variants: Path) -> None:
    received = {name: 2 * value for name, value in opened.weights.items()}
    for seed in range(3):
        opened.step(seed)
    opened.session.load(received)
    assert_equal(opened.trained(), received)
    fresh = Opened(variants / opened.manifest.variant)
    fresh.session.load(received)
    for seed in range(3, 6):
        assert opened.step(seed) == fresh.step(seed)
    assert_equal(opened.trained(), fresh.trained())


def test_parts_are_asked_for_one_after_the_other(variants: Path) -> None:
    """So that no more than one micro-batch is ever in memory."""
    opened = Opened(variants / "micro2")
    session, asked = opened.session, []
    x, y = batch(0)

    def parts() -> Iterator[tuple[Array, Array]]:
        for rows in (slice(0, 2), slice(2, 4)):
            held = session._optimizer_state  # type: ignore[attr-defined]
            asked.append(sum(float(value.abs().sum()) for value in held.values()))
            yield x[rows], y[rows]

    session.step(parts(), RATE)
    assert asked[0] == 0 < asked[1]


def test_tiles_of_a_tensor_are_passed_and_written_in_place(tmp_path: Path) -> None:
    import torch
    from torch import Tensor, nn

    from frostline.exporter.executorch_lowering import lower_portable

    class Training(nn.Module):
        """Takes the second row of a weight first, and only the first half of a statistic."""

        def forward(self, second: Tensor, first: Tensor, half: Tensor, x: Tensor, y: Tensor) -> object:
            second.copy_(second * 10)
            first.copy_(first + x.sum(0))
            half.copy_(half - 1)
            return x.sum(), y.sum()

    class Evaluation(nn.Module):
        def forward(self, weight: Tensor, x: Tensor) -> Tensor:
            return torch.mm(x, weight.t())

    store = BlobStore(tmp_path)
    row, x, y = torch.zeros(3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    specs = {
        "x": TensorSpec(name="x", shape=(2, 3)),
        "y": TensorSpec(name="y", dtype="int64", shape=(2,)),
        "weight": TensorSpec(name="weight", shape=(2, 3)),
        "statistic": TensorSpec(name="statistic", shape=(2, 2)),
    }

    def program(module: nn.Module, arguments: list[Tensor], inputs: list[TensorSpec]) -> Program:
        lowered = lower_portable(module, arguments)
        store.put(lowered.content)
        file = reference_to(lowered.content)
        return Program(file=file, inputs=inputs, outputs=[], arena_bytes=lowered.arena_bytes)

    second, first = (TensorSpec(name="weight", shape=(3,), tile=tile) for tile in (1, 0))
    half = TensorSpec(name="statistic", shape=(1, 2), tile=0)
    training = program(
        Training(), [row, row.clone(), torch.zeros(1, 2), x, y], [second, first, half, specs["x"], specs["y"]]
    )
    evaluation = program(Evaluation(), [torch.zeros(2, 3), x], [specs["weight"], specs["x"]])
    manifest = StageManifest(
        stage=0,
        stages=1,
        name="tiled",
        engine="executorch",
        variant="whole",
        batch=2,
        micro_batches=1,
        classes=2,
        parameters=[specs["weight"]],
        statistics=[specs["statistic"]],
        optimizer_state=[],
        received=[],
        training=training,
        update=None,
        evaluation=evaluation,
        prefix=[],
        planned=PlannedMemory(
            arena=0, parameters=0, statistics=0, optimizer_state=0, received=0, batch=0, program=0
        ),
    )
    session = open_runtime("executorch").open_stage(manifest, store)
    weight = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    session.load({"weight": weight, "statistic": np.full((2, 2), 7, np.float32)})
    addresses = {name: value.ctypes.data for name, value in session.trained().items()}
    given = np.array([[1, 0, 2], [0, 1, 2]], np.float32)
    for _ in range(2):
        assert session.step([(given, np.array([1, 2]))], RATE) == (6.0, 3)
    trained = session.trained()
    assert trained["weight"].tolist() == [[3, 4, 11], [400, 500, 600]]
    assert trained["statistic"].tolist() == [[5, 5], [7, 7]]
    assert {name: value.ctypes.data for name, value in trained.items()} == addresses
    np.testing.assert_array_equal(session.evaluate(given), given @ trained["weight"].T)
