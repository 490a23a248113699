"""A device that was interrupted in the middle of a lease sends the update of one that was not."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from frostline.device_runtime import checkpoint, training
from frostline.device_runtime.checkpoint import CHECKPOINT
from frostline.device_runtime.engine import TrainingSession
from frostline.device_runtime.training import TrainingTask, train
from frostline.device_runtime.worker import Workers
from frostline.protocol.errors import RunError
from frostline.protocol.messages import TrainingMetrics
from tests.device_runtime.leases import leased
from tests.device_runtime.test_training import make_samples, prepare

SAMPLES = make_samples(23)
STEPS = 10


class Interrupted(Exception):
    pass


class Counting:
    """A session that counts its steps, and is interrupted before one of them."""

    steps = 0

    def __init__(self, session: TrainingSession, stop: int | None) -> None:
        self._session = session
        self._stop = stop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def step(self, parts: Any, learning_rate: float) -> tuple[float, int]:
        if Counting.steps == self._stop:
            raise Interrupted
        Counting.steps += 1
        return self._session.step(parts, learning_rate)


@pytest.fixture(autouse=True)
def always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)


@pytest.fixture(params=["executorch", "onnxruntime"])
def artifact(request: pytest.FixtureRequest, variants: Path) -> Path:
    return variants / request.param / "micro2"


@pytest.fixture
def train_until(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainingTask, int | None], TrainingMetrics]:
    """Train, stopped before a step; what was done is in `Counting.steps`."""
    open_runtime = training.open_runtime

    def train_it(task: TrainingTask, stop: int | None) -> TrainingMetrics:
        class Runtime:
            def __init__(self, engine: Any) -> None:
                self._runtime = open_runtime(engine)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._runtime, name)

            def open_stage(self, *arguments: Any) -> Any:
                return Counting(self._runtime.open_stage(*arguments), stop)

        Counting.steps = 0
        monkeypatch.setattr(training, "open_runtime", Runtime)
        return train(task)

    return train_it


def prepared(artifact: Path, folder: Path) -> TrainingTask:
    return leased(prepare(artifact, folder, SAMPLES).task, evaluate=True)


def without_time(metrics: TrainingMetrics) -> TrainingMetrics:
    return metrics.model_copy(update={"seconds": 0.0})


def files(task: TrainingTask) -> list[Path]:
    return list((task.state_folder / CHECKPOINT).iterdir())


@pytest.mark.parametrize("stops", [[1], [STEPS - 1], [3, 4, 2]])
def test_training_goes_on_from_its_last_step(
    artifact: Path, tmp_path: Path, train_until: Any, stops: list[int]
) -> None:
    task = prepared(artifact, tmp_path / "calm")
    expected = train_until(task, None)
    assert expected.steps == Counting.steps == STEPS
    assert files(task) == []

    disturbed = prepared(artifact, tmp_path / "disturbed")
    for stop in stops:
        with pytest.raises(Interrupted):
            train_until(disturbed, stop)
    metrics = train_until(disturbed, None)
    assert Counting.steps == STEPS - sum(stops)
    assert without_time(metrics) == without_time(expected)
    assert disturbed.update_path.read_bytes() == task.update_path.read_bytes()
    assert files(disturbed) == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(os.urandom(1000)),
        lambda path: np.savez(path, progress=np.zeros(5)),
        flip,
    ],
    ids=["empty", "truncated", "garbage", "nothing in it", "a bit flipped"],
)
def test_a_damaged_checkpoint_is_dropped(
    artifact: Path, tmp_path: Path, train_until: Any, damage: Callable[[Path], None]
) -> None:
    task = prepared(artifact, tmp_path / "calm")
    train_until(task, None)
    disturbed = prepared(artifact, tmp_path / "disturbed")
    with pytest.raises(Interrupted):
        train_until(disturbed, 4)
    (path,) = files(disturbed)
    damage(path)
    train_until(disturbed, None)
    assert Counting.steps == STEPS
    assert disturbed.update_path.read_bytes() == task.update_path.read_bytes()


def test_another_lease_begins_anew(artifact: Path, tmp_path: Path, train_until: Any) -> None:
    task = prepared(artifact, tmp_path)
    with pytest.raises(Interrupted):
        train_until(task, 4)
    train_until(leased(task, lease="9" * 32), None)
    assert Counting.steps == STEPS


def test_a_full_disk_costs_the_checkpoint_only(
    artifact: Path, tmp_path: Path, train_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **tensors: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    task = prepared(artifact, tmp_path)
    monkeypatch.setattr(np, "savez", fail)
    assert train_until(task, None).steps == STEPS


def test_short_leases_write_none(
    artifact: Path, tmp_path: Path, train_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 10.0)
    monkeypatch.setattr(np, "savez", lambda *arguments, **tensors: pytest.fail("flash wears"))
    assert train_until(prepared(artifact, tmp_path), None).steps == STEPS


def steps_kept(task: TrainingTask) -> int:
    (path,) = files(task)
    with np.load(path) as archive:
        return int(archive["progress"][1])


def test_a_killed_training_process_goes_on_where_it_was(
    variants: Path, tmp_path: Path, train_until: Any
) -> None:
    """The process is killed for real; checkpoints come every ten seconds, as on a device."""
    device = prepare(variants / "onnxruntime" / "micro2", tmp_path, make_samples(4000))
    task = leased(device.task, epochs=1000, learning_rate=1e-4)

    async def main() -> None:
        with Workers() as workers:
            running = asyncio.create_task(workers.train(task))
            async with asyncio.timeout(60):
                while not list((task.state_folder / CHECKPOINT).glob("*.npz")):
                    await asyncio.sleep(0.1)
            for process in psutil.Process().children():
                if "spawn_main" in " ".join(process.cmdline()):
                    process.send_signal(signal.SIGKILL)
            with pytest.raises(RunError, match="the training process died"):
                await running

    asyncio.run(main())
    before = steps_kept(task)
    assert before > 100
    with pytest.raises(Interrupted):
        train_until(task, 3)
    assert steps_kept(task) == before + 3


def test_the_checkpoint_of_a_task_is_its_own(artifact: Path, tmp_path: Path, train_until: Any) -> None:
    task = prepared(artifact, tmp_path)
    with pytest.raises(Interrupted):
        train_until(task, 4)
    train_until(replace(task, update_path=tmp_path / "elsewhere"), None)
    assert Counting.steps == STEPS - 4
