"""The agent: what a phone's stand-in, a board or a virtual device does between connecting and leaving.

Its states, drawn in docs/agent.md: idle, fetching, training, sending. One lease is worked on at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.metadata
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from frostline.datasets.samples import Samples
from frostline.device_runtime.engine import INSTALL
from frostline.device_runtime.error_feedback import ERROR_FEEDBACK, ErrorFeedback
from frostline.device_runtime.fetching import ContentFetcher
from frostline.device_runtime.outbox import Outbox
from frostline.device_runtime.training import TrainingTask
from frostline.device_runtime.worker import Workers
from frostline.protocol.blobs import BlobStore, index_of
from frostline.protocol.connection import BrokerAddress, Connection, Will
from frostline.protocol.errors import FrostlineError, ProtocolViolation, RunError, StorageExceeded
from frostline.protocol.manifest import StageManifest, decode_manifest
from frostline.protocol.messages import (
    Answer,
    Engine,
    Lease,
    Presence,
    Receipt,
    RunAnnouncement,
    TrainingMetrics,
    UpdateOffer,
    as_reason,
    decode,
)
from frostline.protocol.topics import Topics, checked_name

ENTERED = "broker"
"""File in a device's folder that names the broker that let it in last."""
ANNOUNCEMENT_SECONDS = 3.0
"""How long the announcement of a lease's run is waited for."""

State = Literal["idle", "fetching", "training", "sending"]


@dataclass(frozen=True)
class DeviceSettings:
    """What a device is.

    Attributes
    ----------
    name : str
        Unique in the fleet.
    data : str
        Name or folder of its samples.
    memory_bytes : int
        Planned bytes of training it will hold; larger stages are refused.
    state_folder : Path
        Downloads, cached features and the outbox; one a device.
    engines : tuple of Engine
        The runtimes it trains with.
    storage_bytes : int
        What its downloads may take; those used longest ago go first. Cached features and unsent updates come on top.
    gigaflops : float
        What one thread does, from `frostline.device_runtime.speed`; 0 where it is not known.
    leave_when_finished : bool
        Return from `Agent.run` once the run is over, in place of waiting for the next.
    """

    name: str
    data: str
    memory_bytes: int
    state_folder: Path
    engines: tuple[Engine, ...]
    storage_bytes: int = 2**30
    gigaflops: float = 0.0
    leave_when_finished: bool = False


class Agent:
    """One device of a fleet.

    Parameters
    ----------
    samples : Samples
        The device's samples; only their number, shape and class counts are looked at here.
    workers : Workers
        Where training runs; agents in one process may share it.
    notify : callable
        Told the state whenever there is something to tell a person, and the line that tells it.
    """

    def __init__(
        self,
        settings: DeviceSettings,
        address: BrokerAddress,
        topics: Topics,
        samples: Samples,
        workers: Workers,
        notify: Callable[[State, str], None] = lambda state, text: None,
    ) -> None:
        name = checked_name(settings.name, "device name")
        self._settings = settings
        self._topics = topics
        self._workers = workers
        self._notify = notify
        self._presence = Presence(
            device=name,
            session=uuid.uuid4().hex,
            state="online",
            memory_bytes=settings.memory_bytes,
            gigaflops=settings.gigaflops,
            engines=list(settings.engines),
            samples=len(samples),
            software=importlib.metadata.version("frostline"),
        )
        self._class_counts = samples.class_counts()
        farewell = self._presence.model_copy(update={"state": "offline"})
        self._farewell = farewell.encode()
        self._connection = Connection(
            address, f"frostline-{topics.fleet}-{name}", Will(topics.presence(name), self._farewell)
        )
        self._store = BlobStore(settings.state_folder / "blobs")
        self._fetcher = ContentFetcher(self._connection, topics, name, self._store)
        self._outbox = Outbox(self._connection, topics, name, settings.state_folder / "outbox")
        self._feedback = ErrorFeedback(settings.state_folder / ERROR_FEEDBACK)
        self._run: RunAnnouncement | None = None
        self._announced = asyncio.Event()
        self._work: asyncio.Queue[Lease] = asyncio.Queue()
        self._taken: set[str] = set()
        self._accepted = ""
        self._address = str(address).encode()
        self._entered = settings.state_folder / ENTERED
        self._known = self._entered.is_file() and self._entered.read_bytes() == self._address
        self._state: State = "idle"
        self._saw_open = False
        self._over = asyncio.Event()

    async def run(self) -> None:
        """Serve leases until cancelled, or until the run is over if the settings say so.

        A device that restarts while its broker is away waits for it.

        Raises
        ------
        BrokerUnreachable
            If the broker does not answer and never let this device in.
        """
        name = self._settings.name
        self._connection.on_message = self._on_message
        self._connection.on_connected = self._on_connected
        for topic in (self._topics.run, self._topics.lease(name), self._topics.receipt(name)):
            self._connection.subscribe(topic)
        pending = self._outbox.pending()
        self._taken.update(offer.lease for offer in pending)
        await self._connection.open(patient=self._known)
        if not self._connection.connected:
            self._notify("idle", f"waiting for broker {self._address.decode()}")
        try:
            await self._work_until_over(pending)
        finally:
            self._connection.publish(self._topics.presence(name), self._farewell, retain=True)
            await self._connection.close()

    async def _work_until_over(self, pending: list[UpdateOffer]) -> None:
        working = asyncio.create_task(self._work_on(pending))
        over = asyncio.create_task(self._over.wait())
        try:
            await asyncio.wait([working, over], return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            # Nobody waits for what is still being trained or sent: its run is over, or this device leaves.
            for task in (working, over):
                task.cancel()
            await asyncio.gather(working, over, return_exceptions=True)

    async def _work_on(self, pending: list[UpdateOffer]) -> None:
        for offer in pending:
            await self._send(offer)
            self._enter("idle", "waiting for work")
        while True:
            await self._serve(await self._work.get())

    def _on_connected(self) -> None:
        self._notify(self._state, "connected")
        if not self._known:
            with contextlib.suppress(OSError):  # A full disk keeps no device from working.
                self._entered.write_bytes(self._address)
            self._known = True
        self._announce()

    def _on_message(self, topic: str, payload: bytes) -> None:
        name = self._settings.name
        try:
            if topic == self._topics.run:
                self._on_run(decode(RunAnnouncement, payload))
            elif topic == self._topics.lease(name):
                self._on_lease(decode(Lease, payload))
            elif topic == self._topics.receipt(name):
                self._outbox.receive(decode(Receipt, payload))
            else:
                self._fetcher.deliver(topic, payload)
        except ProtocolViolation as error:
            self._notify(self._state, f"ignored a message on {topic}: {error}")

    def _on_run(self, run: RunAnnouncement) -> None:
        self._run = run
        self._announced.set()
        if run.state == "open":
            self._saw_open = True
            self._announce()
        elif self._saw_open and self._settings.leave_when_finished:
            # A broker that outlives its runs first tells of the one before, which is no reason to leave.
            self._over.set()

    def _on_lease(self, lease: Lease) -> None:
        # The server repeats a lease to a device that came back or did not answer; one that is taken needs no second copy.
        if lease.lease not in self._taken:
            self._taken.add(lease.lease)
            self._work.put_nowait(lease)
        elif lease.lease == self._accepted:
            self._answer(lease.lease, "accepted")

    def _announce(self) -> None:
        asked = self._run is not None and self._run.asks_class_counts
        presence = self._presence.model_copy(update={"class_counts": self._class_counts if asked else None})
        self._connection.publish(self._topics.presence(self._settings.name), presence.encode(), retain=True)

    async def _serve(self, lease: Lease) -> None:
        """Work through one lease; whatever goes wrong ends the lease, never the agent."""
        try:
            async with asyncio.timeout(lease.deadline_seconds):
                offer = await self._train(lease)
        except _Refused as refusal:
            self._give_up(lease, "refused", str(refusal))
        except TimeoutError:
            self._give_up(lease, "failed", "the lease's deadline passed")
        except ExceptionGroup as group:
            self._give_up(lease, "failed", _reason(group.exceptions[0]))
        except Exception as error:
            self._give_up(lease, "failed", _reason(error))
        else:
            await self._send(offer)
        self._enter("idle", "waiting for work")

    async def _train(self, lease: Lease) -> UpdateOffer:
        run = await self._announcement(lease.run)
        self._enter("fetching", f"round {lease.round}: fetching")
        await self._fetcher.fetch(lease.manifest, run.chunk_size)
        manifest = decode_manifest(self._store.read(lease.manifest), "received manifest")
        self._admit(manifest)
        content = [lease.manifest, *manifest.files, lease.weights]
        try:
            self._store.make_room(self._settings.storage_bytes, content)
        except StorageExceeded as error:
            raise _Refused(str(error)) from None
        self._accepted = lease.lease
        self._answer(lease.lease, "accepted")
        for reference in content:
            await self._fetcher.fetch(reference, run.chunk_size)
        self._enter("training", f"round {lease.round}: training {manifest.name}")
        update_path = self._outbox.content_path(lease.lease)
        task = TrainingTask(
            data=self._settings.data,
            state_folder=self._settings.state_folder,
            update_path=update_path,
            lease=lease,
        )
        metrics = await self._workers.train(task)
        self._store.remove(lease.weights)
        return self._offer(lease, update_path, metrics, run.chunk_size)

    async def _announcement(self, run: str) -> RunAnnouncement:
        """The announcement of a lease's run; one that never came, the broker is asked for."""
        if self._run is None or self._run.run != run:
            self._announced.clear()
            self._connection.subscribe(self._topics.run)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ANNOUNCEMENT_SECONDS):
                    await self._announced.wait()
        if self._run is None or self._run.run != run:
            raise _Refused("the lease belongs to another run than the one announced")
        return self._run

    def _admit(self, manifest: StageManifest) -> None:
        """The device's own check: the planned bytes are known before a program is fetched."""
        planned, budget = manifest.planned.total, self._settings.memory_bytes
        if manifest.engine not in self._presence.engines:
            raise _Refused(f"engine {manifest.engine!r} is not offered here: {INSTALL[manifest.engine]}")
        if planned > budget:
            raise _Refused(f"stage {manifest.name!r} needs {planned} bytes, this device's budget is {budget}")

    def _offer(self, lease: Lease, path: Path, metrics: TrainingMetrics, chunk_size: int) -> UpdateOffer:
        index = index_of(path.read_bytes(), chunk_size)
        identity = f"{lease.run} {lease.lease} {self._settings.name} {index.sha256}"
        update = hashlib.sha256(identity.encode()).hexdigest()[:32]
        offer = UpdateOffer(update=update, lease=lease.lease, content=index, metrics=metrics)
        self._outbox.add(offer)
        return offer

    async def _send(self, offer: UpdateOffer) -> None:
        self._enter("sending", f"sending {offer.content.size} bytes")
        receipt = await self._outbox.send(offer)
        self._feedback.settle(offer.lease, counted=receipt.state == "done")
        if receipt.state == "rejected":
            # So that the server need not wait for the lease's deadline.
            self._answer(offer.lease, "failed", f"update rejected: {receipt.reason}")

    def _give_up(self, lease: Lease, answer: Literal["refused", "failed"], reason: str) -> None:
        self._answer(lease.lease, answer, reason)
        # A server that missed the answer repeats the lease, and then it is tried again.
        self._taken.discard(lease.lease)
        with contextlib.suppress(OSError):
            self._store.remove(lease.weights)

    def _answer(self, lease: str, answer: Literal["accepted", "refused", "failed"], reason: str = "") -> None:
        message = Answer(lease=lease, answer=answer, reason=as_reason(reason))
        self._connection.publish(self._topics.answer(self._settings.name), message.encode())
        if answer != "accepted":
            self._enter("idle", f"{answer}: {reason}")

    def _enter(self, state: State, text: str) -> None:
        self._state = state
        self._notify(state, text)


class _Refused(RunError):
    """This device will not take the lease."""


def _reason(error: Exception) -> str:
    if isinstance(error, FrostlineError):
        return str(error)
    if isinstance(error, OSError):
        return f"this device's storage: {error}"
    return f"{type(error).__name__}: {error}"
