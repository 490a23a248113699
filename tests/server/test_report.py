"""The report: one well-formed page with figures and numbers that loads nothing and trusts nothing."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from frostline.protocol.errors import RunError
from frostline.protocol.sizes import format_size
from frostline.server.records import RoundRecord, RunSummary, StageRecord
from frostline.server.report import (
    format_decimal,
    format_duration,
    format_percent,
    render_report,
    write_report,
)
from frostline.server.run_folder import RunFolder

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

CONFIG = 'name = "digits"\n[pace]\nwindow = 5\n'
VOID_ELEMENTS = {"meta", "br", "hr", "img", "link", "input"}
SVG_NAMESPACES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def sample_records(stages: int = 3, rounds: int = 8, accuracy: bool = True) -> list[RoundRecord]:
    return [
        RoundRecord(
            stage=stage,
            stage_name=f"block {stage}",
            stages=stages,
            round=stage * rounds + index,
            round_in_stage=index,
            loss=2.3 * 0.9 ** (stage * rounds + index),
            accuracy=1 - 0.9 ** (stage * rounds + index + 1) if accuracy else None,
            accuracy_source="server" if accuracy else "none",
            effective_movement=1 / (1 + index) if index > 1 else None,
            movement_slope=-0.1 / (1 + index) if index > 2 else None,
            speed=1 / (1 + index),
            frozen=index == rounds - 1,
            devices_selected=8,
            devices_finished=7,
            samples=640,
            bytes_down=812_000,
            bytes_up=640_000,
            planned_bytes=1_500_000 - 300_000 * stage,
            variants={"whole": 2, "micro4": 1},
            engines={"executorch": 3},
            seconds=3.2,
        )
        for stage in range(stages)
        for index in range(rounds)
    ]


def sample_summary(stages: int = 3, rounds: int = 8, accuracy: bool = True) -> RunSummary:
    return RunSummary(
        run="digits",
        accuracy=0.931 if accuracy else None,
        rounds=stages * rounds,
        blocks_frozen=stages,
        blocks=stages,
        peak_planned_bytes=1_500_000,
        full_model_planned_bytes=4_000_000,
        bytes_down=19_488_000,
        bytes_up=15_360_000,
        seconds=76.8,
        stages=[
            StageRecord(
                stage=stage,
                name=f"block {stage}",
                planned_bytes=1_500_000 - 300_000 * stage,
                memory={
                    "arena": 1_000_000 - 300_000 * stage,
                    "parameters": 250_000,
                    "optimizer_state": 250_000,
                },
                rounds=rounds,
                frozen_by="pace" if stage else "round_cap",
            )
            for stage in range(stages)
        ],
    )


class StrictParser(HTMLParser):
    """Fails on a tag closed out of order or an identifier used twice, and gathers what a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.identifiers: list[str] = []
        self.references: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in VOID_ELEMENTS:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        for name, value in attributes:
            if name == "id":
                self.identifiers.append(value or "")
            if name in {"src", "href", "xlink:href", "srcset", "data", "action"}:
                self.references.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags and self.open_tags.pop() == tag, f"</{tag}> closes nothing at {self.getpos()}"


def parse(page: str) -> StrictParser:
    parser = StrictParser()
    parser.feed(page)
    parser.close()
    assert parser.open_tags == []
    assert len(parser.identifiers) == len(set(parser.identifiers))
    return parser


@pytest.mark.parametrize("accuracy", [True, False])
def test_is_well_formed_and_has_three_figures(accuracy: bool) -> None:
    page = render_report(sample_summary(accuracy=accuracy), sample_records(accuracy=accuracy), CONFIG)
    parser = parse(page)
    assert parser.counts["svg"] == 3
    assert parser.counts["table"] == 3
    assert "script" not in parser.counts


def test_loads_nothing() -> None:
    page = render_report(sample_summary(), sample_records(), CONFIG)
    parser = parse(page)
    assert set(re.findall(r"https?://[^\s\"'<>]*", page)) <= SVG_NAMESPACES
    assert all(reference.startswith("#") for reference in parser.references)
    assert {reference[1:] for reference in parser.references} <= set(parser.identifiers)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_shows_the_numbers() -> None:
    page = render_report(sample_summary(), sample_records(), CONFIG)
    for text in (
        "93.1 %",
        "1.50 MB",
        "4.00 MB",
        "62 % less",
        "1 min 17 s",
        "19.5 MB",
        "15.4 MB",
        "3 of 3",
        "round cap",
    ):
        assert text in page
    assert page.count('class="frozen"') == 3
    assert "window = 5" in page


def test_says_so_when_accuracy_is_missing() -> None:
    page = render_report(sample_summary(accuracy=False), sample_records(accuracy=False), CONFIG)
    assert "not measured" in page
    assert "training loss" in page
    assert "None" not in page


def test_everything_named_by_a_user_is_escaped() -> None:
    attack = "<script>alert('&')</script>"
    summary = sample_summary().model_copy(update={"run": attack})
    named = summary.stages[0].model_copy(update={"name": f"$x^2$ {attack}", "memory": {attack: 10}})
    summary = summary.model_copy(update={"stages": [named]})
    records = [record.model_copy(update={"stage_name": attack}) for record in sample_records(stages=1)]
    page = render_report(summary, records, attack)
    assert "script" not in parse(page).counts
    assert "&lt;script&gt;" in page
    assert "$x^2$" in page


def test_is_the_same_every_time() -> None:
    arguments = (sample_summary(), sample_records(), CONFIG)
    assert render_report(*arguments) == render_report(*arguments)


def test_draws_with_the_colours_of_the_page_only() -> None:
    page = render_report(sample_summary(), sample_records(), CONFIG)
    for figure in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert re.findall(r"(?:fill|stroke): (#[0-9a-f]+)", figure) == []
        assert "var(--ink)" in figure or "var(--muted)" in figure


@pytest.mark.parametrize("rounds", [0, 1, 200])
def test_takes_any_number_of_rounds(rounds: int) -> None:
    parse(render_report(sample_summary(rounds=rounds), sample_records(rounds=rounds), CONFIG))


def test_takes_a_run_without_stages() -> None:
    parse(render_report(sample_summary(stages=0), [], ""))


def test_takes_a_loss_that_diverged() -> None:
    records = [record.model_copy(update={"loss": math.nan}) for record in sample_records(accuracy=False)]
    parse(render_report(sample_summary(accuracy=False), records, CONFIG))


def test_leaves_the_drawing_settings_of_the_process_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    render_report(sample_summary(), sample_records(), CONFIG)
    assert dict(matplotlib.rcParams) == before


def test_is_written_to_the_run_folder(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    write_report(folder, sample_summary(), sample_records(), CONFIG)
    assert parse(folder.report_path.read_text(encoding="utf-8")).counts["svg"] == 3


def test_a_folder_that_vanished_is_a_run_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written"):
        write_report(RunFolder(tmp_path / "absent"), sample_summary(), [], "")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_340, "12.3 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (161_000_000, "161 MB"),
        (2_500_000_000, "2.50 GB"),
        (3 * 10**15, "3000 TB"),
    ],
)
def test_sizes_are_decimal(count: int, text: str) -> None:
    assert format_size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (192.0, "3 min 12 s"),
        (3720.0, "1 h 02 min"),
    ],
)
def test_durations_use_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(2.0, "2.000"), (0.154, "0.1540"), (2000.0, "2000"), (math.nan, "nan")]
)
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert format_decimal(value) == text


def test_missing_numbers_are_a_dash() -> None:
    assert format_percent(None) == format_decimal(None) == "\N{EN DASH}"
    assert format_decimal(-0.01234567) == "\N{MINUS SIGN}0.01235"
