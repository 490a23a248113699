from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from frostline.device_runtime.engine import PrefixSession, TrainingSession
from frostline.device_runtime.feature_cache import FeatureCache
from frostline.protocol.blobs import BlobStore
from frostline.protocol.manifest import PlannedMemory, Program, StageManifest, TensorSpec
from frostline.protocol.messages import BlobReference
from frostline.protocol.tensors import Array

BATCH = 4
X = np.arange(30, dtype=np.float32).reshape(10, 3) + 1


class Doubling:
    """A prefix that doubles and repeats its input's columns, so that every block changes the shape."""

    def __init__(self, calls: list[Array]) -> None:
        self._calls = calls

    def run(self, x: Array) -> Array:
        self._calls.append(x.copy())
        return np.concatenate([x, x], axis=1) * np.float32(2)


class FakeRuntime:
    """Remembers which programs were opened and what they were run on."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.calls: list[Array] = []

    def open_stage(self, manifest: StageManifest, store: BlobStore) -> TrainingSession:
        raise AssertionError("features need no training session")

    def open_prefix(self, program: Program, store: BlobStore) -> PrefixSession:
        self.opened.append(program.file.sha256[0])
        return Doubling(self.calls)


def program(letter: str, columns: int) -> Program:
    return Program(
        file=BlobReference(sha256=letter * 64, size=1),
        inputs=[TensorSpec(name="x", shape=(BATCH, columns))],
        outputs=[TensorSpec(name="features", shape=(BATCH, 2 * columns))],
        arena_bytes=0,
    )


def manifest(letters: str) -> StageManifest:
    prefix = [program(letter, 3 * 2**position) for position, letter in enumerate(letters)]
    planned = PlannedMemory(
        arena=0, parameters=0, statistics=0, optimizer_state=0, received=0, batch=0, program=0
    )
    return StageManifest(
        stage=len(letters),
        stages=5,
        name="stage",
        engine="executorch",
        variant="whole",
        batch=BATCH,
        micro_batches=1,
        classes=2,
        parameters=[],
        statistics=[],
        optimizer_state=[],
        received=[],
        training=program("e", 1),
        update=None,
        evaluation=program("f", 1),
        prefix=prefix,
        planned=planned,
    )


class Device:
    """A feature cache on a folder, with a fake runtime."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "features"
        self.runtime = FakeRuntime()
        self._store = BlobStore(folder / "blobs")

    def features(self, letters: str, x: Array = X, fingerprint: str = "samples") -> Array:
        cache = FeatureCache(self.folder)
        return cache.features(x, fingerprint, manifest(letters), self.runtime, self._store)

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def expected(x: Array, blocks: int) -> Array:
    for _ in range(blocks):
        x = np.concatenate([x, x], axis=1) * np.float32(2)
    return x


def test_nothing_frozen_gives_the_samples_themselves(device: Device) -> None:
    assert device.features("") is X
    assert device.runtime.opened == []


def test_features_are_computed_once_also_across_restarts(device: Device) -> None:
    first = device.features("a")
    np.testing.assert_array_equal(first, expected(X, 1))
    assert first.dtype == np.float32
    assert not first.flags.writeable
    again = device.features("a")
    np.testing.assert_array_equal(again, first)
    assert device.runtime.opened == ["a"]
    assert len(device.runtime.calls) == 3


def test_every_call_has_a_whole_batch_and_the_last_is_filled_with_zeros(device: Device) -> None:
    device.features("a")
    assert [call.shape for call in device.runtime.calls] == [(BATCH, 3)] * 3
    np.testing.assert_array_equal(np.concatenate(device.runtime.calls)[:10], X)
    np.testing.assert_array_equal(device.runtime.calls[-1][2:], np.zeros((2, 3)))


def test_a_longer_chain_starts_from_the_shorter_one_and_replaces_it(device: Device) -> None:
    device.features("a")
    (short,) = device.files
    np.testing.assert_array_equal(device.features("abc"), expected(X, 3))
    assert device.runtime.opened == ["a", "b", "c"]
    assert len(device.files) == 1
    assert not short.exists()


def test_a_chain_that_branches_off_shares_only_what_is_equal(device: Device) -> None:
    device.features("ab")
    np.testing.assert_array_equal(device.features("ac"), expected(X, 2))
    assert device.runtime.opened == ["a", "b", "a", "c"]


def test_other_samples_have_other_features(device: Device) -> None:
    device.features("a")
    other = X + 100
    np.testing.assert_array_equal(device.features("a", other, "other samples"), expected(other, 1))
    assert device.runtime.opened == ["a", "a"]
    assert len(device.files) == 1, "features of samples that are gone fill the device's storage"


def test_what_a_crash_left_unfinished_is_ignored_and_removed(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    run = Doubling.run

    def crash(self: Doubling, x: Array) -> Array:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return run(self, x)

    monkeypatch.setattr(Doubling, "run", crash)
    with pytest.raises(KeyboardInterrupt):
        device.features("a")
    (unfinished,) = device.files
    assert unfinished.suffix == ".unfinished"
    # The next process is another one.
    unfinished.rename(unfinished.with_name(unfinished.name.replace(str(os.getpid()), "1")))
    np.testing.assert_array_equal(device.features("a"), expected(X, 1))
    assert [path.suffix for path in device.files] == [".npy"]


@pytest.mark.parametrize("damage", ["empty", "cut short", "garbage", "other shape", "other type"])
def test_a_damaged_file_is_computed_again(device: Device, damage: str) -> None:
    device.features("a")
    (path,) = device.files
    whole = path.read_bytes()
    if damage == "other shape":
        np.save(path, np.zeros((10, 5), np.float32))
    elif damage == "other type":
        np.save(path, np.zeros((10, 6), np.float64))
    else:
        path.write_bytes({"empty": b"", "cut short": whole[:-4], "garbage": b"garbage" * 100}[damage])
    np.testing.assert_array_equal(device.features("a"), expected(X, 1))
    assert device.runtime.opened == ["a", "a"]
