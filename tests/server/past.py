"""Rounds that were closed, as a ledger tells of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frostline.protocol.messages import BlobReference, Presence, TrainingMetrics
from frostline.server.history import FleetHistory, Observation
from frostline.server.ledger import AcceptedUpdate, Ledger, NewLease

REFERENCE = BlobReference(sha256="0" * 64, size=1)
METRICS = set(TrainingMetrics.model_fields)


class Past:
    """A ledger that rounds are written to."""

    def __init__(self, folder: Path) -> None:
        self.ledger = Ledger(f"sqlite:///{folder}/ledger.sqlite")
        self.ledger.begin_stage(0, "block")
        self.history = FleetHistory()
        self.presences: dict[str, Presence] = {}
        self.leases = 0

    def round(self, **devices: str | dict[str, Any]) -> None:
        """Close a round: how each device's lease ended, or what its update showed."""
        number = self.ledger.rounds()
        self.ledger.open_round(number, 0, REFERENCE)
        for device, ended in devices.items():
            self.leases += 1
            lease = f"{self.leases:032x}"
            self.ledger.add_leases(number, [NewLease(lease, device)])
            if isinstance(ended, str):
                self.ledger.settle_lease(lease, ended)
                continue
            defaults = {"samples": 10, "steps": 10, "loss": 1.0, "seconds": 2.0}
            metrics = TrainingMetrics(**defaults | {k: v for k, v in ended.items() if k in METRICS})
            observation = Observation(**{k: v for k, v in ended.items() if k not in METRICS})
            update = AcceptedUpdate(lease, lease, device, REFERENCE, metrics, observation.model_dump_json())
            self.ledger.add_update(update, number)
        self.ledger.close_round(number, REFERENCE, REFERENCE)
        self.history.add_round(self.ledger, number, self.presences)
