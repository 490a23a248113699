"""The report of a finished run: one HTML file that needs nothing but a browser."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import groupby
from operator import attrgetter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from frostline.protocol.errors import RunError
from frostline.protocol.sizes import format_size
from frostline.server.records import RoundRecord, RunSummary, StageRecord

if TYPE_CHECKING:
    from frostline.server.run_folder import RunFolder

_TEMPLATE_NAME = "report.html"
_NO_VALUE = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"

# The figures are drawn in these colours, which occur nowhere else, and each is then replaced by a variable of the
# page's style sheet: that is how a figure follows the reader's light or dark theme.
_PAPER = "#0c0d0e"
_INK = "#010203"
_MUTED = "#020304"
_GRID = "#030405"
_BAND = "#040506"
_FREEZE = "#050607"
_SERIES = ("#060708", "#070809", "#08090a", "#090a0b", "#0a0b0c", "#0b0c0d")
_STYLE_VARIABLES = {
    _PAPER: "--paper",
    _INK: "--ink",
    _MUTED: "--muted",
    _GRID: "--grid",
    _BAND: "--band",
    _FREEZE: "--freeze",
    **{colour: f"--series-{index}" for index, colour in enumerate(_SERIES)},
}

_WIDTH_INCHES = 8.6
_HEIGHT_INCHES = 2.7
_NARROWEST_LABELLED_STAGE = 0.02
_MOST_MARKED_ROUNDS = 80

_DRAWING_SETTINGS: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": _MUTED,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": _MUTED,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "svg.fonttype": "none",
    "text.color": _MUTED,
    "xtick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.color": _GRID,
    "ytick.labelcolor": _MUTED,
    "ytick.major.size": 0,
}


def write_report(
    folder: RunFolder, summary: RunSummary, records: Sequence[RoundRecord], config_text: str
) -> None:
    """Write a run's report to the run folder.

    The same arguments give the same bytes. The page loads nothing from the network.

    Parameters
    ----------
    folder : RunFolder
        Where the report goes; an earlier report is replaced.
    summary : RunSummary
        The headline numbers and the stages.
    records : sequence of RoundRecord
        The rounds, in the order they were recorded; may be empty.
    config_text : str
        The configuration the run was started with, shown as it is.

    Raises
    ------
    RunError
        The file cannot be written, or the packages that draw and render are not installed.
    """
    page = render_report(summary, records, config_text)
    try:
        folder.report_path.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise RunError(
            f"{folder.report_path} cannot be written ({error.strerror}): free space or correct permissions."
        ) from error


def render_report(summary: RunSummary, records: Sequence[RoundRecord], config_text: str) -> str:
    """Return a run's report as the text of an HTML page.

    Parameters
    ----------
    summary : RunSummary
        The headline numbers and the stages.
    records : sequence of RoundRecord
        The rounds, in the order they were recorded; may be empty.
    config_text : str
        The configuration the run was started with.

    Returns
    -------
    str
        The page.

    Raises
    ------
    RunError
        The packages that draw and render are not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise _missing_package(error) from error
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        size=format_size,
        percent=format_percent,
        duration=format_duration,
        decimal=format_decimal,
        words=_words,
    )
    source = resources.files("frostline.server").joinpath(_TEMPLATE_NAME).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        summary=summary,
        records=records,
        config_text=config_text,
        saving=_saving_text(summary.peak_planned_bytes, summary.full_model_planned_bytes),
        memory_kinds=_memory_kinds(summary.stages),
        stage_rows=[_stage_row(stage, summary, records) for stage in summary.stages],
        accuracy_source=_accuracy_source(records),
        accuracy_figure=Markup(_draw_accuracy(records)),  # noqa: S704 - drawn here, text escaped by matplotlib
        pace_figure=Markup(_draw_pace(records)),  # noqa: S704
        memory_figure=Markup(_draw_memory(summary)),  # noqa: S704
    )


def format_percent(fraction: float | None) -> str:
    """Return a fraction as a percentage with one decimal, and a dash when there is none.

    Parameters
    ----------
    fraction : float or None
        A fraction, 1 for the whole.

    Returns
    -------
    str
        Such as "93.1 %".
    """
    return _NO_VALUE if fraction is None else f"{100 * fraction:.1f} %"


def format_duration(seconds: float) -> str:
    """Return a duration in the two largest units that matter.

    Parameters
    ----------
    seconds : float
        Seconds, not negative.

    Returns
    -------
    str
        Such as "8.4 s", "3 min 12 s" or "1 h 02 min".
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_decimal(value: float | None) -> str:
    """Return a number with four significant digits, and a dash when there is none.

    Parameters
    ----------
    value : float or None
        Any number.

    Returns
    -------
    str
        Such as "0.3142".
    """
    return _NO_VALUE if value is None else f"{value:#.4g}".rstrip(".").replace("-", _MINUS)


def _missing_package(error: ImportError) -> RunError:
    return RunError(f"The report cannot be made ({error}): run `pip install 'frostline[server]'`.")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _saving_text(planned: int, full: int) -> str:
    if full == 0:
        return _NO_VALUE
    saved = 1 - planned / full
    return f"{100 * abs(saved):.0f} % {'less' if saved >= 0 else 'more'}"


def _memory_kinds(stages: Iterable[StageRecord]) -> list[str]:
    """Return the kinds of memory of all stages, each once, in the order they first appear."""
    return list(dict.fromkeys(kind for stage in stages for kind in stage.memory))


def _stage_row(stage: StageRecord, summary: RunSummary, records: Sequence[RoundRecord]) -> dict[str, Any]:
    measured = [
        record.accuracy for record in records if record.stage == stage.stage and record.accuracy is not None
    ]
    return {
        "record": stage,
        "accuracy": measured[-1] if measured else None,
        "saving": _saving_text(stage.planned_bytes, summary.full_model_planned_bytes),
    }


def _accuracy_source(records: Iterable[RoundRecord]) -> str:
    sources = {record.accuracy_source for record in records if record.accuracy is not None}
    return " and ".join(f"the {source}" for source in sorted(sources, reverse=True))


def _draw_accuracy(records: Sequence[RoundRecord]) -> str:
    measured = any(record.accuracy is not None for record in records)
    with _Drawing("accuracy") as drawing:
        axes = drawing.axes()
        _mark_stages(axes, records)
        if measured:
            axes.set_ylabel("held-out accuracy, %")
            points = [
                (record.round, 100 * record.accuracy) for record in records if record.accuracy is not None
            ]
        else:
            axes.set_ylabel("training loss")
            points = [(record.round, record.loss) for record in records]
        _draw_points(axes, points, _SERIES[0], marked=len(records) <= _MOST_MARKED_ROUNDS)
        return drawing.svg("Accuracy by round" if measured else "Training loss by round")


def _draw_pace(records: Sequence[RoundRecord]) -> str:
    with _Drawing("pace") as drawing:
        axes = drawing.axes()
        _mark_stages(axes, records)
        # Each block starts anew, so the lines must not run from one block to the next.
        for _, group in groupby(records, key=attrgetter("stage")):
            stage_records = list(group)
            for field, colour in (("speed", _SERIES[2]), ("effective_movement", _SERIES[1])):
                values = [(record.round, getattr(record, field)) for record in stage_records]
                points = [(number, value) for number, value in values if value is not None]
                _draw_points(axes, points, colour, marked=len(records) <= _MOST_MARKED_ROUNDS)
        axes.set_ylabel("fraction")
        if any(record.effective_movement is not None for record in records):
            axes.set_ylim(bottom=0)
        else:
            _say_in_the_middle(axes, "effective movement was not measured")
        return drawing.svg("Effective movement and speed of the trained block by round")


def _draw_memory(summary: RunSummary) -> str:
    kinds = _memory_kinds(summary.stages)
    unit, divisor = _memory_unit(summary)
    full = summary.full_model_planned_bytes / divisor
    with _Drawing("memory", height=1.1 + 0.32 * max(len(summary.stages), 1)) as drawing:
        axes = drawing.axes()
        positions = list(range(len(summary.stages)))
        starts = [0.0] * len(positions)
        for index, kind in enumerate(kinds):
            sizes = [stage.memory.get(kind, 0) / divisor for stage in summary.stages]
            colour = _SERIES[index % len(_SERIES)]
            axes.barh(positions, sizes, height=0.62, left=starts, color=colour, label=_words(kind))
            starts = [start + size for start, size in zip(starts, sizes, strict=True)]
        for position, stage, end in zip(positions, summary.stages, starts, strict=True):
            saving = _saving_text(stage.planned_bytes, summary.full_model_planned_bytes)
            axes.annotate(
                f"{format_size(stage.planned_bytes)}, {saving}",
                (end, position),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=_INK,
                bbox={"facecolor": _PAPER, "edgecolor": "none", "pad": 1},
            )
        axes.axvline(
            full,
            color=_FREEZE,
            linestyle=(0, (4, 3)),
            linewidth=1.4,
            label=f"whole model at once, about {format_size(summary.full_model_planned_bytes)}",
        )
        axes.set_yticks(positions, [_literal(f"{stage.stage + 1}  {stage.name}") for stage in summary.stages])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, max([full, *starts]) * 1.02 or 1)
        axes.set_xlabel(f"planned memory on a device, {unit}")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, borderaxespad=0, handlelength=1.6)
        return drawing.svg("Planned memory of each stage by kind, next to the whole model's")


def _memory_unit(summary: RunSummary) -> tuple[str, float]:
    largest = max([summary.full_model_planned_bytes, *(stage.planned_bytes for stage in summary.stages)])
    return ("MB", 1e6) if largest >= 1_000_000 else ("kB", 1e3)


def _draw_points(axes: Any, points: Sequence[tuple[int, float]], colour: str, *, marked: bool) -> None:
    """Draw values over rounds counted from 0; unmeasured rounds in between are bridged."""
    # A line through one point shows nothing.
    marker = "o" if marked or len(points) == 1 else None
    rounds = [number + 1 for number, _ in points]
    axes.plot(rounds, [value for _, value in points], color=colour, marker=marker, clip_on=False)


def _mark_stages(axes: Any, records: Sequence[RoundRecord]) -> None:
    """Shade every other stage, number them above the axes, and draw a line where a block froze."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axes.grid(visible=False, axis="x")
    if not records:
        _say_in_the_middle(axes, "no rounds were recorded")
        return
    axes.set_xlim(records[0].round + 0.5, records[-1].round + 1.5)
    spans = [(stage, list(rounds)) for stage, rounds in groupby(records, key=attrgetter("stage"))]
    above = axes.get_xaxis_transform()
    axes.text(-0.012, 1.02, "stage", transform=axes.transAxes, ha="right", va="bottom")
    for index, (stage, rounds) in enumerate(spans):
        start, end = rounds[0].round + 0.5, rounds[-1].round + 1.5
        if index % 2 == 1:
            axes.axvspan(start, end, color=_BAND, linewidth=0)
        if end - start >= _NARROWEST_LABELLED_STAGE * len(records):
            axes.text((start + end) / 2, 1.02, f"{stage + 1}", transform=above, ha="center", va="bottom")
    for record in records:
        if record.frozen:
            axes.axvline(
                record.round + 1.5, color=_FREEZE, linestyle=(0, (4, 3)), linewidth=1.1, clip_on=False
            )


def _say_in_the_middle(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center")


def _literal(text: str) -> str:
    """Return a text that matplotlib draws as it is, though a pair of dollar signs means mathematics to it."""
    return text.replace("$", r"\$")


class _Drawing:
    """One figure, drawn without matplotlib's global state and turned into SVG for the page.

    Parameters
    ----------
    name : str
        Keeps the identifiers inside the figure apart from those of the page's other figures.
    height : float
        Inches.
    """

    def __init__(self, name: str, height: float = _HEIGHT_INCHES) -> None:
        try:
            from matplotlib import rc_context
            from matplotlib.figure import Figure
        except ImportError as error:
            raise _missing_package(error) from error
        self._settings = rc_context({**_DRAWING_SETTINGS, "svg.hashsalt": f"frostline-{name}"})
        self._make_figure = Figure
        self._height = height
        self._figure: Any = None

    def __enter__(self) -> Self:
        self._settings.__enter__()
        self._figure = self._make_figure(figsize=(_WIDTH_INCHES, self._height), layout="constrained")
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._settings.__exit__(error_type, error, traceback)

    def axes(self) -> Any:
        """Return the figure's only axes."""
        return self._figure.add_subplot()

    def svg(self, title: str) -> str:
        """Return the figure as an SVG element.

        Parameters
        ----------
        title : str
            What the figure shows, for those who do not see it.

        Returns
        -------
        str
            The element, coloured by the page's variables.
        """
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(self._figure).print_svg(buffer, metadata=no_metadata)
        return _embed(buffer.getvalue(), title)


def _embed(svg: str, title: str) -> str:
    """Turn an SVG document into an element of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # A style sheet inside an inline figure would apply to the whole page.
    svg = re.sub(r"<style.*?</style>\s*", "", svg, flags=re.DOTALL)
    referenced = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match.group(0) if match.group(1) in referenced else "", svg)
    # The page's font is used; text must keep the widths that the layout was computed with only roughly.
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for colour, variable in _STYLE_VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1).strip()
