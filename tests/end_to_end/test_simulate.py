"""`frostline simulate`, `explain` and `study`, as people call them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.emulator.small_runs import write_run
from tests.end_to_end.conftest import run_command


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in simulated time; one of its four devices is too small."""
    folder = tmp_path_factory.mktemp("simulated")
    config = write_run(
        folder / "run.toml",
        {
            "model": {"blocks": 1},
            "fleet": {"memory": ["200%", "200%", "200%", "1 kB"]},
            "selection": {"method": "communities", "class_counts": True},
        },
    )
    result = run_command("simulate", "--config", config, "--out", folder / "run", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["rounds"] == 2 and summary["seconds"] > 0
    return folder / "run"


def test_explain_tells_of_every_device(simulated: Path) -> None:
    result = run_command("explain", simulated, "2")
    assert result.returncode == 0, result.stderr
    lines = {name: line for line in result.stdout.splitlines() for name in line.split() if "device-" in name}
    assert sorted(lines) == ["device-1", "device-2", "device-3", "device-4"]
    assert "its budget is 1.00 kB" in lines["device-4"] and "cannot" in lines["device-4"]
    assert sum("done" in line for line in lines.values()) == 2
    assert "chosen by communities" in result.stdout


def test_explain_as_json(simulated: Path) -> None:
    document = json.loads(run_command("explain", simulated, "1", "--json").stdout)
    by_lease = {device["device"]: device["lease"] for device in document["devices"]}
    assert sorted(lease or "none" for lease in by_lease.values()) == ["done", "done", "none", "none"]
    assert all(device["reason"] for device in document["devices"])


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["explain", "RUN", "3"], ["no round 3", "it has 2"]),
        (["explain", "NOWHERE", "1"], ["nowhere"]),
        (["simulate", "--config", "NOWHERE"], ["nowhere", "cannot be read"]),
        (["study", "NOWHERE"], ["nowhere", "cannot be read"]),
        (["study", "STUDY", "--set", "batch=4"], ["--set", "table.key=value"]),
        (["study", "STUDY", "--set", "training.batsh=4"], ["training.batsh", "batch"]),
        (["study", "STUDY", "--set", "training.batch=many"], ["training.batch"]),
    ],
)
def test_mistakes_are_one_line(
    simulated: Path, tmp_path: Path, arguments: Sequence[str], mentions: Sequence[str]
) -> None:
    study = tmp_path / "study.toml"
    study.write_text(
        '[study]\nseeds = [0]\nreference = "a"\ntarget_accuracy = 0.5\n[settings.even.fleet]\n'
        'split = "iid"\n[methods.a]\nrun = "run.toml"\n'
    )
    write_run(tmp_path / "run.toml")
    places = {"RUN": simulated, "NOWHERE": tmp_path / "nowhere", "STUDY": study}
    result = run_command(*(places.get(each, each) for each in arguments))
    message = [line for line in result.stderr.splitlines() if line.startswith("frostline: ")]
    assert result.returncode == 2 and len(message) == 1, result.stderr
    assert "Traceback" not in result.stderr and not result.stdout
    assert all(text in message[0] for text in mentions), message[0]


@pytest.mark.slow
def test_a_study_prints_its_rows_and_says_what_failed(tmp_path: Path) -> None:
    study = tmp_path / "study.toml"
    study.write_text(
        '[study]\nseeds = [0]\nreference = "well"\ntarget_accuracy = 0.05\n[settings.even.fleet]\nsplit = "iid"\n'
        '[methods.well]\nrun = "run.toml"\n[methods.poorly]\nrun = "run.toml"\nchanges.fleet.memory = ["1 kB"]\n'
    )
    write_run(tmp_path / "run.toml", {"model": {"blocks": 1}, "rounds": {"join_seconds": 1}})
    result = run_command("study", study, "--out", tmp_path / "out", "--workers", "1", "--json")
    assert result.returncode == 1
    assert [row["method"] for row in json.loads(result.stdout)["even"]] == ["well"]
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("frostline: 1 of 2 runs failed") and "can be trained with" in last
    assert (tmp_path / "out" / "even.json").is_file() and (tmp_path / "out" / "tables.md").is_file()
