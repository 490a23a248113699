"""`frostline serve`: the server of a fleet of real devices."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from frostline.cli.options import CacheFolder, NoCache


def serve(
    config: Annotated[Path, typer.Option(help="TOML file that describes the run.")],
    out: Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/<config>-<time>.")] = None,
    broker: Annotated[str | None, typer.Option(help="Broker to use in place of the configuration's.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out where it was cut short.")] = False,
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")] = False,
) -> None:
    """Train a model with the devices that join the fleet, until every block is frozen.

    Everything is journalled: a server that was killed goes on with the same round when started again with --resume.
    """
    from frostline.protocol.errors import UsageError
    from frostline.server.compiler_process import CompilerProcess
    from frostline.server.config import load_config

    settings, text = load_config(config)
    if resume and out is None:
        raise UsageError("--resume needs --out: the folder of the run to go on with")
    # The compiler's process loads its libraries while this one loads the same.
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(CompilerProcess(settings.training.engines[0]))

        from frostline.cli.progress import TerminalObserver, print_summary
        from frostline.server.assembly import assemble, broker_address, cache_folder

        address = broker_address(settings, broker)
        compiled = cache_folder(settings, cache, unused=no_cache)
        folder = out or default_folder(config)
        observer = stack.enter_context(TerminalObserver())
        run = assemble(
            settings, text, folder, address, observer, resume=resume, compiled=compiled, process=process
        )

        async def train() -> None:
            summary = await run.coordinator().run()
            print_summary(summary, run.folder, as_json=as_json)

        asyncio.run(train())


def default_folder(config: Path) -> Path:
    """A new folder below `runs/`, named after the configuration and the time."""
    return Path("runs") / f"{config.stem}-{datetime.now():%Y%m%d-%H%M%S}"
