"""Times a training step of each stage with each engine, side by side with eager PyTorch.

Each engine runs as on a device: in a process of its own, from an artifact, on one thread. The processes take turns, step by
step, and seconds are medians. Plain SGD, which every engine has. Engines that are not installed are left out;
`make onnxruntime-training` brings the third one.

    OMP_NUM_THREADS=1 python benchmarks/engines.py --model resnet18 --batch 8 --json
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from frostline.device_runtime.engine import ENGINES, open_runtime
from frostline.device_runtime.resident_memory import peak_growth
from frostline.protocol.artifact import read_artifact
from frostline.protocol.sizes import format_size
from frostline.protocol.tensors import decode_tensors

if TYPE_CHECKING:
    # Devices run this file too, and have no PyTorch.
    from frostline.exporter.cutting import CutModel
    from frostline.exporter.models.lookup import ModelSpec

ROOT = Path(__file__).parents[1]
TRAINING_PACKAGE = Path(os.environ.get("FROSTLINE_ONNXRUNTIME_TRAINING", ROOT / "build/onnxruntime-training"))
RATE = 1e-4


class Device:
    """An engine with one stage, in a process of its own."""

    def __init__(self, engine: str, artifact: Path) -> None:
        started = time.perf_counter()
        command = [sys.executable, __file__, "--serve", str(artifact)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment(engine), **pipes)
        self._answer()
        self.start_seconds = time.perf_counter() - started

    def step(self) -> float:
        """Seconds of one step."""
        return float(self._ask("step"))

    def growth(self) -> int:
        """Bytes by which the process grew since the runtime was loaded."""
        return int(self._ask("growth"))

    def close(self) -> None:
        """End the process."""
        self._ask("end")
        self._process.wait()

    def _ask(self, request: str) -> str:
        assert self._process.stdin is not None
        print(request, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def serve(artifact: Path) -> None:
    """The device's side: open the stage, then do what is asked for."""
    manifest, store = read_artifact(artifact)
    runtime = open_runtime(manifest.engine)
    weights = decode_tensors((artifact / "weights.safetensors").read_bytes(), manifest.trained, "weights")
    random = np.random.default_rng(0)
    x = manifest.evaluation.inputs[-1]
    drawn = random.normal(size=x.shape) if x.vocabulary is None else random.integers(0, x.vocabulary, x.shape)
    parts = [(drawn.astype(x.dtype), random.integers(0, manifest.classes, x.shape[0]))]

    def begin() -> None:
        nonlocal session
        session = runtime.open_stage(manifest, store)
        session.load(weights)
        for _ in range(2):
            session.step(parts, RATE)

    session: Any = None
    growth = peak_growth(begin)
    print("ready", flush=True)
    for request in sys.stdin:
        started = time.perf_counter()
        if request.strip() == "step":
            session.step(parts, RATE)
            print(time.perf_counter() - started, flush=True)
        else:
            print(growth, flush=True)
            if request.strip() == "end":
                return


def environment(engine: str) -> dict[str, str]:
    """The variables of an engine's process: one finds its package in a folder of its own."""
    if engine != "onnxruntime-training":
        return dict(os.environ)
    paths = [str(TRAINING_PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def export(engine: str, model: str, spec: ModelSpec, batch: int, out: Path) -> None:
    """Compile all stages for an engine."""
    command = [sys.executable, "-m", "frostline.cli.main", "export", "--model", model, "--engine", engine]
    command += ["--blocks", ",".join(spec.default_blocks or ()), "--batch", str(batch), "--momentum", "0"]
    done = subprocess.run(
        [*command, "--out", str(out)], env=environment(engine), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)


def eager_step(parts: CutModel, index: int, batch: int, classes: int) -> Callable[[], float]:
    """Seconds of a step of the same stage in PyTorch."""
    import torch
    import torch.nn.functional as F

    from frostline.exporter.inputs import random_inputs
    from frostline.exporter.stage import build_stage

    stage = build_stage(parts, index, seed=0)
    model = stage.model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)
    x = random_inputs(batch, stage.input_shape, stage.vocabulary, torch.Generator().manual_seed(0))
    y = torch.randint(0, classes, (batch,))

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        return time.perf_counter() - started

    return step


def measure(
    parts: CutModel, index: int, batch: int, classes: int, artifacts: dict[str, Path], runs: int
) -> list[dict[str, Any]]:
    """One row for each engine, and one for eager PyTorch."""
    folders = {engine: folder / f"stage-{index + 1}" for engine, folder in artifacts.items()}
    devices = {engine: Device(engine, folder) for engine, folder in folders.items()}
    eager = eager_step(parts, index, batch, classes)
    eager()
    times: dict[str, list[float]] = {engine: [] for engine in ["eager", *devices]}
    for _ in range(runs):
        times["eager"].append(eager())
        for engine, device in devices.items():
            times[engine].append(device.step())
    rows = []
    for engine, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times["eager"], strict=True)]
        row: dict[str, Any] = {
            "engine": engine,
            "stage": index + 1,
            "seconds": statistics.median(seconds),
            "ratio_to_eager": statistics.median(ratios),
            "rss_growth_bytes": None,
            "artifact_bytes": None,
            "start_seconds": None,
        }
        if engine in devices:
            device = devices[engine]
            manifest, _ = read_artifact(folders[engine])
            own = [manifest.training, manifest.evaluation, *([manifest.update] if manifest.update else [])]
            size = sum(program.file.size for program in own)
            size += manifest.checkpoint.size if manifest.checkpoint else 0
            row |= {"rss_growth_bytes": device.growth(), "artifact_bytes": size}
            row["start_seconds"] = device.start_seconds
            device.close()
        rows.append(row)
    return rows


def main(
    model: Annotated[str, typer.Option(help="A built-in model.")] = "resnet18",
    batch: Annotated[int, typer.Option(min=1, help="Samples in a step.")] = 8,
    runs: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 15,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    stage_of: Annotated[Path | None, typer.Option("--serve", hidden=True)] = None,
) -> None:
    """Time a training step of each stage with each engine, side by side with eager PyTorch."""
    if stage_of is not None:
        serve(stage_of)
        return
    import torch

    from frostline.exporter.cutting import cut
    from frostline.exporter.models.lookup import build_model

    torch.set_num_threads(1)
    spec = build_model(model, {})
    parts = cut(spec.module, spec.default_blocks or 4, spec.example(2), spec.vocabulary)
    console = Console(stderr=True)
    engines = [
        each
        for each in ENGINES
        if each != "onnxruntime-training" or (TRAINING_PACKAGE / "onnxruntime").is_dir()
    ]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        artifacts = {engine: Path(folder) / engine for engine in engines}
        for engine, out in track(artifacts.items(), "compiling", console=console):
            export(engine, model, spec, batch, out)
        for index in track(range(len(parts.blocks)), "timing", console=console):
            rows += measure(parts, index, batch, spec.classes, artifacts, runs)
    if as_json:
        print(json.dumps({"model": model, "batch": batch, "rows": rows}, indent=1))
    else:
        show(model, batch, rows)


def show(model: str, batch: int, rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    table = Table(title=f"{model}, batch {batch}: one training step on one thread")
    for heading in ("stage", "engine", "ms", "to eager", "growth", "artifact", "start s"):
        table.add_column(
            heading, justify="left" if heading == "engine" else "right", no_wrap=heading == "engine"
        )
    for row in rows:
        sizes = [row["rss_growth_bytes"], row["artifact_bytes"]]
        table.add_row(
            str(row["stage"]),
            row["engine"],
            f"{1000 * row['seconds']:.1f}",
            f"{row['ratio_to_eager']:.2f}",
            *("" if size is None else format_size(size) for size in sizes),
            "" if row["start_seconds"] is None else f"{row['start_seconds']:.2f}",
        )
    for engine in dict.fromkeys(row["engine"] for row in rows):
        ratio = statistics.median(row["ratio_to_eager"] for row in rows if row["engine"] == engine)
        table.add_row("median", engine, "", f"{ratio:.2f}", "", "", "")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
