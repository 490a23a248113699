"""`frostline device`: one device of a fleet."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console

from frostline.protocol.sizes import format_size, parse_size


def device(
    broker: Annotated[
        str,
        typer.Option(
            help="mqtt://host:1883, or mqtts://host:8883 for TLS; a cluster as mqtt://host1,host2,host3."
        ),
    ],
    data: Annotated[
        str, typer.Option(help="A folder of safetensors with x and y, or a name such as digits.")
    ],
    name: Annotated[str, typer.Option("--id", help="This device's name, unique in the fleet.")],
    fleet: Annotated[
        str, typer.Option(help="The fleet to join: run.fleet of the server's configuration.")
    ] = "demo",
    memory: Annotated[
        str | None,
        typer.Option(help="Budget for training, such as 64MB. Default: half of the memory free now."),
    ] = None,
    storage: Annotated[
        str, typer.Option(help="Most that downloads may take, such as 200MB; what was used longest ago goes.")
    ] = "1GB",
    state: Annotated[
        Path | None,
        typer.Option(help="Folder for downloads and unsent updates. Default: ~/.local/state/frostline/ID."),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="Train with this runtime only: executorch, onnxruntime or onnxruntime-training. May be repeated. "
            "Default: every one that is installed."
        ),
    ] = None,
    leave_when_finished: Annotated[bool, typer.Option(help="Exit once the run is over.")] = False,
    ca_file: Annotated[
        Path | None, typer.Option(help="Authority that signed the broker's certificate.")
    ] = None,
    certificate_file: Annotated[Path | None, typer.Option(help="This device's certificate.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="This device's private key.")] = None,
) -> None:
    """Join a fleet: announce what this device is, train the stages it is leased, return the updates.

    Samples never leave the device. An interrupted device goes on where it was: what it downloaded and what it has not
    delivered yet is in its state folder.
    """
    from frostline.datasets.load import load_samples
    from frostline.device_runtime.agent import Agent, DeviceSettings
    from frostline.device_runtime.engine import ENGINES, INSTALL, available_engines, check_engine
    from frostline.device_runtime.speed import measure_speed
    from frostline.device_runtime.worker import Workers
    from frostline.protocol.connection import BrokerAddress
    from frostline.protocol.errors import UsageError
    from frostline.protocol.topics import Topics, checked_name

    checked_name(name, "--id")
    engines = [check_engine(each) for each in engine or []] or available_engines()
    if not engines:
        raise UsageError(
            "no engine is installed on this device: " + " or ".join(INSTALL[each] for each in ENGINES[:2])
        )
    address = BrokerAddress.parse(broker, ca_file, certificate_file, key_file)
    topics = Topics(fleet)
    memory_bytes = parse_size(memory, "--memory") if memory else psutil.virtual_memory().available // 2
    samples = load_samples(data, "train")
    settings = DeviceSettings(
        name=name,
        data=data,
        memory_bytes=memory_bytes,
        state_folder=state or Path.home() / ".local" / "state" / "frostline" / name,
        engines=tuple(engines),
        storage_bytes=parse_size(storage, "--storage"),
        gigaflops=measure_speed(),
        leave_when_finished=leave_when_finished,
    )
    console = Console(stderr=True)
    console.print(
        f"{name}: {len(samples)} samples, {format_size(memory_bytes)} for training with {', '.join(engines)}, "
        f"fleet {fleet}"
    )

    async def serve_leases() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
        with Workers() as workers:
            agent = Agent(
                settings,
                address,
                topics,
                samples,
                workers,
                lambda state, text: console.print(f"{name}: {text}", markup=False, soft_wrap=True),
            )
            await agent.run()

    try:
        asyncio.run(serve_leases())
    except asyncio.CancelledError:
        raise SystemExit(143) from None
