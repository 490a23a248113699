"""Simulated runs that are done in a moment: a narrow CNN on a part of the digits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from frostline.emulator.emulation import split_samples
from frostline.emulator.simulation import simulate
from frostline.server.assembly import Run, assemble, broker_address
from frostline.server.config import Document, merge, parse_config
from frostline.server.coordinator import RunObserver
from frostline.server.records import RunSummary

DOCUMENT: Document = {
    "model": {"name": "small_cnn", "blocks": 2, "options": {"width": 4}},
    "data": {"train": "digits", "test": "digits", "train_samples": 160, "test_samples": 100},
    "training": {"batch": 8, "engines": ["onnxruntime"]},
    "rounds": {"devices": 2, "max_per_stage": 2, "join_seconds": 30},
    "selection": {"method": "uniform"},
    "fleet": {"devices": 4, "memory": ["200%"], "engines": ["onnxruntime"]},
}
"""Two stages of two rounds, each of two of four devices."""


def document(changes: Mapping[str, Document] | None = None) -> Document:
    """The tables of a run, with single keys changed."""
    return merge(DOCUMENT, changes or {})


def write_run(path: Path, changes: Mapping[str, Document] | None = None) -> Path:
    """The same as a file."""
    path.write_text(tomli_w.dumps(document(changes)), encoding="utf-8")
    return path


def prepare(
    out: Path,
    compiled: Path,
    changes: Mapping[str, Document] | None = None,
    observer: RunObserver | None = None,
) -> Run:
    """A run that is ready to start; what it compiles is kept in `compiled`."""
    text = tomli_w.dumps(document(changes))
    config = parse_config(text, "run.toml")
    address = broker_address(config)
    return assemble(config, text, out, address, observer or RunObserver(), resume=False, compiled=compiled)


def finish(run: Run, profile: Path | None = None) -> RunSummary:
    """Simulate it to its end."""
    return simulate(run, split_samples(run.config), profile)


def rows(out: Path) -> list[dict[str, Any]]:
    """The records of its rounds as they are on disk."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
