"""Measures delivery: bytes on the wire, the broker's fan-out, how many updates a second a server takes, and its memory.

Everything is the real thing: a broker (mosquitto where it is installed), the device's fetcher and outbox, the server's gateway,
round and ledger. Server, broker and devices are processes of their own; all devices share one process, and their stores are
in memory where the system has such a folder, since fifty devices do not share one disk.

* wire_overhead: bytes through a device's socket, both ways, over those of the content: 10 MB down, 10 MB up.
* int8_ratio: bytes of an update in int8 over its bytes in float32.
* fan_out_ratio: how fast 50 devices fetch 10 MB, checked and whole in their stores, over how fast the broker brings the same
  chunks to 50 bare paho clients that only count them. Medians of `--runs`, in turns.
* aggregation_in_process_per_s: updates of 62 thousand parameters, checked, decoded and folded in, a second.
* aggregation_broker_per_s: the same from devices through the broker: leased, offered, received, journalled, folded in.
* server_growth_bytes: by how much the server's memory peaks higher with ten times the devices.

    OMP_NUM_THREADS=1 python benchmarks/delivery.py --json
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import asyncio
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import paho.mqtt.client as mqtt
import typer
from paho.mqtt.enums import CallbackAPIVersion
from rich.console import Console
from rich.table import Table

from frostline.device_runtime.fetching import ContentFetcher
from frostline.device_runtime.outbox import Outbox
from frostline.emulator.broker import EmbeddedBroker
from frostline.protocol.blobs import BlobStore, index_of, reference_to, split_chunks, write_atomically
from frostline.protocol.connection import BrokerAddress, Connection
from frostline.protocol.manifest import PlannedMemory, Program, StageManifest, TensorSpec
from frostline.protocol.messages import (
    BlobReference,
    Lease,
    Presence,
    Receipt,
    TrainingMetrics,
    UpdateEncoding,
    UpdateOffer,
    decode,
)
from frostline.protocol.topics import Topics
from frostline.protocol.update_encoding import decode_update, encode_update
from frostline.server.admission import OfferedStage
from frostline.server.aggregation import Aggregator
from frostline.server.config import RunConfig
from frostline.server.gateway import Gateway
from frostline.server.ledger import Ledger, sqlite_url
from frostline.server.round import Round, RoundPlan

FLEET, RUN = "benchmark", "0" * 32
TOPICS = Topics(FLEET)
CONTENT_BYTES = 10_000_000
CHUNK = 256 * 1024
PARAMETERS = 62_000
FAN_OUT_DEVICES = 50
CONCURRENT = 32
SEED = 0


def stage_of(parameters: int) -> StageManifest:
    """A stage of so many parameters; nothing else of it matters here."""
    program = Program(
        file=BlobReference(sha256="0" * 64, size=1),
        inputs=[TensorSpec(name="x", shape=(1, 1))],
        outputs=[],
        arena_bytes=0,
    )
    halves = (parameters // 2, parameters - parameters // 2)
    return StageManifest(
        stage=0,
        stages=1,
        name="stage",
        engine="onnxruntime",
        variant="whole",
        batch=1,
        micro_batches=1,
        classes=10,
        parameters=[TensorSpec(name=f"block.{n}", shape=(size,)) for n, size in enumerate(halves)],
        statistics=[],
        optimizer_state=[],
        received=[],
        training=program,
        update=None,
        evaluation=program,
        prefix=[],
        planned=PlannedMemory(
            arena=0, parameters=0, statistics=0, optimizer_state=0, received=0, batch=0, program=1
        ),
    )


def update_of(stage: StageManifest, encoding: UpdateEncoding | None = None) -> bytes:
    """A random update of a stage, as it travels."""
    random = np.random.default_rng(SEED)
    update = {spec.name: random.normal(size=spec.shape).astype(np.float32) for spec in stage.parameters}
    return encode_update(update, stage, encoding or UpdateEncoding())


# The server, in a process of its own.


@dataclass(frozen=True)
class Served:
    """What the server's process tells when its round is over."""

    updates: int
    seconds: float
    peak_bytes: int


def serve(url: str, parameters: int, devices: int, weights: bytes, results: Any) -> None:
    """Lease one stage to so many devices and take what comes back."""
    with tempfile.TemporaryDirectory() as folder:
        results.put(asyncio.run(_serve(Path(folder), url, parameters, devices, weights)))


async def _serve(folder: Path, url: str, parameters: int, devices: int, weights: bytes) -> Served:
    stage = stage_of(parameters)
    updates = BlobStore(folder / "updates")
    gateway = Gateway(BrokerAddress.parse(url), TOPICS, CHUNK, updates)
    await gateway.open()
    reference = gateway.content.offer(weights)
    ledger = Ledger(sqlite_url(folder / "ledger.sqlite"))
    ledger.begin_stage(0, stage.name)
    ledger.open_round(0, 0, reference)
    offer = OfferedStage(stage, reference_to(stage.encode()))
    plan = RoundPlan(0, RUN, [offer], {1.0: reference}, devices, deadline_seconds=600.0)
    config = RunConfig.model_validate({"model": {"name": "small_cnn"}})
    start = {spec.name: np.zeros(spec.shape, np.float32) for spec in stage.parameters}
    while len(gateway.devices) < devices:
        await asyncio.sleep(0.05)
    current = Round(plan, config, gateway, ledger, Aggregator(start), updates)
    started = time.perf_counter()
    await current.run(iter(list(gateway.devices)))
    seconds = time.perf_counter() - started
    # The last receipts are on their way.
    await asyncio.sleep(1)
    await gateway.close()
    ledger.close()
    return Served(len(current.metrics), seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


# Devices.


class SendingDevice:
    """A device that answers its lease with an update it has already."""

    def __init__(self, address: BrokerAddress, name: str, folder: Path, content: bytes) -> None:
        self.connection = Connection(address, name)
        self.store = BlobStore(folder / "blobs")
        self._name = name
        self._content = content
        self._fetcher = ContentFetcher(self.connection, TOPICS, name, self.store)
        self._outbox = Outbox(self.connection, TOPICS, name, folder / "outbox")
        self._lease: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self.connection.on_message = self._on_message

    async def open(self) -> None:
        """Connect and say hello."""
        for topic in (TOPICS.lease(self._name), TOPICS.receipt(self._name)):
            self.connection.subscribe(topic)
        await self.connection.open()
        presence = Presence(
            device=self._name,
            session=RUN,
            state="online",
            memory_bytes=10**9,
            engines=["onnxruntime"],
            samples=10,
        )
        self.connection.publish(TOPICS.presence(self._name), presence.encode(), retain=True)

    async def work(self, slots: asyncio.Semaphore, *, fetch: bool) -> None:
        """Take the lease, fetch its weights if asked to, and have the update counted."""
        lease = await self._lease
        async with slots:
            if fetch:
                await self._fetcher.fetch(lease.weights, CHUNK)
            write_atomically(self._outbox.content_path(lease.lease), self._content)
            metrics = TrainingMetrics(samples=10, steps=1, loss=1.0, seconds=1.0)
            index = index_of(self._content, CHUNK)
            offer = UpdateOffer(update=lease.lease[::-1], lease=lease.lease, content=index, metrics=metrics)
            self._outbox.add(offer)
            assert (await self._outbox.send(offer)).state == "done"

    def _on_message(self, topic: str, payload: bytes) -> None:
        if topic == TOPICS.receipt(self._name):
            self._outbox.receive(decode(Receipt, payload))
        elif topic == TOPICS.lease(self._name):
            if not self._lease.done():
                self._lease.set_result(decode(Lease, payload))
        else:
            self._fetcher.deliver(topic, payload)


async def send_updates(
    address: BrokerAddress, devices: int, folder: Path, content: bytes, *, fetch: bool
) -> None:
    """Connect so many devices and have the update of each counted, `CONCURRENT` at a time."""
    fleet = [SendingDevice(address, f"device-{n}", folder / str(n), content) for n in range(devices)]
    for device in fleet:
        await device.open()
    slots = asyncio.Semaphore(CONCURRENT)
    async with asyncio.timeout(300):
        await asyncio.gather(*(device.work(slots, fetch=fetch) for device in fleet))
    await asyncio.gather(*(device.connection.close() for device in fleet))


def run_round(
    broker: EmbeddedBroker,
    devices: int,
    parameters: int,
    send: Callable[[BrokerAddress, Path, bytes], Awaitable[None]],
    weights: bytes = b"weights",
) -> Served:
    """One round of a server's process and the devices of this one."""
    results = multiprocessing.get_context("spawn").Queue()
    arguments = (broker.url, parameters, devices, weights, results)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=arguments)
    server.start()
    with device_folder() as folder:
        content = update_of(stage_of(parameters))

        async def play() -> None:
            await send(BrokerAddress.parse(broker.url), folder, content)

        asyncio.run(play())
    served: Served = results.get(timeout=60)
    server.join()
    assert served.updates == devices
    return served


@contextmanager
def device_folder() -> Iterator[Path]:
    """A folder in memory where the system has one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


# Wire.


class CountingProxy:
    """Passes bytes between a device and the broker and counts them."""

    def __init__(self, target: BrokerAddress) -> None:
        self._target = target
        self.bytes = 0

    async def open(self) -> BrokerAddress:
        """Where to connect in place of the broker."""
        server = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        return BrokerAddress.parse(f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}")

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._target.host, self._target.port)
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**18):
            self.bytes += len(data)
            writer.write(data)
            await writer.drain()
        writer.close()


def wire_overhead(broker: EmbeddedBroker) -> float:
    """Bytes through one device's socket over those of the content it got and gave."""
    counted = 0
    given = len(update_of(stage_of(CONTENT_BYTES // 4)))

    async def send(address: BrokerAddress, folder: Path, content: bytes) -> None:
        nonlocal counted
        proxy = CountingProxy(address)
        await send_updates(await proxy.open(), 1, folder, content, fetch=True)
        counted = proxy.bytes

    weights = np.random.default_rng(SEED).bytes(CONTENT_BYTES)
    run_round(broker, 1, CONTENT_BYTES // 4, send, weights)
    return counted / (CONTENT_BYTES + given)


# Fan-out.


def publish(url: str, bare: bool, begin: Any, end: Any) -> None:
    """The server's side: the content on offer, or its chunks to whoever listens."""

    async def play() -> None:
        content = np.random.default_rng(SEED).bytes(CONTENT_BYTES)
        if bare:
            connection = Connection(BrokerAddress.parse(url), "publisher")
            await connection.open()
            await asyncio.to_thread(begin.wait)
            begin.wait()
            for chunk in split_chunks(content, CHUNK):
                connection.publish("bare", chunk)
            await asyncio.to_thread(end.wait)
            await connection.close()
        else:
            gateway = Gateway(BrokerAddress.parse(url), TOPICS, CHUNK, BlobStore(Path(tempfile.mkdtemp())))
            await gateway.open()
            gateway.content.offer(content)
            await asyncio.sleep(0.5)
            await asyncio.to_thread(begin.wait)
            begin.wait()
            await asyncio.to_thread(end.wait)
            gateway.content.withdraw_all()
            await gateway.close()

    asyncio.run(play())


async def listen(address: BrokerAddress, begin: Any) -> float:
    """Seconds until every bare paho client has heard every byte."""
    heard = [0] * FAN_OUT_DEVICES
    over = asyncio.Event()

    def hear(client: Any, number: int, message: Any) -> None:
        heard[number] += len(message.payload)
        if heard[number] >= CONTENT_BYTES and min(heard) >= CONTENT_BYTES:
            over.set()

    clients = [bare_client(address, number, hear) for number in range(FAN_OUT_DEVICES)]
    await asyncio.sleep(1)
    await asyncio.to_thread(begin.wait)
    started = time.perf_counter()
    begin.wait()
    await over.wait()
    seconds = time.perf_counter() - started
    for client in clients:
        client.disconnect()
    return seconds


def bare_client(address: BrokerAddress, number: int, hear: Callable[[Any, int, Any], None]) -> mqtt.Client:
    """A paho client in this event loop that listens and does nothing else."""
    loop = asyncio.get_running_loop()
    client = mqtt.Client(CallbackAPIVersion.VERSION2, f"bare-{number}", userdata=number)
    client.on_socket_open = lambda c, _, sock: loop.add_reader(sock, c.loop_read)
    client.on_socket_close = lambda _, __, sock: loop.remove_reader(sock)
    client.on_socket_register_write = lambda c, _, sock: loop.add_writer(sock, c.loop_write)
    client.on_socket_unregister_write = lambda _, __, sock: loop.remove_writer(sock)
    client.on_connect = lambda c, *_: c.subscribe("bare", 1)
    client.on_message = hear
    client.connect(address.host, address.port)
    return client


async def fetch(address: BrokerAddress, folder: Path, begin: Any) -> float:
    """Seconds until every device has the content in its store."""
    reference = reference_to(np.random.default_rng(SEED).bytes(CONTENT_BYTES))
    fetchers = []
    connections = []
    for number in range(FAN_OUT_DEVICES):
        connection = Connection(address, f"device-{number}")
        fetcher = ContentFetcher(connection, TOPICS, f"device-{number}", BlobStore(folder / str(number)))
        connection.on_message = fetcher.deliver
        await connection.open()
        connections.append(connection)
        fetchers.append(fetcher)
    await asyncio.to_thread(begin.wait)
    started = time.perf_counter()
    begin.wait()
    await asyncio.gather(*(fetcher.fetch(reference, CHUNK) for fetcher in fetchers))
    seconds = time.perf_counter() - started
    await asyncio.gather(*(connection.close() for connection in connections))
    return seconds


def fan_out(broker: EmbeddedBroker, *, bare: bool) -> float:
    """Seconds to bring the content to every device."""
    context = multiprocessing.get_context("spawn")
    begin, end = context.Barrier(2), context.Barrier(2)
    publisher = context.Process(target=publish, args=(broker.url, bare, begin, end))
    publisher.start()
    address = BrokerAddress.parse(broker.url)
    with device_folder() as folder:
        seconds = asyncio.run(listen(address, begin) if bare else fetch(address, folder, begin))
    end.wait()
    publisher.join()
    return seconds


# Aggregation.


def aggregation_in_process() -> float:
    """Updates checked, decoded and folded in, a second."""
    stage = stage_of(PARAMETERS)
    content = update_of(stage)
    aggregator = Aggregator({spec.name: np.zeros(spec.shape, np.float32) for spec in stage.parameters})
    count = 2000
    started = time.perf_counter()
    for _ in range(count):
        assert reference_to(content).size == len(content)
        aggregator.fold(decode_update(content, stage, UpdateEncoding(), "update"), 10)
    return count / (time.perf_counter() - started)


def round_of(broker: EmbeddedBroker, devices: int) -> Served:
    """A round of devices that only send."""

    async def send(address: BrokerAddress, folder: Path, content: bytes) -> None:
        await send_updates(address, devices, folder, content, fetch=False)

    return run_round(broker, devices, PARAMETERS, send)


def measure(runs: int, devices: int) -> dict[str, float]:
    """Every figure."""
    full, int8 = (
        update_of(stage_of(PARAMETERS)),
        update_of(stage_of(PARAMETERS), UpdateEncoding(values="int8")),
    )
    with EmbeddedBroker() as broker:
        overhead = wire_overhead(broker)
        pairs = [(fan_out(broker, bare=True), fan_out(broker, bare=False)) for _ in range(runs)]
        rounds = [(round_of(broker, devices // 10), round_of(broker, devices)) for _ in range(runs)]
    bare, fetched = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {
        "wire_overhead": overhead,
        "int8_ratio": len(int8) / len(full),
        "fan_out_bare_seconds": bare,
        "fan_out_seconds": fetched,
        "fan_out_ratio": bare / fetched,
        "aggregation_in_process_per_s": statistics.median(aggregation_in_process() for _ in range(runs)),
        "aggregation_broker_per_s": statistics.median(many.updates / many.seconds for _, many in rounds),
        "server_growth_bytes": statistics.median(many.peak_bytes - few.peak_bytes for few, many in rounds),
    }


def main(
    runs: Annotated[int, typer.Option(min=1, help="Measurements of each figure; medians are told.")] = 5,
    devices: Annotated[int, typer.Option(min=200, help="Devices that send an update.")] = 400,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure delivery over a real broker."""
    figures = measure(runs, devices)
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    table = Table("figure", "value", title=f"delivery, medians of {runs}")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.4g}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
