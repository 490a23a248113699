from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from frostline.emulator import step_profile
from frostline.emulator.step_profile import StepProfile
from frostline.protocol.blobs import BlobStore
from frostline.protocol.manifest import Program, TensorSpec
from tests.server.builders import BATCH, program, stage_manifest


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What was timed so far; every measurement gives another figure."""
    figures: list[float] = []
    numbers = count(1)

    def measure(*arguments: Any) -> float:
        figures.append(next(numbers) / 8)
        return figures[-1]

    monkeypatch.setattr(step_profile, "_time_step", measure)
    monkeypatch.setattr(step_profile, "_time_block", measure)
    yield figures


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def block(*shape: int) -> Program:
    outputs = [TensorSpec(name="features", shape=(BATCH, *shape))]
    return program(b"block").model_copy(update={"outputs": outputs})


def test_a_stage_is_measured_once(tmp_path: Path, store: BlobStore, timed: list[float]) -> None:
    profile = StepProfile(tmp_path / "profile.json")
    seconds = profile.step_seconds(stage_manifest(), store)
    assert seconds == profile.step_seconds(stage_manifest(), store) == 1 / 8
    assert profile.block_seconds(block(3), stage_manifest(), store) == 2 / 8
    assert profile.block_seconds(block(3), stage_manifest(), store) == 2 / 8
    assert len(timed) == 2


def test_whoever_shares_the_file_does_not_measure(
    tmp_path: Path, store: BlobStore, timed: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.json"
    # Both are there before anything is known.
    first, second = StepProfile(path), StepProfile(path)
    known = first.step_seconds(stage_manifest(), store)
    assert list(json.loads(path.read_text()).values()) == [known]

    def fail(*arguments: Any) -> float:
        raise AssertionError("measured again")

    monkeypatch.setattr(step_profile, "_time_step", fail)
    assert second.step_seconds(stage_manifest(), store) == known
    assert StepProfile(path).step_seconds(stage_manifest(), store) == known
    with pytest.raises(AssertionError, match="measured again"):
        second.step_seconds(stage_manifest(variant="micro2"), store)


def test_figures_of_others_are_kept(tmp_path: Path, store: BlobStore, timed: list[float]) -> None:
    path = tmp_path / "profile.json"
    first, second = StepProfile(path), StepProfile(path)
    first.step_seconds(stage_manifest(), store)
    second.step_seconds(stage_manifest(variant="micro2"), store)
    first.step_seconds(stage_manifest(variant="micro4"), store)
    assert sorted(json.loads(path.read_text()).values()) == [1 / 8, 2 / 8, 3 / 8]


LARGER_BATCH = program().model_copy(update={"inputs": [TensorSpec(name="x", shape=(2 * BATCH, 2))]})


@pytest.mark.parametrize(
    "changes",
    [
        {"variant": "micro2"},
        {"engine": "onnxruntime"},
        {"name": "another"},
        {"stages": 2},
        {"batch": 2 * BATCH, "training": LARGER_BATCH, "evaluation": LARGER_BATCH},
        {"parameters": [TensorSpec(name="block.weight", shape=(8,))]},
    ],
)
def test_what_may_take_another_time_is_measured_by_itself(
    tmp_path: Path, store: BlobStore, timed: list[float], changes: dict[str, Any]
) -> None:
    profile = StepProfile(tmp_path / "profile.json")
    profile.step_seconds(stage_manifest(), store)
    profile.step_seconds(stage_manifest(**changes), store)
    assert len(timed) == 2


def test_a_larger_image_is_measured_by_itself(tmp_path: Path, store: BlobStore, timed: list[float]) -> None:
    # The weights of a convolution have the same shapes whatever the image.
    profile = StepProfile(tmp_path / "profile.json")
    for side in (8, 28):
        seen = program(b"step", (1, side, side))
        profile.step_seconds(stage_manifest(training=seen, evaluation=seen), store)
    assert len(timed) == 2


def test_blocks_of_other_shapes_are_measured_by_themselves(
    tmp_path: Path, store: BlobStore, timed: list[float]
) -> None:
    profile = StepProfile(tmp_path / "profile.json")
    for each in (block(3), block(4), block(3)):
        profile.block_seconds(each, stage_manifest(), store)
    assert len(timed) == 2


def test_the_figure_is_the_median_of_what_calls_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], 0

    def call() -> None:
        nonlocal calls
        calls += 1
        # The first call loads, and now and then something else has the processor.
        clock[0] += 100 if calls in (1, 3) else 0.5

    monkeypatch.setattr(step_profile.time, "perf_counter", lambda: clock[0])
    assert step_profile._median_seconds(call) == 0.5
    assert calls == step_profile.TIMED_CALLS + 1
