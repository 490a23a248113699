"""`frostline explain`: why each device was or was not chosen for a round."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def explain(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    number: Annotated[
        int, typer.Argument(metavar="ROUND", min=1, help="The round, counted from 1 as the run prints them.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON on stdout.")] = False,
) -> None:
    """Explain a round: who was asked and why, who was not and why, and how each lease ended.

    Works on runs of servers and of emulated or simulated fleets, finished or not.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from frostline.protocol.errors import UsageError
    from frostline.protocol.sizes import format_size
    from frostline.server.config import load_config
    from frostline.server.ledger import open_ledger
    from frostline.server.run_folder import RunFolder

    folder = RunFolder.open(run)
    selection = folder.selection(number - 1)
    if selection is None:
        rounds = len(folder.records())
        raise UsageError(f"{run} has no round {number}: it has {rounds}")
    config, _ = load_config(folder.config_path)
    ledger = open_ledger(config.ledger.url, folder.ledger_path)
    try:
        ends = {lease.device: (lease.state, lease.reason) for lease in ledger.leases(selection.round)}
    finally:
        ledger.close()
    if as_json:
        document = selection.model_dump()
        for device in document["devices"]:
            device["lease"], device["lease_reason"] = ends.get(device["device"], (None, ""))
        typer.echo(json.dumps(document, indent=1))
        return
    # Wider than a pipe is taken for: the lines are for people, or for grep.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(
        f"Round {number}, {selection.stage_name}: {selection.devices_wanted} updates wanted"
        + (
            f", {selection.surplus} more leases for a dropout of {selection.dropout:.0%}"
            if selection.surplus
            else ""
        )
        + f"; chosen by {selection.method}; deadline {selection.deadline_seconds:.0f} s",
        markup=False,
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("place", "score", "expected"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("device", "lease", "group", "form"):
        table.add_column(heading, no_wrap=True)
    table.add_column("why", overflow="fold")
    for choice in selection.devices:
        state, reason = ends.get(choice.device, ("", ""))
        why = choice.reason if not reason or state == "surplus" else f"{choice.reason}; {state}: {reason}"
        table.add_row(
            "" if choice.place is None else str(choice.place + 1),
            "" if choice.score is None else f"{choice.score:.2f}",
            "" if choice.predicted_seconds is None else f"{choice.predicted_seconds:.1f} s",
            # What devices say of themselves is shown, never interpreted.
            escape(choice.device),
            state or ("not asked" if choice.place is not None else "cannot"),
            "" if choice.community is None else str(choice.community + 1),
            "" if choice.planned_bytes is None else f"{choice.variant} {format_size(choice.planned_bytes)}",
            escape(why),
            style="bold" if state == "done" else "dim" if choice.place is None else "",
        )
    console.print(table)
