"""A fleet that learns from token ids, from the folder of samples to the final model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from frostline.exporter.models.lookup import build_model
from tests.byte_patterns import LENGTH, byte_patterns, write_byte_patterns
from tests.end_to_end.conftest import run_command

CONFIG = """
[run]
seed = 1

[model]
name = "text_transformer"
blocks = ["layer1", "layer2"]
options = {{ vocabulary = 128, width = 16, depth = 2, heads = 2 }}

[data]
train = "{data}"
test = "{data}"

[training]
batch = 8
epochs = 2
learning_rate = 0.1

[rounds]
devices = 2
max_per_stage = 6

[fleet]
devices = 2
"""


def test_a_fleet_tells_byte_grammars_apart(tmp_path: Path) -> None:
    from frostline.device_runtime.executorch_engine import ExecuTorchProgram

    config, out = tmp_path / "run.toml", tmp_path / "run"
    config.write_text(CONFIG.format(data=write_byte_patterns(tmp_path / "data")))
    result = run_command("emulate", "--config", config, "--out", out, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["accuracy"] >= 0.9

    options = {"vocabulary": 128, "width": 16, "depth": 2, "heads": 2}
    model = build_model("text_transformer", options, (LENGTH,), 3).module
    model.load_state_dict(load_file(out / "model.safetensors"))
    samples = byte_patterns(8, seed=3)
    with torch.inference_mode():
        logits = model.eval()(torch.from_numpy(samples.x))
    program = ExecuTorchProgram((out / "model.pte").read_bytes(), "model.pte")
    (by_program,) = program.run([torch.from_numpy(samples.x)])
    assert torch.allclose(by_program, logits, atol=1e-4)
    assert np.mean(logits.argmax(1).numpy() == samples.y) >= 0.75
