"""Compiles models of the zoo as `frostline export` does, and tells what came of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from frostline.exporter.artifact import CompiledStage, ExportOptions, compile_prefix, compile_stage
from frostline.exporter.cutting import CutModel, cut
from frostline.exporter.inputs import random_inputs
from frostline.exporter.optimizer import SGD
from frostline.exporter.parity import device_session
from frostline.exporter.stage import Stage, build_stage, statistics_tensors, trainable_tensors
from frostline.exporter.targets import find_target
from frostline.protocol.errors import FrostlineError
from tests.zoo.entry import Entry, Refusal

BATCH = 8
RATE = 0.01
TIMED_STEPS = 5


@dataclass(frozen=True)
class StageResult:
    """One stage on one engine.

    Attributes
    ----------
    seconds
        CPU seconds to compile it, with its checks and the program of the block once it is frozen.
    ratio
        Time of a step on a device's code over that of eager PyTorch: medians, one thread, measured in turn.
    """

    name: str
    block_parameters: int
    output_module_parameters: int
    feature_bytes: int
    planned_bytes: int
    seconds: float
    ratio: float
    loss_error: float
    tensor_error: float


@dataclass(frozen=True)
class Result:
    """One model on one engine.

    Attributes
    ----------
    verdict
        ``compiled``, ``refused`` with one clear line, or ``failed`` in any other way.
    as_expected
        Whether that is what its entry says.
    """

    name: str
    kind: str
    engine: str
    verdict: str
    as_expected: bool
    message: str = ""
    parameters: int = 0
    cut_seconds: float = 0.0
    stages: list[StageResult] = field(default_factory=list)

    def as_row(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compile_entry(entry: Entry, engine: str, *, timed: bool = True) -> Result:
    """Cut a model, compile each stage and each frozen block, and compare a step's time with eager PyTorch's."""
    began = time.process_time()
    stages: list[StageResult] = []
    about: dict[str, Any] = {"name": entry.name, "kind": entry.kind, "engine": engine}
    try:
        model = entry.model()
        blocks = entry.blocks if isinstance(entry.blocks, int) else list(entry.blocks)
        parts = cut(model, blocks, entry.example(2), entry.vocabulary, entry.classes)
        parameters = sum(each.numel() for each in model.parameters())
        about |= {"parameters": parameters, "cut_seconds": round(time.process_time() - began, 2)}
        stages.extend(_stage(entry, parts, index, engine, timed=timed) for index in range(len(parts.blocks)))
    except FrostlineError as error:
        message = str(error)
        refusal = entry.expected
        expected = isinstance(refusal, Refusal) and all(each in message for each in refusal.mentions)
        return Result(**about, verdict="refused", as_expected=expected, message=message)
    except Exception as error:  # a defect of the exporter, which the table is to show
        return Result(
            **about, verdict="failed", as_expected=False, message=f"{type(error).__name__}: {error}"[:500]
        )
    return Result(**about, verdict="compiled", as_expected=entry.expected == "compiles", stages=stages)


def _stage(entry: Entry, parts: CutModel, index: int, engine: str, *, timed: bool) -> StageResult:
    began = time.process_time()
    options = ExportOptions(BATCH, entry.classes, SGD(momentum=0.9), find_target(engine))
    stage = build_stage(parts, index, seed=0)
    compiled = compile_stage(stage, options)
    if index + 1 < len(parts.blocks):
        compile_prefix(stage, BATCH, options.target)
    seconds = time.process_time() - began
    block = parts.blocks[index]
    return StageResult(
        name=stage.name,
        block_parameters=sum(each.numel() for each in stage.model.block.parameters()),
        output_module_parameters=sum(each.numel() for each in stage.model.output_module.parameters()),
        feature_bytes=4 * int(np.prod(block.output_shape)),
        planned_bytes=compiled.manifest.planned.total,
        seconds=round(seconds, 2),
        ratio=round(_ratio(stage, compiled, entry), 3) if timed else 0.0,
        loss_error=compiled.parity.loss_error,
        tensor_error=compiled.parity.tensor_error,
    )


def _ratio(stage: Stage, compiled: CompiledStage, entry: Entry) -> float:
    """A step on a device's code over one of eager PyTorch, taken in turn."""
    random = torch.Generator().manual_seed(0)
    x = random_inputs(BATCH, stage.input_shape, stage.vocabulary, random)
    y = torch.randint(0, entry.classes, (BATCH,), generator=random)
    values = {**trainable_tensors(stage), **statistics_tensors(stage)}
    eager = _eager_steps(stage, x, y)
    ours, theirs = [], []
    with device_session(compiled.manifest, compiled.files, values) as session:
        for _ in range(TIMED_STEPS + 1):
            began = time.perf_counter()
            session.step([(x.numpy(), y.numpy())], RATE)
            ours.append(time.perf_counter() - began)
            theirs.append(next(eager))
    return statistics.median(ours[1:]) / statistics.median(theirs[1:])


def _eager_steps(stage: Stage, x: torch.Tensor, y: torch.Tensor) -> Iterator[float]:
    """The seconds of each step of PyTorch's own."""
    model = stage.model.train()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if n in stage.trained], RATE, 0.9)
    while True:
        began = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        yield time.perf_counter() - began
