"""Compares stand-ins that are no heavier than their block with dense ones: size, and accuracy after each stage.

A network of depthwise separable convolutions, whose blocks are lighter than a dense convolution, is trained block by block in
eager PyTorch, each stage from where the last one left off, from the same weights and on the same batches with either kind. The
last stage has no stand-ins: what it reaches is what the blocks learnt behind them are worth.

    OMP_NUM_THREADS=1 python benchmarks/stand_ins.py --data fashion-mnist --samples 6000 --json
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import json
import statistics
from itertools import pairwise
from typing import Annotated, Any

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
from frostline.exporter.output_module import OutputModuleKind
from frostline.exporter.stage import build_stage

BATCH = 32
KINDS: tuple[OutputModuleKind, ...] = ("convolutions", "dense")


class Separable(nn.Sequential):
    """A depthwise and a pointwise convolution, each with batch norm and ReLU (Howard et al., "MobileNets", 2017)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
            *(nn.BatchNorm2d(inputs), nn.ReLU()),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            *(nn.BatchNorm2d(outputs), nn.ReLU()),
        )


def network(channels: int, classes: int) -> nn.Module:
    """A stem, four blocks of two separable convolutions, the mean over places and a linear layer."""
    stem = nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    widths = (32, 64, 128, 128, 256)
    blocks = [
        nn.Sequential(Separable(a, b, 2 if index in (1, 3) else 1), Separable(b, b, 1))
        for index, (a, b) in enumerate(pairwise(widths))
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))
    return nn.Sequential(stem, *blocks, head)


def measure(
    data: tuple[Samples, Samples], samples: int, epochs: int, rate: float, seed: int, kind: OutputModuleKind
) -> list[dict[str, Any]]:
    """One row for each stage, trained one after another."""
    train, test = data
    torch.manual_seed(seed)
    module = network(train.x.shape[1], train.classes)
    parts = cut(module, ["1", "2", "3", "4"], torch.zeros(2, *train.x.shape[1:]))
    x, y = torch.from_numpy(train.x[:samples]), torch.from_numpy(train.y[:samples])
    frozen: list[nn.Module] = []
    rows = []
    for index, block in enumerate(parts.blocks):
        stage = build_stage(parts, index, seed, kind)
        fit(stage.model, x, y, epochs, rate, seed)
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


def fit(model: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float, seed: int) -> None:
    """SGD with momentum over shuffled batches."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.train().parameters(), rate, 0.9)
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
    data: Annotated[str, typer.Option(help="Images to train on.")] = "digits",
    samples: Annotated[int, typer.Option(min=1, help="How many of them.")] = 6000,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs a stage.")] = 6,
    learning_rate: Annotated[
        float,
        typer.Option(
            help="Of SGD with momentum. Dense stand-ins, which nothing normalises, diverge at 0.05."
        ),
    ] = 0.005,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Compare stand-ins that are no heavier than their block with dense ones."""
    torch.set_num_threads(1)
    loaded = load_samples(data, "train"), load_samples(data, "test")
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=seeds * len(KINDS))
        for seed in range(seeds):
            for kind in KINDS:
                rows += measure(loaded, samples, epochs, learning_rate, seed, kind)
                progress.advance(task)
    if as_json:
        print(
            json.dumps(
                {
                    "data": data,
                    "samples": samples,
                    "epochs": epochs,
                    "learning_rate": learning_rate,
                    "rows": rows,
                },
                indent=1,
            )
        )
        return
    table = Table(
        title=f"{data}, {epochs} epochs a stage at {learning_rate:g}, {seeds} seeds: parameters and accuracy"
    )
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
