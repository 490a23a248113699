"""One run on a simulated fleet: real training, simulated time."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from frostline.datasets.samples import Samples
from frostline.emulator.emulation import device_engines, device_name, memory_budgets
from frostline.emulator.simulated_fleet import SimulatedFleet, VirtualDevice
from frostline.emulator.step_profile import StepProfile
from frostline.emulator.virtual_time import run_in_virtual_time
from frostline.protocol.blobs import BlobStore
from frostline.protocol.sizes import parse_size
from frostline.server.assembly import Run
from frostline.server.config import RunConfig
from frostline.server.records import RunSummary

SPEED_STREAM, BANDWIDTH_STREAM = 1, 2
"""Tell the fleet's draws apart."""


def simulate(run: Run, shards: Sequence[Samples], profile_path: Path | None = None) -> RunSummary:
    """Run a server and its virtual devices until the model is trained; every duration in the results is simulated.

    Parameters
    ----------
    shards : sequence of Samples
        Each device's samples, from `frostline.emulator.emulation.split_samples`.
    profile_path : Path or None
        The file of step times; one of the run's own if None.

    Raises
    ------
    FrostlineError
        Whatever ends the server's run.
    """
    folder = run.folder.path / "devices"
    folder.mkdir(exist_ok=True)
    profile = StepProfile(profile_path or run.folder.path / "profile.json")
    try:
        return run_in_virtual_time(_simulate(run, shards, profile, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _simulate(run: Run, shards: Sequence[Samples], profile: StepProfile, folder: Path) -> RunSummary:
    config = run.config
    budgets = await memory_budgets(run)
    fleet = SimulatedFleet(
        virtual_devices(config, shards, budgets),
        profile,
        folder,
        BlobStore(run.folder.updates_dir),
        config.broker.chunk_size,
        config.run.seed,
    )
    return await run.coordinator(fleet).run()


def virtual_devices(
    config: RunConfig, shards: Sequence[Samples], budgets: Sequence[int]
) -> list[VirtualDevice]:
    """The devices of a configuration: what they hold, and speeds and bandwidths drawn with the fleet's seed."""
    table = config.simulation
    engines = device_engines(config.fleet)
    count = config.fleet.devices
    slow, fast = (float(parse_size(each, "simulation.bandwidth")) for each in table.bandwidth)
    speeds = _log_uniform(table.speed[0], table.speed[1], count, [config.fleet.seed, SPEED_STREAM])
    bandwidths = _log_uniform(slow, fast, count, [config.fleet.seed, BANDWIDTH_STREAM])
    return [
        VirtualDevice(
            name=device_name(number, count),
            samples=shards[number],
            memory_bytes=budgets[number],
            engines=engines[number],
            speed=speeds[number],
            bandwidth=bandwidths[number],
            dropout=table.dropout,
            away_seconds=table.away_seconds,
        )
        for number in range(count)
    ]


def _log_uniform(low: float, high: float, count: int, seed: Sequence[int]) -> list[float]:
    drawn = np.random.default_rng(list(seed)).uniform(np.log(low), np.log(high), count)
    return [float(value) for value in np.exp(drawn)]
