"""`frostline export`: a model's stages as training artifacts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from frostline.protocol.artifact import write_artifact
from frostline.protocol.errors import UsageError
from frostline.protocol.sizes import format_size

if TYPE_CHECKING:
    from frostline.exporter.artifact import CompiledStage
    from frostline.exporter.stage import Stage


def export(
    model: Annotated[
        str,
        typer.Option(help="A built-in model such as [bold]resnet18[/bold], or your package.module:factory."),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for the artifacts, one sub-folder a stage. New or empty.")
    ],
    blocks: Annotated[
        str,
        typer.Option(
            help="How many blocks, or the names of the modules each ends with: layer1,layer2,layer3."
        ),
    ] = "4",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-O", help="Passed to the model: width=32, norm=batch. May be repeated."),
    ] = None,
    input_shape: Annotated[
        str | None, typer.Option(help="One sample's shape, such as 3,32,32. Needed for your own models.")
    ] = None,
    classes: Annotated[int | None, typer.Option(help="How many classes the model tells apart.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a training step.")] = 16,
    momentum: Annotated[
        float, typer.Option(min=0, max=1, help="SGD's momentum, compiled into the step.")
    ] = 0.9,
    weight_decay: Annotated[
        float, typer.Option(min=0, max=1, help="L2 penalty, compiled into the step.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Draws the initial weights.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
) -> None:
    """Compile each block of a model into a training artifact, checked against eager PyTorch.

    Every stage gets a manifest with its planned memory, a training and an evaluation program, the programs of the
    frozen blocks before it and its initial weights.
    """
    import torch

    from frostline.exporter.artifact import (
        ExportOptions,
        arrays,
        compile_prefix,
        compile_stage,
    )
    from frostline.exporter.cutting import cut
    from frostline.exporter.models.lookup import build_model
    from frostline.exporter.optimizer import SGD
    from frostline.exporter.stage import build_stage, statistics_tensors, trainable_tensors

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: exists and is not an empty folder; choose another")
    spec = build_model(model, _options(option or []), _shape(input_shape), classes, seed)
    wanted = int(blocks) if blocks.isdigit() else [name.strip() for name in blocks.split(",")]
    parts = cut(spec.module, wanted, torch.zeros(2, *spec.input_shape))
    options = ExportOptions(batch=batch, classes=spec.classes, optimizer=SGD(momentum, weight_decay))

    console = Console(stderr=True)
    prefix: list[Any] = []
    prefix_files: dict[str, bytes] = {}
    rows = []
    for index in range(len(parts.blocks)):
        stage = build_stage(parts, index, seed)
        with console.status(f"stage {index + 1} of {len(parts.blocks)}: compiling {stage.name}"):
            compiled = compile_stage(stage, options, prefix)
            files = {**compiled.files, **prefix_files}
            weights = arrays({**trainable_tensors(stage), **statistics_tensors(stage)})
            write_artifact(out / f"stage-{index + 1}", compiled.manifest, files, weights)
            if index + 1 < len(parts.blocks):
                program, content = compile_prefix(stage, batch)
                prefix.append(program)
                prefix_files[program.file.sha256] = content
        rows.append(_row(stage, compiled))
    if as_json:
        typer.echo(json.dumps({"model": model, "batch": batch, "stages": rows}, indent=2))
    else:
        _print(Console(), model, batch, rows)


def _row(stage: Stage, compiled: CompiledStage) -> dict[str, Any]:
    planned = compiled.manifest.planned
    return {
        "stage": stage.index + 1,
        "name": stage.name,
        "planned_bytes": planned.total,
        "memory": planned.model_dump(),
        "loss_error": compiled.parity.loss_error,
        "tensor_error": compiled.parity.tensor_error,
    }


def _print(console: Console, model: str, batch: int, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{model}, batch {batch}: planned memory on a device")
    for heading in ("stage", "block", "arena", "state", "program", "total", "error against eager"):
        table.add_column(heading, justify="left" if heading == "block" else "right")
    for row in rows:
        memory = row["memory"]
        state = memory["parameters"] + memory["statistics"] + memory["optimizer_state"]
        table.add_row(
            str(row["stage"]),
            row["name"],
            *(
                format_size(size)
                for size in (memory["arena"], state, memory["program"], row["planned_bytes"])
            ),
            f"{row['tensor_error']:.0e}",
        )
    console.print(table)


def _options(pairs: list[str]) -> dict[str, object]:
    options: dict[str, object] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise UsageError(f"--option {pair!r}: write it as name=value, such as width=32")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UsageError(f"--input-shape {text!r}: write one sample's shape as 3,32,32")
    return shape
