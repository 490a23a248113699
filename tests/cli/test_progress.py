from __future__ import annotations

import pytest

from frostline.cli.progress import TerminalObserver


@pytest.mark.parametrize(
    "text", ["device: failed: [/] no", "[bold]x", "[/tmp/a] missing", "[link=x]y[/link]"]
)
def test_words_of_devices_are_printed_as_they_are(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalObserver() as observer:
        observer.on_note(text)
    assert text in capsys.readouterr().err
