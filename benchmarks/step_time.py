"""Times one training step of each stage: eager PyTorch, ExecuTorch as exported, ExecuTorch by Frostline.

Everything runs on one thread, in one process, interleaved; seconds are medians. The stock program is so slow that it is
run once; leave it out with --no-stock.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py --model resnet18 --batch 8 --json
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from frostline.device_runtime.executorch_engine import ExecuTorchProgram
from frostline.exporter.artifact import ExportOptions, compile_stage
from frostline.exporter.cutting import cut
from frostline.exporter.executorch_lowering import quiet
from frostline.exporter.executorch_target import EXECUTORCH
from frostline.exporter.inputs import random_inputs
from frostline.exporter.models.lookup import build_model
from frostline.exporter.optimizer import SGD
from frostline.exporter.stage import Stage, build_stage
from frostline.exporter.tiles import pick, tile_name
from frostline.exporter.training_step import initial_state, trace_training_step
from frostline.protocol.errors import RunError

with quiet():
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
    from executorch.exir.passes import MemoryPlanningPass

OPTIMIZER = SGD(momentum=0.9)
IN_PLACE = MemoryPlanningPass(alloc_graph_input=False)
UNCHECKED = EdgeCompileConfig(_check_ir_validity=False)


def measure(model: str, stage: Stage, batch: int, classes: int, runs: int, stock: bool) -> dict[str, Any]:
    """One row: the same step three ways."""
    state = initial_state(stage, OPTIMIZER, layout=EXECUTORCH.layout(stage.model))
    x = random_inputs(batch, stage.input_shape, stage.vocabulary, torch.Generator().manual_seed(0))
    y = torch.randint(0, classes, (batch,))
    compiled = compile_stage(stage, ExportOptions(batch, classes, OPTIMIZER))
    training = compiled.manifest.training
    content = compiled.files[training.file.sha256]
    tensors = {**state.by_name, "x": x, "y": y, "learning_rate": torch.tensor(1e-4)}
    taken = [each.name if each.tile is None else tile_name(each.name, each.tile) for each in training.inputs]
    ours = runner(content, [pick(tensors, name).clone() for name in taken])
    eager = eager_runner(stage, x, y)
    pairs = [(seconds(ours), seconds(eager)) for _ in range(runs)]
    median = statistics.median(a for a, _ in pairs)
    eager_median = statistics.median(b for _, b in pairs)
    row: dict[str, Any] = {
        "model": model,
        "stage": stage.index + 1,
        "seconds": median,
        "eager_seconds": eager_median,
        "ratio_to_eager": statistics.median(a / b for a, b in pairs),
        "stock_seconds": None,
        "arena_bytes": training.arena_bytes,
        "stock_arena_bytes": None,
        "planned_bytes": compiled.manifest.planned.total,
        "program_bytes": len(content),
    }
    if stock:
        # In the model's own order: another one, and tiles, are ideas of ours.
        state = initial_state(stage, OPTIMIZER)
        step = trace_training_step(stage, OPTIMIZER, state, x, y, lambda graph, arguments: graph)
        arguments = step.arguments({**tensors, **state.by_name})
        stock_content, row["stock_arena_bytes"] = lower_as_documented(step, arguments)
        # Stock ExecuTorch refuses to run some, such as the backward of 1-D convolutions.
        with suppress(RunError):
            row["stock_seconds"] = seconds(runner(stock_content, arguments))
    return row


def lower_as_documented(module: torch.nn.Module, arguments: list[torch.Tensor]) -> tuple[bytes, int]:
    """The same step by ExecuTorch's own defaults, but for the inputs, which stay with the caller; and its arena."""
    with quiet():
        edge = to_edge(torch.export.export(module, tuple(arguments), strict=False), compile_config=UNCHECKED)
        program = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=IN_PLACE))
    sizes = program.executorch_program.execution_plan[0].non_const_buffer_sizes
    return bytes(program.buffer), sum(sizes)


def runner(content: bytes, arguments: Sequence[torch.Tensor]) -> Callable[[], object]:
    """A step of a lowered program over tensors of its own."""
    loaded = ExecuTorchProgram(content, "training")
    return lambda: loaded.run(arguments)


def eager_runner(stage: Stage, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    """The same step by PyTorch's autograd and optimizer."""
    model = stage.model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=OPTIMIZER.momentum)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    return step


def seconds(step: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def main(
    model: Annotated[list[str] | None, typer.Option(help="Built-in models; may be repeated.")] = None,
    batch: Annotated[int, typer.Option(help="Samples in a step.")] = 8,
    runs: Annotated[int, typer.Option(help="Steps timed; their median counts.")] = 5,
    stock: Annotated[bool, typer.Option(help="Also time the program as ExecuTorch exports it.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON.")] = False,
) -> None:
    """Time one training step of every stage three ways."""
    torch.set_num_threads(1)
    rows = []
    for name in model or ["resnet18"]:
        spec = build_model(name, {}, None, 10)
        parts = cut(spec.module, list(spec.default_blocks or ()) or 4, spec.example(2), spec.vocabulary)
        stages = range(len(parts.blocks))
        for index in track(stages, description=name, console=Console(stderr=True)):
            stage = build_stage(parts, index, seed=0)
            rows.append(measure(name, stage, batch, spec.classes, runs, stock))
    if as_json:
        print(json.dumps({"batch": batch, "rows": rows}, indent=2))
    else:
        show(rows, batch)


def show(rows: list[dict[str, Any]], batch: int) -> None:
    """Print the rows as a table."""
    table = Table(title=f"one training step, batch {batch}, one thread")
    for heading in (
        "model",
        "stage",
        "eager ms",
        "frostline ms",
        "to eager",
        "stock s",
        "arena MB",
        "stock arena MB",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        stock = row["stock_seconds"]
        table.add_row(
            row["model"],
            str(row["stage"]),
            f"{row['eager_seconds'] * 1e3:.1f}",
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['ratio_to_eager']:.2f}x",
            "" if stock is None else f"{stock:.1f}",
            f"{row['arena_bytes'] / 1e6:.1f}",
            "" if stock is None else f"{row['stock_arena_bytes'] / 1e6:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
