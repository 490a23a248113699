"""`frostline emulate`: a whole fleet on this machine."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Annotated

import typer

from frostline.cli.options import CacheFolder, NoCache

QUICKSTART = Path("examples/quickstart.toml")


def emulate(
    config: Annotated[
        Path, typer.Option(help="TOML file that describes the run and its fleet.")
    ] = QUICKSTART,
    out: Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/<config>-<time>.")] = None,
    broker: Annotated[
        str | None, typer.Option(help="Use this broker in place of one started just for the run.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the broker that is started. Default: a free one.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Training processes. Default: one a core.")
    ] = None,
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")] = False,
) -> None:
    """Emulate a fleet: a broker, a server and virtual devices on this machine, over real MQTT connections.

    The virtual devices run the code of real ones and train with the same artifacts. Nothing needs to be set up: the
    broker is mosquitto if it is installed, else the NATS server that came with the installation.
    """
    from frostline.server.compiler_process import CompilerProcess
    from frostline.server.config import load_config

    settings, text = load_config(config)
    with contextlib.ExitStack() as stack:
        # The compiler's process loads its libraries while this one loads the same.
        process = stack.enter_context(CompilerProcess(settings.training.engines[0]))

        from frostline.cli.progress import TerminalObserver, print_summary
        from frostline.cli.serve import default_folder
        from frostline.emulator.broker import EmbeddedBroker
        from frostline.emulator.emulation import default_workers, split_samples
        from frostline.emulator.emulation import emulate as emulate_fleet
        from frostline.server.assembly import assemble, broker_address, cache_folder

        shards = split_samples(settings)
        compiled = cache_folder(settings, cache, unused=no_cache)
        url = broker or stack.enter_context(EmbeddedBroker(port)).url
        address = broker_address(settings, url)
        observer = stack.enter_context(TerminalObserver())
        folder = out or default_folder(config)
        run = assemble(
            settings, text, folder, address, observer, resume=False, compiled=compiled, process=process
        )
        summary = asyncio.run(emulate_fleet(run, shards, address, workers or default_workers()))
    print_summary(summary, run.folder, as_json=as_json)
