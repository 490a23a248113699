"""The check before an artifact ships: the lowered step, in its real runtime, against eager PyTorch in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from frostline.exporter.executorch_lowering import LoweredProgram, quiet
from frostline.exporter.stage import Stage
from frostline.exporter.training_step import StageState
from frostline.protocol.errors import RunError

if TYPE_CHECKING:
    from frostline.exporter.artifact import ExportOptions

STEPS = 2
LEARNING_RATE = 0.05
TOLERANCE = 1e-3
"""Largest error let through: of the loss relative to itself, of a tensor relative to how far it moved.

float32 training steps differ from float64 by about 1e-5; a wrong kernel or a wrong rewrite by about 1.
"""


@dataclass(frozen=True)
class Parity:
    """The largest relative errors found, of the losses and of the updated tensors."""

    loss_error: float
    tensor_error: float


def check_parity(stage: Stage, training: LoweredProgram, state: StageState, options: ExportOptions) -> Parity:
    """Train the same two random batches in the runtime and in eager PyTorch, and compare all that changed.

    Raises
    ------
    RunError
        Naming the stage and the tensor that differs most.
    """
    batches = _random_batches(stage, options)
    losses, trained = _run(training, state, batches)
    want_losses, want, moved = _train_eagerly(stage, options, batches)
    loss_error = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(losses, want_losses, strict=True))
    errors = {}
    for name, held in trained.items():
        value = stage.layout.model(name, held)
        # A tensor whose gradient vanishes (a bias before a norm) moves by rounding only: an absolute floor for it.
        scale = max(float(moved[name].norm()), 1e-5 * float(want[name].norm()), 1e-6)
        errors[name] = float((value.double() - want[name]).norm()) / scale
    worst = max(errors, key=lambda name: errors[name])
    parity = Parity(loss_error, errors[worst])
    if not (parity.loss_error <= TOLERANCE and parity.tensor_error <= TOLERANCE):
        raise RunError(
            f"stage {stage.name!r}: the ExecuTorch program does not train as eager PyTorch does: loss off by "
            f"{parity.loss_error:.1e}, tensor {worst!r} by {parity.tensor_error:.1e} of its movement"
        )
    return parity


def _random_batches(stage: Stage, options: ExportOptions) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(0)
    shape = (options.batch, *stage.input_shape)
    return [
        (
            torch.randn(shape, generator=random),
            torch.randint(0, options.classes, (options.batch,), generator=random),
        )
        for _ in range(STEPS)
    ]


def _run(
    training: LoweredProgram, state: StageState, batches: list[tuple[Tensor, Tensor]]
) -> tuple[list[float], dict[str, Tensor]]:
    tensors = [t.clone() for t in state.tensors]
    rate = torch.tensor(LEARNING_RATE)
    with quiet():
        from executorch.extension.pybindings.portable_lib import _load_for_executorch_from_buffer

        module = _load_for_executorch_from_buffer(training.content)
        losses = [
            float(module.run_method("forward", (*tensors, x, y, rate), clone_outputs=False)[-2])
            for x, y in batches
        ]
    names = [*state.parameters, *state.statistics]
    return losses, dict(zip(names, tensors, strict=False))


def _train_eagerly(
    stage: Stage, options: ExportOptions, batches: list[tuple[Tensor, Tensor]]
) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, final values and movement of every tensor, by torch.optim rather than our own optimizer."""
    model = copy.deepcopy(stage.model).double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = options.optimizer
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.double()), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = model.state_dict()
    return losses, after, {name: after[name] - before[name] for name in after}
