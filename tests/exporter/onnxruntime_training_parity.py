"""Trains a built-in model's stages with onnxruntime-training and in eager PyTorch; prints the errors as JSON.

Run by test_onnxruntime_training.py in a process of its own, whose onnxruntime is that of onnxruntime-training:

    python -m tests.exporter.onnxruntime_training_parity '{"model": "resnet10", "optimizer": {"name": "sgd"}}'
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frostline.device_runtime.onnxruntime_training_engine import ArtifactPaths, OnnxRuntimeTrainingSession
from frostline.exporter.artifact import ExportOptions
from frostline.exporter.cutting import cut
from frostline.exporter.inputs import random_inputs
from frostline.exporter.named_tensors import tensors_of
from frostline.exporter.onnxruntime_training import TrainingArtifacts, generate_training_artifacts
from frostline.exporter.optimizer import SGD, AdamW, Optimizer
from frostline.exporter.parity import LAST_BITS, ROUNDING, VANISHING, train_eagerly
from frostline.exporter.stage import Stage, build_stage
from frostline.protocol.errors import FrostlineError
from frostline.protocol.manifest import TensorSpec
from tests.exporter import onnxruntime_training_stages
from tests.exporter.small_models import small_model

CLASSES, BATCH, STEPS, BLOCKS = 5, 4, 3, 3

TOLERANCE = 1e-4
"""Relative error let through of a tensor, unless eager float32 is off by more: see `frostline.exporter.parity`."""


def main(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each stage."""
    torch.set_num_threads(1)
    settings = dict(request["optimizer"])
    rate = settings.pop("learning_rate", 0.01)
    optimizer = {"sgd": SGD, "adamw": AdamW}[settings.pop("name")](**settings)
    rows = []
    for stage in stages(request["model"], request.get("options", {})):
        try:
            errors = compare(
                stage, optimizer, rate, request.get("micro_batches", 1), request.get("steps", STEPS)
            )
        except FrostlineError as error:
            errors = {"error": f"{type(error).__name__}: {error}"}
        rows.append({"stage": stage.name, **errors})
    return rows


def stages(model: str, options: Mapping[str, Any]) -> Iterator[Stage]:
    """The stages of a small built-in model, or one of `onnxruntime_training_stages`."""
    if hasattr(onnxruntime_training_stages, model):
        yield getattr(onnxruntime_training_stages, model)(CLASSES)
        return
    spec = small_model(model, classes=CLASSES, **options)
    parts = cut(spec.module, BLOCKS, spec.example(2), spec.vocabulary)
    yield from (build_stage(parts, index, seed=0) for index in range(len(parts.blocks)))


def compare(
    stage: Stage, optimizer: Optimizer, rate: float, micro_batches: int, steps: int
) -> dict[str, Any]:
    """The largest relative errors of losses and logits after some steps, and of tensors by what is let through."""
    random = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(steps):
        x = random_inputs(BATCH, stage.input_shape, stage.vocabulary, random)
        y = torch.randint(0, CLASSES, (BATCH,), generator=random)
        batches.append(list(zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True)))
    artifacts = generate_training_artifacts(stage, ExportOptions(BATCH, CLASSES, optimizer), micro_batches)
    with tempfile.TemporaryDirectory() as folder:
        session = opened(artifacts, stage, Path(folder))
        # A first load and step that must leave no trace.
        session.load(values(stage))
        session.step([(x.numpy(), y.numpy()) for x, y in batches[0]], rate)
        session.load(values(stage))
        losses, states = [], []
        for parts in batches:
            states.append({name: value.copy() for name, value in session.state().items()})
            losses.append(session.step([(x.numpy(), y.numpy()) for x, y in parts], rate)[0])
        got = {name: torch.from_numpy(value.copy()) for name, value in session.trained().items()}
        logits = session.evaluate(batches[0][0][0].numpy())
        # Interrupted before the last step, and gone on in a session of its own.
        resumed = opened(artifacts, stage, Path(folder))
        resumed.restore(states[-1])
        resumed.step([(x.numpy(), y.numpy()) for x, y in batches[-1]], rate)
        gone_on = {name: torch.from_numpy(value.copy()) for name, value in resumed.trained().items()}
    eager = list(train_eagerly(stage, optimizer, batches, rate))
    near = [
        list(train_eagerly(stage, optimizer, batches, rate, torch.float32, noise))[-1].tensors
        for noise in (0.0, LAST_BITS)
    ]
    want, gradients = eager[-1].tensors, eager[-1].gradient_norms
    before = tensors_of(stage.model)
    moved = {name: each - before[name].detach() for name, each in want.items()}
    wanted_losses = [step.loss for step in eager]
    floor = VANISHING * max(gradients.values())
    limits = {
        name: max(TOLERANCE, ROUNDING * max(relative(each[name], want[name]) for each in near))
        for name in want
    }
    compared = [name for name in got if gradients.get(name, 1.0) >= floor]
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in zip(losses, wanted_losses, strict=True)),
        "tensor": max(relative(got[name], want[name]) / limits[name] for name in compared),
        "worst": max(compared, key=lambda name: relative(got[name], want[name]) / limits[name]),
        "movement": max(
            float((got[n].double() - want[n]).norm() / moved[n].norm().clamp(min=1e-6)) for n in compared
        ),
        "logits": relative(torch.from_numpy(logits), evaluated(stage, want, batches[0][0][0])),
        "resumed": max(relative(gone_on[name], got[name]) for name in got),
        "statistics": list(artifacts.statistics),
    }


def opened(artifacts: TrainingArtifacts, stage: Stage, folder: Path) -> OnnxRuntimeTrainingSession:
    kinds = ("training", "evaluation", "optimizer", "checkpoint")
    for kind in kinds:
        folder.joinpath(kind).write_bytes(getattr(artifacts, kind))
    specs = [TensorSpec(name=name, shape=value.shape) for name, value in values(stage).items()]
    return OnnxRuntimeTrainingSession(
        ArtifactPaths(*(folder / kind for kind in kinds)), specs, artifacts.statistics
    )


def values(stage: Stage) -> dict[str, np.ndarray]:
    """What travels, in the model's order."""
    parameters = {name: p for name, p in stage.model.named_parameters() if p.requires_grad}
    statistics = {name: b for name, b in stage.model.named_buffers() if b.is_floating_point()}
    return {name: each.detach().numpy().copy() for name, each in {**parameters, **statistics}.items()}


def evaluated(stage: Stage, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    model = stage.model.eval()
    with torch.no_grad():
        x = x.double() if x.is_floating_point() else x
        logits = torch.func.functional_call(model, dict(tensors), (x,), tie_weights=False)
    model.train()
    return logits


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-3))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))))
