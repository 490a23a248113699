"""A whole fleet on one desktop: server and virtual devices, each with its own MQTT connection."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from frostline.datasets.folder import save_samples
from frostline.datasets.load import load_samples
from frostline.datasets.samples import Samples
from frostline.device_runtime.agent import Agent, DeviceSettings, State
from frostline.device_runtime.engine import available_engines, check_engine
from frostline.device_runtime.speed import measure_speed
from frostline.device_runtime.worker import Workers
from frostline.emulator.partition import split_dirichlet, split_iid
from frostline.protocol.connection import BrokerAddress
from frostline.protocol.errors import UsageError
from frostline.protocol.messages import Engine
from frostline.protocol.sizes import parse_share
from frostline.protocol.topics import Topics
from frostline.server.assembly import Run
from frostline.server.config import FleetTable, RunConfig
from frostline.server.records import RunSummary


async def emulate(
    run: Run,
    shards: Sequence[Samples],
    address: BrokerAddress,
    workers: int,
    notify: Callable[[str, State, str], None] = lambda device, state, text: None,
) -> RunSummary:
    """Run a server and `config.fleet.devices` agents until the model is trained.

    The agents run the code of a real device; they share worker processes, since each takes a core while it trains.
    A device's memory budget is enforced by its own admission check and the server's, on planned bytes.

    Parameters
    ----------
    shards : sequence of Samples
        Each device's samples, from `split_samples`.
    workers : int
        Training processes.
    notify : callable
        Told of every device's change of state.

    Raises
    ------
    FrostlineError
        Whatever ends the server's run.
    """
    fleet = run.config.fleet
    budgets = await memory_budgets(run)
    engines = device_engines(fleet)
    folder = run.folder.path / "devices"
    topics = Topics(run.config.run.fleet)
    with Workers(workers) as pool:
        agents = []
        for number in range(fleet.devices):
            name = device_name(number, fleet.devices)
            settings = _place(folder / name, name, shards[number], budgets[number], engines[number])
            on_change = _for_device(notify, name)
            agents.append(Agent(settings, address, topics, shards[number], pool, on_change))
        tasks = [asyncio.create_task(agent.run()) for agent in agents]
        try:
            return await _until_server_ends(run, tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # Features and downloads of virtual devices are of no use afterwards; the run's results are.
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def device_name(number: int, count: int) -> str:
    """What the virtual device `number`, counted from 0, of `count` is called; names sort as numbers do."""
    return f"device-{number + 1:0{len(str(count))}d}"


async def memory_budgets(run: Run) -> list[int]:
    """The devices' budgets in bytes, from sizes or percentages of what the whole model would take, as estimated.

    Raises
    ------
    UsageError
        Naming the entry that is neither.
    """
    fleet = run.config.fleet
    whole = 0
    if any("%" in entry for entry in _memory_entries(fleet)):
        whole = (await asyncio.to_thread(run.schedule.estimate_whole_model)).total
    if fleet.memory_range is not None:
        low, high = (parse_share(entry, whole, "fleet.memory_range") for entry in fleet.memory_range)
        drawn = np.random.default_rng(fleet.seed).uniform(low, high, fleet.devices)
        return [int(budget) for budget in drawn]
    budgets = [parse_share(entry, whole, "fleet.memory") for entry in fleet.memory]
    return [budgets[number % len(budgets)] for number in range(fleet.devices)]


def _memory_entries(fleet: FleetTable) -> list[str]:
    return fleet.memory if fleet.memory_range is None else fleet.memory_range


def split_samples(config: RunConfig) -> list[Samples]:
    """The training samples dealt out to the virtual devices; checks their memory and engines as well.

    Raises
    ------
    UsageError
        If the run names no training samples or has fewer than devices.
    """
    if config.data.train is None:
        raise UsageError(
            'data.train is missing: an emulated fleet needs samples to split, such as train = "digits"'
        )
    for entry in _memory_entries(config.fleet):
        parse_share(entry, 0, "fleet.memory")
    device_engines(config.fleet)
    samples = load_samples(config.data.train, "train").some(config.data.train_samples, config.run.seed)
    return [samples.take(rows) for rows in _split(samples, config.fleet, config.run.seed)]


def _split(samples: Samples, fleet: FleetTable, seed: int) -> list[npt.NDArray[np.int64]]:
    if fleet.split == "iid":
        return split_iid(samples.y, fleet.devices, seed)
    return split_dirichlet(samples.y, fleet.devices, fleet.alpha, seed)


def device_engines(fleet: FleetTable) -> list[tuple[Engine, ...]]:
    """The engines of each device.

    Raises
    ------
    UsageError
        Naming one that is not installed.
    """
    every = tuple(available_engines())
    dealt: list[tuple[Engine, ...]] = [(check_engine(engine),) for engine in fleet.engines] or [every]
    return [dealt[number % len(dealt)] for number in range(fleet.devices)]


def _place(
    folder: Path, name: str, shard: Samples, memory_bytes: int, engines: tuple[Engine, ...]
) -> DeviceSettings:
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    save_samples(shard, data / "samples.safetensors")
    return DeviceSettings(
        name=name,
        data=str(data),
        memory_bytes=memory_bytes,
        state_folder=folder / "state",
        engines=engines,
        gigaflops=measure_speed(),
        leave_when_finished=True,
    )


def _for_device(notify: Callable[[str, State, str], None], name: str) -> Callable[[State, str], None]:
    return lambda state, text: notify(name, state, text)


async def _until_server_ends(run: Run, agents: Sequence[asyncio.Task[None]]) -> RunSummary:
    server = asyncio.create_task(run.coordinator().run())
    try:
        # An agent ends by itself only when the run is over, or when it could not even connect.
        await asyncio.wait([server, *agents], return_when=asyncio.FIRST_EXCEPTION)
        for agent in agents:
            if agent.done() and agent.exception() is not None and not server.done():
                agent.result()
        return await server
    finally:
        server.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await server


def default_workers() -> int:
    """One training process a core."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
