"""The coordinator: drives a run from the first lease to the final model, and resumes one that was cut short."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import numpy as np

from frostline.protocol.blobs import BlobStore
from frostline.protocol.errors import FrostlineError, RunError
from frostline.protocol.manifest import PlannedMemory
from frostline.protocol.messages import BlobReference, Engine, Presence, RunAnnouncement
from frostline.protocol.sizes import format_size, parse_share
from frostline.protocol.tensors import Array, encode_tensors
from frostline.server.aggregation import Aggregator, narrowed
from frostline.server.config import RunConfig
from frostline.server.divergence import NOT_FINITE, diverged, divergence
from frostline.server.final_model import write_final_model
from frostline.server.fleet import Fleet
from frostline.server.ledger import Ledger
from frostline.server.notices import Notices, named
from frostline.server.offering import StageOffers, explain_refused, tell_refused
from frostline.server.pace import PaceController, PaceReading
from frostline.server.records import RoundRecord, RunSummary, StageRecord
from frostline.server.report import write_report
from frostline.server.round import Round, RoundPlan, loop_time, wait_for_change
from frostline.server.round_selection import RoundSelection
from frostline.server.run_folder import RunFolder
from frostline.server.schedule import Schedule
from frostline.server.snapshots import read_arrays, store_arrays

GRACE_SECONDS = 1.0
"""How long a round waits for forms that are wanted anew: those that a cache holds are there by then."""


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
        self._notices = Notices(observer.on_note)
        self._whole: int | None = None
        self._limit: int | None = None
        self._ahead: asyncio.Task[None] | None = None
        self._hopeless = ""
        self._stages: list[StageRecord] = []
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
            await self._compile_first()
            self._announce(run, "open")
            await self._gather()
            await self._run_stages(run)
            summary = await self._finish()
            self._announce(run, "finished")
            return summary
        finally:
            if self._ahead is not None:
                self._ahead.cancel()
            self._schedule.close()
            self._fleet.content.withdraw_all()
            await self._fleet.close()
            self._ledger.close()
            self._folder.close()

    async def _compile_first(self) -> None:
        """Compile the stage that comes first before the fleet is told of the run; the others while it trains."""
        index, engine = self._ledger.current_stage(), self._config.training.engines[0]
        unfinished = index < len(self._schedule)
        if unfinished:
            self._observer.on_note(f"compiling stage {index + 1} of {len(self._schedule)}")
            self._schedule.begin(index, engine)
        await self._estimate()
        if unfinished:
            # Where it cannot be, that is said once it is known which devices this concerns.
            with contextlib.suppress(FrostlineError):
                await asyncio.to_thread(self._schedule.plan, index, engine)

    async def _estimate(self) -> None:
        """Estimate the whole model, which a limit may be a share of and savings are told by."""
        limit = self._config.training.memory_limit
        try:
            self._whole = (await asyncio.to_thread(self._schedule.estimate_whole_model)).total
        except FrostlineError:
            if limit is not None and "%" in limit:
                raise
        self._limit = None if limit is None else parse_share(limit, self._whole or 0, "training.memory_limit")

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
        try:
            await self._offer_first(index, progress.offers)
            planned = progress.offers.manifest.planned
            self._observer.on_stage(self._stage_record(index, planned), len(self._schedule))
            if self._ahead is None:
                self._ahead = asyncio.create_task(self._compile_ahead(index + 1))
            # Asked before each round: a server may have been killed between a stage's last round and its freezing.
            while not progress.pace.converged and progress.rounds < progress.cap:
                if self._hopeless:
                    raise RunError(self._hopeless)
                await self._run_round(run, index, progress)
        finally:
            await progress.offers.withdraw()
        if not progress.pace.converged:
            self._observer.on_note(
                f"{self._schedule.name(index)}: frozen by the cap of {progress.rounds} rounds, not converged"
            )
        frozen_by = "pace" if progress.pace.converged else "round_cap"
        self._ledger.freeze_stage(index, frozen_by, progress.weights_reference, planned)

    async def _offer_first(self, index: int, offers: StageOffers) -> None:
        """Put a stage on offer to the devices that are there, so that its first round is not trained by some of them.

        Raises
        ------
        RunError
            If it cannot be compiled for any engine of the run, or for none that came within `rounds.join_seconds`.
        """
        offers.begin()
        deadline = loop_time() + self._config.rounds.join_seconds
        while True:
            await offers.settle()
            offers.widen(self._trainers())
            if offers.compiling:
                continue
            self._tell_left_out(offers)
            if offers.offers:
                return
            if loop_time() >= deadline or set(offers.refused) >= set(self._config.training.engines):
                raise RunError(explain_refused(self._schedule.name(index), offers.refused))
            self._fleet.remind()
            await wait_for_change(self._fleet.changed)

    def _trainers(self) -> list[Presence]:
        """The devices online that have something to train on."""
        return [presence for presence in self._online() if presence.samples]

    def _tell_left_out(self, offers: StageOffers) -> None:
        """Say once which devices the server cannot serve, and why."""
        served = self._config.training.engines
        strangers: dict[tuple[str, ...], list[str]] = {}
        for record in self._fleet.devices.values():
            presence = record.presence
            if presence.state == "online" and not set(presence.engines) & set(served):
                engines = (*presence.engines, *record.unknown_engines)
                strangers.setdefault(engines, []).append(presence.device)
        for engines, devices in strangers.items():
            has = f"have {' and '.join(engines)} only" if engines else "have no engine"
            self._notices.tell_once(
                f"left out of this run: {named(devices)}, which {has}; stages are compiled for training.engines = {served}: "
                "install one of these there, or add theirs if this server knows it",
                "strangers",
                *engines,
            )
        offers.leave_out(self._trainers())

    async def _compile_ahead(self, first: int) -> None:
        """Compile the stages to come, in order, for the engines that the fleet turns out to have."""
        for index in range(first, len(self._schedule)):
            refused: dict[Engine, str] = {}
            compiled: set[Engine] = set()
            while pending := self._engines_in_use(refused) - compiled - set(refused):
                engine = min(pending, key=self._config.training.engines.index)
                try:
                    await asyncio.to_thread(self._schedule.plan, index, engine)
                    compiled.add(engine)
                except FrostlineError as error:
                    name, trainers = self._schedule.name(index), self._trainers()
                    refused[engine] = tell_refused(self._notices, name, engine, trainers, str(error))
            if refused and not self._engines_in_use(refused):
                # Not worth the rounds before it.
                self._hopeless = explain_refused(self._schedule.name(index), refused)

    def _engines_in_use(self, refused: Container[Engine]) -> set[Engine]:
        """The engines that devices are served for where a stage cannot be compiled for those refused."""
        served = self._config.training.engines
        first = (
            next((each for each in presence.engines if each in served and each not in refused), None)
            for presence in self._trainers()
        )
        return {each for each in first if each is not None}

    async def _begin(self, index: int) -> _StageProgress:
        """Publish a stage and take up where the ledger says it stands."""
        training, content = self._config.training, self._fleet.content
        offers = StageOffers(index, self._schedule, training, content, self._limit, self._notices)
        weights = self._schedule.weights(index)
        pace = PaceController(self._config.pace, self._config.run.seed)
        row = self._ledger.begin_stage(index, self._schedule.name(index))
        cap = row.rounds_before + self._config.rounds.max_per_stage
        progress = _StageProgress(
            offers, pace, weights, store_arrays(self._weights, weights), cap, row.rounds
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
        offers = progress.offers
        offers.widen(self._trainers())
        await offers.settle(GRACE_SECONDS)
        self._tell_left_out(offers)
        self._ledger.open_round(number, index, progress.weights_reference)
        forms = {offer.width: offer.manifest for offer in offers.offers}
        published = {
            width: self._fleet.content.offer(encode_tensors(narrowed(progress.weights, manifest.trained)))
            for width, manifest in forms.items()
        }
        last_layer = self._schedule.last_layer(index)
        plan = self._selection.plan(number, run, offers.offers, published, last_layer, offers.refused)
        aggregator = Aggregator(progress.weights)
        current = Round(plan, self._config, self._fleet, self._ledger, aggregator, self._updates)

        def candidates() -> list[str]:
            offers.widen(self._trainers())
            return self._selection.order(plan)

        try:
            rounds = self._config.rounds
            enough = await current.collect(
                candidates, rounds.minimum_updates, rounds.join_seconds, lambda: offers.compiling
            )
        finally:
            for reference in published.values():
                self._fleet.content.withdraw(reference)
        for note in current.notes:
            self._observer.on_note(note)
        if not enough:
            raise RunError(await self._explain_shortage(index, current, plan, offers))

        before = progress.weights_reference
        weights = aggregator.result()
        self._check_diverged(current, plan, weights, index, progress, started)
        if all(np.array_equal(weights[name], value) for name, value in progress.weights.items()):
            self._notices.tell_once(
                f"{self._schedule.name(index)}: round {number + 1} moved none of its tensors: all gradients were zero, or too "
                "small for float32; look for frozen layers and dead units in it, or raise training.learning_rate",
                "unmoved",
                str(index),
            )
        progress.weights = weights
        progress.weights_reference = store_arrays(self._weights, progress.weights)
        parameters = {
            spec.name for spec in progress.offers.manifest.parameters if spec.name.startswith("block.")
        }
        reading = progress.pace.observe({n: w for n, w in progress.weights.items() if n in parameters})
        accuracy = await asyncio.to_thread(self._schedule.accuracy, index, progress.weights)
        pace_reference = store_arrays(self._weights, progress.pace.snapshot())
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

    def _check_diverged(
        self,
        current: Round,
        plan: RoundPlan,
        weights: Mapping[str, Array],
        index: int,
        progress: _StageProgress,
        started: float,
    ) -> None:
        """End a run that has diverged, with the round that shows it on record.

        Raises
        ------
        RunError
            Naming stage and round, by what it shows, and what to change.
        """
        loss = _mean_loss(current)
        sign = divergence(loss, weights, progress.offers.manifest.classes)
        if sign:
            nothing = PaceReading(None, None, None, False)
            self._record(current, plan, nothing, None, index, progress, loop_time() - started)
            raise RunError(self._diverged(index, plan.number, sign))

    def _diverged(self, index: int, number: int, sign: str) -> str:
        training = self._config.training
        return diverged(self._schedule.name(index), number, sign, training.learning_rate, training.clip_norm)

    async def _explain_shortage(
        self, index: int, current: Round, plan: RoundPlan, offers: StageOffers
    ) -> str:
        online = self._online()
        waited = f"within {self._config.rounds.join_seconds:.0f} s"
        if not online:
            return f"no device joined fleet {self._config.run.fleet!r} {waited}; start some with frostline device"
        name = self._schedule.name(index)
        if self._selection.order(plan):
            unfinished = [reason for reason in current.reasons if NOT_FINITE in reason]
            if unfinished and len(unfinished) == len(current.reasons):
                return self._diverged(index, plan.number, f"every device gave up, {unfinished[-1]!r}")
            needed = self._config.rounds.minimum_updates
            last = f"; the last: {current.reasons[-1]}" if current.reasons else ""
            return f"stage {name!r}: {len(current.metrics)} of at least {needed} updates came back {waited}{last}"
        engines = self._config.training.engines
        if not any(set(presence.engines) & set(engines) for presence in online):
            return (
                f"stage {name!r}: none of the {len(online)} devices online has an engine of training.engines = {engines}; "
                "add theirs, or install one of these on a device"
            )
        trainers = self._trainers()
        if not trainers:
            return f"stage {name!r}: none of the {len(online)} devices online has any samples"
        if offers.refused and not any(offers.engine_of(presence) for presence in trainers):
            return explain_refused(name, offers.refused)
        least = await asyncio.to_thread(self._least_memory, index, offers)
        largest = max(presence.memory_bytes for presence in online)
        return (
            f"stage {name!r} can be trained with {least} bytes and none of the {len(online)} devices "
            f"online can train it: the largest budget is {largest} bytes; add a device with {format_size(least)} or "
            "more, or cut the model into more blocks or use a smaller batch"
        )

    def _least_memory(self, index: int, offers: StageOffers) -> int:
        """The smallest budget that a form of the stage fits, for the first engine that there is one for."""
        if self._config.training.variants == "auto":
            with contextlib.suppress(FrostlineError):
                return self._schedule.smallest(index, offers.manifest.engine).manifest.planned.total
        return min(offer.manifest.planned.total for offer in offers.offers)

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
            loss=_mean_loss(current),
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
        # A server killed between recording a round and closing it repeats the round, but not its record.
        if record.round > self._last_recorded:
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

    async def _finish(self) -> RunSummary:
        records = self._folder.records()
        model = self._schedule.trained_model()
        example = self._schedule.example(self._config.training.batch)
        try:
            await asyncio.to_thread(write_final_model, self._folder, model, example)
        except RunError as error:
            self._observer.on_note(f"{self._folder.eval_program_path.name} was not written: {error}")
        summary = RunSummary(
            run=self._folder.path.name,
            accuracy=records[-1].accuracy,
            rounds=len(records),
            blocks_frozen=sum(stage.frozen_by == "pace" for stage in self._stages),
            blocks=len(self._stages),
            peak_planned_bytes=max(stage.planned_bytes for stage in self._stages),
            full_model_planned_bytes=self._whole or 0,
            bytes_down=sum(record.bytes_down for record in records),
            bytes_up=sum(record.bytes_up for record in records),
            seconds=sum(record.seconds for record in records),
            stages=self._stages,
        )
        self._folder.summary_path.write_text(summary.model_dump_json(indent=2) + "\n", encoding="utf-8")
        write_report(self._folder, summary, records, self._config_text)
        self._ledger.finish()
        return summary


def _mean_loss(current: Round) -> float:
    """Of the updates counted, a sample."""
    metrics = current.metrics
    return float(np.average([m.loss for m in metrics], weights=[m.samples for m in metrics]))
