"""A fleet of which the server cannot serve everybody: the others train on."""

from __future__ import annotations

import json
from pathlib import Path

from tests.end_to_end.conftest import run_command, write_config


def test_a_board_whose_engine_has_no_words_for_a_stage_is_left_out_of_it(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    text = config.read_text()
    for old, new in (
        ('name = "small_cnn"', 'name = "tests.end_to_end.margins:digits"'),
        ("blocks = 2", 'blocks = ["0", "1"]'),
        ('options = { width = 8, norm = "group" }', "options = { width = 4 }"),
        ("max_per_stage = 40", "max_per_stage = 3"),
        ("learning_rate = 0.1", "learning_rate = 0.01"),
        ("patience = 1", "patience = 1\nrollback = 1"),
        ('memory = ["100%", "70%"]', 'memory = ["100MB"]\nengines = ["executorch", "onnxruntime"]'),
    ):
        assert old in text
        text = text.replace(old, new)
    config.write_text(text)
    out = tmp_path / "run"
    finished = run_command(
        "emulate", "--config", config, "--out", out, "--json", "--cache", tmp_path / "cache"
    )
    assert finished.returncode == 0, finished.stderr
    summary = json.loads(finished.stdout)
    assert summary["rounds"] == 6
    assert summary["accuracy"] > 0.5
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["engines"] for record in records if record["stage"] == 0] == [
        {"executorch": 2, "onnxruntime": 1}
    ] * 3
    assert [record["engines"] for record in records if record["stage"] == 1] == [{"executorch": 2}] * 3
    (note,) = [line for line in finished.stderr.splitlines() if "cannot be compiled" in line]
    for word in (
        "1: ",
        "onnxruntime",
        "device-2",
        "aten.reflection_pad2d",
        "module '1.1'",
        "training.engines",
    ):
        assert word in note
    assert (out / "model.safetensors").is_file()
    assert "resource_tracker" not in finished.stderr
