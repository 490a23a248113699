"""The protocol's state machines, as docs/agent.md and docs/protocol.md draw them, under everything that may happen to a message.

Agents, gateway, round and ledger are the real ones, in simulated time; the broker between them holds each message until the
test says what becomes of it, and everybody may be killed between any two of them.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from frostline.datasets.samples import Samples
from frostline.device_runtime import agent as agent_module
from frostline.device_runtime.agent import Agent, DeviceSettings, State
from frostline.device_runtime.training import TrainingTask
from frostline.device_runtime.worker import Workers
from frostline.emulator.virtual_time import VirtualTimeLoop
from frostline.protocol.blobs import BlobStore, reference_to, sha256_of, write_atomically
from frostline.protocol.connection import BrokerAddress
from frostline.protocol.manifest import TensorSpec
from frostline.protocol.messages import Receipt, RunAnnouncement, TrainingMetrics, UpdateOffer, decode
from frostline.protocol.tensors import Array, encode_tensors
from frostline.protocol.topics import Topics
from frostline.server import gateway as gateway_module
from frostline.server.aggregation import Aggregator
from frostline.server.config import RunConfig
from frostline.server.gateway import Gateway
from frostline.server.ledger import Ledger, sqlite_url
from frostline.server.round import Round, RoundPlan
from tests.end_to_end.held_broker import Held, HeldBroker, HeldClient
from tests.server.builders import offered, program, stage_manifest

TOPICS = Topics("fleet")
ADDRESS = BrokerAddress("broker.example", 1883)
CHUNK = 1024
DEVICES = [f"device-{n}" for n in range(3)]
ROUNDS = 2
PROGRAM, WEIGHTS = os.urandom(3 * CHUNK), b"weights"
TRAINED = [TensorSpec(name="block.w", shape=(700,))]
STAGE = offered(stage_manifest(64, parameters=TRAINED, training=program(PROGRAM)))
SAMPLES = Samples(x=np.zeros((4, 2), np.float32), y=np.array([0, 0, 1, 1]), classes=2)
CONFIG = RunConfig.model_validate({"model": {"name": "m"}})
DEADLINE_SECONDS = 60.0
LONGEST_SECONDS = 3600.0
"""Of simulated time, for a run nothing happens to any more."""
DOCS = Path(__file__).parents[2] / "docs"


def update_of(device: str, number: int) -> dict[str, Array]:
    random = np.random.default_rng([*device.encode(), number])
    return {spec.name: random.normal(size=spec.shape).astype(np.float32) for spec in TRAINED}


def edges(page: str, first: str) -> set[tuple[str, str]]:
    """The arrows of the diagram in a page of the documentation that begins in state `first`."""
    for diagram in re.findall(r"```mermaid\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        found = set(re.findall(r"^ +(\S+) --> ([^\s:]+)", diagram, re.MULTILINE))
        if ("[*]", first) in found:
            return found
    raise AssertionError(f"no diagram in {page} begins with {first}")


AGENT_EDGES = edges("agent.md", "idle")
LEASE_EDGES = edges("protocol.md", "open")


class InstantWorkers:
    """Trains in a simulated second."""

    async def train(self, task: TrainingTask) -> TrainingMetrics:
        await asyncio.sleep(1)
        device = task.state_folder.name
        write_atomically(task.update_path, encode_tensors(update_of(device, task.lease.round)))
        return TrainingMetrics(samples=len(SAMPLES), steps=1, loss=1.0, seconds=1.0)


class Device:
    """A device that can be killed and started again; its folder stays."""

    def __init__(self, name: str, folder: Path, loop: asyncio.AbstractEventLoop) -> None:
        self.name = name
        self.folder = folder / name
        self.visited: list[State] = []
        self._loop = loop

    def start(self) -> None:
        """Start the process."""
        device = DeviceSettings(self.name, "data", 10**6, self.folder, ("executorch",))
        # Until it connects, it is in no state.
        self.visited.clear()

        def notify(state: State, text: str) -> None:
            self.visited.append(state)

        self.agent = Agent(device, ADDRESS, TOPICS, SAMPLES, cast(Workers, InstantWorkers()), notify)
        self._running = self._loop.create_task(self.agent.run())

    @property
    def client(self) -> HeldClient:
        """Its connection."""
        return cast(HeldClient, self.agent._connection)

    def kill(self) -> None:
        """End the process; none of its words come out any more."""
        self.client.die()
        end(self._loop, self._running)

    def keeps(self, lease: str) -> bool:
        """Whether the update of a lease is in the outbox, whole."""
        outbox = self.folder / "outbox"
        return (outbox / f"{lease}.json").is_file() and (outbox / f"{lease}.safetensors").is_file()


class Server:
    """A server that can be killed and goes on from its folder."""

    def __init__(self, folder: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._folder = folder
        self._loop = loop
        self.results: dict[int, dict[str, Array]] = {}

    def start(self) -> None:
        """Start the process."""
        self.ledger = Ledger(sqlite_url(self._folder / "ledger.sqlite"))
        self.updates = BlobStore(self._folder / "updates")
        self.gateway = Gateway(ADDRESS, TOPICS, CHUNK, self.updates)
        self.running = self._loop.create_task(self._play())

    @property
    def client(self) -> HeldClient:
        """Its connection."""
        return cast(HeldClient, self.gateway._connection)

    def kill(self) -> None:
        """End the process."""
        self.client.die()
        end(self._loop, self.running)
        self.ledger.close()

    async def _play(self) -> None:
        run = self.ledger.run()
        await self.gateway.open()
        self.gateway.announce(RunAnnouncement(run=run, state="open", chunk_size=CHUNK))
        for content in (STAGE.manifest.encode(), PROGRAM, WEIGHTS):
            self.gateway.content.offer(content)
        weights = reference_to(WEIGHTS)
        self.ledger.begin_stage(0, "block")
        while (number := self.ledger.rounds()) < ROUNDS:
            self.ledger.open_round(number, 0, weights)
            plan = RoundPlan(number, run, [STAGE], {1.0: weights}, len(DEVICES), DEADLINE_SECONDS)
            aggregator = Aggregator({spec.name: np.zeros(spec.shape, np.float32) for spec in TRAINED})
            current = Round(plan, CONFIG, self.gateway, self.ledger, aggregator, self.updates)
            assert await current.collect(lambda: DEVICES, len(DEVICES), LONGEST_SECONDS)
            self.results[number] = aggregator.result()
            self.ledger.close_round(number, weights, weights)
            self.updates.clear()


async def in_loop(function: Callable[[], None]) -> None:
    """Call what needs a running loop."""
    function()


def end(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))


class Delivery(RuleBasedStateMachine):
    """Two rounds of three devices, among faults."""

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self.loop = VirtualTimeLoop()
        self._stack.callback(self.loop.close)
        self.unhandled: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.unhandled.append(context))
        self.broker = HeldBroker(self.loop)
        self.broker.published = self._note
        for module in (agent_module, gateway_module):
            self._stack.enter_context(mock.patch.object(module, "Connection", self.broker.client))
        # Hypothesis plays a failure again, and then it has to be the same.
        self._stack.enter_context(mock.patch.object(os, "urandom", random.Random(0).randbytes))
        self.receipts: dict[str, list[str]] = defaultdict(list)
        self.announced: dict[str, tuple[str, str]] = {}
        self.ended: set[str] = set()
        self.lease_states: dict[str, str] = {}
        self.fatal_receipt = self.server_died = False
        self.server = Server(folder, self.loop)
        self.devices = [Device(name, folder, self.loop) for name in DEVICES]
        for process in (self.server, *self.devices):
            self.loop.run_until_complete(in_loop(process.start))

    def _note(self, client: HeldClient, topic: str, payload: bytes) -> bool:
        """Look at what is published; False where the server dies before it is."""
        kind = topic.split("/")[-1]
        if kind == "receipt":
            receipt = decode(Receipt, payload)
            self.receipts[receipt.update].append(receipt.state)
            if receipt.state == "done" and self.fatal_receipt:
                self.fatal_receipt = False
                self.server_died = True
                client.die()
                return False
        elif kind == "offer":
            offer = decode(UpdateOffer, payload)
            self.announced[offer.update] = (topic.split("/")[-2], offer.lease)
        return True

    def _pass(self, seconds: float = 0.0) -> None:
        """Let everyone do what they have to do, for so long."""

        async def turns() -> None:
            await asyncio.sleep(seconds)
            for _ in range(30):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())
        if self.server_died:
            self.server_died = False
            self._restart(self.server)

    def _restart(self, process: Device | Server) -> None:
        process.kill()
        self.loop.run_until_complete(in_loop(process.start))
        self._pass()

    def _deliver(self, message: Held, *, keep: bool = False, payload: bytes | None = None) -> None:
        if message.topic.endswith("/receipt") and payload is None:
            receipt = decode(Receipt, message.payload)
            if receipt.state in ("done", "rejected"):
                self.ended.add(receipt.update)

        self.loop.run_until_complete(
            in_loop(partial(self.broker.deliver, message, keep=keep, payload=payload))
        )
        self._pass()

    @rule(messages=st.integers(1, 100))
    def all_goes_well_for_some_messages(self, messages: int) -> None:
        for _ in range(messages):
            if self.broker.held:
                self._deliver(self.broker.held[0])
            else:
                self._pass(0.5)

    @precondition(lambda self: self.broker.held)
    @rule(
        number=st.integers(0, 99),
        fate=st.sampled_from(["overtakes", "is lost", "is repeated", "is cut short"]),
        length=st.integers(0, 2 * CHUNK),
    )
    def a_message(self, number: int, fate: str, length: int) -> None:
        message = self.broker.held[number % len(self.broker.held)]
        if fate == "is lost":
            self.broker.held.remove(message)
        else:
            short = message.payload[: length % max(1, len(message.payload))]
            payload = short if fate == "is cut short" else None
            self._deliver(message, keep=fate == "is repeated", payload=payload)

    @precondition(lambda self: self._content())
    @rule(number=st.integers(0, 99), bit=st.integers(0, 8 * CHUNK - 1))
    def a_bit_of_content_flips(self, number: int, bit: int) -> None:
        content = self._content()
        message = content[number % len(content)]
        damaged = bytearray(message.payload)
        damaged[bit // 8 % len(damaged)] ^= 1 << bit % 8
        self._deliver(message, payload=bytes(damaged))

    def _content(self) -> list[Held]:
        return [message for message in self.broker.held if "/chunk/" in message.topic and message.payload]

    @rule(seconds=st.sampled_from([1.0, 4.0, 12.0, DEADLINE_SECONDS]))
    def nothing_arrives(self, seconds: float) -> None:
        self._pass(seconds)

    @rule(who=st.sampled_from(["server", *DEVICES]), seconds=st.sampled_from([0.5, 15.0]))
    def a_link_is_cut(self, who: str, seconds: float) -> None:
        self._process(who).client.cut(seconds)
        self._pass()

    @rule(who=st.sampled_from(["server", "broker", *DEVICES]))
    def somebody_is_killed(self, who: str) -> None:
        if who == "broker":
            self.loop.run_until_complete(in_loop(self.broker.restart))
            self._pass()
        else:
            self._restart(self._process(who))

    def _process(self, who: str) -> Device | Server:
        return self.server if who == "server" else self.devices[DEVICES.index(who)]

    @rule()
    def the_server_will_die_before_it_acknowledges(self) -> None:
        self.fatal_receipt = True

    @invariant()
    def every_update_is_counted_once_and_is_what_was_sent(self) -> None:
        for number in range(ROUNDS):
            counted = self.server.ledger.updates(number)
            assert max(Counter(update.device for update in counted).values(), default=1) == 1
            for update in counted:
                content = encode_tensors(update_of(update.device, number))
                assert update.content.sha256 == sha256_of(content)

    @invariant()
    def what_is_acknowledged_is_in_the_ledger_and_final(self) -> None:
        for update, states in self.receipts.items():
            final = {state for state in states if state in ("done", "rejected")}
            assert len(final) <= 1, states
            if final:
                after = states[states.index(*final) :]
                assert set(after) <= final | {"unknown"}, states
            if "done" in final:
                assert self.server.ledger.has_update(update)

    @invariant()
    def an_announced_update_is_kept_until_its_end_is_heard(self) -> None:
        for update, (device, lease) in self.announced.items():
            kept = self.devices[DEVICES.index(device)].keeps(lease)
            assert kept or update in self.ended, (device, lease)

    @invariant()
    def leases_change_as_the_diagram_says(self) -> None:
        for number in range(ROUNDS):
            for row in self.server.ledger.leases(number):
                # Faster than anyone could look, a lease may have been opened and ended at once.
                before = self.lease_states.get(row.lease, "open")
                assert before == row.state or (before, row.state) in LEASE_EDGES, (before, row.state)
                self.lease_states[row.lease] = row.state

    @invariant()
    def agents_change_as_the_diagram_says(self) -> None:
        for device in self.devices:
            states = ["[*]", *device.visited]
            for before, after in itertools.pairwise(states):
                assert before == after or (before, after) in AGENT_EDGES, states

    @invariant()
    def nothing_goes_wrong_unseen(self) -> None:
        assert self.unhandled == []
        if self.server.running.done():
            self.server.running.result()

    def teardown(self) -> None:
        """In peace the run comes to its end, with the model of a run in which nothing happened."""
        try:
            self.fatal_receipt = False
            began = self.loop.time()
            while not self.server.running.done() or self.broker.held:
                for message in list(self.broker.held):
                    if message in self.broker.held:
                        self._deliver(message)
                if not self.broker.held:
                    self._pass(0.5)
                assert self.loop.time() < began + LONGEST_SECONDS, "the run does not end"
            self._pass(30)
            for message in list(self.broker.held):
                self._deliver(message)
            for check in (
                self.every_update_is_counted_once_and_is_what_was_sent,
                self.what_is_acknowledged_is_in_the_ledger_and_final,
                self.agents_change_as_the_diagram_says,
                self.nothing_goes_wrong_unseen,
            ):
                check()
            for number, result in self.server.results.items():
                assert len(self.server.ledger.updates(number)) == len(DEVICES)
                mean = np.mean([update_of(device, number)["block.w"] for device in DEVICES], axis=0)
                np.testing.assert_allclose(result["block.w"], mean, rtol=1e-5, atol=1e-7)
            assert {row.state for n in range(ROUNDS) for row in self.server.ledger.leases(n)} >= {"done"}
        finally:
            for process in (self.server, *self.devices):
                process.kill()
            self._stack.close()


TestDelivery = Delivery.TestCase
TestDelivery.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
