"""The first model that a newcomer brings, written the way tutorials write it: on a phone's engine and a board's, side by side."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from frostline.datasets.load import load_samples
from frostline.datasets.samples import Samples
from frostline.emulator.partition import split_iid
from tests.end_to_end.conftest import command

MODEL = """
from torch import nn


def build():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )
"""

ROUNDS, EPOCHS, BATCH, RATE, DEVICES = 10, 1, 16, 0.05, 2

CONFIG = f"""
[run]
fleet = "newcomer"
seed = 0

[model]
name = "newcomer:build"
blocks = 1

[data]
train = "digits"
test = "digits"

[training]
engines = ["executorch", "onnxruntime"]
batch = {BATCH}
epochs = {EPOCHS}
learning_rate = {RATE}
momentum = 0.9

[rounds]
devices = {DEVICES}
max_per_stage = {ROUNDS}

[pace]
window = {ROUNDS}
regression = {ROUNDS}

[fleet]
devices = {DEVICES}
memory = ["100MB"]
engines = ["executorch", "onnxruntime"]
split = "iid"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "newcomer.py").write_text(MODEL)
    (tmp_path / "run.toml").write_text(CONFIG)
    return tmp_path


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )


def _model(folder: Path) -> nn.Module:
    names: dict[str, object] = {}
    exec((folder / "newcomer.py").read_text(), names)
    torch.manual_seed(0)
    return names["build"]()  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize("engine", ["executorch", "onnxruntime"])
def test_it_is_exported_as_it_is(folder: Path, engine: str) -> None:
    shape = ["--input-shape", "1,8,8", "--classes", "10", "--blocks", "3"]
    made = _run(
        folder,
        "export",
        "--model",
        "newcomer:build",
        *shape,
        "--engine",
        engine,
        "--out",
        "artifacts",
        "--json",
    )
    assert made.returncode == 0, made.stderr
    assert [stage["name"] for stage in json.loads(made.stdout)["stages"]] == ["2", "5", "8"]


def test_a_phone_and_a_board_train_it_as_eager_pytorch_does(folder: Path) -> None:
    finished = _run(folder, "emulate", "--config", "run.toml", "--out", "run", "--no-cache", "--json")
    assert finished.returncode == 0, finished.stderr
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(record["engines"] == {"executorch": 1, "onnxruntime": 1} for record in records)
    accuracy = json.loads(finished.stdout)["accuracy"]
    assert accuracy >= _federated(_model(folder), len(records)) - 0.02


def _federated(model: nn.Module, rounds: int) -> float:
    """The accuracy of plain federated averaging in PyTorch."""
    samples, test = load_samples("digits", "train"), load_samples("digits", "test")
    shares = [samples.take(rows) for rows in split_iid(samples.y, DEVICES, seed=0)]
    for number in range(rounds):
        states = [_trained(model, share, number) for share in shares]
        mean = {
            name: torch.stack([s[name].float() for s in states]).mean(0).to(states[0][name].dtype)
            for name in states[0]
        }
        model.load_state_dict(mean)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(test.x))
    return float((logits.argmax(1).numpy() == test.y).mean())


def _trained(model: nn.Module, samples: Samples, seed: int) -> dict[str, torch.Tensor]:
    local = copy.deepcopy(model)
    optimizer = torch.optim.SGD(local.train().parameters(), RATE, momentum=0.9)
    x, y = torch.from_numpy(samples.x), torch.from_numpy(samples.y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    for rows in order.split(BATCH)[:-1]:
        optimizer.zero_grad()
        F.cross_entropy(local(x[rows]), y[rows]).backward()
        optimizer.step()
    return local.state_dict()
