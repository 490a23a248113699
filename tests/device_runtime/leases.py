"""Leases and tasks as the tests of training need them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from frostline.device_runtime.training import TrainingTask
from frostline.protocol.messages import BlobReference, Lease


def lease_of(manifest: BlobReference, weights: BlobReference, **changes: Any) -> Lease:
    """A lease of one epoch; `changes` are its other fields."""
    fields: dict[str, Any] = {
        "run": "1" * 32,
        "lease": "2" * 32,
        "round": 0,
        "manifest": manifest,
        "weights": weights,
        "epochs": 1,
        "learning_rate": 0.05,
        "seed": 0,
        "deadline_seconds": 600.0,
    }
    return Lease(**fields | changes)


def leased(task: TrainingTask, **changes: Any) -> TrainingTask:
    """The task with other values in its lease, whether or not a lease may hold them."""
    return replace(task, lease=task.lease.model_copy(update=changes))
