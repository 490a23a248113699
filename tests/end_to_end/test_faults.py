"""A run in a storm counts what a run in peace counts, in real processes over a real broker."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"


def test_a_run_in_a_storm_counts_what_a_run_in_peace_counts(tmp_path: Path) -> None:
    arguments = ["--json", "--rounds", "3", "--each", "6", "--limit", "240", "--keep", tmp_path / "runs"]
    result = subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=500, check=False
    )
    assert result.stdout, result.stderr
    figures = json.loads(result.stdout)
    assert (figures["lost"], figures["double_counted"], figures["finished"]) == (0, 0, True), figures
    assert result.returncode == 0
    assert figures["tracebacks"] == 0, [p.read_text() for p in (tmp_path / "runs").rglob("*.log")]
    assert figures["updates"] == 2 * 3 * 10
    # A last round's receipt may be lost, and the server gone before the device asks again.
    assert figures["updates"] - 10 <= figures["acknowledged"] <= figures["updates"]
    assert figures["injected"] >= 40
    killed = {"server_killed", "broker_killed", "devices_killed"}
    assert killed | {"duplicated", "reordered", "truncated", "bit_flipped"} <= figures["by_class"].keys()
