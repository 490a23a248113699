"""How a run looks in a terminal: a bar for the block being trained, a line for every round, a table at the end."""

from __future__ import annotations

import json
from types import TracebackType

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from frostline.protocol.sizes import format_size
from frostline.server.coordinator import RunObserver
from frostline.server.records import RoundRecord, RunSummary, StageRecord
from frostline.server.report import format_duration, format_percent
from frostline.server.run_folder import RunFolder


class TerminalObserver(RunObserver):
    """Shows a run on stderr; a context manager, since a progress bar has to be put away."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            console=self.console,
        )
        self._task = self._progress.add_task("starting", total=None, detail="")

    def __enter__(self) -> TerminalObserver:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_note(self, text: str) -> None:
        """Show it as what is going on right now, and keep it."""
        self._progress.update(self._task, description=text)
        # Notes carry words of devices: they are printed, never interpreted.
        self.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def on_stage(self, stage: StageRecord, stages: int) -> None:
        """Begin a stage's bar."""
        self._progress.update(
            self._task,
            description=f"block {stage.stage + 1}/{stages} {stage.name}",
            completed=stage.stage,
            total=stages,
            detail=f"{format_size(stage.planned_bytes)} a device",
        )

    def on_round(self, record: RoundRecord) -> None:
        """Print a round's line."""
        movement = "" if record.effective_movement is None else f"  movement {record.effective_movement:.2f}"
        accuracy = "" if record.accuracy is None else f"  accuracy {format_percent(record.accuracy)}"
        self.console.print(
            f"round {record.round + 1:3d}  block {record.stage + 1}  loss {record.loss:.3f}{accuracy}{movement}"
            f"  {record.devices_finished}/{record.devices_selected} devices  {record.seconds:.1f} s",
            highlight=False,
            soft_wrap=True,
        )
        if record.frozen:
            self.console.print(
                f"[bold cyan]block {record.stage + 1} frozen[/bold cyan]", highlight=False, soft_wrap=True
            )
            self._progress.update(self._task, completed=record.stage + 1)


def print_summary(summary: RunSummary, folder: RunFolder, *, as_json: bool) -> None:
    """Print how a run ended, as a table or as JSON, on stdout."""
    if as_json:
        typer.echo(json.dumps({**summary.model_dump(), "folder": str(folder.path)}, indent=2))
        return
    table = Table(title="Frostline run", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("accuracy", format_percent(summary.accuracy))
    table.add_row("blocks frozen by the pace controller", f"{summary.blocks_frozen} of {summary.blocks}")
    table.add_row("rounds", str(summary.rounds))
    table.add_row("peak memory on a device", peak_text(summary))
    table.add_row("sent to devices", format_size(summary.bytes_down))
    table.add_row("received from devices", format_size(summary.bytes_up))
    table.add_row("training time", format_duration(summary.seconds))
    table.add_row("report", str(folder.report_path))
    written = [path.name for path in (folder.model_path, folder.eval_program_path) if path.exists()]
    table.add_row("model", ", ".join(written))
    Console().print(table)


def peak_text(summary: RunSummary) -> str:
    """The largest stage's bytes, next to the whole model's where those could be estimated."""
    peak, whole = summary.peak_planned_bytes, summary.full_model_planned_bytes
    if not whole:
        return format_size(peak)
    change = 1 - peak / whole
    compared = f"{format_percent(abs(change))} {'less' if change >= 0 else 'more'}"
    return f"{format_size(peak)} ({compared} than the whole model's, about {format_size(whole)})"
