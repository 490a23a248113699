"""What a study's runs show: a row a method, and plots of accuracy over simulated time and of memory."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from frostline.emulator.study import Study, StudyRun
from frostline.protocol.sizes import format_size
from frostline.protocol.tensors import Array
from frostline.server.ledger import Ledger, sqlite_url
from frostline.server.records import RoundRecord, RunSummary
from frostline.server.run_folder import RunFolder

SMOOTHED_ROUNDS = 3
"""An accuracy counts as reached when the mean of so many rounds has: single rounds jump by several points."""


@dataclass(frozen=True)
class FinishedRun:
    """One run's course."""

    seed: int
    summary: RunSummary
    records: list[RoundRecord]
    trained_devices: int
    devices: int

    @cached_property
    def seconds(self) -> list[float]:
        """Simulated time at the end of each round."""
        return [float(value) for value in np.cumsum([record.seconds for record in self.records])]

    @cached_property
    def accuracies(self) -> list[float]:
        """Held-out accuracy after each round, the mean of the last `SMOOTHED_ROUNDS`."""
        raw = [record.accuracy or 0.0 for record in self.records]
        return [statistics.mean(raw[max(0, end - SMOOTHED_ROUNDS) : end]) for end in range(1, len(raw) + 1)]

    def seconds_to(self, accuracy: float) -> float | None:
        """When an accuracy was reached; None if it never was."""
        return next((s for s, a in zip(self.seconds, self.accuracies, strict=True) if a >= accuracy), None)

    def bytes_to(self, accuracy: float) -> int | None:
        """Payload both ways until then."""
        sent = np.cumsum([record.bytes_down + record.bytes_up for record in self.records])
        return next((int(b) for b, a in zip(sent, self.accuracies, strict=True) if a >= accuracy), None)

    def accuracy_at(self, seconds: float) -> float:
        """The best accuracy reached until then."""
        reached = [a for s, a in zip(self.seconds, self.accuracies, strict=True) if s <= seconds]
        return max(reached, default=0.0)


class MethodRow(BaseModel):
    """One method in one setting: means over the seeds.

    Attributes
    ----------
    accuracy, accuracy_std : float
        Of the final model, as fractions, and the standard deviation over the seeds.
    accuracy_at_equal_time : float
        The best reached until the quickest method was done.
    seconds_to_target, bytes_to_target : float or None
        Until the study's target accuracy; None unless every seed reached it.
    participation : float
        Share of the devices that trained at least once.
    peak_memory_cut, stage_mean_memory_cut, round_weighted_memory_cut : float
        How much less than the reference's whole model in one piece: of the largest stage, of the stages' mean, and of
        what devices were served over all rounds. Planned bytes.
    speedup_to_exclusivefl_best : float or None
        How many times sooner than the reference it reached the best accuracy of the reference; None unless every seed
        did.
    """

    model_config = ConfigDict(frozen=True)

    method: str
    accuracy: float
    accuracy_std: float
    accuracy_at_equal_time: float
    seconds: float
    rounds: float
    seconds_to_target: float | None
    bytes_to_target: float | None
    participation: float
    peak_memory_cut: float
    stage_mean_memory_cut: float
    round_weighted_memory_cut: float
    speedup_to_exclusivefl_best: float | None
    seeds: int


@dataclass(frozen=True)
class StudyResults:
    """All settings of a study, with the runs behind them."""

    target_accuracy: float
    rows: dict[str, list[MethodRow]]
    runs: dict[str, dict[str, list[FinishedRun]]]


def evaluate(study: Study) -> StudyResults:
    """The rows of what is finished by now; settings without a finished run of the reference are left out."""
    runs: dict[str, dict[str, list[FinishedRun]]] = {}
    for run in study.runs:
        if run.done:
            runs.setdefault(run.setting, {}).setdefault(run.method, []).append(_read(run))
    table = study.config.study
    rows = {
        setting: [
            _row(method, finished, methods[table.reference], list(methods.values()), table.target_accuracy)
            for method, finished in methods.items()
        ]
        for setting, methods in runs.items()
        if table.reference in methods
    }
    return StudyResults(table.target_accuracy, rows, runs)


def _read(run: StudyRun) -> FinishedRun:
    folder = RunFolder.open(run.folder)
    summary = RunSummary.model_validate_json(folder.summary_path.read_bytes())
    records = folder.records()
    ledger = Ledger(sqlite_url(folder.ledger_path))
    try:
        trained = {update.device for number in range(len(records)) for update in ledger.updates(number)}
    finally:
        ledger.close()
    selection = folder.selection(records[0].round)
    devices = len(selection.devices) if selection else len(trained)
    return FinishedRun(run.seed, summary, records, len(trained), devices)


def _row(
    method: str,
    runs: Sequence[FinishedRun],
    reference: Sequence[FinishedRun],
    everyone: Sequence[Sequence[FinishedRun]],
    target: float,
) -> MethodRow:
    whole = statistics.mean(run.summary.full_model_planned_bytes for run in reference)
    accuracies = [run.summary.accuracy or 0.0 for run in runs]
    equal = min(run.seconds[-1] for finished in everyone for run in finished)

    def cut(measure: Callable[[FinishedRun], float]) -> float:
        return 1 - statistics.mean(measure(run) for run in runs) / whole

    return MethodRow(
        method=method,
        accuracy=statistics.mean(accuracies),
        accuracy_std=statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        accuracy_at_equal_time=statistics.mean(run.accuracy_at(equal) for run in runs),
        seconds=statistics.mean(run.seconds[-1] for run in runs),
        rounds=statistics.mean(len(run.records) for run in runs),
        seconds_to_target=_mean(run.seconds_to(target) for run in runs),
        bytes_to_target=_mean(run.bytes_to(target) for run in runs),
        participation=statistics.mean(run.trained_devices / run.devices for run in runs),
        peak_memory_cut=cut(lambda run: run.summary.peak_planned_bytes),
        stage_mean_memory_cut=cut(lambda run: statistics.mean(s.planned_bytes for s in run.summary.stages)),
        round_weighted_memory_cut=cut(lambda run: statistics.mean(r.served_bytes for r in run.records)),
        speedup_to_exclusivefl_best=_speedup(runs, reference),
        seeds=len(runs),
    )


def _speedup(runs: Sequence[FinishedRun], reference: Sequence[FinishedRun]) -> float | None:
    """Ratio of the mean times to the reference's best accuracy of the same seed."""
    best = {run.seed: (max(run.accuracies), run) for run in reference}
    pairs = [(run, *best[run.seed]) for run in runs if run.seed in best]
    theirs = _mean(other.seconds_to(accuracy) for _, accuracy, other in pairs)
    ours = _mean(run.seconds_to(accuracy) for run, accuracy, _ in pairs)
    return None if theirs is None or ours is None else theirs / ours


def _mean(values: Iterable[float | None]) -> float | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return statistics.mean(known) if known and len(known) == len(found) else None


def write_results(results: StudyResults, folder: Path) -> None:
    """Write `<setting>.json`, the same as tables in Markdown, and plots as SVG, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for setting, rows in results.rows.items():
        document = {
            "setting": setting,
            "target_accuracy": results.target_accuracy,
            "rows": [{key: _rounded(value) for key, value in row.model_dump().items()} for row in rows],
        }
        (folder / f"{setting}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        _draw_courses(setting, results.runs[setting], folder / f"{setting}.svg")
    _draw_memory(results, folder / "memory.svg")
    (folder / "tables.md").write_text(_markdown(results), encoding="utf-8")


def _rounded(value: Any) -> Any:
    return round(value, 4 if abs(value) < 100 else 1) if isinstance(value, float) else value


def print_table(results: StudyResults) -> None:
    """Print a table a setting on stdout."""
    for setting, rows in results.rows.items():
        table = Table(title=_title(setting, rows))
        for heading in _headings(results.target_accuracy):
            table.add_column(heading, justify="left" if heading == "method" else "right")
        for row in rows:
            table.add_row(*_cells(row))
        Console().print(table)


def _markdown(results: StudyResults) -> str:
    lines = []
    for setting, rows in results.rows.items():
        headings = _headings(results.target_accuracy)
        lines += [
            f"## {_title(setting, rows)}",
            "",
            _markdown_row(headings),
            "|---" + "|--:" * (len(headings) - 1) + "|",
        ]
        lines += [_markdown_row(_cells(row)) for row in rows]
        lines.append("")
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _title(setting: str, rows: Sequence[MethodRow]) -> str:
    return f"{setting}: means of {max(row.seeds for row in rows)} seeds"


def _headings(target_accuracy: float) -> list[str]:
    target = f"{target_accuracy:.0%}"
    return [
        *("method", "accuracy", "at equal time", f"s to {target}", f"bytes to {target}", "took part"),
        *(
            "peak memory",
            "mean of stages",
            "over rounds",
            "sooner at the reference's best",
            "rounds",
            "seconds",
        ),
    ]


def _cells(row: MethodRow) -> list[str]:
    speedup = row.speedup_to_exclusivefl_best
    return [
        row.method,
        f"{row.accuracy:.1%} ± {row.accuracy_std:.1%}",
        f"{row.accuracy_at_equal_time:.1%}",
        "never" if row.seconds_to_target is None else f"{row.seconds_to_target:.0f}",
        "never" if row.bytes_to_target is None else format_size(int(row.bytes_to_target)),
        f"{row.participation:.0%}",
        *(
            f"{-cut:+.1%}"
            for cut in (row.peak_memory_cut, row.stage_mean_memory_cut, row.round_weighted_memory_cut)
        ),
        "never" if speedup is None else f"{speedup:.1f}x",
        f"{row.rounds:.0f}",
        f"{row.seconds:.0f}",
    ]


def _draw_courses(setting: str, methods: dict[str, list[FinishedRun]], path: Path) -> None:
    """Accuracy over simulated time: the mean of the seeds, and the range between them."""
    with _figure(path, (7.5, 4.2)) as axes:
        for method, runs in methods.items():
            end = max(run.seconds[-1] for run in runs)
            times = np.linspace(0, end, 200)
            curves = np.array([_accuracies_at(run, times) for run in runs])
            (line,) = axes.plot(times, 100 * curves.mean(0), label=method, linewidth=1.4)
            low, high = 100 * curves.min(0), 100 * curves.max(0)
            axes.fill_between(times, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_xlabel("simulated seconds")
        axes.set_ylabel("held-out accuracy, %")
        axes.set_title(f"{setting}: mean and range over the seeds")
        axes.legend(fontsize=8, loc="lower right")
        axes.grid(alpha=0.3)


def _accuracies_at(run: FinishedRun, times: Array) -> Array:
    """The accuracy of the last round that had ended at each time; 0 before the first."""
    reached: Array = np.array([0.0, *run.accuracies])
    return reached[np.searchsorted(run.seconds, times, side="right")]


def _draw_memory(results: StudyResults, path: Path) -> None:
    """What training takes, as a share of the whole model in one piece."""
    setting, rows = next(reversed(results.rows.items()))
    kinds = ("peak_memory_cut", "stage_mean_memory_cut", "round_weighted_memory_cut")
    with _figure(path, (7.5, 3.6)) as axes:
        places = np.arange(len(rows))
        for number, kind in enumerate(kinds):
            shares = [100 * (1 - getattr(row, kind)) for row in rows]
            label = kind.removesuffix("_memory_cut").replace("_", " ")
            axes.bar(places + 0.27 * (number - 1), shares, 0.25, label=label)
        axes.set_xticks(places, [row.method for row in rows], rotation=20, ha="right", fontsize=8)
        axes.set_ylabel("% of the whole model's bytes")
        axes.set_title(f"Planned memory on a device ({setting})")
        axes.legend(fontsize=8)
        axes.grid(axis="y", alpha=0.3)


@contextlib.contextmanager
def _figure(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Axes of a Matplotlib figure that is then written as SVG; the same data give the same file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "frostline"
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    try:
        yield axes
        figure.savefig(path, metadata={"Date": None})
    finally:
        plt.close(figure)
