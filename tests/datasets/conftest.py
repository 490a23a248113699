from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from frostline.datasets.load import load_samples
from frostline.protocol.errors import UsageError


@pytest.fixture
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty $FROSTLINE_DATA, with the working directory elsewhere."""
    root = tmp_path / "root"
    elsewhere = tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    monkeypatch.setenv("FROSTLINE_DATA", str(root))
    monkeypatch.chdir(elsewhere)
    return root


@pytest.fixture
def refusal() -> Callable[..., str]:
    """Loads what must be refused and returns the message, which is one line."""

    def load_refused(source: str, split: Any = "train") -> str:
        with pytest.raises(UsageError) as caught:
            load_samples(source, split)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return load_refused
