from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostline.exporter import lowering_cache
from frostline.exporter.artifact import ExportOptions, StageTensors, compile_stage, trace_training
from frostline.exporter.cutting import cut
from frostline.exporter.lowering_cache import LoweringCache
from frostline.exporter.models.lookup import build_model
from frostline.exporter.onnxruntime_target import ONNXRUNTIME, OnnxRuntimeTarget
from frostline.exporter.optimizer import SGD, AdamW
from frostline.exporter.stage import Stage, build_stage
from frostline.exporter.target import LoweredProgram
from frostline.exporter.training_step import TracedProgram
from frostline.exporter.variant import WHOLE, Variant
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


def test_a_damaged_program_is_lowered_again(tmp_path: Path, cache: LoweringCache, target: Counting) -> None:
    lower(cache, target)
    (path,) = (tmp_path / "cache").glob("*.program")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert lower(cache, target).content == b"program 2"
    assert path.read_bytes() == b"program 2"
    assert lower(cache, target).content == b"program 2"


def _without(key: str) -> Any:
    def remove(entry: dict[str, Any]) -> bytes:
        return json.dumps({name: value for name, value in entry.items() if name != key}).encode()

    return remove


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: b"",
        lambda entry: b"{",
        lambda entry: b"\xff\xfe",
        lambda entry: b"[]",
        lambda entry: b"null",
        lambda entry: json.dumps({**entry, "arena_bytes": None}).encode(),
        _without("written"),
        _without("sha256"),
        None,
    ],
)
def test_a_damaged_description_is_ignored(
    tmp_path: Path, cache: LoweringCache, target: Counting, damage: Any
) -> None:
    lower(cache, target)
    (path,) = (tmp_path / "cache").glob("*.json")
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(json.loads(path.read_bytes())))
    assert lower(cache, target).content == b"program 2"
    assert lower(cache, target).content == b"program 2"


def test_a_failure_leaves_nothing_behind(
    tmp_path: Path, cache: LoweringCache, target: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> LoweredProgram:
        raise ValueError("cannot be said")

    monkeypatch.setattr(Counting, "lower", fail)
    with pytest.raises(ValueError, match="cannot be said"):
        lower(cache, target)
    assert not list((tmp_path / "cache").iterdir())
