"""The zoo on both engines: what compiles, how exactly, how fast, and what is refused with which words.

python -m tests.zoo.run --table docs/models.md --json build/zoo.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.zoo.registry import ENTRIES
from tests.zoo.table import table

ENGINES = ("executorch", "onnxruntime")
WORKERS = 2
MODELS_A_PROCESS = 40
"""After so many a worker begins afresh: tracing keeps what it has seen."""

Row = dict[str, Any]


def _run(task: tuple[str, str, bool]) -> Row:
    name, engine, timed = task
    from tests.zoo.compiling import compile_entry

    entry = next(each for each in ENTRIES if each.name == name)
    return compile_entry(entry, engine, timed=timed).as_row()


def _begin() -> None:
    import torch

    torch.set_num_threads(1)
    sys.setrecursionlimit(10_000)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile what is asked for; the exit code tells whether all of it came out as its entries say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="a regular expression that names have to match")
    parser.add_argument("--kind", choices=("architecture", "layer"))
    parser.add_argument("--engine", choices=ENGINES)
    parser.add_argument("--json", type=Path, help="write every row there")
    parser.add_argument("--table", type=Path, help="write the table there, as Markdown")
    parser.add_argument("--untimed", action="store_true", help="leave out the steps' times")
    given = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tasks = [
        (entry.name, engine, not given.untimed)
        for entry in ENTRIES
        for engine in ENGINES
        if (given.only is None or re.search(given.only, entry.name))
        and given.kind in (None, entry.kind)
        and given.engine in (None, engine)
    ]
    rows: list[Row] = []
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with context.Pool(WORKERS, initializer=_begin, maxtasksperchild=MODELS_A_PROCESS) as pool:
        for row in pool.imap_unordered(_run, tasks):
            rows.append(row)
            mark = "ok  " if row["as_expected"] else "FAIL"
            took = row["cut_seconds"] + sum(stage["seconds"] for stage in row["stages"])
            print(f"{len(rows)}/{len(tasks)} {mark} {row['engine']:12} {row['name']:32} {row['verdict']:9} {took:6.1f} s  "
                  f"{row['message'][:160]}", flush=True)  # fmt: skip
    order = {name: index for index, name in enumerate(entry.name for entry in ENTRIES)}
    rows.sort(key=lambda row: (order[row["name"]], row["engine"]))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(rows, indent=1))
    if given.table:
        given.table.write_text(table(rows))
    print(f"{time.monotonic() - began:.0f} s")
    for engine in ENGINES:
        of_engine = [row for row in rows if row["engine"] == engine]
        if of_engine:
            _summarise(engine, of_engine)
    return 0 if all(row["as_expected"] for row in rows) else 1


def _summarise(engine: str, rows: Sequence[Row]) -> None:
    stages = [stage for row in rows for stage in row["stages"]]
    counts = {
        verdict: sum(row["verdict"] == verdict for row in rows)
        for verdict in ("compiled", "refused", "failed")
    }
    ratios = [stage["ratio"] for stage in stages if stage["ratio"]]
    print(engine, counts, "as expected", sum(row["as_expected"] for row in rows), "of", len(rows), end="; ")
    if ratios:
        print(f"step over eager: median {statistics.median(ratios):.2f}", end="; ")
    if stages:
        print(
            f"seconds a stage: median {statistics.median(s['seconds'] for s in stages):.1f}, most {max(s['seconds'] for s in stages):.1f}"
        )


if __name__ == "__main__":
    sys.exit(main())
