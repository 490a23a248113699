"""One round: leases go out, updates come in, until every lease is settled."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from frostline.protocol.blobs import BlobStore
from frostline.protocol.errors import CorruptContent
from frostline.protocol.manifest import TensorSpec
from frostline.protocol.messages import Answer, BlobReference, Lease, TrainingMetrics, UpdateOffer
from frostline.protocol.tensors import decode_tensors
from frostline.server.aggregation import Aggregator
from frostline.server.config import RunConfig
from frostline.server.gateway import Gateway
from frostline.server.ledger import AcceptedUpdate, Ledger
from frostline.server.selection import OfferedStage, fastest_admitted

OFFLINE_GRACE_SECONDS = 10.0
"""How long a device with a lease may be gone before another takes its place."""
TICK_SECONDS = 0.5


@dataclass
class _OpenLease:
    device: str
    message: Lease
    expires: float
    session: str


@dataclass(frozen=True)
class RoundPlan:
    """What is fixed before a round begins.

    Attributes
    ----------
    offers : sequence of OfferedStage
        The variants of the stage, fastest first; all train the same tensors.
    """

    number: int
    run: str
    offers: Sequence[OfferedStage]
    weights_reference: BlobReference

    @property
    def trained(self) -> list[TensorSpec]:
        """The tensors an update holds."""
        return self.offers[0].manifest.trained


class Round:
    """Leases one stage to a number of devices and folds in what they return; each device at most once.

    A lease that is refused, fails, expires or belongs to a vanished device goes to the next candidate. Updates of
    settled leases are rejected: a late update is dropped, never half-counted.
    """

    def __init__(
        self,
        plan: RoundPlan,
        config: RunConfig,
        gateway: Gateway,
        ledger: Ledger,
        aggregator: Aggregator,
        updates: BlobStore,
    ) -> None:
        self._plan = plan
        self._config = config
        self._gateway = gateway
        self._ledger = ledger
        self._aggregator = aggregator
        self._updates = updates
        self._open: dict[str, _OpenLease] = {}
        self._asked: set[str] = set()
        self.metrics: list[TrainingMetrics] = []
        self.bytes_up = 0
        self.accepted_by: list[str] = []
        self.variants: dict[str, OfferedStage] = {}
        self.notes: list[str] = []
        self._restore()

    @property
    def asked(self) -> int:
        """How many devices were given a lease."""
        return len(self._asked)

    async def run(self, candidates: Iterator[str]) -> None:
        """Ask candidates in order until enough have returned an update or none is left to ask."""
        wanted = self._config.rounds.devices
        self._gateway.listen(self)
        try:
            # Presences that came while nobody listened are not told again.
            for holder in {held.device for held in self._open.values()} & self._gateway.devices.keys():
                self.on_presence(holder)
            while True:
                self._expire()
                while len(self.metrics) + len(self._open) < wanted:
                    device = next(candidates, None)
                    if device is None:
                        break
                    self._ask(device)
                if not self._open:
                    return
                await wait_for_change(self._gateway.changed)
        finally:
            self._gateway.listen(None)

    def on_answer(self, device: str, answer: Answer) -> None:
        """Note that a device took a lease, or settle the lease it did not take or gave up."""
        lease = self._open.get(answer.lease)
        if lease is None or lease.device != device:
            return
        if answer.answer == "accepted":
            if device not in self.accepted_by:
                self.accepted_by.append(device)
        else:
            self._settle(answer.lease, answer.answer, answer.reason)

    def on_presence(self, device: str) -> None:
        """Repeat the lease to a device that came back with a new session and may not have it."""
        record = self._gateway.devices[device]
        if record.offline_since is not None:
            return
        for lease in self._open.values():
            if lease.device == device and lease.session != record.presence.session:
                lease.session = record.presence.session
                self._gateway.send_lease(device, lease.message)

    def is_counted(self, update: str) -> bool:
        """Whether the update was counted before."""
        return self._ledger.has_update(update)

    def objection(self, device: str, offer: UpdateOffer) -> str:
        """Why an offered update is not wanted; empty if it is."""
        lease = self._open.get(offer.lease)
        if lease is None or lease.device != device:
            return "the lease is not open any more"
        limit = sum(spec.size_bytes + 512 for spec in self._plan.trained) + 4096
        if offer.content.size > limit:
            return f"an update of this stage has at most {limit} bytes"
        announced = self._gateway.devices[device].presence.samples if device in self._gateway.devices else 0
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
        try:
            tensors = decode_tensors(content, self._plan.trained, f"update of {device}")
        except CorruptContent as error:
            self._settle(offer.lease, "failed", str(error))
            return str(error)
        reference = BlobReference(sha256=offer.content.sha256, size=offer.content.size)
        accepted = AcceptedUpdate(offer.update, offer.lease, device, reference, offer.metrics)
        self._ledger.add_update(accepted, self._plan.number)
        self._aggregator.fold(tensors, offer.metrics.samples)
        self.metrics.append(offer.metrics)
        self.bytes_up += offer.content.size
        self._open.pop(offer.lease, None)
        return ""

    def _restore(self) -> None:
        """Take up a round that a killed server left: refold what was counted, keep the open leases."""
        for update in self._ledger.updates(self._plan.number):
            content = self._updates.read(update.content)
            tensors = decode_tensors(content, self._plan.trained, f"update of {update.device}")
            self._aggregator.fold(tensors, update.metrics.samples)
            self.metrics.append(update.metrics)
            self.bytes_up += update.content.size
        for row in self._ledger.leases(self._plan.number):
            if row.state in ("open", "done"):
                # A device that failed may be asked again: after a restart it deserves another try.
                self._asked.add(row.device)
            if row.state == "open":
                # The device may have lost it or hold a finished update for it; an empty session repeats it.
                self._open[row.lease] = self._lease(row.lease, row.device, session="")

    def _ask(self, device: str) -> None:
        if device in self._asked or self._variant_for(device) is None:
            return
        lease = os.urandom(16).hex()
        session = self._gateway.devices[device].presence.session
        self._asked.add(device)
        self._open[lease] = self._lease(lease, device, session)
        self._ledger.add_lease(lease, self._plan.number, device)
        self._gateway.send_lease(device, self._open[lease].message)

    def _variant_for(self, device: str) -> OfferedStage | None:
        record = self._gateway.devices.get(device)
        return fastest_admitted(record.presence, self._plan.offers) if record else None

    def _lease(self, lease: str, device: str, session: str) -> _OpenLease:
        training, rounds = self._config.training, self._config.rounds
        # A device that is not there yet gets the variant that needs least, should it have lost its lease.
        variant = self._variant_for(device) or self._plan.offers[-1]
        self.variants[device] = variant
        message = Lease(
            run=self._plan.run,
            lease=lease,
            round=self._plan.number,
            manifest=variant.reference,
            weights=self._plan.weights_reference,
            epochs=training.epochs,
            learning_rate=training.learning_rate,
            seed=(self._config.run.seed + 7919 * self._plan.number) % 2**32,
            evaluate=self._config.data.test is None,
            deadline_seconds=rounds.deadline_seconds,
        )
        expires = asyncio.get_running_loop().time() + rounds.deadline_seconds
        return _OpenLease(device, message, expires, session)

    def _expire(self) -> None:
        now = asyncio.get_running_loop().time()
        for lease, held in list(self._open.items()):
            record = self._gateway.devices.get(held.device)
            if now >= held.expires:
                self._settle(lease, "expired", "the deadline passed")
            elif (
                record is not None
                and record.offline_since is not None
                and now - record.offline_since > OFFLINE_GRACE_SECONDS
            ):
                self._settle(lease, "expired", "the device went offline")

    def _settle(self, lease: str, state: str, reason: str) -> None:
        held = self._open.pop(lease)
        self._ledger.settle_lease(lease, state, reason)
        self.notes.append(f"{held.device}: {state}: {reason}")


async def wait_for_change(event: asyncio.Event) -> None:
    """Wait until a device says something, or for a tick: deadlines pass in silence."""
    event.clear()
    # wait_for would lose a cancellation that comes in the same turn of the loop as the event.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(TICK_SECONDS):
            await event.wait()
