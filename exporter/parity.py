"""The check before an artifact ships: the lowered step, in its real runtime, against eager PyTorch in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frostline.exporter.dropout import SeededDropout
from frostline.exporter.inputs import random_inputs
from frostline.exporter.optimizer import SGD, AdamW, Optimizer
from frostline.exporter.stage import Stage
from frostline.exporter.target import LoweredProgram, Target
from frostline.protocol.errors import RunError

if TYPE_CHECKING:
    from frostline.exporter.artifact import ExportOptions, StageTensors

Batch = tuple[Tensor, Tensor]
"""x (N, *input_shape) and y (N,) int64."""

STEPS = 2
LEARNING_RATE = 0.05
LOSS_TOLERANCE = 1e-3
"""Largest error let through of a loss, relative to itself."""
TENSOR_TOLERANCE = 5e-3
"""Largest error let through of a tensor, relative to how far it moved.

float32 differs from float64 by about 1e-5, and by up to 2e-3 where rounding carries an activation across ReLU's kink; a
wrong kernel or a wrong rewrite by about 1.
"""
VANISHING = 1e-6
"""Tensors whose gradient is this much smaller than the largest are not compared: in float32 it is all rounding, and some
optimizers take steps of one size however small the gradient is."""


@dataclass(frozen=True)
class Parity:
    """The largest relative errors found, of the losses and of the updated tensors."""

    loss_error: float
    tensor_error: float


Steps = Sequence[Sequence[Batch]]
"""The micro-batches of each step."""


def check_parity(
    stage: Stage,
    options: ExportOptions,
    micro_batches: int,
    train: Callable[[Steps], tuple[list[float], Mapping[str, Tensor]]],
) -> Parity:
    """Train the same random batches in the runtime and in eager PyTorch, and compare all that changed.

    Parameters
    ----------
    train : callable
        Trains in the runtime at `LEARNING_RATE`, the seeds of dropout 0, 1, 2 ...; the loss of each step, and the
        parameters and statistics in the model's order.

    Raises
    ------
    RunError
        Naming the stage and the tensor that differs most.
    """
    batches = [_random_batch(stage, options, seed) for seed in range(STEPS)]
    parts = [list(zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True)) for x, y in batches]
    losses, trained = train(parts)
    each, want, moved, gradient_norms = train_eagerly(stage, options.optimizer, parts, LEARNING_RATE)
    want_losses = [
        sum(each[i : i + micro_batches]) / micro_batches for i in range(0, len(each), micro_batches)
    ]
    unmoved = VANISHING * max(gradient_norms.values())
    loss_error = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(losses, want_losses, strict=True))
    errors = {}
    for name, value in trained.items():
        if gradient_norms.get(name, unmoved) < unmoved:
            continue
        # A tensor whose gradient vanishes (a bias before a norm) or is clipped moves by little more than rounding, which
        # is 6e-8 of its value a step: a floor for it.
        scale = max(float(moved[name].norm()), 2e-4 * float(want[name].norm()), 1e-6)
        errors[name] = float((value.double() - want[name]).norm()) / scale
    worst = max(errors, key=lambda name: errors[name])
    parity = Parity(loss_error, errors[worst])
    if not (parity.loss_error <= LOSS_TOLERANCE and parity.tensor_error <= TENSOR_TOLERANCE):
        raise RunError(
            f"stage {stage.name!r}: the {options.target.engine} program does not train as eager PyTorch does: loss off by "
            f"{parity.loss_error:.1e}, tensor {worst!r} by {parity.tensor_error:.1e} of its movement"
        )
    return parity


def _random_batch(stage: Stage, options: ExportOptions, seed: int) -> Batch:
    random = torch.Generator().manual_seed(seed)
    x = random_inputs(options.batch, stage.input_shape, stage.vocabulary, random)
    return x, torch.randint(0, options.classes, (options.batch,), generator=random)


def train_lowered(
    target: Target,
    training: LoweredProgram,
    update: LoweredProgram | None,
    tensors: StageTensors,
    batches: Steps,
) -> tuple[list[float], dict[str, Tensor]]:
    """Train by lowered programs, as `check_parity` asks for."""
    held = {name: tensor.clone() for name, tensor in tensors.state.by_name.items()}
    held["learning_rate"] = torch.tensor(LEARNING_RATE)
    losses: list[float] = []
    calls = 0
    run_training = target.load(training)
    run_update = target.load(update) if update else None
    for parts in batches:
        loss = 0.0
        for index, (x, y) in enumerate(parts):
            first, seed = torch.tensor(float(index == 0)), torch.tensor(float(calls))
            held |= {"x": x, "y": y, "first": first, "seed": seed}
            loss += float(run_training(held)[0]) / len(parts)
            calls += 1
        losses.append(loss)
        if run_update is not None:
            run_update(held)
    state = tensors.state
    return losses, {n: state.layout.model(n, held[n]) for n in [*state.parameters, *state.statistics]}


def train_eagerly(
    stage: Stage, settings: Optimizer, batches: Sequence[Sequence[Batch]], learning_rate: float
) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """What PyTorch makes of the same batches in float64, by its own optimizers rather than ours.

    The seeds of dropout are 0, 1, 2 ... in the order of the micro-batches.

    Parameters
    ----------
    batches : sequence of sequence of (x, y)
        The micro-batches of each step.

    Returns
    -------
    tuple
        The loss of each micro-batch, the final values of the model's tensors, how they moved, and the norms of the
        parameters' gradients at the first step.
    """
    model = copy.deepcopy(stage.model).double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(trained.values())
    received = [p.detach().clone() for p in parameters]
    optimizer = _of_torch(settings, parameters, learning_rate)
    losses: list[float] = []
    gradient_norms: dict[str, float] = {}
    for parts in batches:
        optimizer.zero_grad()
        for x, y in parts:
            with SeededDropout(torch.tensor(float(len(losses)))):
                loss = F.cross_entropy(model(x.double() if x.is_floating_point() else x), y)
            (loss / len(parts)).backward()
            losses.append(loss.item())
        for (name, parameter), value in zip(trained.items(), received, strict=True):
            assert parameter.grad is not None
            gradient_norms.setdefault(name, float(parameter.grad.norm()))
            parameter.grad += settings.proximal * (parameter.detach() - value)
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimizer.step()
    after = model.state_dict()
    return losses, after, {name: after[name] - before[name] for name in after}, gradient_norms


def _of_torch(
    settings: Optimizer, parameters: Sequence[nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    decay = settings.weight_decay
    if isinstance(settings, SGD):
        return torch.optim.SGD(
            parameters, learning_rate, settings.momentum, weight_decay=decay, nesterov=settings.nesterov
        )
    assert isinstance(settings, AdamW)
    betas = settings.beta1, settings.beta2
    return torch.optim.AdamW(parameters, learning_rate, betas, settings.epsilon, decay)
