"""Compares how updates may be sent: bytes, what encoding costs, and what it does to the model that is trained.

Every encoding trains the quickstart's digits with a small CNN on the same eight devices, in simulated time, and is measured
on the updates they send. Encoding and decoding are timed on a million random values, in turns, medians.

    OMP_NUM_THREADS=1 python benchmarks/updates.py --seeds 3
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from frostline.emulator.emulation import split_samples
from frostline.emulator.simulation import simulate
from frostline.protocol.manifest import TensorSpec
from frostline.protocol.messages import UpdateEncoding
from frostline.protocol.update_encoding import decode_update, encode_update
from frostline.server.assembly import assemble, broker_address
from frostline.server.config import load_config
from frostline.server.coordinator import RunObserver
from frostline.server.run_folder import RunFolder

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.toml"
ENCODINGS = [
    UpdateEncoding(),
    UpdateEncoding(compression="zstd"),
    UpdateEncoding(values="float16"),
    UpdateEncoding(values="int8"),
    UpdateEncoding(values="int8", compression="zstd"),
    UpdateEncoding(values="int8", share=0.1),
    UpdateEncoding(values="int8", share=0.1, compression="zstd"),
    UpdateEncoding(values="int8", share=0.01, compression="zstd"),
]
VALUES, TIMED = 1_000_000, 9


@dataclass(frozen=True)
class Stage:
    """What is trained where only encoding is timed."""

    parameters: Sequence[TensorSpec] = (TensorSpec(name="w", shape=(VALUES,)),)
    statistics: Sequence[TensorSpec] = ()


def name_of(encoding: UpdateEncoding) -> str:
    """What tables call it."""
    share = "" if encoding.share == 1 else f", largest {encoding.share:.0%}"
    return f"{encoding.values}{share}{', zstd' if encoding.compression == 'zstd' else ''}"


def trained(encoding: UpdateEncoding, seed: int, folder: Path) -> tuple[float, int, float]:
    """Final accuracy, rounds and bytes an update, of one run."""
    changes: dict[str, Any] = {
        "run": {"seed": seed},
        "model": {"name": "small_cnn", "blocks": 3, "options": {"width": 16}},
        "training": {"engines": ["onnxruntime"]},
        "fleet": {"engines": ["onnxruntime"], "memory": ["200%"]},
        "updates": encoding.model_dump(),
    }
    config, text = load_config(QUICKSTART, changes)
    out = folder / f"{name_of(encoding)} {seed}"
    address = broker_address(config)
    run = assemble(config, text, out, address, RunObserver(), resume=False, compiled=folder / "compiled")
    summary = simulate(run, split_samples(config), folder / "profile.json")
    records = RunFolder.open(out).records()
    sent = sum(record.bytes_up for record in records) / sum(record.devices_finished for record in records)
    return summary.accuracy or 0.0, summary.rounds, sent


def timed() -> dict[str, tuple[float, float]]:
    """Median seconds to encode and to decode a million values, by encoding."""
    update = {"w": np.random.default_rng(0).normal(size=VALUES).astype(np.float32)}
    stage = Stage()
    taken: dict[str, list[tuple[float, float]]] = {name_of(encoding): [] for encoding in ENCODINGS}
    for _ in range(TIMED):
        for encoding in ENCODINGS:
            started = time.perf_counter()
            content = encode_update(update, stage, encoding)
            encoded = time.perf_counter()
            decode_update(content, stage, encoding, "benchmark")
            taken[name_of(encoding)].append((encoded - started, time.perf_counter() - encoded))
    return {
        name: (statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs))
        for name, pairs in taken.items()
    }


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each encoding.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Compare encodings of updates."""
    torch.set_num_threads(1)
    costs = timed()
    found: dict[str, list[tuple[float, int, float]]] = {name_of(encoding): [] for encoding in ENCODINGS}
    with tempfile.TemporaryDirectory() as folder:
        pairs = [(encoding, seed) for seed in range(seeds) for encoding in ENCODINGS]
        for encoding, seed in track(pairs, "training", console=Console(stderr=True)):
            found[name_of(encoding)].append(trained(encoding, seed, Path(folder)))
    plain = statistics.mean(sent for _, _, sent in found[name_of(ENCODINGS[0])])
    rows = [
        {
            "encoding": name,
            "ratio": statistics.mean(sent for _, _, sent in runs) / plain,
            "accuracy": statistics.mean(accuracy for accuracy, _, _ in runs),
            "accuracy_std": statistics.stdev(a for a, _, _ in runs) if len(runs) > 1 else 0.0,
            "rounds": statistics.mean(rounds for _, rounds, _ in runs),
            "encode_seconds": costs[name][0],
            "decode_seconds": costs[name][1],
        }
        for name, runs in found.items()
    ]
    if as_json:
        print(json.dumps({"seeds": seeds, "rows": rows}, indent=1))
        return
    table = Table(title=f"Encodings of updates, {seeds} run(s) each; seconds a million values")
    for heading in ("encoding", "bytes", "accuracy", "rounds", "encode ms", "decode ms"):
        table.add_column(heading, justify="left" if heading == "encoding" else "right")
    for row in rows:
        accuracy = f"{row['accuracy']:.1%} ± {row['accuracy_std']:.1%}"
        times = [f"{1000 * float(row[f'{kind}_seconds']):.1f}" for kind in ("encode", "decode")]
        table.add_row(str(row["encoding"]), f"{row['ratio']:.1%}", accuracy, f"{row['rounds']:.0f}", *times)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
