"""The coordinator: drives a run from the first lease to the final model, and resumes one that was cut short."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from frostline.protocol.blobs import BlobStore
from frostline.protocol.errors import RunError
from frostline.protocol.manifest import PlannedMemory
from frostline.protocol.messages import BlobReference, Presence, RunAnnouncement
from frostline.protocol.sizes import format_size, parse_share
from frostline.protocol.tensors import Array, encode_tensors
from frostline.server.aggregation import Aggregator, narrowed
from frostline.server.config import RunConfig
from frostline.server.final_model import write_final_model
from frostline.server.fleet import Fleet
from frostline.server.ledger import Ledger
from frostline.server.offering import StageOffers
from frostline.server.pace import PaceController, PaceReading
from frostline.server.records import RoundRecord, RunSummary, StageRecord
from frostline.server.report import write_report
from frostline.server.round import Round, RoundPlan, loop_time, wait_for_change
from frostline.server.round_selection import RoundSelection
from frostline.server.run_folder import RunFolder
from frostline.server.schedule import Schedule
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
    """Where a stage stands; `cap` is the number of rounds it ends at whether it rests or not."""

    offers: StageOffers
    pace: PaceController
    weights: dict[str, Array]
    weights_reference: BlobReference
    cap: int
    rounds: int
    leased_content: dict[str, set[str]] = field(default_factory=dict)


class Coordinator:
    """Runs one schedule over one fleet.

    Parameters
    ----------
    config, config_text : RunConfig, str
        The run, and the text it was read from, which is kept with the results.
    folder : RunFolder
        Where everything is written.
    ledger : Ledger
        The run's journal, which may hold a run to go on with; closed when the run ends.
    schedule : Schedule
        The model's stages.
    fleet : Fleet
        The devices.
    """

    def __init__(
        self,
        config: RunConfig,
        config_text: str,
        folder: RunFolder,
        ledger: Ledger,
        schedule: Schedule,
        fleet: Fleet,
        observer: RunObserver,
    ) -> None:
        self._config = config
        self._config_text = config_text
        self._folder = folder
        self._schedule = schedule
        self._observer = observer
        self._ledger = ledger
        self._weights = BlobStore(folder.weights_dir)
        self._updates = BlobStore(folder.updates_dir)
        self._fleet = fleet
        self._selection = RoundSelection(config, fleet, self._ledger, folder)
        self._limit: int | None = None
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
            # A run that is gone on with had its broker once, which may only be restarting too.
            if not await self._fleet.open(patient=self._ledger.holds_run()):
                self._observer.on_note("the broker does not answer; trying until it does")
            run = self._ledger.run()
            whole = await self._compile()
            self._announce(run, "open")
            await self._gather()
            await self._run_stages(run)
            summary = await self._finish(whole)
            self._announce(run, "finished")
            return summary
        finally:
            self._fleet.content.withdraw_all()
            await self._fleet.close()
            self._ledger.close()
            self._folder.close()

    async def _compile(self) -> int:
        """Compile all stages before the first lease, so that every peak is known; returns the whole model's."""
        for index in range(len(self._schedule)):
            self._observer.on_note(f"compiling stage {index + 1} of {len(self._schedule)}")
            await asyncio.to_thread(self._schedule.plan, index)
        self._observer.on_note("planning the whole model, for comparison")
        whole = (await asyncio.to_thread(self._schedule.plan_whole_model)).total
        limit = self._config.training.memory_limit
        self._limit = None if limit is None else parse_share(limit, whole, "training.memory_limit")
        return whole

    def _announce(self, run: str, state: str) -> None:
        announcement = RunAnnouncement.model_validate(
            {
                "run": run,
                "state": state,
                "asks_class_counts": self._config.selection.class_counts,
                "chunk_size": self._config.broker.chunk_size,
            }
        )
        self._fleet.announce(announcement)

    async def _gather(self) -> None:
        """Give the fleet time to join, so that the first round is not trained by whoever came first."""
        wanted = self._config.rounds.devices
        deadline = loop_time() + self._config.rounds.join_seconds
        self._observer.on_note(
            f"waiting for {wanted} devices, at most {self._config.rounds.join_seconds:.0f} s"
        )
        while len(self._online()) < wanted and loop_time() < deadline:
            self._fleet.remind()
            await wait_for_change(self._fleet.changed)

    def _online(self) -> list[Presence]:
        records = self._fleet.devices.values()
        return [record.presence for record in records if record.presence.state == "online"]

    async def _run_stages(self, run: str) -> None:
        """Train the stages in order; a block whose freezing cost accuracy is trained once more."""
        index = 0
        while index < len(self._schedule):
            await self._run_stage(run, index)
            if self._fell_back(index):
                previous = self._schedule.name(index - 1)
                self._observer.on_note(
                    f"{self._schedule.name(index)} ended less accurate than {previous}, which is trained once more"
                )
                self._ledger.reopen_stage(index - 1)
                self._stages = self._stages[:-2]
                self._schedule.reopen(index - 1)
                index -= 1
            else:
                index += 1

    def _fell_back(self, index: int) -> bool:
        """Whether a stage ended less accurate than the one before, whose block was not trained again yet."""
        if index == 0:
            return False
        if self._ledger.begin_stage(index - 1, self._schedule.name(index - 1)).reopened:
            return False
        accuracy = {record.stage: record.accuracy for record in self._folder.records()}
        before, after = accuracy.get(index - 1), accuracy.get(index)
        return before is not None and after is not None and after < before - self._config.pace.rollback

    async def _run_stage(self, run: str, index: int) -> None:
        row = self._ledger.begin_stage(index, self._schedule.name(index))
        if row.result is None:
            await self._train_stage(run, index)
            row = self._ledger.begin_stage(index, self._schedule.name(index))
        assert row.result is not None and row.planned is not None
        weights = read_arrays(self._weights, BlobReference.model_validate_json(row.result))
        change = await asyncio.to_thread(self._schedule.freeze, index, weights)
        if change is not None:
            self._observer.on_note(
                f"{row.name}: in int8 the frozen block changes the accuracy by {change:+.1%}"
            )
        stage = self._stage_record(index, PlannedMemory.model_validate_json(row.planned))
        ended = {
            "rounds": row.rounds,
            "frozen_by": row.frozen_by,
            "reopened": row.reopened,
            "int8_accuracy_change": change,
        }
        self._stages.append(stage.model_copy(update=ended))

    def _stage_record(self, index: int, planned: PlannedMemory) -> StageRecord:
        return StageRecord(
            stage=index,
            name=self._schedule.name(index),
            planned_bytes=planned.total,
            memory=planned.model_dump(),
            rounds=0,
            frozen_by="pace",
        )

    async def _train_stage(self, run: str, index: int) -> None:
        """Run rounds until the pace controller freezes the block, or until there were as many as there may be."""
        progress = await self._begin(index)
        planned = progress.offers.manifest.planned
        self._observer.on_stage(self._stage_record(index, planned), len(self._schedule))
        try:
            # Asked before each round: a server may have been killed between a stage's last round and its freezing.
            while not progress.pace.converged and progress.rounds < progress.cap:
                await self._run_round(run, index, progress)
        finally:
            progress.offers.withdraw()
        if not progress.pace.converged:
            self._observer.on_note(
                f"{self._schedule.name(index)}: frozen by the cap of {progress.rounds} rounds, not converged"
            )
        frozen_by = "pace" if progress.pace.converged else "round_cap"
        self._ledger.freeze_stage(index, frozen_by, progress.weights_reference, planned)

    async def _begin(self, index: int) -> _StageProgress:
        """Publish a stage and take up where the ledger says it stands."""
        training, content = self._config.training, self._fleet.content
        offers = await asyncio.to_thread(
            StageOffers, index, self._schedule, training, content, self._limit, self._observer.on_note
        )
        pace = PaceController(self._config.pace, self._config.run.seed)
        row = self._ledger.begin_stage(index, self._schedule.name(index))
        cap = row.rounds_before + self._config.rounds.max_per_stage
        progress = _StageProgress(
            offers, pace, offers.weights, store_arrays(self._weights, offers.weights), cap, row.rounds
        )
        last = self._ledger.last_round(index)
        if last is not None:
            progress.weights_reference = BlobReference.model_validate_json(last.result or last.weights)
            progress.weights = read_arrays(self._weights, progress.weights_reference)
            snapshot = self._ledger.last_pace(index)
            if snapshot is not None:
                pace.restore(read_arrays(self._weights, snapshot))
        return progress

    async def _run_round(self, run: str, index: int, progress: _StageProgress) -> None:
        number = self._ledger.rounds()
        started = loop_time()
        await progress.offers.widen([presence for presence in self._online() if presence.samples])
        self._ledger.open_round(number, index, progress.weights_reference)
        forms = {offer.width: offer.manifest for offer in progress.offers.offers}
        published = {
            width: self._fleet.content.offer(encode_tensors(narrowed(progress.weights, manifest.trained)))
            for width, manifest in forms.items()
        }
        last_layer = self._schedule.last_layer(index)
        plan = self._selection.plan(number, run, progress.offers.offers, published, last_layer)
        aggregator = Aggregator(progress.weights)
        current = Round(plan, self._config, self._fleet, self._ledger, aggregator, self._updates)
        try:
            rounds = self._config.rounds
            if not await current.collect(
                lambda: self._selection.order(plan), rounds.minimum_updates, rounds.join_seconds
            ):
                eligible = len(self._selection.order(plan))
                explained = asyncio.to_thread(self._explain_shortage, index, eligible, len(current.metrics))
                raise RunError(await explained)
        finally:
            for reference in published.values():
                self._fleet.content.withdraw(reference)
        for note in current.notes:
            self._observer.on_note(note)

        before = progress.weights_reference
        progress.weights = aggregator.result()
        progress.weights_reference = store_arrays(self._weights, progress.weights)
        parameters = {
            spec.name for spec in progress.offers.manifest.parameters if spec.name.startswith("block.")
        }
        reading = progress.pace.observe({n: w for n, w in progress.weights.items() if n in parameters})
        accuracy = await asyncio.to_thread(self._schedule.accuracy, index, progress.weights)
        pace_reference = store_arrays(self._weights, progress.pace.snapshot())
        if number > self._last_recorded:
            self._record(current, plan, reading, accuracy, index, progress, loop_time() - started)
        replaced = {before.sha256: before}
        if (last_pace := self._ledger.last_pace(index)) is not None:
            replaced[last_pace.sha256] = last_pace
        self._ledger.close_round(number, progress.weights_reference, pace_reference)
        self._updates.clear()
        for reference in replaced.values():
            if reference not in (progress.weights_reference, pace_reference):
                self._weights.remove(reference)
        progress.rounds += 1
        self._selection.learn(number)

    def _explain_shortage(self, index: int, eligible: int, returned: int) -> str:
        online = self._online()
        waited = f"within {self._config.rounds.join_seconds:.0f} s"
        if not online:
            return f"no device joined fleet {self._config.run.fleet!r} {waited}; start some with frostline device"
        name = self._schedule.name(index)
        if eligible:
            needed = self._config.rounds.minimum_updates
            return f"stage {name!r}: {returned} of at least {needed} updates came back {waited}"
        engines = self._config.training.engines
        if not any(set(presence.engines) & set(engines) for presence in online):
            return (
                f"stage {name!r}: none of the {len(online)} devices online has an engine of training.engines = {engines}; "
                "add theirs, or install one of these on a device"
            )
        if not any(presence.samples for presence in online):
            return f"stage {name!r}: none of the {len(online)} devices online has any samples"
        least = self._least_memory(index)
        largest = max(presence.memory_bytes for presence in online)
        return (
            f"stage {name!r} can be trained with {least} bytes and none of the {len(online)} devices "
            f"online can train it: the largest budget is {largest} bytes; add a device with {format_size(least)} or "
            "more, or cut the model into more blocks or use a smaller batch"
        )

    def _least_memory(self, index: int) -> int:
        """The smallest budget that a form of the stage fits, for the run's first engine."""
        engine = self._config.training.engines[0]
        if self._config.training.variants == "whole":
            return self._schedule.prepare(index, engine).manifest.planned.total
        return self._schedule.smallest(index, engine).manifest.planned.total

    def _record(
        self,
        current: Round,
        plan: RoundPlan,
        reading: PaceReading,
        accuracy: float | None,
        index: int,
        progress: _StageProgress,
        seconds: float,
    ) -> None:
        metrics = current.metrics
        evaluated = sum(m.evaluated for m in metrics)
        on_devices = sum(m.correct for m in metrics) / evaluated if evaluated else None
        served = [current.variants[device].manifest for device in current.accepted_by]
        record = RoundRecord(
            stage=index,
            stage_name=self._schedule.name(index),
            stages=len(self._schedule),
            round=plan.number,
            round_in_stage=progress.rounds,
            loss=float(np.average([m.loss for m in metrics], weights=[m.samples for m in metrics])),
            accuracy=accuracy if accuracy is not None else on_devices,
            accuracy_source="server" if accuracy is not None else "devices" if evaluated else "none",
            effective_movement=reading.effective_movement,
            movement_slope=reading.slope,
            speed=reading.speed,
            frozen=reading.converged or progress.rounds + 1 >= progress.cap,
            devices_selected=current.asked,
            devices_finished=len(metrics),
            samples=sum(m.samples for m in metrics),
            bytes_down=self._bytes_down(current, plan, progress),
            bytes_up=current.bytes_up,
            planned_bytes=progress.offers.manifest.planned.total,
            served_bytes=round(np.mean([manifest.planned.total for manifest in served])) if served else 0,
            variants=Counter(manifest.variant for manifest in served),
            engines=Counter(manifest.engine for manifest in served),
            seconds=seconds,
        )
        self._folder.record(record)
        self._observer.on_round(record)

    def _bytes_down(self, current: Round, plan: RoundPlan, progress: _StageProgress) -> int:
        """Payload the devices of a round fetched: the weights each time, the programs once a device."""
        total = 0
        for device in current.accepted_by:
            offer = current.variants[device]
            known = progress.leased_content.setdefault(device, set())
            wanted = {r.sha256: r.size for r in [offer.reference, *offer.manifest.files]}
            total += sum(size for sha256, size in wanted.items() if sha256 not in known)
            total += plan.weights[offer.width].size
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
