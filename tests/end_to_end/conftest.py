"""Whole runs in real processes, over a real broker."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from frostline.emulator.broker import EmbeddedBroker

CONFIG = """
[run]
fleet = "test"
seed = 1

[model]
name = "small_cnn"
blocks = 2
options = {{ width = 8, norm = "{norm}" }}

[data]
train = "digits"
{test}

[training]
batch = 16
epochs = 2
learning_rate = 0.1

[rounds]
devices = 3
join_seconds = 60
deadline_seconds = {deadline}
max_per_stage = 40

[pace]
window = 3
regression = 3
slope = 0.2
creep = 0.5
patience = 1

[fleet]
devices = 3
memory = ["100%", "70%"]
"""


def write_config(
    folder: Path, *, test: str = 'test = "digits"', deadline: float = 120, norm: str = "group"
) -> Path:
    """A run of two blocks on real digits that is done within a minute or two."""
    path = folder / "run.toml"
    text = CONFIG.format(test=test, deadline=deadline, norm=norm)
    if not test:
        text = text.replace("[model]", "[model]\ninput_shape = [1, 8, 8]\nclasses = 10", 1)
    path.write_text(text)
    return path


def command(*arguments: str | Path) -> list[str]:
    """The `frostline` command of this interpreter."""
    return [sys.executable, "-m", "frostline.cli.main", *map(str, arguments)]


def run_command(*arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run `frostline` to its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )


@pytest.fixture
def broker() -> Iterator[EmbeddedBroker]:
    """A broker of the test's own: mosquitto where it is installed, else NATS."""
    with EmbeddedBroker() as running:
        yield running
