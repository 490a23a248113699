"""The coordinator: drives a run from the first lease to the final model, and resumes one that was cut short."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from frostline.exporter.variant import WHOLE
from frostline.protocol.blobs import BlobStore
from frostline.protocol.connection import BrokerAddress
from frostline.protocol.errors import RunError
from frostline.protocol.manifest import StageManifest
from frostline.protocol.messages import BlobReference, Engine, Presence, RunAnnouncement
from frostline.protocol.sizes import format_size
from frostline.protocol.tensors import Array, encode_tensors
from frostline.protocol.topics import Topics
from frostline.server.aggregation import Aggregator
from frostline.server.config import RunConfig
from frostline.server.final_model import write_final_model
from frostline.server.gateway import Gateway
from frostline.server.ledger import Ledger, sqlite_url
from frostline.server.pace import PaceController, PaceReading
from frostline.server.records import RoundRecord, RunSummary, StageRecord
from frostline.server.report import write_report
from frostline.server.round import Round, RoundPlan, wait_for_change
from frostline.server.run_folder import RunFolder
from frostline.server.schedule import GrowingSchedule, PreparedStage
from frostline.server.selection import OfferedStage, UniformSelector, fastest_admitted
from frostline.server.snapshots import read_arrays, store_arrays


class RunObserver:
    """Told how a run goes; subclasses show it to a person. Does nothing by itself."""

    def on_note(self, text: str) -> None:
        """Something worth a line happened."""

    def on_stage(self, stage: StageRecord, stages: int) -> None:
        """A stage begins; its count of rounds is still 0."""

    def on_round(self, record: RoundRecord) -> None:
        """A round was closed."""


@dataclass
class _StageProgress:
    """Where a stage stands."""

    offers: list[OfferedStage]
    pace: PaceController
    weights: dict[str, Array]
    weights_reference: BlobReference
    rounds: int = 0
    budgets: set[tuple[Engine, int]] = field(default_factory=set)
    leased_content: dict[str, set[str]] = field(default_factory=dict)

    @property
    def manifest(self) -> StageManifest:
        """The stage trained in one piece, on the run's first engine."""
        return self.whole[self.offers[0].manifest.engine]

    @property
    def whole(self) -> dict[Engine, StageManifest]:
        """The same for each engine that it is compiled for."""
        manifests = [offer.manifest for offer in self.offers]
        return {each.engine: each for each in manifests if each.variant == WHOLE.name}


class Coordinator:
    """Runs one schedule over one fleet.

    Parameters
    ----------
    config, config_text : RunConfig, str
        The run, and the text it was read from, which is kept with the results.
    folder : RunFolder
        Where everything is written; its ledger may hold a run to go on with.
    schedule : GrowingSchedule
        The model's stages.
    address : BrokerAddress
        The broker.
    """

    def __init__(
        self,
        config: RunConfig,
        config_text: str,
        folder: RunFolder,
        schedule: GrowingSchedule,
        address: BrokerAddress,
        observer: RunObserver,
    ) -> None:
        self._config = config
        self._config_text = config_text
        self._folder = folder
        self._schedule = schedule
        self._observer = observer
        self._ledger = Ledger(sqlite_url(folder.ledger_path))
        self._weights = BlobStore(folder.weights_dir)
        self._updates = BlobStore(folder.updates_dir)
        topics = Topics(config.run.fleet)
        self._gateway = Gateway(address, topics, config.broker.chunk_size, self._updates)
        self._selector = UniformSelector(config.run.seed)
        self._stages: list[StageRecord] = []
        # A server killed between recording a round and closing it repeats the round, but not its record.
        self._last_recorded = max((record.round for record in folder.records()), default=-1)

    async def run(self) -> RunSummary:
        """Train every stage and write the final model, the summary and the report.

        Raises
        ------
        BrokerUnreachable
            If the broker cannot be reached.
        RunError
            If no device can train a stage, or too few return anything.
        """
        try:
            await self._gateway.open()
            run = self._ledger.run()
            whole = await self._compile()
            self._announce(run, "open")
            await self._gather()
            for index in range(len(self._schedule)):
                await self._run_stage(run, index)
            summary = await self._finish(whole)
            self._announce(run, "finished")
            return summary
        finally:
            self._gateway.content.withdraw_all()
            await self._gateway.close()
            self._ledger.close()
            self._folder.close()

    async def _compile(self) -> int:
        """Compile all stages before the first lease, so that every peak is known; returns the whole model's."""
        for index in range(len(self._schedule)):
            self._observer.on_note(f"compiling stage {index + 1} of {len(self._schedule)}")
            await asyncio.to_thread(self._schedule.plan, index)
        self._observer.on_note("planning the whole model, for comparison")
        return (await asyncio.to_thread(self._schedule.plan_whole_model)).total

    def _announce(self, run: str, state: str) -> None:
        announcement = RunAnnouncement.model_validate(
            {"run": run, "state": state, "chunk_size": self._config.broker.chunk_size}
        )
        self._gateway.announce(announcement)

    async def _gather(self) -> None:
        """Give the fleet time to join, so that the first round is not trained by whoever came first."""
        wanted = self._config.rounds.devices
        deadline = time.monotonic() + self._config.rounds.join_seconds
        self._observer.on_note(
            f"waiting for {wanted} devices, at most {self._config.rounds.join_seconds:.0f} s"
        )
        while len(self._online()) < wanted and time.monotonic() < deadline:
            await wait_for_change(self._gateway.changed)

    def _online(self) -> list[Presence]:
        records = self._gateway.devices.values()
        return [record.presence for record in records if record.presence.state == "online"]

    async def _run_stage(self, run: str, index: int) -> None:
        row = self._ledger.begin_stage(index, self._schedule.name(index))
        plan = self._schedule.plan(index)
        record = StageRecord(
            stage=index,
            name=self._schedule.name(index),
            planned_bytes=plan.total,
            memory=plan.model_dump(),
            rounds=row.rounds,
            frozen_by="pace",
        )
        if row.result is None:
            self._observer.on_stage(record, len(self._schedule))
            frozen_by, result = await self._train_stage(run, index)
            self._ledger.freeze_stage(index, frozen_by, result)
            row = self._ledger.begin_stage(index, self._schedule.name(index))
        assert row.result is not None
        reference = BlobReference.model_validate_json(row.result)
        weights = read_arrays(self._weights, reference)
        change = await asyncio.to_thread(self._schedule.freeze, index, weights)
        if change is not None:
            self._observer.on_note(
                f"{record.name}: in int8 the frozen block changes the accuracy by {change:+.1%}"
            )
        ended = {"rounds": row.rounds, "frozen_by": row.frozen_by, "int8_accuracy_change": change}
        self._stages.append(record.model_copy(update=ended))

    async def _train_stage(self, run: str, index: int) -> tuple[str, BlobReference]:
        """Run rounds until the pace controller freezes the block; returns why it was frozen, and its weights."""
        progress = self._begin(index)
        try:
            # Asked before each round: a server may have been killed between a stage's last round and its freezing.
            while True:
                if progress.pace.converged:
                    return "pace", progress.weights_reference
                if progress.rounds >= self._config.rounds.max_per_stage:
                    self._observer.on_note(
                        f"{self._schedule.name(index)}: frozen by the cap of {progress.rounds} rounds, not converged"
                    )
                    return "round_cap", progress.weights_reference
                await self._run_round(run, index, progress)
        finally:
            for offer in progress.offers:
                for reference in (offer.reference, *offer.manifest.files):
                    self._gateway.content.withdraw(reference)

    def _begin(self, index: int) -> _StageProgress:
        """Publish a stage and take up where the ledger says it stands."""
        prepared = self._schedule.prepare(index, self._config.training.engines[0])
        pace = PaceController(self._config.pace, self._config.run.seed)
        weights_reference = store_arrays(self._weights, prepared.weights)
        progress = _StageProgress([self._offer(prepared)], pace, prepared.weights, weights_reference)
        last = self._ledger.last_round(index)
        if last is not None:
            progress.rounds = self._ledger.begin_stage(index, self._schedule.name(index)).rounds
            progress.weights_reference = BlobReference.model_validate_json(last.result or last.weights)
            progress.weights = read_arrays(self._weights, progress.weights_reference)
            snapshot = self._ledger.last_pace(index)
            if snapshot is not None:
                pace.restore(read_arrays(self._weights, snapshot))
        return progress

    def _offer(self, prepared: PreparedStage) -> OfferedStage:
        for content in prepared.files.values():
            self._gateway.content.offer(content)
        return OfferedStage(prepared.manifest, self._gateway.content.offer(prepared.manifest.encode()))

    async def _offer_variants(self, index: int, progress: _StageProgress) -> None:
        """Offer the stage to every engine there is, and devices that cannot hold it in one piece what they can."""
        devices = [presence for presence in self._online() if presence.samples]
        served = self._config.training.engines
        wanted = {
            (engine, presence.memory_bytes)
            for presence in devices
            for engine in [each for each in presence.engines if each in served][:1]
        }
        for engine, budget in sorted(wanted - progress.budgets, key=lambda pair: -pair[1]):
            progress.budgets.add((engine, budget))
            if engine not in progress.whole:
                self._observer.on_note(f"{progress.manifest.name}: compiling for {engine}")
                whole = await asyncio.to_thread(self._schedule.prepare, index, engine)
                progress.offers.append(self._offer(whole))
            if budget < progress.whole[engine].planned.total and self._config.training.variants == "auto":
                await self._offer_within(index, progress, engine, budget)
        first = progress.offers[0].manifest.engine
        progress.offers.sort(
            key=lambda o: (o.manifest.engine != first, o.manifest.engine, -o.manifest.planned.total)
        )

    async def _offer_within(self, index: int, progress: _StageProgress, engine: Engine, budget: int) -> None:
        """Offer the fastest variant for an engine that fits a budget, unless it is offered already."""
        name = progress.manifest.name
        self._observer.on_note(f"{name}: looking for a variant within {format_size(budget)}")
        prepared = await asyncio.to_thread(self._schedule.prepare_within, index, engine, budget)
        offered = [(offer.manifest.engine, offer.manifest.variant) for offer in progress.offers]
        if prepared and (engine, prepared.manifest.variant) not in offered:
            progress.offers.append(self._offer(prepared))
            planned = format_size(prepared.manifest.planned.total)
            self._observer.on_note(f"{name}: offering {prepared.manifest.variant}, which takes {planned}")

    async def _run_round(self, run: str, index: int, progress: _StageProgress) -> None:
        number = self._ledger.rounds()
        started = time.monotonic()
        await self._offer_variants(index, progress)
        self._ledger.open_round(number, index, progress.weights_reference)
        weights_reference = self._gateway.content.offer(encode_tensors(progress.weights))
        plan = RoundPlan(number, run, list(progress.offers), weights_reference)
        aggregator = Aggregator(progress.weights)
        current = Round(plan, self._config, self._gateway, self._ledger, aggregator, self._updates)
        try:
            await self._collect(current, plan, number)
        finally:
            self._gateway.content.withdraw(weights_reference)
        for note in current.notes:
            self._observer.on_note(note)

        before = progress.weights_reference
        progress.weights = aggregator.result()
        progress.weights_reference = store_arrays(self._weights, progress.weights)
        parameters = {spec.name for spec in progress.manifest.parameters if spec.name.startswith("block.")}
        reading = progress.pace.observe({n: w for n, w in progress.weights.items() if n in parameters})
        accuracy = await asyncio.to_thread(self._schedule.accuracy, index, progress.weights)
        pace_reference = store_arrays(self._weights, progress.pace.snapshot())
        if number > self._last_recorded:
            self._record(current, reading, accuracy, index, number, progress, time.monotonic() - started)
        replaced = {before.sha256: before}
        if (last_pace := self._ledger.last_pace(index)) is not None:
            replaced[last_pace.sha256] = last_pace
        self._ledger.close_round(number, progress.weights_reference, pace_reference)
        self._updates.clear()
        for reference in replaced.values():
            if reference not in (progress.weights_reference, pace_reference):
                self._weights.remove(reference)
        progress.rounds += 1

    async def _collect(self, current: Round, plan: RoundPlan, number: int) -> None:
        """Run the round, again if need be, until it has the updates it needs."""
        waiting_since = time.monotonic()
        while True:
            devices = self._gateway.devices.items()
            eligible = [device for device, r in devices if fastest_admitted(r.presence, plan.offers)]
            asked = current.asked
            await current.run(iter(self._selector.order(eligible, number)))
            if current.asked > asked:
                waiting_since = time.monotonic()
            if len(current.metrics) >= self._config.rounds.minimum_updates:
                return
            if time.monotonic() - waiting_since >= self._config.rounds.join_seconds:
                raise RunError(
                    self._explain_shortage(plan.offers[-1].manifest, len(eligible), len(current.metrics))
                )
            await wait_for_change(self._gateway.changed)

    def _explain_shortage(self, manifest: StageManifest, eligible: int, returned: int) -> str:
        online = self._online()
        waited = f"within {self._config.rounds.join_seconds:.0f} s"
        if not online:
            return f"no device joined fleet {self._config.run.fleet!r} {waited}; start some with frostline device"
        if not eligible:
            largest = max(presence.memory_bytes for presence in online)
            return (
                f"stage {manifest.name!r} needs {manifest.planned.total} bytes and none of the {len(online)} devices "
                f"online can train it: the largest budget is {largest} bytes; add a device with more memory, or cut "
                "the model into more blocks or use a smaller batch"
            )
        needed = self._config.rounds.minimum_updates
        return f"stage {manifest.name!r}: {returned} of at least {needed} updates came back {waited}"

    def _record(
        self,
        current: Round,
        reading: PaceReading,
        accuracy: float | None,
        index: int,
        number: int,
        progress: _StageProgress,
        seconds: float,
    ) -> None:
        metrics = current.metrics
        evaluated = sum(m.evaluated for m in metrics)
        on_devices = sum(m.correct for m in metrics) / evaluated if evaluated else None
        capped = progress.rounds + 1 >= self._config.rounds.max_per_stage
        record = RoundRecord(
            stage=index,
            stage_name=self._schedule.name(index),
            stages=len(self._schedule),
            round=number,
            round_in_stage=progress.rounds,
            loss=float(np.average([m.loss for m in metrics], weights=[m.samples for m in metrics])),
            accuracy=accuracy if accuracy is not None else on_devices,
            accuracy_source="server" if accuracy is not None else "devices" if evaluated else "none",
            effective_movement=reading.effective_movement,
            movement_slope=reading.slope,
            speed=reading.speed,
            frozen=reading.converged or capped,
            devices_selected=current.asked,
            devices_finished=len(metrics),
            samples=sum(m.samples for m in metrics),
            bytes_down=self._bytes_down(current, progress),
            bytes_up=current.bytes_up,
            planned_bytes=progress.manifest.planned.total,
            variants=Counter(current.variants[device].manifest.variant for device in current.accepted_by),
            engines=Counter(current.variants[device].manifest.engine for device in current.accepted_by),
            seconds=seconds,
        )
        self._folder.record(record)
        self._observer.on_round(record)

    def _bytes_down(self, current: Round, progress: _StageProgress) -> int:
        """Payload the devices of a round fetched: the weights each time, the programs once a device."""
        total = 0
        for device in current.accepted_by:
            offer = current.variants[device]
            known = progress.leased_content.setdefault(device, set())
            wanted = {r.sha256: r.size for r in [offer.reference, *offer.manifest.files]}
            total += sum(size for sha256, size in wanted.items() if sha256 not in known)
            total += progress.weights_reference.size
            known.update(wanted)
        return total

    async def _finish(self, whole: int) -> RunSummary:
        records = self._folder.records()
        model = self._schedule.trained_model()
        example = self._schedule.example(self._config.training.batch)
        await asyncio.to_thread(write_final_model, self._folder, model, example)
        summary = RunSummary(
            run=self._folder.path.name,
            accuracy=records[-1].accuracy,
            rounds=len(records),
            blocks_frozen=sum(stage.frozen_by == "pace" for stage in self._stages),
            blocks=len(self._stages),
            peak_planned_bytes=max(stage.planned_bytes for stage in self._stages),
            full_model_planned_bytes=whole,
            bytes_down=sum(record.bytes_down for record in records),
            bytes_up=sum(record.bytes_up for record in records),
            seconds=sum(record.seconds for record in records),
            stages=self._stages,
        )
        self._folder.summary_path.write_text(summary.model_dump_json(indent=2) + "\n", encoding="utf-8")
        write_report(self._folder, summary, records, self._config_text)
        self._ledger.finish()
        return summary
