"""Stages and devices as the server's tests need them: everything has a default but what a test is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from frostline.protocol.blobs import reference_to
from frostline.protocol.manifest import PlannedMemory, Program, StageManifest, TensorSpec
from frostline.protocol.messages import Presence
from frostline.server.admission import OfferedStage

BATCH = 4


def program(content: bytes = b"program", shape: Sequence[int] = (2,)) -> Program:
    inputs = [TensorSpec(name="x", shape=(BATCH, *shape))]
    return Program(file=reference_to(content), inputs=inputs, outputs=[], arena_bytes=0)


def planned(arena: int = 0, **kinds: int) -> PlannedMemory:
    nothing = dict.fromkeys(
        ("parameters", "statistics", "optimizer_state", "received", "batch", "program"), 0
    )
    return PlannedMemory(**{"arena": arena, **nothing, **kinds})


def stage_manifest(memory: int = 0, /, **changes: Any) -> StageManifest:
    """A stage that takes so many bytes; `changes` are fields of the manifest."""
    training = changes.get("training", program())
    fields: dict[str, Any] = {
        "stage": 0,
        "stages": 1,
        "name": "block",
        "engine": "executorch",
        "variant": "whole",
        "batch": BATCH,
        "micro_batches": 1,
        "classes": 2,
        "parameters": [],
        "statistics": [],
        "optimizer_state": [],
        "received": [],
        "training": training,
        "update": None,
        "evaluation": training,
        "prefix": [],
        "planned": planned(memory),
    }
    return StageManifest(**fields | changes)


def offered(manifest: StageManifest, width: float = 1.0) -> OfferedStage:
    return OfferedStage(manifest, reference_to(manifest.encode()), width)


def online(device: str = "phone", **changes: Any) -> Presence:
    fields: dict[str, Any] = {
        "device": device,
        "session": "0" * 32,
        "state": "online",
        "memory_bytes": 1000,
        "engines": ["executorch"],
        "samples": 10,
    }
    return Presence(**fields | changes)
