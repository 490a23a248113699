"""What training takes of a device's memory: each stage, planned and measured, beside the whole model in PyTorch.

The whole model is trained by eager PyTorch at the same effective batch; its memory is counted as the tensors autograd
saves, weights, gradients and momentum, and measured as the growth of a process's resident memory. Every stage is planned
in one piece and in its smallest variant, and the growth of a process that trains it is measured beside that.

    OMP_NUM_THREADS=1 python benchmarks/memory.py --model resnet18 --batch 32 --json
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import json
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from frostline.device_runtime.engine import open_runtime
from frostline.device_runtime.resident_memory import peak_growth
from frostline.exporter.artifact import CompiledStage, ExportOptions, arrays
from frostline.exporter.cutting import CutModel, cut
from frostline.exporter.inputs import random_inputs
from frostline.exporter.models.lookup import build_model
from frostline.exporter.optimizer import SGD
from frostline.exporter.planning import StageVariants, estimate_stage
from frostline.exporter.stage import Stage, build_stage, statistics_tensors, trainable_tensors
from frostline.exporter.variant import WHOLE, variants_of
from frostline.protocol.blobs import BlobStore
from frostline.protocol.manifest import StageManifest
from frostline.protocol.sizes import format_size

OPTIMIZER = SGD(momentum=0.9)
STEPS = 3


def whole_model(model: str, batch: int) -> dict[str, int]:
    """Eager PyTorch on the whole model: bytes by kind, and the measured growth."""
    spec = build_model(model, {}, None, None)
    module = spec.module.train()
    x = random_inputs(batch, spec.input_shape, spec.vocabulary, torch.Generator().manual_seed(0))
    y = torch.zeros(batch, dtype=torch.int64)
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in parameters:
            saved[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        F.cross_entropy(module(x), y)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    activations = sum(t.untyped_storage().nbytes() for t in saved.values())
    return {"saved_tensors": activations, "weights": weights, "gradients": weights, "momentum": weights}


def whole_model_growth(model: str, batch: int) -> int:
    """How much a process grows that trains the whole model in eager PyTorch."""
    torch.set_num_threads(1)
    spec = build_model(model, {}, None, None)
    weights = sum(p.numel() * p.element_size() for p in spec.module.parameters())
    x = random_inputs(batch, spec.input_shape, spec.vocabulary, torch.Generator().manual_seed(0))
    y = torch.zeros(batch, dtype=torch.int64)

    def train() -> None:
        optimizer = torch.optim.SGD(spec.module.parameters(), 1e-4, OPTIMIZER.momentum)
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(spec.module(x), y).backward()
            optimizer.step()

    # The weights are there before.
    return peak_growth(train) + weights


def stage_growth(folder: str, *trained: tuple[StageManifest, dict[str, Any]]) -> int:
    """How much a process grows that trains stages as a device does, for the last one.

    Those before load what any training loads, the runtime's own code among it.
    """
    return [_growth(BlobStore(Path(folder)), manifest, weights) for manifest, weights in trained][-1]


def _growth(store: BlobStore, manifest: StageManifest, weights: dict[str, Any]) -> int:
    runtime = open_runtime(manifest.engine)
    spec = manifest.training.inputs[[each.name for each in manifest.training.inputs].index("x")]

    def train() -> None:
        session = runtime.open_stage(manifest, store)
        session.load(weights)
        for _ in range(STEPS):
            session.step(parts(), 1e-4)

    def parts() -> Any:
        for _ in range(manifest.micro_batches):
            yield np.zeros(spec.shape, spec.dtype), np.zeros(spec.shape[0], np.int64)

    return peak_growth(train)


def in_fresh_process(function: Callable[..., int], *arguments: Any) -> int:
    """Run a measurement in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def weights(stage: Stage) -> dict[str, Any]:
    """The stage's values as a device receives them."""
    return arrays({**trainable_tensors(stage), **statistics_tensors(stage)})


def small_stage() -> tuple[Stage, CompiledStage]:
    """A stage that takes next to no memory."""
    spec = build_model("small_cnn", {"width": 8}, None, None)
    stage = build_stage(cut(spec.module, 2, spec.example(2)), 0, 0)
    return stage, StageVariants(stage, ExportOptions(4, spec.classes, OPTIMIZER)).compiled()


def smallest(stage: Stage, options: ExportOptions, variants: StageVariants) -> CompiledStage:
    """The variant that takes least."""
    choice = min(
        variants_of(options.batch), key=lambda variant: estimate_stage(stage, options, variant).total
    )
    return variants.compiled(choice)


def measure(stage: Stage, options: ExportOptions, warm_up: tuple[Stage, CompiledStage]) -> dict[str, Any]:
    """One stage's row."""
    variants = StageVariants(stage, options)
    whole, small = variants.compiled(WHOLE), smallest(stage, options, variants)
    row: dict[str, Any] = {"stage": stage.index + 1, "name": stage.name, "variant": small.manifest.variant}
    for key, compiled in (("whole", whole), ("small", small)):
        with tempfile.TemporaryDirectory() as folder:
            store = BlobStore(Path(folder))
            for content in [*compiled.files.values(), *warm_up[1].files.values()]:
                store.put(content)
            trained = [(c.manifest, weights(s)) for s, c in (warm_up, (stage, compiled))]
            growth = in_fresh_process(stage_growth, folder, *trained)
        row |= {f"{key}_planned_bytes": compiled.manifest.planned.total, f"{key}_measured_bytes": growth}
    return row


def main(
    model: Annotated[str, typer.Option(help="A built-in model.")] = "resnet18",
    batch: Annotated[int, typer.Option(min=1, help="Effective batch of a step.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Plan and measure the memory of each stage beside that of the whole model in PyTorch."""
    torch.set_num_threads(1)
    spec = build_model(model, {}, None, None)
    parts: CutModel = cut(spec.module, list(spec.default_blocks or ()), spec.example(2), spec.vocabulary)
    options = ExportOptions(batch, spec.classes, OPTIMIZER)
    stages = [build_stage(parts, index, 0) for index in range(len(parts.blocks))]
    eager = whole_model(model, batch)
    total = sum(eager.values())
    console = Console(stderr=True)
    warm_up = small_stage()
    rows = [measure(stage, options, warm_up) for stage in track(stages, model, console=console)]
    planned = [row["small_planned_bytes"] for row in rows]
    result = {
        "model": model,
        "batch": batch,
        "whole_model": eager,
        "whole_model_bytes": total,
        "whole_model_measured_bytes": in_fresh_process(whole_model_growth, model, batch),
        "peak_fraction": max(planned) / total,
        "mean_fraction": sum(planned) / len(planned) / total,
        "rows": rows,
    }
    print(json.dumps(result, indent=2)) if as_json else show(result)


def show(result: dict[str, Any]) -> None:
    """The same as a table."""
    table = Table(title=f"{result['model']}, batch {result['batch']}: planned (measured) memory of a device")
    for heading in ("stage", "block", "in one piece", "smallest variant", "", "of the whole model"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        cells = [
            f"{format_size(row[f'{key}_planned_bytes'])} ({format_size(row[f'{key}_measured_bytes'])})"
            for key in ("whole", "small")
        ]
        share = row["small_planned_bytes"] / result["whole_model_bytes"]
        table.add_row(str(row["stage"]), row["name"], *cells, row["variant"], f"{share:.1%}")
    console = Console()
    console.print(table)
    console.print(
        f"whole model in eager PyTorch: {format_size(result['whole_model_bytes'])} "
        f"({format_size(result['whole_model_measured_bytes'])}); stages in their smallest variant: "
        f"peak {result['peak_fraction']:.1%}, mean {result['mean_fraction']:.1%} of it"
    )


if __name__ == "__main__":
    typer.run(main)
