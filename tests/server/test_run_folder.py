"""The run folder: what is recorded comes back, also after a crash in the middle of a line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from frostline.protocol.errors import CorruptContent, RunError, UsageError
from frostline.server.records import RoundRecord
from frostline.server.run_folder import RunFolder


def round_record(number: int, **changes: object) -> RoundRecord:
    fields: dict[str, object] = {
        "stage": 0,
        "stage_name": "stem",
        "stages": 3,
        "round": number,
        "round_in_stage": number,
        "loss": 2.3 - 0.1 * number,
        "accuracy": 0.1 + 0.05 * number,
        "accuracy_source": "server",
        "effective_movement": None,
        "movement_slope": None,
        "speed": None,
        "frozen": False,
        "devices_selected": 4,
        "devices_finished": 3,
        "samples": 96,
        "bytes_down": 4000,
        "bytes_up": 3000,
        "planned_bytes": 250_000,
        "variants": {"whole": 3},
        "engines": {"executorch": 3},
        "seconds": 1.5,
    }
    return RoundRecord.model_validate(fields | changes)


def test_records_come_back_in_order(tmp_path: Path) -> None:
    written = [round_record(0), round_record(1, accuracy=None, accuracy_source="none", frozen=True)]
    with RunFolder.create(tmp_path / "deep" / "run") as folder:
        for record in written:
            folder.record(record)
    assert RunFolder.open(folder.path).records() == written
    assert [json.loads(line)["round"] for line in folder.metrics_path.read_text().splitlines()] == [0, 1]


def test_a_diverged_loss_comes_back(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run") as folder:
        folder.record(round_record(0, loss=math.nan))
        folder.record(round_record(1, loss=math.inf))
    first, second = folder.records()
    assert math.isnan(first.loss)
    assert second.loss == math.inf
    for line in folder.metrics_path.read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def test_scalars_reach_tensorboard(tmp_path: Path) -> None:
    accumulator_module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunFolder.create(tmp_path / "run") as folder:
        folder.record(round_record(0, accuracy=None))
        folder.record(round_record(1))
    accumulator = accumulator_module.EventAccumulator(str(folder.tensorboard_dir))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("loss/training")] == [0, 1]
    assert [event.value for event in accumulator.Scalars("accuracy/held_out")] == [pytest.approx(0.15)]


def test_a_line_cut_short_by_a_crash_is_left_out_and_overwritten(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run") as folder:
        folder.record(round_record(0))
        with folder.metrics_path.open("a") as file:
            file.write(round_record(1).model_dump_json()[:40])
        reopened = RunFolder.open(folder.path)
        assert reopened.records() == [round_record(0)]
        reopened.record(round_record(2))
        reopened.close()
    assert reopened.records() == [round_record(0), round_record(2)]


def test_a_first_line_cut_short_leaves_nothing(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.metrics_path.write_text('{"stage":')
    assert folder.records() == []
    folder.record(round_record(0))
    folder.close()
    assert folder.records() == [round_record(0)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("not json", "the line: Invalid JSON"),
        (round_record(0).model_dump_json().replace('"loss"', '"los"'), "loss"),
    ],
)
def test_a_wrong_line_in_the_middle_is_named(tmp_path: Path, line: str, problem: str) -> None:
    folder = RunFolder.create(tmp_path / "run")
    good = round_record(0).model_dump_json()
    folder.metrics_path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(CorruptContent, match=rf"metrics\.jsonl:2 .*{problem}"):
        folder.records()


def test_create_refuses_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        RunFolder.create(tmp_path)
    with pytest.raises(UsageError, match="cannot be made"):
        RunFolder.create(tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_create_takes_an_empty_folder(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    assert folder.weights_dir.is_dir()
    assert folder.updates_dir.is_dir()
    assert RunFolder.open(tmp_path).records() == []


def test_open_refuses_what_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        RunFolder.open(tmp_path / "absent")
    with pytest.raises(UsageError, match="not a run folder"):
        RunFolder.open(tmp_path)


def test_the_configuration_is_kept_to_the_byte(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    folder.write_config("name = 'é'\r\n\n")
    assert folder.config_path.read_bytes() == "name = 'é'\r\n\n".encode()


def test_a_folder_that_vanished_is_a_run_error(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "absent")
    with pytest.raises(RunError, match="cannot be read"):
        folder.records()
    with pytest.raises(RunError, match="cannot be written"):
        folder.record(round_record(0))
    with pytest.raises(RunError, match="cannot be written"):
        folder.write_config("")


def test_paths_are_inside_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    names = {
        "ledger_path": "ledger.sqlite",
        "weights_dir": "weights",
        "updates_dir": "updates",
        "model_path": "model.safetensors",
        "eval_program_path": "model.pte",
        "report_path": "report.html",
        "summary_path": "summary.json",
        "metrics_path": "metrics.jsonl",
        "tensorboard_dir": "tensorboard",
    }
    assert {attribute: getattr(folder, attribute) for attribute in names} == {
        attribute: tmp_path / name for attribute, name in names.items()
    }


@pytest.mark.parametrize(
    "changes", [{"accuracy": 1.5}, {"samples": -1}, {"accuracy_source": "guess"}, {"extra": 1}]
)
def test_impossible_records_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        round_record(0, **changes)


def test_a_run_has_one_server_at_a_time(tmp_path: Path) -> None:
    first = RunFolder.create(tmp_path / "run")
    first.lock()
    second = RunFolder.open(tmp_path / "run")
    with pytest.raises(UsageError, match="is in use: another server is training this run"):
        second.lock()
    first.close()
    second.lock()
    second.close()


def test_a_killed_server_keeps_nobody_out(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run").close()
    program = (
        "import sys, time; from frostline.server.run_folder import RunFolder; folder = RunFolder.open(sys.argv[1]);"
        "folder.lock(); print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "run"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        folder = RunFolder.open(tmp_path / "run")
        with pytest.raises(UsageError, match="is in use"):
            folder.lock()
        process.kill()
    folder.lock()
    folder.close()
