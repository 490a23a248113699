"""`frostline inspect`: what an artifact holds, and whether it is intact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from frostline.protocol.artifact import read_artifact
from frostline.protocol.sizes import format_size


def inspect(
    artifact: Annotated[Path, typer.Argument(help="Folder of one stage, as frostline export wrote it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole manifest as JSON.")] = False,
) -> None:
    """Verify every file of an artifact against its hash and show what a device needs to train it."""
    manifest, _ = read_artifact(artifact)
    if as_json:
        document = {**manifest.model_dump(mode="json"), "planned_bytes": manifest.planned.total}
        typer.echo(json.dumps(document, indent=2))
        return
    table = Table(
        title=f"stage {manifest.stage + 1} of {manifest.stages}: {manifest.name}", show_header=False
    )
    table.add_row("engine", manifest.engine)
    table.add_row(
        "batch", f"{manifest.batch} of {list(manifest.input_shape)} {manifest.evaluation.inputs[-1].dtype}"
    )
    table.add_row("frozen blocks before it", str(len(manifest.prefix)))
    table.add_row(
        "operations in a step", f"{manifest.flops / 10**9:.3g} GFLOP" if manifest.flops else "not known"
    )
    for kind, size in manifest.planned.model_dump().items():
        table.add_row(kind.replace("_", " "), format_size(size))
    table.add_row("planned in all", format_size(manifest.planned.total))
    table.add_row("sent once", format_size(sum(reference.size for reference in manifest.files)))
    table.add_row("sent each round", format_size(sum(spec.size_bytes for spec in manifest.trained)))
    Console().print(table)
