from __future__ import annotations

import json
from pathlib import Path

from frostline.protocol.artifact import read_artifact
from tests.end_to_end.conftest import run_command


def test_a_budget_picks_cuts_and_variants(tmp_path: Path) -> None:
    out = tmp_path / "artifacts"
    options = ["-O", "width=8", "--input-shape", "1,16,16", "--classes", "10", "--batch", "8"]
    budget = 330_000
    finished = run_command(
        "export", "--model", "small_cnn", *options, "--memory-budget", str(budget), "--out", out, "--json"
    )
    assert finished.returncode == 0, finished.stderr
    rows = json.loads(finished.stdout)["stages"]
    manifests = [read_artifact(out / f"stage-{index + 1}")[0] for index in range(len(rows))]
    assert [m.planned.total for m in manifests] == [row["planned_bytes"] for row in rows]
    assert max(m.planned.total for m in manifests) <= budget
    assert len(rows) > 1 or rows[0]["variant"] != "whole"
