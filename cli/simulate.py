"""`frostline simulate`: a fleet in simulated time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from frostline.cli.options import CacheFolder, NoCache


def simulate(
    config: Annotated[Path, typer.Option(help="TOML file that describes the run and its fleet.")],
    out: Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/<config>-<time>.")] = None,
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")] = False,
) -> None:
    """Simulate a fleet: devices really train, but on a clock that only counts what they would need.

    No broker and no waiting: a round takes as long as computing it takes here, while every duration in the results
    follows from the devices' speeds and bandwidths in [simulation]. For trying out what a fleet of hundreds would do.
    """
    from frostline.cli.progress import TerminalObserver, print_summary
    from frostline.cli.serve import default_folder
    from frostline.emulator.emulation import split_samples
    from frostline.emulator.simulation import simulate as simulate_run
    from frostline.server.assembly import assemble, broker_address, cache_folder
    from frostline.server.config import load_config

    settings, text = load_config(config)
    shards = split_samples(settings)
    folder = out or default_folder(config)
    with TerminalObserver() as observer:
        compiled = cache_folder(settings, cache, unused=no_cache)
        run = assemble(
            settings, text, folder, broker_address(settings), observer, resume=False, compiled=compiled
        )
        summary = simulate_run(run, shards)
    print_summary(summary, run.folder, as_json=as_json)
