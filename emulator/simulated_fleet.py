"""A fleet in simulated time: virtual devices that really train, on a clock that only counts what they would need.

A lease takes a device: bytes to fetch over its bandwidth, samples through frozen blocks it has not run yet and training
steps, both as long as this machine takes divided by the device's speed, and the update's bytes over its bandwidth. The
training itself is `frostline.device_runtime.training.train`, the code of a real device, on the compiled artifact.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from frostline.datasets.folder import save_samples
from frostline.datasets.samples import Samples
from frostline.device_runtime.error_feedback import ERROR_FEEDBACK, ErrorFeedback
from frostline.device_runtime.training import TrainingTask, train
from frostline.emulator.step_profile import StepProfile
from frostline.protocol.blobs import BlobStore, index_of
from frostline.protocol.errors import FrostlineError
from frostline.protocol.manifest import StageManifest, decode_manifest
from frostline.protocol.messages import (
    Answer,
    BlobReference,
    Engine,
    Lease,
    Presence,
    RunAnnouncement,
    UpdateEncoding,
    UpdateOffer,
    as_reason,
)
from frostline.protocol.update_encoding import encoded_bytes
from frostline.server.fleet import DeviceRecord, RoundListener

REFERENCE_GIGAFLOPS = 10.0
"""What a device as fast as this machine announces. Only ratios matter: speeds are corrected by what is observed."""

EXACT = UpdateEncoding()
"""What updates are as long as the weights in."""


@dataclass
class VirtualDevice:
    """One device.

    Attributes
    ----------
    speed : float
        As a multiple of this machine's.
    bandwidth : float
        Bytes a second, each way.
    dropout : float
        Chance to vanish with a lease.
    away_seconds : float
        For how long.
    """

    name: str
    samples: Samples
    memory_bytes: int
    engines: tuple[Engine, ...]
    speed: float
    bandwidth: float
    dropout: float = 0.0
    away_seconds: float = 0.0
    fetched: set[str] = field(default_factory=set)
    computed: set[str] = field(default_factory=set)

    def presence(self, *, asks_class_counts: bool) -> Presence:
        """What it announces."""
        return Presence(
            device=self.name,
            session="0" * 32,
            state="online",
            memory_bytes=self.memory_bytes,
            engines=list(self.engines),
            samples=len(self.samples),
            class_counts=self.samples.class_counts() if asks_class_counts else None,
            gigaflops=REFERENCE_GIGAFLOPS * self.speed,
        )


class SimulatedContent:
    """Content on offer, in a folder that all virtual devices share."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._offered: set[str] = set()

    def offer(self, content: bytes) -> BlobReference:
        """Keep content for the devices."""
        reference = self._store.put(content)
        self._offered.add(reference.sha256)
        return reference

    def withdraw(self, reference: BlobReference) -> None:
        """Remove content."""
        if reference.sha256 in self._offered:
            self._offered.discard(reference.sha256)
            self._store.remove(reference)

    def withdraw_all(self) -> None:
        """Remove everything."""
        for sha256 in list(self._offered):
            self.withdraw(BlobReference(sha256=sha256, size=1))


class SimulatedFleet:
    """Virtual devices, as a coordinator sees them; see `frostline.server.fleet.Fleet`.

    Parameters
    ----------
    folder : Path
        For content, samples and features.
    updates : BlobStore
        Where the server keeps updates that it counts.
    chunk_size : int
        Of the updates' indexes.
    seed : int
        Of who drops out when.
    """

    def __init__(
        self,
        devices: Sequence[VirtualDevice],
        profile: StepProfile,
        folder: Path,
        updates: BlobStore,
        chunk_size: int,
        seed: int,
    ) -> None:
        self._virtual = {device.name: device for device in devices}
        self._profile = profile
        self._folder = folder
        self._store = BlobStore(folder / "blobs")
        self._updates = updates
        self._chunk_size = chunk_size
        self._seed = seed
        self._listener: RoundListener | None = None
        self._work: set[asyncio.Task[None]] = set()
        self.content = SimulatedContent(self._store)
        self.devices: dict[str, DeviceRecord] = {}
        self.changed = asyncio.Event()

    async def open(self, *, patient: bool) -> bool:
        """Give every device its folder; they share one of content."""
        for device in self._virtual.values():
            state = self._state_folder(device)
            (state / "data").mkdir(parents=True, exist_ok=True)
            if not (state / "blobs").exists():
                (state / "blobs").symlink_to(self._folder.absolute() / "blobs", target_is_directory=True)
            save_samples(device.samples, state / "data" / "samples.safetensors")
        return True

    async def close(self) -> None:
        """Stop what is still being worked on."""
        for task in self._work:
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)

    def announce(self, announcement: RunAnnouncement) -> None:
        """All devices join."""
        for name, device in self._virtual.items():
            presence = device.presence(asks_class_counts=announcement.asks_class_counts)
            self.devices[name] = DeviceRecord(presence, None)
        self.changed.set()

    def remind(self) -> None:
        """Do nothing: no message is lost here."""

    def listen(self, listener: RoundListener | None) -> None:
        """Tell `listener` what devices do; a device still at work when its round is over gives up."""
        self._listener = listener

    def send_lease(self, device: str, lease: Lease) -> None:
        """Have a device work on a lease."""
        task = asyncio.create_task(self._serve(self._virtual[device], lease))
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _serve(self, device: VirtualDevice, lease: Lease) -> None:
        listener = self._listener
        manifest = decode_manifest(self._store.read(lease.manifest), "manifest")
        fetching, computing, sending = self._costs(device, lease, manifest)
        random = np.random.default_rng([self._seed, lease.round, *device.name.encode()])
        if random.random() < device.dropout:
            await asyncio.sleep(random.random() * (fetching + computing))
            await self._vanish(device)
            return
        if listener is not None:
            listener.on_answer(device.name, Answer(lease=lease.lease, answer="accepted"))
        await asyncio.sleep(fetching + computing + sending)
        device.fetched.update(reference.sha256 for reference in (lease.manifest, *manifest.files))
        device.computed.update(program.file.sha256 for program in manifest.prefix)
        # The round may be over: nobody waits for this update then, and it need not be computed.
        if listener is not None and listener is self._listener:
            self._finish(device, lease, computing, listener)
            self.changed.set()

    def _finish(self, device: VirtualDevice, lease: Lease, computing: float, listener: RoundListener) -> None:
        state = self._state_folder(device)
        update_path = state / "update.safetensors"
        task = TrainingTask(
            data=str(state / "data"),
            state_folder=state,
            update_path=update_path,
            lease=lease,
        )
        try:
            metrics = train(task).model_copy(update={"seconds": computing})
        except FrostlineError as error:
            listener.on_answer(
                device.name, Answer(lease=lease.lease, answer="failed", reason=as_reason(str(error)))
            )
            return
        content = update_path.read_bytes()
        index = index_of(content, self._chunk_size)
        offer = UpdateOffer(
            update=f"{lease.lease[:16]}{index.sha256[:16]}", lease=lease.lease, content=index, metrics=metrics
        )
        refused = listener.objection(device.name, offer)
        if not refused:
            self._updates.put(content)
            refused = listener.count(device.name, offer, content)
        ErrorFeedback(state / ERROR_FEEDBACK).settle(lease.lease, counted=not refused)

    def _costs(
        self, device: VirtualDevice, lease: Lease, manifest: StageManifest
    ) -> tuple[float, float, float]:
        """Simulated seconds of fetching, computing and sending."""
        fetched = [r for r in (lease.manifest, *manifest.files) if r.sha256 not in device.fetched]
        fetching = (sum(r.size for r in fetched) + lease.weights.size) / device.bandwidth
        blocks = [program for program in manifest.prefix if program.file.sha256 not in device.computed]
        machine_seconds = sum(
            math.ceil(len(device.samples) / program.inputs[0].shape[0])
            * self._profile.block_seconds(program, manifest, self._store)
            for program in blocks
        )
        steps = max(1, len(device.samples) * lease.epochs // manifest.batch)
        machine_seconds += steps * self._profile.step_seconds(manifest, self._store)
        saved = encoded_bytes(manifest, EXACT) - encoded_bytes(manifest, lease.encoding)
        return fetching, machine_seconds / device.speed, (lease.weights.size - saved) / device.bandwidth

    async def _vanish(self, device: VirtualDevice) -> None:
        record = self.devices[device.name]
        gone = record.presence.model_copy(update={"state": "offline"})
        self._announce(device.name, DeviceRecord(gone, asyncio.get_running_loop().time()))
        await asyncio.sleep(device.away_seconds)
        self._announce(device.name, record)

    def _announce(self, name: str, record: DeviceRecord) -> None:
        self.devices[name] = record
        if self._listener is not None:
            self._listener.on_presence(name)
        self.changed.set()

    def _state_folder(self, device: VirtualDevice) -> Path:
        return self._folder / device.name
