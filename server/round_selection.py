"""Plans a round: whom to ask in which order, how many, and until when. What was decided is written down with its reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from frostline.protocol.messages import BlobReference, Engine, Presence
from frostline.server.admission import OfferedStage, fastest_admitted, refusal
from frostline.server.config import RunConfig
from frostline.server.fleet import Fleet
from frostline.server.history import FleetHistory
from frostline.server.ledger import Ledger
from frostline.server.records import DeviceChoice, SelectionRecord
from frostline.server.round import RoundPlan
from frostline.server.run_folder import RunFolder
from frostline.server.selection import Candidate, Ranked, build_selector

LEAST_DEADLINE_SECONDS = 30.0
"""Deadlines that follow from predictions are no shorter: a first lease loads programs and computes features."""


class RoundSelection:
    """Applies a run's selector to the fleet as it stands, with what the ledger tells of every device's past."""

    def __init__(self, config: RunConfig, fleet: Fleet, ledger: Ledger, folder: RunFolder) -> None:
        self._config = config
        self._fleet = fleet
        self._ledger = ledger
        self._folder = folder
        self._selector = build_selector(config.selection, config.run.seed)
        self._history: FleetHistory | None = None
        self._explained: int | None = None

    def plan(
        self,
        number: int,
        run: str,
        offers: Sequence[OfferedStage],
        weights: Mapping[float, BlobReference],
        last_layer: Sequence[str],
        refused: Mapping[Engine, str] | None = None,
    ) -> RoundPlan:
        """What is fixed before round `number` begins; `offers` and `refused` may grow while it is on."""
        wanted = self._config.rounds.devices
        return RoundPlan(
            number=number,
            run=run,
            offers=offers,
            weights=weights,
            devices=wanted,
            surplus=self._surplus(wanted),
            deadline_seconds=self._deadline(offers, number, wanted),
            last_layer=last_layer,
            refused=refused if refused is not None else {},
        )

    def order(self, plan: RoundPlan) -> list[str]:
        """The devices that can train the stage in the order in which they are to be asked; writes down why."""
        ranked = self._rank(plan.offers, plan.number)
        wanted = plan.devices + plan.surplus
        presences = self._presences()
        places = {each.device: place for place, each in enumerate(ranked)}
        known = {each.device: each for each in ranked}
        choices = [
            self._choice(presence, known.get(device), places.get(device), wanted, plan)
            for device, presence in sorted(
                presences.items(), key=lambda item: (places.get(item[0], len(places)), item[0])
            )
        ]
        record = SelectionRecord(
            round=plan.number,
            stage=plan.offers[0].manifest.stage,
            stage_name=plan.offers[0].manifest.name,
            method=self._config.selection.method,
            devices_wanted=plan.devices,
            surplus=plan.surplus,
            dropout=self._past.dropout,
            deadline_seconds=plan.deadline_seconds,
            devices=choices,
        )
        # Once a round is under way, devices that were asked may have left, and no longer tell why they were.
        if plan.number != self._explained and ranked:
            self._folder.record_selection(record)
            self._explained = plan.number
        return [each.device for each in ranked]

    def learn(self, number: int) -> None:
        """Take in a round that was closed."""
        self._past.add_round(self._ledger, number, self._presences())

    @property
    def _past(self) -> FleetHistory:
        # Read once devices are there: a ledger has no presences, which put observed speeds in relation to announced ones.
        if self._history is None:
            self._history = FleetHistory.read(self._ledger, self._presences())
        return self._history

    def _presences(self) -> dict[str, Presence]:
        return {device: record.presence for device, record in self._fleet.devices.items()}

    def _rank(self, offers: Sequence[OfferedStage], number: int) -> list[Ranked]:
        candidates = []
        for presence in self._presences().values():
            offer = fastest_admitted(presence, offers)
            if offer is not None:
                seconds = self._past.predict_seconds(presence, offer, self._config.training.epochs)
                candidates.append(Candidate(presence, seconds))
        return self._selector.rank(candidates, self._past, number)

    def _surplus(self, wanted: int) -> int:
        """Leases beyond those wanted, so that as many come back after the dropout seen so far."""
        needed = round(wanted / (1 - self._past.dropout))
        return min(needed, math.floor(wanted * self._config.selection.surplus)) - wanted

    def _deadline(self, offers: Sequence[OfferedStage], number: int, wanted: int) -> float:
        longest = self._config.rounds.deadline_seconds
        factor = self._config.selection.deadline_factor
        chosen = {each.device for each in self._rank(offers, number)[:wanted]}
        presences = [presence for device, presence in self._presences().items() if device in chosen]
        expected = []
        for presence in presences:
            offer = fastest_admitted(presence, offers)
            # An announced speed is only a guess: deadlines are for devices that were seen at work.
            if offer is None or self._past.of(presence.device).rate is None:
                return longest
            expected.append(self._past.predict_seconds(presence, offer, self._config.training.epochs))
        known = [seconds for seconds in expected if seconds is not None]
        if not factor or not known or len(known) < len(expected):
            return longest
        return min(longest, max(LEAST_DEADLINE_SECONDS, factor * max(known)))

    def _choice(
        self,
        presence: Presence,
        ranked: Ranked | None,
        place: int | None,
        wanted: int,
        plan: RoundPlan,
    ) -> DeviceChoice:
        offer = fastest_admitted(presence, plan.offers)
        if ranked is None or place is None or offer is None:
            reason = refusal(presence, [each.manifest for each in plan.offers], plan.refused)
            return DeviceChoice(device=presence.device, reason=reason, memory_bytes=presence.memory_bytes)
        figures = asdict(ranked)
        return DeviceChoice(
            **figures,
            place=place,
            chosen=place < wanted,
            memory_bytes=presence.memory_bytes,
            planned_bytes=offer.manifest.planned.total,
            variant=offer.manifest.variant,
            predicted_seconds=self._past.predict_seconds(presence, offer, self._config.training.epochs),
        )
