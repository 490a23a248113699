"""Stages trained by onnxruntime-training, against eager PyTorch in float64.

That package takes the place of onnxruntime, so it is installed in a folder of its own, named by the environment variable
FROSTLINE_ONNXRUNTIME_TRAINING, and each model runs in a process that finds it first.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from frostline.exporter.onnxruntime_training import check_optimizer
from frostline.exporter.optimizer import SGD, AdamW, Optimizer
from frostline.protocol.errors import UsageError

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("FROSTLINE_ONNXRUNTIME_TRAINING", ROOT / "build" / "onnxruntime-training"))
MODELS = (
    "resnet10",
    "resnet18",
    "small_cnn",
    "vgg11",
    "mobilenet_v2",
    "vit",
    "sensor_cnn",
    "text_transformer",
)
TOLERANCE = 1e-4
"""Largest relative error of logits or a loss."""
SAME = 1e-5
"""Largest relative difference of a tensor between two runs of the same steps.

The runtime's sums depend on where in memory their arguments lie, so not even two uninterrupted runs give the same bits.
"""

SGD_PLAIN = {"name": "sgd"}
# Adam's step is as long for a gradient that is all rounding as for any other, unless epsilon is above it.
ADAMW = {"name": "adamw", "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.99, "epsilon": 1e-4}

QUICK = ("small_cnn", "resnet10", "text_transformer")
"""The models that `make test` compiles here; `make test-slow` compiles the others."""

needs_package = pytest.mark.skipif(
    not (FOLDER / "onnxruntime").is_dir(),
    reason=f"no onnxruntime-training in {FOLDER}: make onnxruntime-training, or set FROSTLINE_ONNXRUNTIME_TRAINING",
)


@functools.cache
def _rows(request: str) -> list[dict[str, Any]]:
    path = os.pathsep.join([str(FOLDER.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    module = "tests.exporter.onnxruntime_training_parity"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, request],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # The agent's users are to see nothing of what the libraries say.
    assert done.stderr == ""
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def trained(model: str, optimizer: dict[str, Any] = SGD_PLAIN, **request: Any) -> list[dict[str, Any]]:
    return _rows(json.dumps({"model": model, "optimizer": optimizer, **request}))


def assert_equal_training(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert "error" not in row, row
        assert max(row["loss"], row["logits"]) < TOLERANCE, row
        assert row["tensor"] <= 1, row
        assert row["resumed"] < SAME, row


@needs_package
@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        pytest.param(
            model,
            optimizer,
            id=f"{model}-{optimizer['name']}",
            marks=[]
            if model in QUICK and (optimizer is SGD_PLAIN or model == "small_cnn")
            else pytest.mark.slow,
        )
        for model in MODELS
        for optimizer in (SGD_PLAIN, ADAMW)
    ],
)
def test_every_stage_trains_as_eager_pytorch_does(model: str, optimizer: dict[str, Any]) -> None:
    # Where float32 takes some of MobileNet's many activations across a kink, Adam's steps part from those in float64,
    # whoever takes them.
    parting = model == "mobilenet_v2" and optimizer is ADAMW
    rows = trained(model, optimizer, steps=1 if parting else 3)
    assert len(rows) == 3
    assert_equal_training(rows)


@needs_package
@pytest.mark.parametrize("model", ["small_cnn", "text_transformer"])
def test_adamw_by_default(model: str) -> None:
    assert_equal_training(trained(model, {"name": "adamw", "learning_rate": 0.001}))


@needs_package
@pytest.mark.parametrize("optimizer", [SGD_PLAIN, ADAMW], ids=["sgd", "adamw"])
def test_micro_batches_make_the_step_of_the_batch(optimizer: dict[str, Any]) -> None:
    assert_equal_training(trained("resnet10", optimizer, micro_batches=4))


@needs_package
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_batch_norm_updates_its_statistics(micro_batches: int) -> None:
    options = {"norm": "batch", "input_size": 32}
    rows = trained("resnet10", ADAMW, options=options, micro_batches=micro_batches)
    assert_equal_training(rows)
    assert all(row["statistics"] for row in rows)


@needs_package
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_gradients_common_norm_is_clipped(optimizer: str) -> None:
    settings = {**(SGD_PLAIN if optimizer == "sgd" else ADAMW), "clip_norm": 0.1, "learning_rate": 0.1}
    assert_equal_training(trained("small_cnn", settings, micro_batches=2))


@needs_package
@pytest.mark.parametrize("stage", ["dropout", "attention", "activations", "frozen", "repeated", "pooling"])
def test_layers_that_the_built_in_models_lack(stage: str) -> None:
    assert_equal_training(trained(stage, micro_batches=2))


@needs_package
@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("transposed", "operator ConvTranspose in module '0' has no gradient"),
        ("no_gradient", "aten::cumprod"),
        ("cumulative", "module 'block.1' averages its statistics over all batches"),
    ],
)
def test_what_cannot_be_trained_is_named_in_one_line(stage: str, said: str) -> None:
    (row,) = trained(stage)
    assert said in row["error"]
    assert "\n" not in row["error"]


@pytest.mark.parametrize(
    ("optimizer", "setting"),
    [
        (SGD(momentum=0.9), "momentum"),
        (SGD(weight_decay=0.1), "weight_decay"),
        (AdamW(proximal=0.1), "proximal"),
    ],
)
def test_a_setting_that_the_runtime_lacks_is_refused(optimizer: Optimizer, setting: str) -> None:
    with pytest.raises(UsageError, match=f"without {setting}.*'onnxruntime'"):
        check_optimizer(optimizer)


@pytest.mark.parametrize("optimizer", [SGD(clip_norm=1.0), AdamW(weight_decay=0.1, clip_norm=1.0)])
def test_other_settings_are_taken(optimizer: Optimizer) -> None:
    check_optimizer(optimizer)
