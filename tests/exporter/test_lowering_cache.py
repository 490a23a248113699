from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostline.exporter import lowering_cache
from frostline.exporter.artifact import ExportOptions, StageTensors, compile_stage, trace_training
from frostline.exporter.cutting import cut
from frostline.exporter.lowering_cache import LoweringCache, default_folder
from frostline.exporter.models.lookup import build_model
from frostline.exporter.onnxruntime_target import ONNXRUNTIME, OnnxRuntimeTarget
from frostline.exporter.optimizer import SGD, AdamW
from frostline.exporter.stage import Stage, build_stage
from frostline.exporter.target import LoweredProgram
from frostline.exporter.training_step import TracedProgram
from frostline.exporter.variant import WHOLE, Variant
from frostline.protocol.blobs import sha256_of
from frostline.protocol.errors import UsageError
from tests.exporter.small_stages import WIDTH, Perceptron, token_stage

BATCH, CLASSES = 4, 2


class Counting(OnnxRuntimeTarget):
    """Lowers to a program of its own each time."""

    def __init__(self) -> None:
        self.lowered = 0

    def lower(
        self, program: TracedProgram, tensors: Mapping[str, Tensor], results: Sequence[str]
    ) -> LoweredProgram:
        self.lowered += 1
        return LoweredProgram(f"program {self.lowered}".encode(), program.inputs, 77, program.written)


class Scaled(nn.Module):
    """Multiplies by a constant that is neither parameter nor buffer."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = torch.full((WIDTH,), factor)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.factor)


def lower(
    cache: LoweringCache,
    target: Counting,
    stage: Stage | None = None,
    options: ExportOptions | None = None,
    variant: Variant = WHOLE,
    results: Sequence[str] = ("loss", "correct"),
) -> LoweredProgram:
    """Trace a stage anew and have the first program of its step lowered."""
    stage = stage or token_stage(Perceptron(), classes=CLASSES)
    options = options or ExportOptions(BATCH, CLASSES, SGD(momentum=0.9), ONNXRUNTIME)
    tensors = StageTensors.of(stage, options, variant)
    program = trace_training(stage, options, tensors, variant)[0]
    return cache.lower(target, program, tensors.by_name, results)


@pytest.fixture
def target() -> Counting:
    return Counting()


@pytest.fixture
def cache(tmp_path: Path) -> LoweringCache:
    return LoweringCache(tmp_path / "cache")


def test_a_second_compilation_lowers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ExportOptions(BATCH, CLASSES, SGD(), ONNXRUNTIME, LoweringCache(tmp_path / "cache"))
    first = compile_stage(token_stage(Perceptron(), classes=CLASSES), options)

    def fail(*arguments: Any) -> LoweredProgram:
        raise AssertionError("lowered again")

    monkeypatch.setattr(OnnxRuntimeTarget, "lower", fail)
    again = compile_stage(token_stage(Perceptron(), classes=CLASSES), options)
    assert again.files == first.files
    assert again.manifest == first.manifest
    assert len(first.files) == 2
    # Programs of a cache are checked like any other.
    assert again.parity.steps > 0 if hasattr(again.parity, "steps") else again.parity


def test_all_of_a_program_is_kept(tmp_path: Path, target: Counting) -> None:
    first = lower(LoweringCache(tmp_path / "cache"), target)
    assert lower(LoweringCache(tmp_path / "cache"), target) == first
    assert target.lowered == 1
    assert first.inputs and first.written and first.arena_bytes == 77


def test_weights_are_not_part_of_a_program(cache: LoweringCache, target: Counting) -> None:
    programs = []
    for seed in (0, 1):
        spec = build_model("small_cnn", {"width": 4, "channels": 1, "input_size": 8}, seed=seed)
        stage = build_stage(cut(spec.module, 2, spec.example(2)), 0, seed)
        programs.append(lower(cache, target, stage, ExportOptions(BATCH, 10, SGD(), ONNXRUNTIME)))
    assert target.lowered == 1
    assert programs[0] == programs[1]


def options(batch: int = BATCH, classes: int = CLASSES, optimizer: Any = None) -> ExportOptions:
    return ExportOptions(batch, classes, optimizer or SGD(momentum=0.9), ONNXRUNTIME)


@pytest.mark.parametrize(
    "change",
    [
        {"options": options(batch=8)},
        {"options": options(optimizer=SGD(momentum=0.8))},
        {"options": options(optimizer=SGD(momentum=0.9, weight_decay=1e-4))},
        {"options": options(optimizer=AdamW())},
        {"variant": Variant(micro_batches=2)},
        {"results": ("loss", "right")},
        {"stage": token_stage(Perceptron(), classes=3), "options": options(classes=3)},
        {"stage": token_stage(Perceptron(), nn.Tanh(), classes=CLASSES)},
    ],
    ids=["batch", "momentum", "decay", "optimizer", "variant", "results", "shapes", "graph"],
)
def test_another_program_is_lowered(cache: LoweringCache, target: Counting, change: dict[str, Any]) -> None:
    lower(cache, target)
    assert lower(cache, target, **change).content == b"program 2"
    assert lower(cache, target).content == b"program 1"


def test_constants_are_part_of_a_program(cache: LoweringCache, target: Counting) -> None:
    for factor, expected in ((0.5, 1), (0.5, 1), (0.25, 2)):
        lower(cache, target, token_stage(Scaled(factor), classes=CLASSES))
        assert target.lowered == expected


def test_engines_do_not_share_programs(cache: LoweringCache, target: Counting) -> None:
    lower(cache, target)
    target.engine = "executorch"
    lower(cache, target)
    assert target.lowered == 2


def test_another_version_of_a_package_or_of_the_exporter_lowers_again(
    cache: LoweringCache, target: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower(cache, target)
    monkeypatch.setattr(lowering_cache, "_versions", lambda: "others")
    lower(cache, target)
    assert target.lowered == 2


def _cut_short(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flipped(position: int) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[position] ^= 1
        return bytes(changed)

    return flip


def _described(description: bytes) -> Callable[[bytes], bytes]:
    """A file with a hash that is right, and a description that is not."""

    def describe(content: bytes) -> bytes:
        body = description + b"\n" + content.split(b"\n", 2)[2]
        return sha256_of(body).encode() + b"\n" + body

    return describe


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"\xff\xfe\n\xff",
        _cut_short,
        _flipped(0),
        _flipped(70),
        _flipped(-1),
        _described(b"[]"),
        _described(b"null"),
        _described(b"{"),
        _described(b'{"inputs": [], "arena_bytes": null, "written": []}'),
        _described(b'{"inputs": [], "arena_bytes": 1}'),
    ],
)
def test_a_damaged_file_is_ignored_and_written_again(
    tmp_path: Path, cache: LoweringCache, target: Counting, damage: Callable[[bytes], bytes]
) -> None:
    lower(cache, target)
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert lower(cache, target).content == b"program 2"
    assert lower(cache, target).content == b"program 2"
    assert [each.name for each in (tmp_path / "cache").iterdir()] == [path.name]


def test_what_was_used_longest_ago_makes_room(tmp_path: Path, target: Counting) -> None:
    folder = tmp_path / "cache"
    unlimited = LoweringCache(folder)
    entry = [options(optimizer=SGD(momentum=momentum)) for momentum in (0.1, 0.2, 0.3, 0.4)]
    for age, each in enumerate(entry[:3]):
        lower(unlimited, target, options=each)
        newest = max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (1000 + age, 1000 + age))
    size = max(path.stat().st_size for path in folder.iterdir())
    assert lower(unlimited, target, options=entry[0]).content == b"program 1"  # Now the newest of the three.
    limited = LoweringCache(folder, limit_bytes=3 * size)
    assert lower(limited, target, options=entry[3]).content == b"program 4"
    assert len(list(folder.iterdir())) == 3
    assert [lower(limited, target, options=each).content for each in (entry[0], entry[2], entry[3])] == [
        b"program 1",
        b"program 3",
        b"program 4",
    ]
    assert lower(limited, target, options=entry[1]).content == b"program 5"


def test_a_cache_too_small_for_one_program_keeps_none(tmp_path: Path, target: Counting) -> None:
    cache = LoweringCache(tmp_path / "cache", limit_bytes=1)
    assert [lower(cache, target).content for _ in range(2)] == [b"program 1", b"program 2"]
    assert not list((tmp_path / "cache").iterdir())


def test_what_a_killed_process_left_half_written_goes_in_time(
    tmp_path: Path, cache: LoweringCache, target: Counting
) -> None:
    old, new = (tmp_path / "cache" / f".writing-{age}" for age in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    lower(cache, target)
    assert new.exists() and not old.exists()


def test_a_cache_that_cannot_be_written_costs_time_only(
    tmp_path: Path, cache: LoweringCache, target: Counting
) -> None:
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file in the folder's place")
    assert [lower(cache, target).content for _ in range(2)] == [b"program 1", b"program 2"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file/cache cannot be made .*--no-cache"):
        LoweringCache(tmp_path / "file" / "cache")


def _lower_many(folder: str, limit_bytes: int) -> list[str]:
    """In a process of its own: lower some programs again and again, each told apart by its momentum."""
    torch.set_num_threads(1)
    cache, target, wrong = LoweringCache(Path(folder), limit_bytes), Counting(), []
    for turn in range(24):
        momentum = 0.1 * (1 + turn % 4)
        found = lower(cache, target, options=options(optimizer=SGD(momentum=momentum)))
        if not found.content.startswith(b"program ") or found.arena_bytes != 77:
            wrong.append(f"{momentum}: {found}")
    return wrong


def test_processes_share_a_folder_that_is_too_small_for_all(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_lower_many, str(folder), 700) for _ in range(3)]
        assert [future.result() for future in futures] == [[], [], []]
    assert all(path.suffix == ".program" for path in folder.iterdir())
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 700


@pytest.mark.parametrize(
    ("named", "expected"),
    [("/tmp/elsewhere", "/tmp/elsewhere/frostline/programs"), ("", "HOME"), ("relative", "HOME")],
)
def test_the_default_folder_is_the_users(named: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_folder() == Path(expected.replace("HOME", "/home/somebody/.cache/frostline/programs"))


def test_a_failure_leaves_nothing_behind(
    tmp_path: Path, cache: LoweringCache, target: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> LoweredProgram:
        raise ValueError("cannot be said")

    monkeypatch.setattr(Counting, "lower", fail)
    with pytest.raises(ValueError, match="cannot be said"):
        lower(cache, target)
    assert not list((tmp_path / "cache").iterdir())
