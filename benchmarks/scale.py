"""Measures how many devices one machine and one server hold.

Broker (mosquitto where it is installed), server and devices are processes of their own; devices are real agents over real
connections, that only lack work.

* idle_core_share: what share of a core a thousand agents in one process take that wait for work, keepalives included.
* idle_agent_bytes: by how much that process grew, for each agent.
* connections: agents connected at the same time, of those asked for, in two processes.
* connect_seconds: until the last of them is connected; known_seconds: until the server knows it.
* round_seconds: until the server has leased a stage to so many of them (`--round`) and has the answer of each, which fetched the
  stage's manifest from the broker and refused it for its size.
* returned_seconds: until the server knows all of them again after the broker was killed and came back empty.
* server_core_share: what the server takes while all of them wait.
* server_bytes_per_device, broker_bytes: what they hold.

    OMP_NUM_THREADS=1 python benchmarks/scale.py --json
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import asyncio
import json
import multiprocessing
import resource
import signal
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from delivery import stage_of
from rich.console import Console
from rich.table import Table

from frostline.datasets.samples import Samples
from frostline.device_runtime.agent import Agent, DeviceSettings
from frostline.device_runtime.worker import Workers
from frostline.emulator.broker import EmbeddedBroker
from frostline.protocol.blobs import BlobStore
from frostline.protocol.connection import BrokerAddress
from frostline.protocol.messages import RunAnnouncement
from frostline.protocol.topics import Topics
from frostline.server.admission import OfferedStage
from frostline.server.aggregation import Aggregator
from frostline.server.config import RunConfig
from frostline.server.gateway import Gateway
from frostline.server.ledger import Ledger, sqlite_url
from frostline.server.round import Round, RoundPlan

TOPICS = Topics("benchmark")
RUN = "0" * 32
CHUNK = 64 * 1024
AGENT_PROCESSES = 2
CONNECTING = 100
"""Agents that connect at a time."""
BUDGET = 1000
"""Bytes that agents say they have."""


def limit_files() -> None:
    """Allow as many open files as we may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


# Agents, in processes of their own.


def run_agents(url: str, first: int, count: int, pipe: Any) -> None:
    """Keep so many agents connected until told to stop; tells how much memory they took."""
    limit_files()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        asyncio.run(_run_agents(BrokerAddress.parse(url), first, count, Path(folder), pipe))


async def _run_agents(address: BrokerAddress, first: int, count: int, folder: Path, pipe: Any) -> None:
    samples = Samples(x=np.zeros((4, 2), np.float32), y=np.array([0, 0, 1, 1]), classes=2)
    before = psutil.Process().memory_info().rss
    slots = asyncio.Semaphore(CONNECTING)
    with Workers() as workers:

        async def start(number: int) -> asyncio.Task[None]:
            connected = asyncio.Event()
            name = f"device-{number}"
            settings = DeviceSettings(name, "data", BUDGET, folder / name, ("onnxruntime",))
            agent = Agent(settings, address, TOPICS, samples, workers, lambda state, text: connected.set())
            async with slots:
                running = asyncio.create_task(agent.run())
                await connected.wait()
            return running

        agents = await asyncio.gather(*(start(number) for number in range(first, first + count)))
        pipe.send(psutil.Process().memory_info().rss - before)
        await asyncio.to_thread(pipe.recv)
        for agent in agents:
            agent.cancel()
        await asyncio.gather(*agents, return_exceptions=True)


class Agents:
    """Processes full of agents."""

    def __init__(self, url: str, count: int, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self.processes = [], []
        share = count // processes
        for number in range(processes):
            here, there = context.Pipe()
            first, those = (
                number * share,
                share if number < processes - 1 else count - share * (processes - 1),
            )
            process = context.Process(target=run_agents, args=(url, first, those, there))
            process.start()
            self._pipes.append(here)
            self.processes.append(process)

    def grown(self) -> int:
        """Wait until all are connected; what their processes grew by, in bytes."""
        return sum(pipe.recv() for pipe in self._pipes)

    def stop(self) -> None:
        """Let them leave."""
        for pipe in self._pipes:
            pipe.send("stop")
        for process in self.processes:
            process.join()


# The server, in a process of its own.


def serve(url: str, asked: int, pipe: Any) -> None:
    """Do what the benchmark's process says, one word at a time."""
    limit_files()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_serve(Path(folder), url, asked, pipe))


async def _serve(folder: Path, url: str, asked: int, pipe: Any) -> None:
    gateway = Gateway(BrokerAddress.parse(url), TOPICS, CHUNK, BlobStore(folder / "updates"))
    await gateway.open()
    gateway.announce(RunAnnouncement(run=RUN, state="open", chunk_size=CHUNK))
    process = psutil.Process()
    empty = process.memory_info().rss
    while True:
        match await asyncio.to_thread(pipe.recv):
            case ("wait", int(devices)):
                # As a coordinator waits for the devices of a round.
                while sum(each.offline_since is None for each in gateway.devices.values()) < devices:
                    gateway.remind()
                    await asyncio.sleep(0.05)
                pipe.send((process.memory_info().rss - empty) / devices)
            case ("rest", float(seconds)):
                before = cpu_seconds(process)
                await asyncio.sleep(seconds)
                pipe.send((cpu_seconds(process) - before) / seconds)
            case ("forget",):
                gateway.devices.clear()
                pipe.send(None)
            case ("round",):
                pipe.send(await _ask_all(gateway, folder, asked))
            case _:
                await gateway.close()
                return


async def _ask_all(gateway: Gateway, folder: Path, asked: int) -> float:
    admitted = stage_of(2)
    # What it really needs, the server does not know; no agent has as much.
    planned = admitted.planned.model_copy(update={"arena": 2 * BUDGET})
    weights = gateway.content.offer(b"weights")
    real = gateway.content.offer(admitted.model_copy(update={"planned": planned}).encode())
    ledger = Ledger(sqlite_url(folder / "ledger.sqlite"))
    ledger.begin_stage(0, "stage")
    ledger.open_round(0, 0, weights)
    plan = RoundPlan(0, RUN, [OfferedStage(admitted, real)], {1.0: weights}, asked, deadline_seconds=600.0)
    config = RunConfig.model_validate({"model": {"name": "small_cnn"}})
    aggregator = Aggregator({"block.w": np.zeros(2, np.float32)})
    current = Round(plan, config, gateway, ledger, aggregator, BlobStore(folder / "updates"))
    started = time.perf_counter()
    await current.run(iter(list(gateway.devices)[:asked]))
    seconds = time.perf_counter() - started
    states = [row.state for row in ledger.leases(0)]
    assert states == ["refused"] * asked, {state: states.count(state) for state in states}
    ledger.close()
    return seconds


class Server:
    """The server's process."""

    def __init__(self, url: str, asked: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=serve, args=(url, asked, there))
        self._process.start()

    def do(self, *words: Any) -> Any:
        """What the server answers."""
        self._pipe.send(words)
        return self._pipe.recv()

    def stop(self) -> None:
        """End it."""
        self._pipe.send(("stop",))
        self._process.join()


def measure_idle(agents: int, seconds: float) -> dict[str, float]:
    """A thousand agents that wait for work."""
    with EmbeddedBroker() as broker:
        fleet = Agents(broker.url, agents, 1)
        grown = fleet.grown()
        process = psutil.Process(fleet.processes[0].pid)
        time.sleep(2)
        before = cpu_seconds(process)
        time.sleep(seconds)
        share = (cpu_seconds(process) - before) / seconds
        fleet.stop()
    return {"idle_agents": agents, "idle_core_share": share, "idle_agent_bytes": grown / agents}


def measure_many(connections: int, asked: int, seconds: float) -> dict[str, float]:
    """A server and ten thousand agents."""
    broker = EmbeddedBroker()
    broker.__enter__()
    url = broker.url
    server = Server(url, asked)
    started = time.perf_counter()
    fleet = Agents(url, connections, AGENT_PROCESSES)
    try:
        fleet.grown()
        connected = time.perf_counter() - started
        held = server.do("wait", connections)
        known = time.perf_counter() - started
        open_connections = len(psutil.Process(broker.pid).net_connections("tcp")) - 2
        figures = {
            "connections": open_connections,
            "connect_seconds": connected,
            "known_seconds": known,
            "server_bytes_per_device": held,
            "server_core_share": server.do("rest", seconds),
            "round_devices": asked,
            "round_seconds": server.do("round"),
            "broker_bytes": psutil.Process(broker.pid).memory_info().rss,
        }
        server.do("forget")
        os.kill(broker.pid, signal.SIGKILL)
        broker.__exit__(None, None, None)
        broker = EmbeddedBroker(BrokerAddress.parse(url).port)
        broker.__enter__()
        started = time.perf_counter()
        server.do("wait", connections)
        return figures | {"returned_seconds": time.perf_counter() - started}
    finally:
        fleet.stop()
        server.stop()
        broker.__exit__(None, None, None)


def main(
    agents: Annotated[int, typer.Option(min=1, help="Agents that idle in one process.")] = 1000,
    connections: Annotated[int, typer.Option(min=2, help="Agents connected at the same time.")] = 10_000,
    asked: Annotated[int, typer.Option("--round", min=1, help="Devices of the round.")] = 1000,
    seconds: Annotated[float, typer.Option(min=1, help="How long idling is watched.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure how many devices one machine and one server hold."""
    limit_files()
    figures = measure_idle(agents, seconds) | measure_many(connections, asked, seconds)
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    table = Table("figure", "value", title="how many devices one machine and one server hold")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
