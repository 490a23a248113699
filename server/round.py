"""One round: leases go out, updates come in, until every lease is settled."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from frostline.protocol.blobs import BlobStore
from frostline.protocol.errors import CorruptContent
from frostline.protocol.messages import Answer, BlobReference, Engine, Lease, TrainingMetrics, UpdateOffer
from frostline.protocol.tensors import Array
from frostline.protocol.update_encoding import decode_update, largest_update
from frostline.server.admission import OfferedStage, fastest_admitted
from frostline.server.aggregation import Aggregator
from frostline.server.config import RunConfig
from frostline.server.fleet import Fleet
from frostline.server.history import Observation, sketch_of
from frostline.server.ledger import AcceptedUpdate, Ledger, LedgerUnavailable, NewLease

OFFLINE_GRACE_SECONDS = 10.0
"""How long a device with a lease may be gone before another takes its place."""
FORGIVE_SECONDS = 5.0
"""How long a round that is short of updates waits before it asks devices again that gave nothing."""
TICK_SECONDS = 0.5
REPEAT_SECONDS = 5.0
"""How long a device may leave a lease unanswered before it is sent again, and then twice as long each time: that a broker
took a message does not mean that it came."""


@dataclass
class _OpenLease:
    device: str
    message: Lease
    sent: float
    session: str
    offer: OfferedStage
    patience: float = field(default_factory=lambda: REPEAT_SECONDS)
    repeat_at: float = math.inf

    def wait_for_answer(self, now: float) -> None:
        """Note that it was sent just now."""
        self.repeat_at, self.patience = now + self.patience, 2 * self.patience


@dataclass(frozen=True)
class RoundPlan:
    """What is fixed before a round begins.

    Attributes
    ----------
    offers : sequence of OfferedStage
        The forms of the stage, fastest first; more may come while the round is on.
    refused : mapping of Engine to str
        Why the stage cannot be compiled for an engine; likewise.
    weights : mapping of float to BlobReference
        What devices start from, by the width of the form.
    devices : int
        Updates that end the round.
    surplus : int
        Leases given out beyond that, since some devices drop out.
    deadline_seconds : float
        After which a lease goes to another device.
    last_layer : sequence of str
        Names of the last layer's tensors, whose movement tells devices' data apart.
    """

    number: int
    run: str
    offers: Sequence[OfferedStage]
    weights: Mapping[float, BlobReference]
    devices: int
    deadline_seconds: float
    surplus: int = 0
    last_layer: Sequence[str] = ()
    refused: Mapping[Engine, str] = field(default_factory=dict)


class Round:
    """Leases one stage to a number of devices and folds in what they return; each device at most once.

    A lease that is refused, fails, expires or belongs to a vanished device goes to the next candidate; the device itself is
    asked again only if it is forgiven. Updates of
    settled leases are rejected: a late update is dropped, never half-counted.
    """

    def __init__(
        self,
        plan: RoundPlan,
        config: RunConfig,
        fleet: Fleet,
        ledger: Ledger,
        aggregator: Aggregator,
        updates: BlobStore,
    ) -> None:
        self._plan = plan
        self._config = config
        self._fleet = fleet
        self._ledger = ledger
        self._aggregator = aggregator
        self._updates = updates
        self._encoding = config.updates.encoding
        self._open: dict[str, _OpenLease] = {}
        self._asked: set[str] = set()
        self._barred: set[str] = set()
        self._gave_nothing: set[str] = set()
        self._failure: LedgerUnavailable | None = None
        self.metrics: list[TrainingMetrics] = []
        self.bytes_up = 0
        self.accepted_by: list[str] = []
        self.variants: dict[str, OfferedStage] = {}
        self.notes: list[str] = []
        self.reasons: list[str] = []
        self._restore()

    @property
    def asked(self) -> int:
        """How many devices were given a lease."""
        return len(self._asked)

    def forgive(self) -> None:
        """Let devices that failed, refused or were too late be asked once more, for a round that has nobody else."""
        self._barred -= self._gave_nothing
        self._gave_nothing.clear()

    async def collect(
        self,
        order: Callable[[], Sequence[str]],
        minimum: int,
        patience_seconds: float,
        preparing: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Run, again if need be, with the candidates `order` names each time, until `minimum` updates have come.

        Parameters
        ----------
        preparing : callable
            Whether something is being made ready that may let more devices take part: patience begins after it.

        Returns
        -------
        bool
            False if for `patience_seconds` nobody was asked and nothing came.
        """
        waiting_since = forgiven = loop_time()
        while True:
            before = self.asked, len(self.metrics)
            await self.run(iter(order()))
            if (self.asked, len(self.metrics)) != before or preparing():
                waiting_since = loop_time()
            if len(self.metrics) >= minimum:
                return True
            if loop_time() - waiting_since >= patience_seconds:
                return False
            self._fleet.remind()
            await wait_for_change(self._fleet.changed)
            if loop_time() - forgiven >= FORGIVE_SECONDS:
                # Whoever failed may be all there is, and may have mended what was wrong.
                forgiven = loop_time()
                self.forgive()

    async def run(self, candidates: Iterator[str]) -> None:
        """Ask candidates in order until enough have returned an update or none is left to ask."""
        wanted = self._plan.devices
        self._fleet.listen(self)
        try:
            # Presences that came while nobody listened are not told again.
            for holder in {held.device for held in self._open.values()} & self._fleet.devices.keys():
                self.on_presence(holder)
            while True:
                if self._failure is not None:
                    raise self._failure
                self._expire()
                if len(self.metrics) >= wanted:
                    for lease in list(self._open):
                        self._settle(lease, "surplus", "the round has enough updates")
                    return
                self._ask(candidates, wanted + self._plan.surplus - len(self.metrics) - len(self._open))
                if not self._open:
                    return
                await wait_for_change(self._fleet.changed)
        finally:
            self._fleet.listen(None)

    def on_answer(self, device: str, answer: Answer) -> None:
        """Note that a device took a lease, or settle the lease it did not take or gave up."""
        lease = self._open.get(answer.lease)
        if lease is None or lease.device != device:
            return
        if answer.answer == "accepted":
            lease.repeat_at = math.inf
            if device not in self.accepted_by:
                self.accepted_by.append(device)
        else:
            self._settle(answer.lease, answer.answer, answer.reason)

    def on_presence(self, device: str) -> None:
        """Repeat the lease to a device that came back with a new session and may not have it."""
        record = self._fleet.devices[device]
        if record.offline_since is not None:
            return
        for lease in self._open.values():
            if lease.device == device and lease.session != record.presence.session:
                lease.session = record.presence.session
                self._send(lease)

    def is_counted(self, update: str) -> bool:
        """Whether the update was counted before."""
        return self._ledger.has_update(update)

    def is_known(self, device: str) -> bool:
        """Whether the device said what it is."""
        return device in self._fleet.devices

    def objection(self, device: str, offer: UpdateOffer) -> str:
        """Why an offered update is not wanted; empty if it is."""
        lease = self._open.get(offer.lease)
        if lease is None or lease.device != device:
            return "the lease is not open any more"
        limit = largest_update(lease.offer.manifest, self._encoding)
        if offer.content.size > limit:
            return f"an update of this stage has at most {limit} bytes"
        announced = self._fleet.devices[device].presence.samples if self.is_known(device) else 0
        if offer.metrics.samples > announced:
            return f"{offer.metrics.samples} samples claimed, {announced} announced"
        return ""

    def count(self, device: str, offer: UpdateOffer, content: bytes) -> str:
        """Journal an update and fold it in; returns why it was rejected instead, or nothing."""
        # Its lease may have expired, or ended with another update, while the content was on its way.
        objection = self.objection(device, offer)
        if objection:
            return objection
        if self._ledger.has_update(offer.update):
            return "an update of this identifier was counted before"
        lease = self._open[offer.lease]
        try:
            tensors = decode_update(content, lease.offer.manifest, self._encoding, f"update of {device}")
        except CorruptContent as error:
            self._settle(offer.lease, "failed", str(error))
            return str(error)
        reference = BlobReference(sha256=offer.content.sha256, size=offer.content.size)
        observation = self._observe(lease, offer, tensors).model_dump_json()
        accepted = AcceptedUpdate(offer.update, offer.lease, device, reference, offer.metrics, observation)
        try:
            self._ledger.add_update(accepted, self._plan.number)
        except LedgerUnavailable as error:
            # It may be in the ledger or not: only a restart, which folds anew what is there, can tell.
            self._failure = error
            raise
        self._aggregator.fold(tensors, offer.metrics.samples)
        self.metrics.append(offer.metrics)
        self.bytes_up += offer.content.size
        self._open.pop(offer.lease, None)
        return ""

    def _observe(self, lease: _OpenLease, offer: UpdateOffer, tensors: Mapping[str, Array]) -> Observation:
        return Observation(
            flops=lease.offer.manifest.flops,
            turnaround_seconds=loop_time() - lease.sent,
            transferred_bytes=self._plan.weights[lease.offer.width].size + offer.content.size,
            sketch=sketch_of(tensors, self._plan.last_layer, self._config.run.seed),
        )

    def _restore(self) -> None:
        """Take up a round that a killed server left: refold what was counted, keep the open leases."""
        leases = self._ledger.leases(self._plan.number)
        leased = {row.lease: self._offer_of_width(row.width) for row in leases}
        for update in self._ledger.updates(self._plan.number):
            content = self._updates.read(update.content)
            manifest = leased[update.lease].manifest
            tensors = decode_update(content, manifest, self._encoding, f"update of {update.device}")
            self._aggregator.fold(tensors, update.metrics.samples)
            self.metrics.append(update.metrics)
            self.bytes_up += update.content.size
        for row in leases:
            if row.state in ("open", "done"):
                # A device that failed may be asked again: after a restart it deserves another try.
                self._asked.add(row.device)
                self._barred.add(row.device)
            if row.state == "open":
                # The device may have lost it or hold a finished update for it; an empty session repeats it.
                offer = self._variant_for(row.device)
                if offer is None or offer.width != row.width:
                    offer = leased[row.lease]
                self._open[row.lease] = self._lease(row.lease, row.device, offer, session="")

    def _offer_of_width(self, width: float) -> OfferedStage:
        """The form of that width which takes least; the same tensors are trained in all of a width."""
        return [offer for offer in self._plan.offers if offer.width == width][-1]

    def _ask(self, candidates: Iterator[str], count: int) -> None:
        """Lease the stage to the next `count` candidates that can train it: journalled together, then sent."""
        asked: dict[str, _OpenLease] = {}
        while len(asked) < count and (device := next(candidates, None)) is not None:
            offer = self._variant_for(device)
            if device not in self._barred and offer is not None:
                session = self._fleet.devices[device].presence.session
                lease = os.urandom(16).hex()
                asked[lease] = self._lease(lease, device, offer, session)
                self._barred.add(device)
        if not asked:
            return
        self._ledger.add_leases(
            self._plan.number,
            [NewLease(lease, held.device, held.offer.width) for lease, held in asked.items()],
        )
        for lease, held in asked.items():
            self._asked.add(held.device)
            self._open[lease] = held
            self._send(held)

    def _send(self, lease: _OpenLease) -> None:
        lease.wait_for_answer(loop_time())
        self._fleet.send_lease(lease.device, lease.message)

    def _variant_for(self, device: str) -> OfferedStage | None:
        record = self._fleet.devices.get(device)
        return fastest_admitted(record.presence, self._plan.offers) if record else None

    def _lease(self, lease: str, device: str, offer: OfferedStage, session: str) -> _OpenLease:
        training = self._config.training
        self.variants[device] = offer
        message = Lease(
            run=self._plan.run,
            lease=lease,
            round=self._plan.number,
            manifest=offer.reference,
            weights=self._plan.weights[offer.width],
            epochs=training.epochs,
            learning_rate=training.learning_rate,
            seed=(self._config.run.seed + 7919 * self._plan.number) % 2**32,
            evaluate=self._config.data.test is None,
            encoding=self._encoding,
            deadline_seconds=self._plan.deadline_seconds,
        )
        return _OpenLease(device, message, loop_time(), session, offer)

    def _expire(self) -> None:
        now = loop_time()
        for lease, held in list(self._open.items()):
            record = self._fleet.devices.get(held.device)
            if now >= held.sent + self._plan.deadline_seconds:
                self._settle(lease, "expired", "the deadline passed")
            elif (
                record is not None
                and record.offline_since is not None
                and now - record.offline_since > OFFLINE_GRACE_SECONDS
            ):
                self._settle(lease, "expired", "the device went offline")
            elif now >= held.repeat_at:
                self._send(held)

    def _settle(self, lease: str, state: str, reason: str) -> None:
        held = self._open.pop(lease)
        self._ledger.settle_lease(lease, state, reason)
        if state != "surplus":
            self._gave_nothing.add(held.device)
            self.notes.append(f"{held.device}: {state}: {reason}")
            self.reasons.append(reason)


def loop_time() -> float:
    """The loop's clock, which may be a simulated one."""
    return asyncio.get_running_loop().time()


async def wait_for_change(event: asyncio.Event) -> None:
    """Wait until a device says something, or for a tick: deadlines pass in silence."""
    event.clear()
    # wait_for would lose a cancellation that comes in the same turn of the loop as the event.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(TICK_SECONDS):
            await event.wait()
