"""The forms of one stage that devices can fetch: compiled as the fleet turns out to need them, while rounds go on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

from frostline.protocol.errors import FrostlineError
from frostline.protocol.manifest import StageManifest
from frostline.protocol.messages import Engine, Presence
from frostline.protocol.sizes import format_size
from frostline.server.admission import OfferedStage, fastest_admitted
from frostline.server.config import TrainingTable
from frostline.server.fleet import Content
from frostline.server.notices import Notices, named
from frostline.server.schedule import PreparedStage, Schedule


class StageOffers:
    """What is on offer of one stage.

    What is wanted is compiled in the background, one form after another. A form that cannot be compiled is one fewer; an
    engine that the stage cannot be compiled for in one piece is left out of it.

    Parameters
    ----------
    limit : int or None
        Bytes that training may take at most; a form that takes more is offered only if none takes less.
    notices : Notices
        Told what is being compiled, and what cannot be.

    Attributes
    ----------
    offers : list of OfferedStage
        The forms, in the order of the run's engines, then fastest first; grows while rounds go on.
    refused : dict of Engine to str
        Why the stage cannot be compiled for an engine.
    """

    def __init__(
        self,
        index: int,
        schedule: Schedule,
        training: TrainingTable,
        content: Content,
        limit: int | None,
        notices: Notices,
    ) -> None:
        self._index = index
        self._name = schedule.name(index)
        self._schedule = schedule
        self._training = training
        self._content = content
        self._limit = limit
        self._notices = notices
        self._whole: dict[Engine, StageManifest] = {}
        self._wanted: list[tuple[Engine, int | None]] = []
        self._asked: set[tuple[Engine, int | None]] = set()
        self._answered: dict[Engine, list[range]] = {}
        self._devices: Sequence[Presence] = []
        self._explained: set[Engine] = set()
        self._compiling: asyncio.Task[None] | None = None
        self.offers: list[OfferedStage] = []
        self.refused: dict[Engine, str] = {}

    @property
    def manifest(self) -> StageManifest:
        """The fastest form for the first of the run's engines that there is one for."""
        return self.offers[0].manifest

    @property
    def compiling(self) -> bool:
        """Whether a form is being compiled that is not on offer yet."""
        return self._compiling is not None and not self._compiling.done()

    def begin(self) -> None:
        """Want the stage in one piece for the run's first engine, which memory is planned for."""
        self._want([(self._training.engines[0], None)])

    def widen(self, presences: Iterable[Presence]) -> None:
        """Want what lets these devices take part: their engine, and a form they can hold. Returns at once."""
        self._devices = list(presences)
        wanted: set[tuple[Engine, int]] = set()
        for presence in self._devices:
            engine = self.engine_of(presence)
            if engine is not None:
                budget = presence.memory_bytes
                wanted.add((engine, budget if self._limit is None else min(budget, self._limit)))
        order = self._training.engines.index
        ordered: list[tuple[Engine, int]] = sorted(wanted, key=lambda pair: (order(pair[0]), -pair[1]))
        self._want(ordered)

    async def settle(self, seconds: float | None = None) -> None:
        """Wait until all that is wanted is on offer or refused; at most `seconds`."""
        if self._compiling is not None:
            await asyncio.wait([self._compiling], timeout=seconds)
            if self._compiling.done():
                self._compiling.result()

    def engine_of(self, presence: Presence) -> Engine | None:
        """The first of a device's engines that it can be served for, as far as is known; None if there is none."""
        served = (each for each in presence.engines if each in self._training.engines)
        return next((each for each in served if each not in self.refused), None)

    def leave_out(self, presences: Iterable[Presence]) -> None:
        """Say which of these devices cannot hold any form that is offered for their engine; each stage says so once."""
        by_engine: dict[Engine, list[Presence]] = {}
        for presence in self._too_small(presences):
            engine = self.engine_of(presence)
            if engine is not None and engine not in self._explained:
                by_engine.setdefault(engine, []).append(presence)
        for engine, devices in by_engine.items():
            offered = [each.manifest for each in self.offers if each.manifest.engine == engine]
            least = min((manifest.planned.total for manifest in offered), default=0)
            most = max(presence.memory_bytes for presence in devices)
            self._notices.tell_once(
                f"{self._name}: left out of this stage: {named(each.device for each in devices)}, with "
                f"{'at most ' if len(devices) > 1 else ''}{format_size(most)} of memory; no form of it for {engine} is "
                f"that small, the smallest offered takes {format_size(least)}. Give them more memory, cut the model "
                "into more blocks or use a smaller batch",
                "memory",
                engine,
                str(self._index),
            )

    async def withdraw(self) -> None:
        """Take everything off the broker; what is still being compiled is dropped."""
        if self._compiling is not None and self.compiling:
            self._compiling.cancel()
            await asyncio.wait([self._compiling])
        for offer in self.offers:
            for reference in (offer.reference, *offer.manifest.files):
                self._content.withdraw(reference)

    def _want(self, wanted: Sequence[tuple[Engine, int | None]]) -> None:
        fresh = [each for each in wanted if each not in self._asked]
        self._asked.update(fresh)
        self._wanted.extend(fresh)
        if self._wanted and not self.compiling:
            self._compiling = asyncio.create_task(self._compile_wanted())

    async def _compile_wanted(self) -> None:
        while self._wanted:
            engine, budget = self._wanted.pop(0)
            if engine in self.refused:
                continue
            try:
                if engine not in self._whole:
                    await self._offer_whole(engine)
                if budget is not None:
                    await self._offer_within(engine, budget)
            except FrostlineError as error:
                self._refuse(engine, str(error))

    async def _offer_whole(self, engine: Engine) -> None:
        """Offer the fastest form for an engine that the limit allows, and the narrower ones."""
        if self.offers or engine != self._training.engines[0]:
            self._notices.tell(f"{self._name}: compiling for {engine}")
        whole = await asyncio.to_thread(self._schedule.prepare, self._index, engine)
        forms = [await self._within_limit(whole, engine)]
        forms += await asyncio.to_thread(self._schedule.narrower, self._index, engine)
        self._whole[engine] = whole.manifest
        for form in forms:
            self._offer(form)

    async def _within_limit(self, whole: PreparedStage, engine: Engine) -> PreparedStage:
        if self._limit is None or whole.manifest.planned.total <= self._limit:
            return whole
        fitting = await asyncio.to_thread(self._schedule.prepare_within, self._index, engine, self._limit)
        if fitting is not None:
            return fitting
        smallest = await asyncio.to_thread(self._schedule.smallest, self._index, engine)
        self._notices.tell(
            f"{self._name}: no form stays within training.memory_limit, which is {format_size(self._limit)}; the "
            f"smallest takes {format_size(smallest.manifest.planned.total)}"
        )
        return smallest

    async def _offer_within(self, engine: Engine, budget: int) -> None:
        """Offer the fastest form for an engine that fits a budget, unless it is offered already."""
        if budget >= self._whole[engine].planned.total or self._training.variants == "whole":
            return
        # What is fastest within one budget is so within every smaller one that it fits.
        answered = self._answered.setdefault(engine, [])
        if any(budget in budgets for budgets in answered):
            return
        prepared = await asyncio.to_thread(self._schedule.prepare_within, self._index, engine, budget)
        answered.append(range(prepared.manifest.planned.total if prepared else 0, budget + 1))
        if prepared and self._offer(prepared):
            planned = format_size(prepared.manifest.planned.total)
            self._notices.tell(f"{self._name}: offering {prepared.manifest.variant}, which takes {planned}")

    def _offer(self, prepared: PreparedStage) -> bool:
        """Put a form on offer; False if it is already."""
        manifest = prepared.manifest
        offered = [(o.manifest.engine, o.manifest.variant, o.width) for o in self.offers]
        if (manifest.engine, manifest.variant, prepared.width) in offered:
            return False
        for content in prepared.files.values():
            self._content.offer(content)
        reference = self._content.offer(manifest.encode())
        self.offers.append(OfferedStage(manifest, reference, prepared.width))
        order = self._training.engines
        self.offers.sort(key=lambda o: (order.index(o.manifest.engine), -o.manifest.planned.total))
        return True

    def _refuse(self, engine: Engine, message: str) -> None:
        """Leave an engine out, or if the stage is offered for it, only the form that could not be compiled."""
        if engine not in self._whole:
            self.refused[engine] = tell_refused(self._notices, self._name, engine, self._devices, message)
            return
        concerned = [each.device for each in self._too_small(self._devices) if self.engine_of(each) == engine]
        if concerned:
            self._explained.add(engine)
            reason = _reason(self._name, message)
            self._notices.tell_once(
                f"{self._name}: left out of this stage: {named(concerned)}, since a form small enough for {engine} cannot be "
                f"compiled: {reason}. The others go on",
                "form",
                engine,
                reason,
            )

    def _too_small(self, presences: Iterable[Presence]) -> list[Presence]:
        """Those of the devices whose engine is served that hold no form on offer."""
        return [
            presence
            for presence in presences
            if self.engine_of(presence) is not None and fastest_admitted(presence, self.offers) is None
        ]


def tell_refused(
    notices: Notices, stage: str, engine: Engine, devices: Iterable[Presence], message: str
) -> str:
    """Say once that a stage cannot be compiled for an engine; returns the reason.

    Parameters
    ----------
    devices : iterable of Presence
        Those online; they are named if the engine is the one they name first.
    message : str
        Of the compiler's error.
    """
    reason = _reason(stage, message)
    names = [each.device for each in devices if engine in each.engines]
    who = named(names) if names else "devices that have no other engine"
    notices.tell_once(
        f"{stage}: cannot be compiled for {engine}, so {who} will not train it with that: {reason}. Change what this names in "
        "the model, or give these devices another engine of training.engines; the others go on",
        "engine",
        engine,
        reason,
    )
    return reason


def explain_refused(stage: str, refused: Mapping[Engine, str]) -> str:
    """Why nobody can train a stage."""
    reasons = "; ".join(f"for {engine}: {reason}" for engine, reason in refused.items())
    return f"stage {stage!r} cannot be compiled for any engine that could train it: {reasons}"


def _reason(stage: str, message: str) -> str:
    """What an error says beside the name of the stage, so that the same of another stage is the same."""
    return message.removeprefix(f"stage {stage!r} cannot be compiled: ").removeprefix(f"stage {stage!r}: ")
