from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from frostline.device_runtime.engine import TrainingSession, open_runtime
from frostline.protocol.artifact import read_artifact
from frostline.protocol.tensors import Array, decode_tensors

BATCH, CLASSES, RATE, STEPS = 4, 3, 0.1, 6

ROOT = Path(__file__).parents[2]
TRAINING_PACKAGE = Path(
    os.environ.get("FROSTLINE_ONNXRUNTIME_TRAINING", ROOT / "build" / "onnxruntime-training")
)


class Opened:
    """An artifact's session, loaded with the weights it came with."""

    def __init__(self, folder: Path) -> None:
        self.manifest, store = read_artifact(folder)
        self.weights = decode_tensors(
            (folder / "weights.safetensors").read_bytes(), self.manifest.trained, "weights"
        )
        runtime = open_runtime(self.manifest.engine)
        self.session: TrainingSession = runtime.open_stage(self.manifest, store)
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


@pytest.fixture(params=["executorch", "onnxruntime"])
def folder(request: pytest.FixtureRequest, variants: Path) -> Path:
    """One engine's variants."""
    return variants / str(request.param)


@pytest.fixture(params=["whole", "micro2"])
def opened(request: pytest.FixtureRequest, folder: Path) -> Opened:
    return Opened(folder / str(request.param))


def test_micro_batches_train_as_the_whole_batch_does(folder: Path) -> None:
    whole, parts = Opened(folder / "whole"), Opened(folder / "micro2")
    assert (whole.manifest.micro_batch, parts.manifest.micro_batch) == (BATCH, BATCH // 2)
    for seed in range(STEPS):
        (loss, right), (want_loss, want_right) = parts.step(seed), whole.step(seed)
        assert loss == pytest.approx(want_loss, rel=1e-4)
        assert right == want_right
    assert_close(parts.trained(), whole.trained())
    assert not any(np.array_equal(value, whole.weights[name]) for name, value in whole.trained().items())


def test_evaluation_between_steps_changes_nothing(opened: Opened, folder: Path) -> None:
    plain = Opened(folder / opened.manifest.variant)
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
        other = Opened(folder / opened.manifest.variant)
        other.session.load(before)
        np.testing.assert_array_equal(other.session.evaluate(x), logits)
    assert not np.allclose(seen[0], seen[-1])
    assert_equal(opened.trained(), plain.trained())


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
        parameter.data.copy_(held[name])
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
        np.testing.assert_allclose(value, want.numpy(), rtol=1e-3, atol=1e-5, err_msg=name)


def test_loading_forgets_all_that_was_before(opened: Opened, folder: Path) -> None:
    received = {name: 2 * value for name, value in opened.weights.items()}
    for seed in range(3):
        opened.step(seed)
    opened.session.load(received)
    assert_equal(opened.trained(), received)
    fresh = Opened(folder / opened.manifest.variant)
    fresh.session.load(received)
    for seed in range(3, 6):
        assert opened.step(seed) == fresh.step(seed)
    assert_equal(opened.trained(), fresh.trained())


def test_parts_are_asked_for_one_after_the_other(folder: Path) -> None:
    """So that no more than one micro-batch is ever in memory."""
    opened = Opened(folder / "micro2")
    session, asked = opened.session, []
    x, y = batch(0)

    def parts() -> Iterator[tuple[Array, Array]]:
        for rows in (slice(0, 2), slice(2, 4)):
            asked.append(session._seed)  # type: ignore[attr-defined]
            yield x[rows], y[rows]

    session.step(parts(), RATE)
    assert asked == [0, 1]


def test_engines_train_alike(variants: Path) -> None:
    """Whatever is sent back by one engine may be averaged with what comes from another."""
    one, other = (Opened(variants / engine / "whole") for engine in ("executorch", "onnxruntime"))
    assert one.manifest.parameters[0].held_axes and not other.manifest.parameters[0].held_axes
    assert one.manifest.flops == other.manifest.flops > 0
    assert_equal(one.trained(), other.trained())
    for seed in range(100):
        (loss, right), (want_loss, want_right) = one.step(seed), other.step(seed)
        assert loss == pytest.approx(want_loss, rel=1e-4)
        assert right == want_right
    for name, value in one.trained().items():
        difference = np.linalg.norm(value - other.trained()[name])
        assert difference <= 1e-4 * np.linalg.norm(value), name


@pytest.mark.skipif(
    not (TRAINING_PACKAGE / "onnxruntime").is_dir(),
    reason=f"no onnxruntime-training in {TRAINING_PACKAGE}: make onnxruntime-training",
)
def test_three_engines_end_where_the_first_does() -> None:
    paths = [str(TRAINING_PACKAGE.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.device_runtime.side_by_side"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    distances = json.loads(done.stdout)
    assert distances.keys() == {"onnxruntime", "onnxruntime-training"}
    for engine, each in distances.items():
        assert max(each.values()) < 1e-4, (engine, each)
