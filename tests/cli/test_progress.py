from __future__ import annotations

import pytest

from frostline.cli.progress import TerminalObserver, peak_text
from frostline.server.records import RunSummary


@pytest.mark.parametrize(
    "text", ["device: failed: [/] no", "[bold]x", "[/tmp/a] missing", "[link=x]y[/link]"]
)
def test_words_of_devices_are_printed_as_they_are(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalObserver() as observer:
        observer.on_note(text)
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("peak", "whole", "said"),
    [
        (3_430_000, 4_830_000, "3.43 MB (29.0 % less than the whole model's, about 4.83 MB)"),
        (1_100, 1_000, "1.10 kB (10.0 % more than the whole model's, about 1.00 kB)"),
        (1_100, 0, "1.10 kB"),
    ],
)
def test_the_peak_is_compared_with_what_the_whole_model_takes(peak: int, whole: int, said: str) -> None:
    fields = dict.fromkeys(RunSummary.model_fields, 0)
    summary = RunSummary.model_validate(
        {**fields, "run": "r", "stages": [], "peak_planned_bytes": peak, "full_model_planned_bytes": whole}
    )
    assert peak_text(summary) == said
