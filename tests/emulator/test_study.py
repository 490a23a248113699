"""Studies: what is enumerated, resumed and reported; and what their figures are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from frostline.emulator.study import Study, StudyObserver, StudyRun, load_study, run_study
from frostline.emulator.study_results import FinishedRun, StudyResults, _row, evaluate, write_results
from frostline.protocol.errors import UsageError
from frostline.server.records import RoundRecord, RunSummary, StageRecord
from tests.emulator.small_runs import write_run

STUDY = """
[study]
seeds = [0, 7]
reference = "small"
target_accuracy = 0.05

[settings.even.fleet]
split = "iid"

[settings.uneven.fleet]
split = "dirichlet"

[methods.small]
run = "run.toml"

[methods.shorter]
run = "run.toml"
changes.rounds.max_per_stage = 1
settings = ["even"]
"""


class Told(StudyObserver):
    def __init__(self) -> None:
        self.waiting = self.done = -1
        self.ended: dict[str, str] = {}

    def on_begin(self, waiting: int, done: int) -> None:
        self.waiting, self.done = waiting, done

    def on_run(self, run: StudyRun, problem: str) -> None:
        self.ended[run.name] = problem


def write_study(folder: Path, text: str = STUDY) -> Path:
    write_run(folder / "run.toml", {"model": {"blocks": 1}})
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_method_runs_in_its_settings_with_every_seed(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path), tmp_path / "out", {"training": {"epochs": 3}})
    names = [run.name for run in study.runs]
    assert sorted(names) == [
        *("even shorter, seed 0", "even shorter, seed 7", "even small, seed 0", "even small, seed 7"),
        *("uneven small, seed 0", "uneven small, seed 7"),
    ]
    assert len({run.folder for run in study.runs}) == len(names)
    by_name = dict(zip(names, study.runs, strict=True))
    assert by_name["even shorter, seed 7"].changes == {
        "rounds": {"max_per_stage": 1},
        "fleet": {"split": "iid"},
        "training": {"epochs": 3},
        "run": {"seed": 7},
    }
    assert by_name["uneven small, seed 0"].changes["fleet"] == {"split": "dirichlet"}


@pytest.mark.parametrize(
    ("old", "new", "mentions"),
    [
        ('reference = "small"', 'reference = "large"', ["study.toml", "study.reference", "large"]),
        ('settings = ["even"]', 'settings = ["od"]', ["study.toml", "methods.shorter.settings", "'od'"]),
        ("seeds = [0, 7]", "seeds = []", ["study.toml", "study.seeds"]),
        ("seeds = [0, 7]", "seeds = [-1]", ["study.toml", "study.seeds.0"]),
        ("seeds = [0, 7]", "seeds = [0, 0]", ["study.toml", "study.seeds"]),
        ("target_accuracy = 0.05", "target_accuracy = 5", ["study.toml", "study.target_accuracy"]),
        ("target_accuracy = 0.05", "target = 0.05", ["study.toml", "study.target"]),
        ("[study]", "[study", ["study.toml", "not valid TOML"]),
        ('split = "iid"', 'split = "odd"', ["fleet.split"]),
        ('run = "run.toml"\n\n', 'run = "none.toml"\n\n', ["none.toml", "cannot be read"]),
        ("changes.rounds.max_per_stage = 1", "changes.rounds.max = 1", ["rounds.max"]),
    ],
)
def test_mistakes_are_named_before_anything_runs(
    tmp_path: Path, old: str, new: str, mentions: Sequence[str]
) -> None:
    assert old in STUDY
    path = write_study(tmp_path, STUDY.replace(old, new, 1))
    with pytest.raises(UsageError) as caught:
        load_study(path, tmp_path / "out")
    assert all(text in str(caught.value) for text in mentions), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_study_goes_on_where_it_stood_and_reports_what_failed(tmp_path: Path) -> None:
    text = STUDY.replace("seeds = [0, 7]", "seeds = [0]").replace("settings.uneven", "settings.poor")
    path = write_study(tmp_path, text.replace('split = "dirichlet"', 'memory = ["1 kB"]'))
    study = load_study(path, tmp_path / "out", {"rounds": {"join_seconds": 1}})
    first, again, lost = Told(), Told(), Told()
    run_study(study, 1, first)
    assert (first.waiting, first.done) == (3, 0)
    assert first.ended.pop("poor small, seed 0").startswith("stage ")
    assert set(first.ended.values()) == {""} and len(first.ended) == 2

    records = (study.runs[0].folder / "metrics.jsonl").read_bytes()
    run_study(study, 1, again)
    assert (again.waiting, again.done, list(again.ended)) == (1, 2, ["poor small, seed 0"])
    assert (study.runs[0].folder / "metrics.jsonl").read_bytes() == records

    # As a killed study leaves a run: begun, without a summary. Begun again, it gives the same.
    (study.runs[0].folder / "summary.json").unlink()
    run_study(Study(study.config, study.out, study.runs[:1]), 1, lost)
    assert lost.ended == {study.runs[0].name: ""}
    assert (study.runs[0].folder / "metrics.jsonl").read_bytes() == records

    results = evaluate(study)
    assert list(results.rows) == ["even"]
    rows = {row.method: row for row in results.rows["even"]}
    assert rows["small"].rounds == 2 and rows["shorter"].rounds == 1
    # Uniform selection: one round asks two of four devices, two rounds up to all.
    assert rows["shorter"].participation == 0.5 <= rows["small"].participation
    write_results(results, tmp_path / "results")
    written = json.loads((tmp_path / "results" / "even.json").read_text())
    assert [row["method"] for row in written["rows"]] == ["small", "shorter"]
    for plot in ("even.svg", "memory.svg"):
        assert (tmp_path / "results" / plot).read_text().rstrip().endswith("</svg>")


def finished(
    seed: int, accuracies: Sequence[float], *, seconds: float = 10.0, planned: int = 400, trained: int = 2
) -> FinishedRun:
    """A run of one stage of `planned` bytes, of a model of 1,000; every round moves 50 bytes."""
    records = [
        RoundRecord(
            stage=0,
            stage_name="block",
            stages=1,
            round=number,
            round_in_stage=number,
            loss=1.0,
            accuracy=accuracy,
            accuracy_source="server",
            effective_movement=None,
            movement_slope=None,
            speed=None,
            frozen=False,
            devices_selected=2,
            devices_finished=2,
            samples=10,
            bytes_down=30,
            bytes_up=20,
            planned_bytes=planned,
            served_bytes=planned // 2,
            variants={},
            engines={},
            seconds=seconds,
        )
        for number, accuracy in enumerate(accuracies)
    ]
    stage = StageRecord(
        stage=0, name="block", planned_bytes=planned, memory={}, rounds=len(records), frozen_by="pace"
    )
    summary = RunSummary(
        run="0" * 32,
        accuracy=accuracies[-1],
        rounds=len(records),
        blocks_frozen=1,
        blocks=1,
        seconds=seconds * len(records),
        bytes_down=30 * len(records),
        bytes_up=20 * len(records),
        peak_planned_bytes=planned,
        full_model_planned_bytes=1000,
        stages=[stage],
    )
    return FinishedRun(seed, summary, records, trained, devices=4)


def test_figures_by_hand() -> None:
    reference = [finished(0, [0.2, 0.2, 0.5, 0.5, 0.5], planned=1000), finished(1, [0.4] * 5, planned=1000)]
    ours = [finished(0, [0.6, 0.6, 0.6], trained=4), finished(1, [0.8, 0.8, 0.8])]
    row = _row("ours", ours, reference, [reference, ours], target=0.5)
    assert row.accuracy == pytest.approx(0.7)
    assert row.accuracy_std == pytest.approx(0.1 * 2**0.5)
    assert row.participation == pytest.approx(0.75)
    assert row.seconds_to_target == 10
    assert row.bytes_to_target == 50
    assert row.peak_memory_cut == row.stage_mean_memory_cut == pytest.approx(0.6)
    assert row.round_weighted_memory_cut == pytest.approx(0.8)
    # The reference is at its best after 50 s (0.5 over three rounds) and 10 s (0.4), ours above both after 10 s each.
    assert row.speedup_to_exclusivefl_best == pytest.approx((50 + 10) / (10 + 10))
    its_own = _row("reference", reference, reference, [reference, ours], target=0.5)
    assert its_own.speedup_to_exclusivefl_best == 1
    # The second seed never gets to the target, so that there is no mean.
    assert its_own.seconds_to_target is None and its_own.bytes_to_target is None
    # Ours is done after 30 s; by then the first has 0.3, the mean of its first three rounds.
    assert its_own.accuracy_at_equal_time == pytest.approx((0.3 + 0.4) / 2)


def test_a_single_round_above_the_target_does_not_reach_it() -> None:
    run = finished(0, [0.1, 0.1, 0.9, 0.1, 0.9, 0.9, 0.9])
    assert run.seconds_to(0.7) == 70
    assert run.bytes_to(0.7) == 350
    assert run.seconds_to(0.95) is run.bytes_to(0.95) is None
    assert run.accuracy_at(5) == 0


def test_the_json_has_the_keys_that_are_documented(tmp_path: Path) -> None:
    runs = {"reference": [finished(0, [0.5, 0.5])], "ours": [finished(0, [0.4])]}
    rows = [_row(name, found, runs["reference"], list(runs.values()), 0.45) for name, found in runs.items()]
    write_results(StudyResults(0.45, {"even": rows}, {"even": runs}), tmp_path)
    written = json.loads((tmp_path / "even.json").read_text())["rows"]
    documented = [
        "method",
        "accuracy",
        "accuracy_std",
        "seconds_to_target",
        "bytes_to_target",
        "participation",
        "peak_memory_cut",
        "stage_mean_memory_cut",
        "round_weighted_memory_cut",
        "speedup_to_exclusivefl_best",
    ]
    assert all(set(documented) <= row.keys() for row in written)
    assert [row["seconds_to_target"] for row in written] == [10.0, None]
    assert written[1]["speedup_to_exclusivefl_best"] is None
    tables = (tmp_path / "tables.md").read_text()
    assert "| ours | 40.0% ± 0.0% |" in tables and "never" in tables
