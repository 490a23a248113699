from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from frostline.datasets.samples import Samples
from frostline.device_runtime import agent as agent_module
from frostline.device_runtime import outbox as outbox_module
from frostline.device_runtime.agent import Agent, DeviceSettings
from frostline.device_runtime.outbox import Outbox
from frostline.device_runtime.training import TrainingTask
from frostline.device_runtime.worker import Workers
from frostline.emulator.broker import EmbeddedBroker
from frostline.protocol.blobs import BlobStore, index_of, reference_to, write_atomically
from frostline.protocol.connection import BrokerAddress, Connection
from frostline.protocol.errors import BrokerUnreachable, RunError, UsageError
from frostline.protocol.manifest import PlannedMemory, Program, StageManifest, TensorSpec
from frostline.protocol.messages import (
    Answer,
    BlobReference,
    ContentRequest,
    Lease,
    Presence,
    Receipt,
    RunAnnouncement,
    TrainingMetrics,
    UpdateOffer,
    decode,
)
from frostline.protocol.topics import Topics
from frostline.server.content import ContentPublisher
from frostline.server.updates import UpdateReceiver

TOPICS = Topics("fleet")
DEVICE = "device"
RUN = "f" * 32
CHUNK = 1024
PLANNED = 6000
METRICS = TrainingMetrics(samples=4, steps=1, loss=0.5, seconds=0.1)
UPDATE = bytes(range(256)) * 10
SAMPLES = Samples(x=np.zeros((4, 2), np.float32), y=np.array([0, 0, 2, 1]), classes=3)


class FakeWorkers:
    """Trains in no time, or as `behave` says."""

    def __init__(self) -> None:
        self.tasks: list[TrainingTask] = []
        self.behave: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0)

    async def train(self, task: TrainingTask) -> TrainingMetrics:
        self.tasks.append(task)
        await self.behave()
        write_atomically(task.update_path, UPDATE)
        return METRICS


class Server:
    """A scripted server: publishes content and remembers what the device said."""

    def __init__(self, address: BrokerAddress, folder: Path) -> None:
        self.connection = Connection(address, "server")
        self.content = ContentPublisher(self.connection, TOPICS, CHUNK)
        self.receiver = UpdateReceiver(BlobStore(folder / "server"), self)
        self.presences: list[Presence] = []
        self.answers: list[Answer] = []
        self.counted: list[tuple[str, bytes]] = []
        self.offers: list[UpdateOffer] = []
        self.verdict = ""
        self.silent = False
        self.connection.on_message = self._on_message
        for topic in TOPICS.server_filters:
            self.connection.subscribe(topic)

    def is_known(self, device: str) -> bool:
        return True

    def is_counted(self, update: str) -> bool:
        return any(known == update for known, _ in self.counted)

    def objection(self, device: str, offer: UpdateOffer) -> str:
        return self.verdict

    def count(self, device: str, offer: UpdateOffer, content: bytes) -> str:
        self.counted.append((offer.lease, content))
        return ""

    def announce(self, state: str = "open", asks_class_counts: bool = False, run: str = RUN) -> None:
        fields = {"run": run, "state": state, "asks_class_counts": asks_class_counts, "chunk_size": CHUNK}
        announcement = RunAnnouncement.model_validate(fields)
        self.connection.publish(TOPICS.run, announcement.encode(), retain=True)

    def lease(self, number: int = 1, **changes: Any) -> Lease:
        """A lease whose content is on the broker."""
        program = Program(
            file=self.content.offer(b"program" * 300),
            inputs=[TensorSpec(name="x", shape=(4, 2))],
            outputs=[],
            arena_bytes=0,
        )
        manifest = StageManifest(
            stage=0,
            stages=1,
            name="block1",
            engine="executorch",
            variant="whole",
            batch=4,
            micro_batches=1,
            classes=3,
            parameters=[],
            statistics=[],
            optimizer_state=[],
            received=[],
            training=program,
            update=None,
            evaluation=program,
            prefix=[],
            planned=PlannedMemory(
                arena=PLANNED,
                parameters=0,
                statistics=0,
                optimizer_state=0,
                received=0,
                batch=0,
                program=0,
            ),
        )
        fields: dict[str, Any] = {
            "run": RUN,
            "lease": f"{number:032x}",
            "round": number,
            "manifest": self.content.offer(manifest.encode()),
            "weights": self.content.offer(f"weights of round {number}".encode()),
            "epochs": 2,
            "learning_rate": 0.25,
            "seed": 11,
            "evaluate": True,
            "deadline_seconds": 20.0,
        }
        return Lease.model_validate(fields | changes)

    def send(self, lease: Lease) -> Lease:
        self.connection.publish(TOPICS.lease(DEVICE), lease.encode())
        return lease

    def _on_message(self, topic: str, payload: bytes) -> None:
        received = TOPICS.parse(topic)
        match received.kind:
            case "presence":
                self.presences.append(decode(Presence, payload))
            case "answer":
                self.answers.append(decode(Answer, payload))
            case "request":
                self.content.answer(decode(ContentRequest, payload))
            case "offer":
                self.offers.append(decode(UpdateOffer, payload))
                if not self.silent:
                    self._reply(self.receiver.on_offer(received.device, self.offers[-1]))
            case "chunk" if not self.silent:
                self._reply(self.receiver.on_chunk(received.device, received.update, received.index, payload))

    def _reply(self, receipt: Receipt | None) -> None:
        if receipt is not None:
            self.connection.publish(TOPICS.receipt(DEVICE), receipt.encode())


@pytest.fixture
def address() -> Iterator[BrokerAddress]:
    # Retained messages must not pass from one test to the next.
    with EmbeddedBroker() as running:
        yield BrokerAddress.parse(running.url)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(agent_module, "ANNOUNCEMENT_SECONDS", 0.3)


class Scene:
    """A scripted server and an agent on one broker."""

    def __init__(self, address: BrokerAddress, folder: Path) -> None:
        self.address = address
        self.server = Server(address, folder)
        self.workers = FakeWorkers()
        self.notes: list[str] = []
        self.settings = DeviceSettings(DEVICE, "the data", PLANNED, folder / "state", ("executorch",))
        self.store = BlobStore(folder / "state" / "blobs")

    def new_agent(self, **changes: Any) -> Agent:
        return Agent(
            replace(self.settings, **changes),
            self.address,
            TOPICS,
            SAMPLES,
            cast(Workers, self.workers),
            lambda state, text: self.notes.append(f"{state}: {text}"),
        )

    @asynccontextmanager
    async def agent(self, **changes: Any) -> AsyncIterator[asyncio.Task[None]]:
        """A connected agent; ended when the block is left, unless it left by itself."""
        running = asyncio.create_task(self.new_agent(**changes).run())
        try:
            await until(lambda: "idle: connected" in self.notes or running.done())
            yield running
        finally:
            running.cancel()
            (ended,) = await asyncio.gather(running, return_exceptions=True)
            assert ended is None or isinstance(ended, asyncio.CancelledError), ended

    async def answered(self, count: int = 1) -> list[tuple[str, str]]:
        await until(lambda: len(self.server.answers) >= count)
        return [(answer.answer, answer.reason) for answer in self.server.answers]


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


Script = Callable[[Scene], Awaitable[None]]


@pytest.fixture
def play(address: BrokerAddress, tmp_path: Path) -> Callable[[Script], None]:
    def play_script(script: Script) -> None:
        async def main() -> None:
            async with asyncio.timeout(20):
                scene = Scene(address, tmp_path)
                await scene.server.connection.open()
                try:
                    await script(scene)
                finally:
                    await scene.server.connection.close()

        asyncio.run(main())

    return play_script


def test_a_lease_repeated_while_it_is_worked_on_is_answered_again(play: Callable[[Script], None]) -> None:
    async def script(scene: Scene) -> None:
        scene.server.announce()
        scene.workers.behave = lambda: asyncio.sleep(60)
        async with scene.agent():
            lease = scene.server.send(scene.server.lease())
            await until(lambda: scene.workers.tasks)
            scene.server.send(lease)
            assert await scene.answered(2) == [("accepted", "")] * 2
            assert len(scene.workers.tasks) == 1

    play(script)


def test_a_stage_that_the_storage_cannot_hold_is_refused(play: Callable[[Script], None]) -> None:
    async def script(scene: Scene) -> None:
        scene.server.announce()
        async with scene.agent(storage_bytes=1500):
            scene.server.send(scene.server.lease())
            ((answer, reason),) = await scene.answered()
            assert answer == "refused"
            assert "bytes of storage are needed, this device's quota is 1500; raise its --storage" in reason
            assert scene.workers.tasks == []

    play(script)


def test_a_lease_is_fetched_trained_and_delivered(play: Callable[[Script], None]) -> None:
    async def script(scene: Scene) -> None:
        scene.server.announce()
        async with scene.agent():
            lease = scene.server.send(scene.server.lease())
            await until(lambda: scene.server.counted)
            assert scene.server.counted == [(lease.lease, UPDATE)]
            assert await scene.answered() == [("accepted", "")]
            (task,) = scene.workers.tasks
            assert (task.data, task.lease) == ("the data", lease)
            assert scene.server.offers[0].metrics == METRICS
            await until(lambda: "idle: waiting for work" in scene.notes)
            assert not scene.store.has(lease.weights), "weights of past rounds fill the storage"
            assert scene.store.has(lease.manifest)
            states = list(dict.fromkeys(note.split(":")[0] for note in scene.notes))
            assert states == ["idle", "fetching", "training", "sending"]
        assert scene.server.presences[0].state == "online"
        await until(lambda: scene.server.presences[-1].state == "offline")

    play(script)


def test_presence_tells_how_fast_the_device_is(play: Callable[[Script], None]) -> None:
    async def script(scene: Scene) -> None:
        for speed in (0.0, 12.5):
            async with scene.agent(gigaflops=speed):
                await until(lambda: scene.server.presences and scene.server.presences[-1].state == "online")
                assert scene.server.presences[-1].gigaflops == speed
            await until(lambda: scene.server.presences[-1].state == "offline")

    play(script)


@pytest.mark.parametrize(("budget", "accepted"), [(PLANNED, True), (PLANNED - 1, False), (0, False)])
def test_a_stage_over_the_budget_is_refused_before_its_programs_are_fetched(
    play: Callable[[Script], None], budget: int, accepted: bool
) -> None:
    async def script(scene: Scene) -> None:
        scene.server.announce()
        async with scene.agent(memory_bytes=budget):
            lease = scene.server.send(scene.server.lease())
            reason = f"stage 'block1' needs {PLANNED} bytes, this device's budget is {budget}"
            expected = ("accepted", "") if accepted else ("refused", reason)
            assert await scene.answered() == [expected]
            if not accepted:
                assert not scene.store.has(reference_to(b"program" * 300))
                assert not scene.store.has(lease.weights)
                assert scene.workers.tasks == []

    play(script)


def test_an_engine_that_is_not_installed_is_refused(
    play: Callable[[Script], None],
) -> None:
    async def script(scene: Scene) -> None:
        scene.settings = replace(scene.settings, engines=("onnxruntime",))
        scene.server.announce()
        async with scene.agent():
            scene.server.send(scene.server.lease())
            fix = "pip install 'frostline[executorch]'"
            assert await scene.answered() == [("refused", f"engine 'executorch' is not offered here: {fix}")]
            assert scene.server.presences[-1].engines == ["onnxruntime"]

    play(script)


@pytest.mark.parametrize("announced", [None, "e" * 32], ids=["none", "another"])
def test_a_lease_of_another_run_is_refused(play: Callable[[Script], None], announced: str | None) -> None:
    async def script(scene: Scene) -> None:
        if announced:
            scene.server.announce(run=announced)
        async with scene.agent():
            scene.server.send(scene.server.lease())
            reason = "the lease belongs to another run than the one announced"
            assert await scene.answered() == [("refused", reason)]

    play(script)


def test_an_announcement_that_was_lost_is_asked_for(
    play: Callable[[Script], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[RunAnnouncement] = []
    listen = Agent._on_run

    def lose_the_first(agent: Agent, run: RunAnnouncement) -> None:
        heard.append(run)
        if len(heard) > 1:
            listen(agent, run)

    monkeypatch.setattr(Agent, "_on_run", lose_the_first)

    async def script(scene: Scene) -> None:
        scene.server.announce()
        async with scene.agent():
            await until(lambda: heard)
            lease = scene.server.send(scene.server.lease())
            await until(lambda: scene.server.counted)
            assert scene.server.counted == [(lease.lease, UPDATE)]
            assert len(heard) == 2

    play(script)


def test_a_device_that_restarts_waits_for_the_broker_it_knows(tmp_path: Path) -> None:
    async def main() -> None:
        with EmbeddedBroker() as broker:
            address = BrokerAddress.parse(broker.url)
            scene = Scene(address, tmp_path)
            async with scene.agent():
                pass
        scene.notes.clear()

        async def come_back() -> None:
            async with scene.agent():
                assert scene.notes == [f"idle: waiting for broker {address}", "idle: connected"]

        coming = asyncio.create_task(come_back())
        await until(lambda: scene.notes)
        with EmbeddedBroker(port=address.port):
            await coming

    asyncio.run(main())


def test_a_device_does_not_wait_for_a_broker_it_never_saw(tmp_path: Path) -> None:
    async def main() -> None:
        with EmbeddedBroker() as broker:
            scene = Scene(BrokerAddress.parse(broker.url), tmp_path)
            async with scene.agent():
                pass
        scene.address = BrokerAddress("localhost", scene.address.port)
        with pytest.raises(BrokerUnreachable):
            await scene.new_agent().run()

    asyncio.run(main())


@pytest.mark.parametrize("slow", ["fetching", "training"])
def test_a_lease_whose_deadline_passes_fails_and_the_next_is_served(
    play: Callable[[Script], None], slow: str
) -> None:
    async def script(scene: Scene) -> None:
        scene.server.announce()
        async with scene.agent():
            late = scene.server.lease(deadline_seconds=0.5)
            if slow == "fetching":
                late = late.model_copy(update={"weights": BlobReference(sha256="0" * 64, size=5)})
            else:
                scene.workers.behave = lambda: asyncio.sleep(60)
            scene.server.send(late)
            answers = await scene.answered(2)
            assert answers == [("accepted", ""), ("failed", "the lease's deadline passed")]
            scene.workers.behave = lambda: asyncio.sleep(0)
            following = scene.server.send(scene.server.lease(2))
            await until(lambda: scene.server.counted)
            assert scene.server.counted == [(following.lease, UPDATE)]

    play(script)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RunError("the training process died"), "the training process died"),
        (OSError(28, "No space left on device"), "this device's storage: [Errno 28] No space left on device"),
        (MemoryError("too much"), "MemoryError: too much"),
        (ValueError("x" * 600), f"ValueError: {'x' * 488}"),
    ],
    ids=["run error", "storage", "memory", "anything else"],
)
def test_whatever_goes_wrong_in_training_ends_the_lease_and_not_the_agent(
    play: Callable[[Script], None], error: Exception, reason: str
) -> None:
    async def fail() -> None:
        raise error

    async def script(scene: Scene) -> None:
        scene.server.announce()
        async with scene.agent():
            scene.workers.behave = fail
            lease = scene.server.send(scene.server.lease())
            assert await scene.answered(2) == [("accepted", ""), ("failed", reason)]
            await until(lambda: not scene.store.has(lease.weights))
            scene.workers.behave = lambda: asyncio.sleep(0)
            # A server that missed the answer repeats the lease.
            scene.server.send(lease)
            await until(lambda: scene.server.counted)

    play(script)


def test_class_counts_are_announced_only_when_asked_for(play: Callable[[Script], None]) -> None:
    async def script(scene: Scene) -> None:
        async with scene.agent():
            await until(lambda: len(scene.server.presences) == 1)
            scene.server.announce(asks_class_counts=False)
            await until(lambda: len(scene.server.presences) == 2)
            scene.server.announce(asks_class_counts=True)
            await until(lambda: len(scene.server.presences) == 3)
            scene.server.announce(asks_class_counts=False)
            await until(lambda: len(scene.server.presences) == 4)
        await until(lambda: len(scene.server.presences) == 5)
        counts = [presence.class_counts for presence in scene.server.presences]
        assert counts == [None, None, [2, 1, 1], None, None]
        first = scene.server.presences[0]
        assert (first.device, first.memory_bytes, first.samples) == (DEVICE, PLANNED, 4)
        assert len({presence.session for presence in scene.server.presences}) == 1

    play(script)


def leave_pending(scene: Scene, lease: Lease) -> UpdateOffer:
    """An update that an earlier process of the device finished and did not deliver."""

    class Unused:
        pass

    earlier = Outbox(cast(Connection, Unused()), TOPICS, DEVICE, scene.settings.state_folder / "outbox")
    write_atomically(earlier.content_path(lease.lease), UPDATE)
    content = index_of(UPDATE, CHUNK)
    offer = UpdateOffer(update="c" * 32, lease=lease.lease, content=content, metrics=METRICS)
    earlier.add(offer)
    return offer


def test_a_finished_update_is_sent_after_a_restart_and_its_lease_not_trained_again(
    play: Callable[[Script], None],
) -> None:
    async def script(scene: Scene) -> None:
        scene.server.announce()
        lease = scene.server.lease()
        offer = leave_pending(scene, lease)
        async with scene.agent():
            # As the server does when the device is back.
            scene.server.send(lease)
            await until(lambda: scene.server.counted)
            assert scene.server.offers[0] == offer
            following = scene.server.send(scene.server.lease(2))
            await until(lambda: len(scene.server.counted) == 2)
            assert [counted for counted, _ in scene.server.counted] == [lease.lease, following.lease]
            assert len(scene.workers.tasks) == 1
            await until(lambda: not list((scene.settings.state_folder / "outbox").iterdir()))

    play(script)


def test_a_pending_update_that_is_rejected_is_dropped(play: Callable[[Script], None]) -> None:
    async def script(scene: Scene) -> None:
        scene.server.verdict = "the lease is not open any more"
        leave_pending(scene, scene.server.lease())
        async with scene.agent():
            await until(lambda: f"idle: failed: update rejected: {scene.server.verdict}" in scene.notes)
            await until(lambda: not list((scene.settings.state_folder / "outbox").iterdir()))

    play(script)


def test_malformed_messages_are_ignored(play: Callable[[Script], None]) -> None:
    async def script(scene: Scene) -> None:
        server = scene.server
        server.announce()
        async with scene.agent():
            lease = server.lease()
            topics = (TOPICS.run, TOPICS.lease(DEVICE), TOPICS.receipt(DEVICE))
            payloads = (b"", b"{", b"null", b"\xff", b"{}", b"[" * 70_000, lease.encode()[:-9])
            for topic in topics:
                for payload in payloads:
                    server.connection.publish(topic, payload)
            server.connection.publish(
                TOPICS.lease(DEVICE), lease.encode().replace(b'"epochs":2', b'"epochs":0')
            )
            server.send(lease)
            await until(lambda: server.counted)
            assert len(scene.workers.tasks) == 1
            ignored = [note for note in scene.notes if note.startswith("idle: ignored a message on ")]
            assert len(ignored) == len(topics) * len(payloads) + 1

    play(script)


def test_a_repeated_lease_is_worked_on_once(play: Callable[[Script], None]) -> None:
    async def script(scene: Scene) -> None:
        scene.server.announce()
        gate = asyncio.Event()
        scene.workers.behave = lambda: cast(Awaitable[None], gate.wait())
        async with scene.agent():
            first, second = scene.server.lease(1), scene.server.lease(2)
            for lease in (first, first, second, first, second):
                scene.server.send(lease)
            await until(lambda: scene.workers.tasks)
            scene.server.send(first)
            await asyncio.sleep(0.1)
            gate.set()
            await until(lambda: len(scene.server.counted) == 2)
            scene.server.send(first)
            third = scene.server.send(scene.server.lease(3))
            await until(lambda: len(scene.server.counted) == 3)
            leases = [counted for counted, _ in scene.server.counted]
            assert leases == [first.lease, second.lease, third.lease]
            assert len(scene.workers.tasks) == 3

    play(script)


@pytest.mark.parametrize("busy", ["", "training", "sending"], ids=["idle", "training", "sending"])
def test_it_leaves_when_the_run_is_finished(play: Callable[[Script], None], busy: str) -> None:
    async def script(scene: Scene) -> None:
        # What the broker still holds of the run before is no reason to leave.
        scene.server.announce("finished", run="e" * 32)
        async with scene.agent(leave_when_finished=True) as running:
            await asyncio.sleep(0.1)
            assert not running.done()
            scene.server.announce()
            if busy == "training":
                scene.workers.behave = lambda: asyncio.sleep(60)
            scene.server.silent = True
            if busy:
                scene.server.send(scene.server.lease())
                await until(lambda: any(note.startswith(busy) for note in scene.notes))
            scene.server.announce("finished")
            async with asyncio.timeout(3):
                await running
            await until(lambda: scene.server.presences[-1].state == "offline")
        kept = len(list((scene.settings.state_folder / "outbox").iterdir()))
        assert kept == (2 if busy == "sending" else 0), "an update that was not delivered stays"

    play(script)


def test_it_waits_for_the_next_run_unless_told_to_leave(play: Callable[[Script], None]) -> None:
    async def script(scene: Scene) -> None:
        scene.server.announce()
        async with scene.agent() as running:
            scene.server.announce("finished")
            await asyncio.sleep(0.2)
            assert not running.done()
            scene.server.announce(run="e" * 32)
            scene.server.send(scene.server.lease(run="e" * 32))
            await until(lambda: scene.server.counted)

    play(script)


def test_a_name_that_cannot_stand_in_a_topic_is_refused(play: Callable[[Script], None]) -> None:
    async def script(scene: Scene) -> None:
        with pytest.raises(UsageError, match="device name 'a/b'"):
            async with scene.agent(name="a/b"):
                pass

    play(script)


def test_the_same_update_has_the_same_name_after_a_restart(play: Callable[[Script], None]) -> None:
    """So that an update that was counted just before the device stopped is not counted again."""

    async def script(scene: Scene) -> None:
        scene.server.announce()
        scene.server.silent = True
        lease = scene.server.lease()
        async with scene.agent():
            scene.server.send(lease)
            await until(lambda: scene.server.offers)
        for path in (scene.settings.state_folder / "outbox").iterdir():
            path.unlink()
        scene.notes.clear()
        async with scene.agent():
            scene.server.send(lease)
            await until(
                lambda: len(scene.workers.tasks) == 2 and "sending: sending 2560 bytes" in scene.notes
            )
            await until(lambda: len({id(offer) for offer in scene.server.offers}) >= 2)
        assert len({offer.update for offer in scene.server.offers}) == 1

    play(script)
