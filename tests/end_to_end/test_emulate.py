"""The emulator end to end: every artifact of the run is there and agrees with the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from frostline.datasets.load import load_samples
from frostline.emulator.broker import EmbeddedBroker
from frostline.exporter.models.lookup import build_model
from tests.end_to_end.conftest import run_command, write_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The summary and folder of one finished run."""
    folder = tmp_path_factory.mktemp("emulate")
    out = folder / "run"
    config = write_config(folder)
    config.write_text(config.read_text().replace("[training]", '[training]\nprefix = "int8"'))
    result = run_command("emulate", "--config", config, "--out", out, "--json")
    assert result.returncode == 0, result.stderr
    assert "in int8 the frozen block changes the accuracy by" in result.stderr
    return json.loads(result.stdout), out


def test_every_block_is_frozen_by_the_pace_controller(finished: tuple[dict[str, Any], Path]) -> None:
    summary, _ = finished
    assert summary["blocks_frozen"] == summary["blocks"] == 2
    assert all(stage["frozen_by"] == "pace" for stage in summary["stages"])
    assert summary["accuracy"] >= 0.93


def test_the_summary_holds_what_scripts_read(finished: tuple[dict[str, Any], Path]) -> None:
    summary, _ = finished
    for key in (
        "rounds",
        "peak_planned_bytes",
        "full_model_planned_bytes",
        "bytes_down",
        "bytes_up",
        "seconds",
    ):
        assert summary[key] > 0, key
    assert summary["peak_planned_bytes"] < summary["full_model_planned_bytes"]


def test_the_summary_says_what_int8_changes(finished: tuple[dict[str, Any], Path]) -> None:
    first, last = finished[0]["stages"]
    assert abs(first["int8_accuracy_change"]) < 0.1
    assert last["int8_accuracy_change"] is None


def test_pytorch_and_the_program_agree_on_the_test_set(finished: tuple[dict[str, Any], Path]) -> None:
    from frostline.device_runtime.executorch_engine import ExecuTorchProgram

    summary, out = finished
    model = build_model("small_cnn", {"width": 8}, (1, 8, 8), 10).module
    model.load_state_dict(load_file(out / "model.safetensors"))
    test = load_samples("digits", "test")
    with torch.inference_mode():
        logits = model.eval()(torch.from_numpy(test.x))
    accuracy = float((logits.argmax(1).numpy() == test.y).mean())
    assert accuracy == pytest.approx(summary["accuracy"], abs=1e-9)

    program = ExecuTorchProgram((out / "model.pte").read_bytes(), "model.pte")
    padded = torch.zeros(-(-len(test) // 16) * 16, 1, 8, 8)
    padded[: len(test)] = torch.from_numpy(test.x)
    batches = [program.run([rows])[0].clone() for rows in padded.split(16)]
    by_program = torch.cat(batches)[: len(test)]
    assert torch.allclose(by_program, logits, atol=1e-4)
    assert np.array_equal(by_program.argmax(1).numpy(), logits.argmax(1).numpy())


def test_the_folder_holds_the_whole_story(finished: tuple[dict[str, Any], Path]) -> None:
    summary, out = finished
    rounds = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rounds) == summary["rounds"]
    assert rounds[-1]["accuracy"] == summary["accuracy"]
    # The device with 70 % of the whole model's memory holds the first stage in parts only.
    assert rounds[0]["variants"]["whole"] == 2 and len(rounds[0]["variants"]) == 2
    assert json.loads((out / "summary.json").read_text())["run"] == summary["run"]
    assert "<svg" in (out / "report.html").read_text()
    assert "[model]" in (out / "config.toml").read_text()
    assert not (out / "devices").exists()


def test_devices_evaluate_when_the_server_cannot(tmp_path: Path, broker: EmbeddedBroker) -> None:
    config = write_config(tmp_path, test="", norm="batch")
    out = tmp_path / "run"
    result = run_command("emulate", "--config", config, "--out", out, "--broker", broker.url, "--json")
    assert result.returncode == 0, result.stderr
    rounds = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {r["accuracy_source"] for r in rounds} == {"devices"}
    assert rounds[-1]["accuracy"] >= 0.9
