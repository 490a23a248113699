"""Many steps on real digits: rounding adds up, but the compiled program goes the way that eager PyTorch goes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from frostline.datasets.load import load_samples
from frostline.device_runtime.engine import open_runtime
from frostline.exporter.artifact import ExportOptions, arrays, compile_stage
from frostline.exporter.cutting import cut
from frostline.exporter.models.lookup import build_model
from frostline.exporter.optimizer import SGD, AdamW, Optimizer
from frostline.exporter.stage import Stage, build_stage, statistics_tensors, trainable_tensors
from frostline.protocol.blobs import BlobStore
from frostline.protocol.tensors import Array

BATCH, STEPS, CLASSES = 16, 50, 10
Batch = tuple[Array, Array]
OfTorch = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


def _stage() -> Stage:
    options = {"width": 8, "norm": "batch", "channels": 1, "input_size": 8}
    spec = build_model("small_cnn", options, classes=CLASSES, seed=0)
    return build_stage(cut(spec.module, 2, spec.example(2)), 0, seed=0)


def _batches() -> list[Batch]:
    samples = load_samples("digits", "train")
    random = np.random.default_rng(0)
    rows = random.permutation(len(samples))[: STEPS * BATCH].reshape(STEPS, BATCH)
    return [(samples.x[chosen], samples.y[chosen]) for chosen in rows]


def _eager(stage: Stage, of_torch: OfTorch, batches: list[Batch], dtype: torch.dtype) -> Array:
    model = copy.deepcopy(stage.model).to(dtype).train()
    optimizer = of_torch(model.parameters())
    losses = []
    for x, y in batches:
        loss = F.cross_entropy(model(torch.from_numpy(x).to(dtype)), torch.from_numpy(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def _compiled(
    stage: Stage, optimizer: Optimizer, batches: list[Batch], learning_rate: float, folder: Path
) -> Array:
    compiled = compile_stage(stage, ExportOptions(BATCH, CLASSES, optimizer))
    store = BlobStore(folder)
    for content in compiled.files.values():
        store.put(content)
    session = open_runtime("executorch").open_stage(compiled.manifest, store)
    session.load(arrays({**trainable_tensors(stage), **statistics_tensors(stage)}))
    return np.array([session.step([batch], learning_rate)[0] for batch in batches])


@pytest.mark.parametrize(
    ("optimizer", "learning_rate", "of_torch"),
    [
        (SGD(momentum=0.9), 0.05, lambda p: torch.optim.SGD(p, 0.05, 0.9)),
        (AdamW(weight_decay=0.01), 0.01, lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.01)),
    ],
    ids=["SGD", "AdamW"],
)
def test_losses_on_digits_are_those_of_eager_pytorch(
    optimizer: Optimizer, learning_rate: float, of_torch: OfTorch, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    stage, batches = _stage(), _batches()
    double, single = (_eager(stage, of_torch, batches, dtype) for dtype in (torch.float64, torch.float32))
    compiled = _compiled(stage, optimizer, batches, learning_rate, tmp_path)
    assert double[-10:].mean() < 0.35 * double[0]
    # These steps are not chaotic: float32 keeps to float64, so a program that does not is wrong.
    np.testing.assert_allclose(single, double, rtol=1e-3)
    np.testing.assert_allclose(compiled, double, rtol=1e-3)
    np.testing.assert_allclose(compiled, single, rtol=1e-3)
