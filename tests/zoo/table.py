"""The table of docs/models.md."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

Row = dict[str, Any]

ABOUT = """# Models

What people bring, written the way torchvision, timm, Hugging Face, keyword-spotting and activity-recognition papers write it,
on both engines: `make zoo` compiles every one (`tests/zoo/`), trains each stage by the device's own code and compares it with
eager PyTorch, and writes this page. All are small (32x32 images, few repeats), batch {batch}, SGD with momentum. `make test`
runs twelve of the most used, a part of the habits, and every refusal.

{summary}

`compiled` gives the CPU seconds of the slowest stage, the time of a step over eager PyTorch's (median of the stages, one
thread; below 1 is faster than eager, whose own overhead weighs in models as small as these: [at full size](../README.md) a
stage takes 1.6 to 2.3 times eager PyTorch's time on ExecuTorch) and the largest error of a tensor relative to how far it moved. `refused` is one line
that says where and why.
"""


def table(rows: Sequence[Row], batch: int = 8) -> str:
    """The page for the rows of a run."""
    engines = sorted({row["engine"] for row in rows})
    sections = [ABOUT.format(batch=batch, summary="\n".join(_summary(rows, engine) for engine in engines))]
    for kind, title in (("architecture", "Architectures"), ("layer", "Layers and habits")):
        of_kind = [row for row in rows if row["kind"] == kind]
        if of_kind:
            sections.append(_section(title, of_kind, engines))
    return "\n".join(sections)


def _summary(rows: Sequence[Row], engine: str) -> str:
    """What a run found of the architectures on one engine."""
    found = [row for row in rows if row["engine"] == engine and row["kind"] == "architecture"]
    stages = [stage for row in found for stage in row["stages"]]
    if not stages:
        return f"* {engine}: nothing compiled."
    compiled = sum(row["verdict"] == "compiled" for row in found)
    unexpected = sum(not row["as_expected"] for row in rows if row["engine"] == engine)
    ratios, seconds = [stage["ratio"] for stage in stages], [stage["seconds"] for stage in stages]
    return (
        f"* {engine}: {compiled} of {len(found)} architectures compiled ({compiled / len(found):.0%}); of all entries {unexpected} "
        f"came out otherwise than intended; a step takes {median(ratios):.2f} times eager PyTorch's (median of their stages), "
        f"compiling a stage {median(seconds):.1f} s of CPU (median), {max(seconds):.1f} s at most."
    )


def _section(title: str, rows: Sequence[Row], engines: Sequence[str]) -> str:
    by_name: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_name.setdefault(row["name"], {})[row["engine"]] = row
    counts = ", ".join(
        f"{engine} {sum(each[engine]['verdict'] == 'compiled' for each in by_name.values() if engine in each)}"
        for engine in engines
    )
    lines = [
        f"## {title}",
        "",
        f"{len(by_name)} in all. Compiled: {counts}.",
        "",
        "| model | parameters | blocks | " + " | ".join(engines) + " |",
        "|---|---|---|" + "---|" * len(engines),
    ]
    for name, found in by_name.items():
        first = max(found.values(), key=lambda row: len(row["stages"]))
        ends = ", ".join(f"`{stage['name']}`" for stage in first["stages"])
        cells = " | ".join(_cell(found[engine]) if engine in found else "" for engine in engines)
        lines.append(f"| {name} | {first['parameters']:,} | {ends} | {cells} |")
    return "\n".join([*lines, ""])


def _cell(row: Row) -> str:
    if row["verdict"] != "compiled":
        message = row["message"].replace("|", "/")
        return f"{row['verdict']}: {message}"
    stages = row["stages"]
    ratios = sorted(stage["ratio"] for stage in stages)
    slowest = max(stage["seconds"] for stage in stages)
    error = max(stage["tensor_error"] for stage in stages)
    return f"compiled, {slowest:.0f} s, {ratios[len(ratios) // 2]:.1f}x, {error:.0e}"
