"""`frostline export`: a model's stages as training artifacts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from frostline.protocol.artifact import write_artifact
from frostline.protocol.errors import UsageError
from frostline.protocol.sizes import format_size, parse_size

if TYPE_CHECKING:
    from frostline.exporter.artifact import CompiledStage, ExportOptions
    from frostline.exporter.cutting import CutModel
    from frostline.exporter.output_module import OutputModuleKind
    from frostline.exporter.parity import Parity
    from frostline.exporter.stage import Stage
    from frostline.protocol.manifest import Program, StageManifest

DEFAULT_BLOCKS = 4
MOST_EXPLAINED = 6
"""Blocks of the longest cut that --explain-cut shows by itself."""

CALIBRATION = 64
"""Samples of noise that int8 blocks are calibrated on."""


def export(
    model: Annotated[
        str,
        typer.Option(help="A built-in model such as [bold]resnet18[/bold], or your package.module:factory."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the artifacts, one sub-folder a stage. New or empty. Needed but for --explain-cut."
        ),
    ] = None,
    explain_cut: Annotated[
        bool,
        typer.Option(
            "--explain-cut",
            help="Compile nothing: show what 1, 2, 3 ... blocks, or those of --blocks, would take in memory, in cached "
            "features and in traffic.",
        ),
    ] = False,
    blocks: Annotated[
        str | None,
        typer.Option(
            help="How many blocks, or the names of the modules each ends with: layer1,layer2,layer3. "
            "Operators that follow a module may belong to its block: conv1+relu. By default up to 4, or with "
            "--memory-budget as few as fit."
        ),
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            help="The planned memory no stage may exceed, such as 64MB: picks the cuts, and for each stage the "
            "fastest variant that fits (micro-batches, recomputation)."
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-O", help="Passed to the model: width=32, norm=batch. May be repeated."),
    ] = None,
    input_shape: Annotated[
        str | None, typer.Option(help="One sample's shape, such as 3,32,32. Needed for your own models.")
    ] = None,
    classes: Annotated[int | None, typer.Option(help="How many classes the model tells apart.")] = None,
    vocabulary: Annotated[
        int | None,
        typer.Option(min=1, help="How many token ids there are, for your own model that takes them."),
    ] = None,
    output_module: Annotated[
        str,
        typer.Option(
            help="What stands in for the blocks to come: convolutions, one for each and the model's head; dense, the "
            "same however heavy; or linear, one layer over the mean of the features."
        ),
    ] = "convolutions",
    batch: Annotated[int, typer.Option(min=1, help="Samples in a training step.")] = 16,
    engine: Annotated[
        str, typer.Option(help="The devices' runtime: executorch for phones, onnxruntime for boards.")
    ] = "executorch",
    prefix: Annotated[
        str,
        typer.Option(
            help="float32, or int8 for frozen blocks with int8 weights (executorch only), calibrated on noise: to "
            "measure with, not to keep."
        ),
    ] = "float32",
    optimizer: Annotated[str, typer.Option(help="sgd or adamw, compiled into the step.")] = "sgd",
    momentum: Annotated[float, typer.Option(min=0, max=1, help="SGD's momentum.")] = 0.9,
    nesterov: Annotated[bool, typer.Option("--nesterov", help="Nesterov's form of SGD's momentum.")] = False,
    weight_decay: Annotated[
        float, typer.Option(min=0, help="L2 penalty for SGD, decoupled decay for AdamW.")
    ] = 0.0,
    proximal: Annotated[float, typer.Option(min=0, help="The factor of FedProx's proximal term.")] = 0.0,
    clip_norm: Annotated[float, typer.Option(min=0, help="Largest norm of all gradients; 0 for any.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Draws the initial weights.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
) -> None:
    """Compile each block of a model into a training artifact, checked against eager PyTorch.

    Every stage gets a manifest with its planned memory, a training and an evaluation program, the programs of the
    frozen blocks before it and its initial weights.
    """
    from frostline.exporter.artifact import ExportOptions
    from frostline.exporter.cutting import Cutter
    from frostline.exporter.models.lookup import build_model
    from frostline.exporter.optimizer import build_optimizer
    from frostline.exporter.planning import BudgetPlanner, balanced_cuts
    from frostline.exporter.targets import find_target

    if out is None and not explain_cut:
        raise UsageError("--out is missing: name a new or empty folder for the artifacts")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: exists and is not an empty folder; choose another")
    if prefix not in ("float32", "int8"):
        raise UsageError(f"--prefix {prefix!r}: use float32 or int8")
    kind = _output_module(output_module)
    budget = parse_size(memory_budget, "--memory-budget") if memory_budget else None
    settings = {"weight_decay": weight_decay, "proximal": proximal, "clip_norm": clip_norm}
    trained_by = build_optimizer(optimizer, momentum=momentum, nesterov=nesterov, **settings)
    spec = build_model(model, _options(option or []), _shape(input_shape), classes, seed, vocabulary)
    options = ExportOptions(batch, spec.classes, trained_by, find_target(engine))

    console = Console(stderr=True)
    with console.status(f"cutting {model}") as status:
        cutter = Cutter(spec.module, spec.example(2), spec.vocabulary, spec.classes)
        if out is None or explain_cut:
            cuts = [cutter.cut(_blocks(blocks))] if blocks else balanced_cuts(cutter, MOST_EXPLAINED)
            explained = _explain(cuts, options, seed, kind, status.update)
        elif budget is None:
            parts = cutter.cut(_blocks(blocks) if blocks else min(DEFAULT_BLOCKS, cutter.most_blocks))
            compiled = _compile(parts, options, seed, kind, status.update)
        else:
            cuts = [cutter.cut(_blocks(blocks))] if blocks else balanced_cuts(cutter)
            planner = BudgetPlanner(options, budget, seed, status.update, kind)
            fitted = planner.fit(cuts)
            parts, compiled = fitted.cut, fitted.stages
        if out is not None and not explain_cut:
            rows = _write(parts, compiled, options, seed, kind, out, status.update, int8=prefix == "int8")
    if explain_cut:
        _print_explained(Console(), model, batch, explained, as_json=as_json)
    elif as_json:
        typer.echo(json.dumps({"model": model, "batch": batch, "stages": rows}, indent=2))
    else:
        _print(Console(), model, batch, rows)


def _compile(
    parts: CutModel,
    options: ExportOptions,
    seed: int,
    kind: OutputModuleKind,
    notify: Callable[[str], None],
) -> list[CompiledStage]:
    from frostline.exporter.artifact import compile_stage
    from frostline.exporter.parallel import in_parallel
    from frostline.exporter.stage import build_stage

    def compiled(index: int) -> CompiledStage:
        return compile_stage(build_stage(parts, index, seed, kind), options)

    count = len(parts.blocks)
    return in_parallel(
        [partial(compiled, index) for index in range(count)], _counting(notify, "stages compiled", count)
    )


def _counting(notify: Callable[[str], None], what: str, count: int) -> Callable[[int], None]:
    """Say how many of some tasks are done whenever one is."""
    done = itertools.count(1)
    notify(f"0 of {count} {what}")
    return lambda _: notify(f"{next(done)} of {count} {what}")


def _write(
    parts: CutModel,
    compiled: list[CompiledStage],
    options: ExportOptions,
    seed: int,
    kind: OutputModuleKind,
    out: Path,
    notify: Callable[[str], None],
    *,
    int8: bool,
) -> list[dict[str, Any]]:
    """Write every stage behind the blocks before it, frozen as they are; a row of figures for each."""
    from frostline.exporter.artifact import arrays
    from frostline.exporter.stage import build_stage, statistics_tensors, trainable_tensors

    frozen = _frozen(parts, options, seed, kind, notify, int8=int8)
    prefix: list[Program] = []
    prefix_files: dict[str, bytes] = {}
    rows = []
    for index, each in enumerate(compiled):
        stage = build_stage(parts, index, seed, kind)
        manifest = each.manifest.behind(prefix)
        weights = arrays({**trainable_tensors(stage), **statistics_tensors(stage)})
        write_artifact(out / f"stage-{index + 1}", manifest, {**each.files, **prefix_files}, weights)
        for program, content in frozen[index : index + 1]:
            prefix.append(program)
            prefix_files[program.file.sha256] = content
        rows.append(_row(stage, manifest, each.parity))
    return rows


def _frozen(
    parts: CutModel,
    options: ExportOptions,
    seed: int,
    kind: OutputModuleKind,
    notify: Callable[[str], None],
    *,
    int8: bool,
) -> list[tuple[Program, bytes]]:
    """The program of each block but the last, frozen."""
    from frostline.exporter.artifact import compile_prefix
    from frostline.exporter.parallel import in_parallel
    from frostline.exporter.stage import build_stage

    def compiled(index: int) -> tuple[Program, bytes]:
        stage = build_stage(parts, index, seed, kind)
        drawn = stage.random_batch(CALIBRATION, seed) if int8 else None
        return compile_prefix(stage, options.batch, options.target, drawn)

    count = len(parts.blocks) - 1
    return in_parallel(
        [partial(compiled, index) for index in range(count)],
        _counting(notify, "frozen blocks compiled", count),
    )


def _explain(
    cuts: Iterable[CutModel],
    options: ExportOptions,
    seed: int,
    kind: OutputModuleKind,
    notify: Callable[[str], None],
) -> list[dict[str, Any]]:
    """For the whole model and for each cut the figures of its stages."""
    from frostline.exporter.alternatives import figures_of, figures_of_whole

    explained: list[dict[str, Any]] = []
    for parts in cuts:
        if not explained:
            notify("estimating the whole model")
            explained.append({"blocks": 0, "stages": [asdict(figures_of_whole(parts, options))]})
        notify(f"estimating {len(parts.blocks)} blocks")
        stages = [asdict(each) for each in figures_of(parts, options, seed, kind)]
        explained.append({"blocks": len(parts.blocks), "stages": stages})
    return explained


def _print_explained(
    console: Console, model: str, batch: int, explained: list[dict[str, Any]], *, as_json: bool
) -> None:
    if as_json:
        typer.echo(json.dumps({"model": model, "batch": batch, "cuts": explained}, indent=2))
        return
    table = Table(title=f"{model}, batch {batch}: ways to cut it, by estimate")
    headings = (
        "blocks",
        "ends with",
        "block",
        "output module",
        "memory",
        "features a sample",
        "travels a round",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "ends with" else "right")
    for cut in explained:
        for index, stage in enumerate(cut["stages"]):
            table.add_row(
                "" if index else str(cut["blocks"] or "none"),
                stage["name"],
                f"{stage['block_parameters']:,}",
                f"{stage['output_module_parameters']:,}",
                *(
                    format_size(stage[size]) if stage[size] else ""
                    for size in ("planned_bytes", "feature_bytes", "travels_bytes")
                ),
                end_section=index + 1 == len(cut["stages"]),
            )
    console.print(table)


def _row(stage: Stage, manifest: StageManifest, parity: Parity) -> dict[str, Any]:
    planned = manifest.planned
    return {
        "stage": stage.index + 1,
        "name": stage.name,
        "variant": manifest.variant,
        "planned_bytes": planned.total,
        "memory": planned.model_dump(),
        "loss_error": parity.loss_error,
        "tensor_error": parity.tensor_error,
    }


def _print(console: Console, model: str, batch: int, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{model}, batch {batch}: planned memory on a device")
    for heading in ("stage", "block", "variant", "arena", "state", "program", "total", "error against eager"):
        table.add_column(heading, justify="left" if heading in ("block", "variant") else "right")
    for row in rows:
        memory = row["memory"]
        kinds = ("parameters", "statistics", "optimizer_state", "received", "second_buffers")
        state = sum(memory[kind] for kind in kinds)
        table.add_row(
            str(row["stage"]),
            row["name"],
            row["variant"],
            *(
                format_size(size)
                for size in (memory["arena"], state, memory["program"], row["planned_bytes"])
            ),
            f"{row['tensor_error']:.0e}",
        )
    console.print(table)


def _output_module(name: str) -> OutputModuleKind:
    from frostline.exporter.output_module import OutputModuleKind

    kinds: tuple[OutputModuleKind, ...] = get_args(OutputModuleKind)
    for kind in kinds:
        if kind == name:
            return kind
    raise UsageError(f"--output-module {name!r}: use {' or '.join(kinds)}")


def _blocks(text: str) -> int | list[str]:
    return int(text) if text.isdigit() else [name.strip() for name in text.split(",")]


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
