"""The forms of one stage that devices can fetch: compiled as the fleet turns out to need them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from frostline.protocol.manifest import StageManifest
from frostline.protocol.messages import Engine, Presence
from frostline.protocol.sizes import format_size
from frostline.protocol.tensors import Array
from frostline.server.admission import OfferedStage
from frostline.server.config import TrainingTable
from frostline.server.fleet import Content
from frostline.server.schedule import PreparedStage, Schedule


class StageOffers:
    """What is on offer of one stage.

    Parameters
    ----------
    limit : int or None
        Bytes that training may take at most; a form that takes more is offered only if none takes less.
    notify : callable
        Told what is being compiled, a line for a person.

    Attributes
    ----------
    offers : list of OfferedStage
        The forms, the run's first engine first, then fastest first.
    weights : dict of str to array
        What the stage starts from.
    """

    def __init__(
        self,
        index: int,
        schedule: Schedule,
        training: TrainingTable,
        content: Content,
        limit: int | None,
        notify: Callable[[str], None],
    ) -> None:
        self._index = index
        self._schedule = schedule
        self._training = training
        self._content = content
        self._limit = limit
        self._notify = notify
        self._whole: dict[Engine, StageManifest] = {}
        self._budgets: set[tuple[Engine, int]] = set()
        self.offers: list[OfferedStage] = []
        self.weights = self._begin(training.engines[0])

    @property
    def manifest(self) -> StageManifest:
        """The fastest form for the run's first engine."""
        return self.offers[0].manifest

    async def widen(self, presences: Iterable[Presence]) -> None:
        """Offer the stage to every engine there is, and devices that cannot hold it in one piece what they can."""
        served = self._training.engines
        wanted = {
            (
                engine,
                presence.memory_bytes if self._limit is None else min(presence.memory_bytes, self._limit),
            )
            for presence in presences
            for engine in [each for each in presence.engines if each in served][:1]
        }
        for engine, budget in sorted(wanted - self._budgets, key=lambda pair: -pair[1]):
            self._budgets.add((engine, budget))
            if engine not in self._whole:
                self._notify(f"{self.manifest.name}: compiling for {engine}")
                await asyncio.to_thread(self._begin, engine)
            if budget < self._whole[engine].planned.total and self._training.variants == "auto":
                await self._offer_within(engine, budget)

    def withdraw(self) -> None:
        """Take everything off the broker."""
        for offer in self.offers:
            for reference in (offer.reference, *offer.manifest.files):
                self._content.withdraw(reference)

    def _begin(self, engine: Engine) -> dict[str, Array]:
        """Offer the fastest form for an engine that the limit allows."""
        whole = self._schedule.prepare(self._index, engine)
        self._whole[engine] = whole.manifest
        self._offer(self._within_limit(whole, engine))
        for form in self._schedule.narrower(self._index, engine):
            self._offer(form)
        return whole.weights

    def _within_limit(self, whole: PreparedStage, engine: Engine) -> PreparedStage:
        if self._limit is None or whole.manifest.planned.total <= self._limit:
            return whole
        fitting = self._schedule.prepare_within(self._index, engine, self._limit)
        if fitting is not None:
            return fitting
        smallest = self._schedule.smallest(self._index, engine)
        self._notify(
            f"{whole.manifest.name}: no form stays within training.memory_limit, which is "
            f"{format_size(self._limit)}; the smallest takes {format_size(smallest.manifest.planned.total)}"
        )
        return smallest

    async def _offer_within(self, engine: Engine, budget: int) -> None:
        """Offer the fastest form for an engine that fits a budget, unless it is offered already."""
        prepared = await asyncio.to_thread(self._schedule.prepare_within, self._index, engine, budget)
        if prepared and self._offer(prepared):
            planned = format_size(prepared.manifest.planned.total)
            self._notify(f"{self.manifest.name}: offering {prepared.manifest.variant}, which takes {planned}")

    def _offer(self, prepared: PreparedStage) -> bool:
        """Put a form on offer; False if it is already."""
        manifest = prepared.manifest
        offered = [(o.manifest.engine, o.manifest.variant, o.width) for o in self.offers]
        if (manifest.engine, manifest.variant, prepared.width) in offered:
            return False
        for content in prepared.files.values():
            self._content.offer(content)
        reference = self._content.offer(prepared.manifest.encode())
        self.offers.append(OfferedStage(prepared.manifest, reference, prepared.width))
        first = self.offers[0].manifest.engine
        self.offers.sort(
            key=lambda o: (o.manifest.engine != first, o.manifest.engine, -o.manifest.planned.total)
        )
        return True
