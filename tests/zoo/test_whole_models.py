"""What a device makes of a whole model, beside the same model built anew and trained by plain PyTorch.

Nothing of the exporter's is on the other side: not its parts, not its captures, not its checks.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from frostline.exporter.artifact import ExportOptions, compile_stage
from frostline.exporter.cutting import cut
from frostline.exporter.inputs import pad
from frostline.exporter.optimizer import SGD
from frostline.exporter.parity import device_session
from frostline.exporter.stage import build_stage, statistics_tensors, trainable_tensors
from frostline.exporter.targets import find_target
from tests.zoo.entry import Entry, to_training
from tests.zoo.layers_corners import ENTRIES
from tests.zoo.registry import ENTRIES as ALL

BATCH, RATE, STEPS = 8, 0.05, 3
RANDOM = ("noisy_residual",)
"""They draw their numbers from the step's seed, which plain PyTorch does not know."""

COMPARED = [each for each in ENTRIES if each.expected == "compiles" and each.name not in RANDOM]
COMPARED += [each for each in ALL if each.name in ("newcomer_cnn", "lenet5", "running_mean_copied")]


IN_EXECUTORCH = (
    *(
        "masked_maximum",
        "masked_maximum_infinite",
        "compacted_in_order",
        "root_of_relu",
        "running_mean_viewed",
    ),
    "ghost_batch_norm",
)
"""Of those that have rewrites of their own there."""


@pytest.mark.parametrize(
    ("entry", "engine"),
    [
        pytest.param(entry, engine, id=f"{entry.name}-{engine}")
        for entry in COMPARED
        for engine in ("onnxruntime", "executorch")
        if engine == "onnxruntime" or entry.name in IN_EXECUTORCH
    ],
)
def test_a_device_trains_what_plain_pytorch_trains(entry: Entry, engine: str) -> None:
    parts = cut(entry.model(), 1, entry.example(2), entry.vocabulary, entry.classes)
    stage = build_stage(parts, 0, seed=0)
    compiled = compile_stage(stage, ExportOptions(BATCH, entry.classes, SGD(), find_target(engine)))
    values = {**trainable_tensors(stage), **statistics_tensors(stage)}
    eager = entry.model()
    before = copy.deepcopy(eager).state_dict()
    to_training(eager)
    optimizer = torch.optim.SGD([p for p in eager.parameters() if p.requires_grad], RATE)
    with device_session(compiled.manifest, compiled.files, values) as session:
        session.load({name: each.detach().numpy() for name, each in values.items()})
        for step in range(STEPS):
            x = entry.example(BATCH, seed=10 + step)
            x = pad(x) if step else x
            y = torch.arange(BATCH) % entry.classes
            optimizer.zero_grad()
            loss = F.cross_entropy(eager(x), y)
            loss.backward()
            optimizer.step()
            found, _ = session.step([(x.numpy(), y.numpy())], RATE)
            assert found == pytest.approx(loss.item(), rel=1e-4)
        trained = {name: torch.from_numpy(np.array(each)) for name, each in session.trained().items()}
    prefixes = ("block.", "output_module.head.")
    for name, value in eager.state_dict().items():
        moved = float((value - before[name]).float().norm())
        ours = next((trained[prefix + name] for prefix in prefixes if prefix + name in trained), None)
        if ours is None:
            # Whole numbers that a norm counts stay behind, and whatever does not move.
            assert moved == 0 or not value.is_floating_point(), name
        else:
            assert float((ours - value).norm()) <= 1e-2 * moved + 1e-5 * _norm(value), name


def _norm(value: Tensor) -> float:
    return float(value.norm()) + 1
