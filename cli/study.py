"""`frostline study`: methods compared on simulated fleets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def study(
    config: Annotated[Path, typer.Argument(help="TOML file that names the methods, settings and seeds.")],
    out: Annotated[Path | None, typer.Option(help="The study's folder. Default: runs/<config>.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Runs at a time. Default: one a core.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a key in every run, such as data.train=cifar10; may be repeated."),
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Where tables and plots go. Default: the study's folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")] = False,
) -> None:
    """Compare methods: each on the same virtual devices, over several seeds, in simulated time.

    The devices really train, with the artifacts and the code of real ones; only the clock is simulated. A study that
    was stopped goes on where it stood. Results are one JSON file a setting, a table and plots in the study's folder.
    """
    import json

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from frostline.emulator.emulation import default_workers
    from frostline.emulator.study import StudyObserver, StudyRun, load_study, run_study
    from frostline.emulator.study_results import evaluate, print_table, write_results
    from frostline.protocol.errors import RunError

    folder = out or Path("runs") / config.stem
    loaded = load_study(config, folder, _changes(changes or []))
    console = Console(stderr=True)
    problems: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("runs", total=len(loaded.runs))

        class Observer(StudyObserver):
            def on_begin(self, waiting: int, done: int) -> None:
                progress.update(bar, completed=done)

            def on_run(self, run: StudyRun, problem: str) -> None:
                progress.advance(bar)
                console.print(
                    f"{run.name}: {problem or 'done'}", markup=False, highlight=False, soft_wrap=True
                )
                if problem:
                    problems.append(f"{run.name}: {problem}")

        run_study(loaded, workers or default_workers(), Observer())
    found = evaluate(loaded)
    write_results(found, results or folder)
    if as_json:
        typer.echo(
            json.dumps({name: [row.model_dump() for row in rows] for name, rows in found.rows.items()})
        )
    else:
        print_table(found)
    if problems:
        raise RunError(f"{len(problems)} of {len(loaded.runs)} runs failed; the first: {problems[0]}")


def _changes(texts: list[str]) -> dict[str, dict[str, Any]]:
    """The keys of `table.key=value`; values are TOML where they are, else strings."""
    import tomllib

    from frostline.protocol.errors import UsageError

    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        path, sign, value = text.partition("=")
        table, dot, key = path.strip().partition(".")
        if not sign or not dot:
            raise UsageError(f"--set {text!r}: write it as table.key=value")
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = value.strip()
        found.setdefault(table, {})[key] = parsed
    return found
