"""Compares stand-ins that are no heavier than their block with dense ones: size, and accuracy after each stage.

A model is trained block by block in eager PyTorch on one machine, each stage from where the last one left off, from the same
weights and on the same batches with either kind. The last stage has no stand-ins: what it reaches is what the blocks learnt
behind them are worth.

    OMP_NUM_THREADS=1 python benchmarks/stand_ins.py --model mobilenet_v2 --json
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import json
import statistics
from typing import Annotated, Any, get_args

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from frostline.datasets.load import load_samples
from frostline.datasets.samples import Samples
from frostline.exporter.cutting import cut
from frostline.exporter.models.lookup import build_model
from frostline.exporter.output_module import OutputModuleKind
from frostline.exporter.stage import build_stage

BATCH = 32
KINDS: tuple[OutputModuleKind, ...] = ("convolutions", "dense")


def measure(
    model: str, options: dict[str, Any], data: tuple[Samples, Samples], epochs: int, seed: int, kind: str
) -> list[dict[str, Any]]:
    """One row for each stage, trained one after another."""
    train, test = data
    torch.manual_seed(seed)
    spec = build_model(model, {**options, "classes": train.classes, "channels": train.x.shape[1]})
    parts = cut(spec.module, spec.default_blocks or 4, torch.zeros(2, *train.x.shape[1:]), None)
    x, y = torch.from_numpy(train.x), torch.from_numpy(train.y)
    frozen: list[nn.Module] = []
    rows = []
    for index, block in enumerate(parts.blocks):
        stage = build_stage(
            parts, index, seed, next(each for each in get_args(OutputModuleKind) if each == kind)
        )
        fit(stage.model, x, y, epochs, seed)
        held_out = through(frozen, torch.from_numpy(test.x))
        rows.append(
            {
                "seed": seed,
                "kind": kind,
                "stage": stage.name,
                "block_parameters": size(block.module),
                "output_module_parameters": size(stage.model.output_module),
                "accuracy": accuracy(stage.model, held_out, torch.from_numpy(test.y)),
            }
        )
        x = through([block.module], x)
        frozen.append(block.module)
    return rows


def fit(model: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int) -> None:
    """SGD with momentum over shuffled batches."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.train().parameters(), 0.05, 0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=random).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


def through(blocks: list[nn.Module], x: Tensor) -> Tensor:
    """What frozen blocks make of samples."""
    with torch.no_grad():
        for block in blocks:
            x = torch.cat([block.eval()(part) for part in x.split(256)])
    return x


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of samples that are told right."""
    return float((through([model], x).argmax(1) == y).float().mean())


def size(module: nn.Module) -> int:
    """How many parameters it has."""
    return sum(each.numel() for each in module.parameters())


def main(
    model: Annotated[str, typer.Option(help="A built-in model of images.")] = "mobilenet_v2",
    width: Annotated[float, typer.Option(help="Its option of that name.")] = 0.5,
    data: Annotated[str, typer.Option(help="Samples to train on.")] = "digits",
    epochs: Annotated[int, typer.Option(min=1, help="Epochs a stage.")] = 6,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Compare stand-ins that are no heavier than their block with dense ones."""
    torch.set_num_threads(1)
    samples = load_samples(data, "train"), load_samples(data, "test")
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=seeds * len(KINDS))
        for seed in range(seeds):
            for kind in KINDS:
                rows += measure(model, {"width": width}, samples, epochs, seed, kind)
                progress.advance(task)
    if as_json:
        print(
            json.dumps(
                {"model": model, "width": width, "data": data, "epochs": epochs, "rows": rows}, indent=1
            )
        )
        return
    table = Table(title=f"{model} (width {width:g}) on {data}, {epochs} epochs a stage, {seeds} seeds")
    for heading in ("stage", "block", "lighter", "dense", "lighter %", "dense %"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for name in dict.fromkeys(row["stage"] for row in rows):
        of_stage = {kind: [r for r in rows if r["stage"] == name and r["kind"] == kind] for kind in KINDS}
        sizes = [f"{of_stage[kind][0]['output_module_parameters']:,}" for kind in KINDS]
        told = [[100 * row["accuracy"] for row in of_stage[kind]] for kind in KINDS]
        means = [f"{statistics.mean(each):.1f} ± {statistics.pstdev(each):.1f}" for each in told]
        table.add_row(name, f"{of_stage[KINDS[0]][0]['block_parameters']:,}", *sizes, *means)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
