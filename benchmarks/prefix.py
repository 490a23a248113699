"""Compares frozen blocks in float32 and in int8: bytes, seconds, and how far the features are off.

Both run in the ExecuTorch runtime on one thread and take turns; seconds are medians. Blocks have fresh weights; int8 is
calibrated on samples drawn as those measured on.

    OMP_NUM_THREADS=1 python benchmarks/prefix.py --model resnet18 --json
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import json
import statistics
import time
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from frostline.exporter.artifact import compile_prefix
from frostline.exporter.cutting import cut
from frostline.exporter.executorch_target import EXECUTORCH
from frostline.exporter.inputs import random_inputs
from frostline.exporter.models.lookup import build_model
from frostline.exporter.stage import Stage, build_stage
from frostline.exporter.target import LoweredProgram, Run
from frostline.protocol.sizes import format_size

BATCH, CALIBRATION = 8, 64


def measure(stage: Stage, runs: int) -> dict[str, Any]:
    """One row: a block both ways."""
    random = torch.Generator().manual_seed(0)
    calibration = random_inputs(CALIBRATION, stage.input_shape, stage.vocabulary, random)
    x = random_inputs(BATCH, stage.input_shape, stage.vocabulary, random)
    programs = [compile_prefix(stage, BATCH, EXECUTORCH, sample) for sample in (None, calibration)]
    loaded = [EXECUTORCH.load(LoweredProgram(c, ("x",), p.arena_bytes)) for p, c in programs]
    want, got = (run({"x": x})[-1].clone() for run in loaded)
    pairs = [(seconds(loaded[0], x), seconds(loaded[1], x)) for _ in range(runs)]
    return {
        "block": stage.name,
        "float32_bytes": len(programs[0][1]),
        "int8_bytes": len(programs[1][1]),
        "float32_seconds": statistics.median(a for a, _ in pairs),
        "int8_seconds": statistics.median(b for _, b in pairs),
        "relative_error": float((got - want).norm() / want.norm()),
    }


def seconds(run: Run, x: Tensor) -> float:
    """One batch."""
    started = time.perf_counter()
    run({"x": x})
    return time.perf_counter() - started


def main(
    model: Annotated[str, typer.Option(help="A built-in model.")] = "resnet18",
    runs: Annotated[int, typer.Option(min=1, help="Batches that are timed.")] = 15,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Compare frozen blocks in float32 and in int8."""
    torch.set_num_threads(1)
    spec = build_model(model, {})
    parts = cut(spec.module, spec.default_blocks or 4, spec.example(2), spec.vocabulary)
    stages = [build_stage(parts, index, seed=0) for index in range(len(parts.blocks))]
    rows = [measure(stage, runs) for stage in track(stages, "measuring", console=Console(stderr=True))]
    if as_json:
        print(json.dumps({"model": model, "batch": BATCH, "rows": rows}, indent=1))
        return
    table = Table(title=f"{model}: frozen blocks over {BATCH} samples on one thread")
    for heading in ("block", "float32", "int8", "float32 ms", "int8 ms", "features off by"):
        table.add_column(heading, justify="left" if heading == "block" else "right")
    for row in rows:
        sizes = [format_size(row[f"{kind}_bytes"]) for kind in ("float32", "int8")]
        times = [f"{1000 * row[f'{kind}_seconds']:.1f}" for kind in ("float32", "int8")]
        table.add_row(row["block"], *sizes, *times, f"{row['relative_error']:.1%}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
