"""The check before an artifact ships: its programs, run by the device's own code, against eager PyTorch in float64.

How far rounding alone carries a model is measured, not guessed: eager float32 takes the same steps, on the same batches and
on batches that differ by their last bits. A program may be off by a few times as much as those are, tensor by
tensor and step by step. A deep network with batch norm and ReLU amplifies a last bit to a tenth of a tensor's movement within
a few steps, and a mean that a norm takes out again moves by rounding alone; a wrong kernel or a wrong rewrite shows in the
first step already.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from frostline.device_runtime.engine import TrainingSession, open_runtime
from frostline.exporter.dropout import SeededDropout
from frostline.exporter.named_tensors import tensors_of
from frostline.exporter.optimizer import SGD, AdamW, Optimizer
from frostline.exporter.stage import Stage
from frostline.protocol.artifact import write_artifact
from frostline.protocol.blobs import BlobStore
from frostline.protocol.errors import RunError
from frostline.protocol.manifest import Program, StageManifest
from frostline.protocol.messages import Engine

if TYPE_CHECKING:
    from frostline.exporter.artifact import ExportOptions

Batch = tuple[Tensor, Tensor]
"""x (N, *input_shape) and y (N,) int64."""

Steps = Sequence[Sequence[Batch]]
"""The micro-batches of each step."""

STEPS = 3
PADDED = 1
"""The step, from 0, whose samples end in zeros: masks, ties and what is all the same are met there."""
LEARNING_RATE = 0.05
LOSS_TOLERANCE = 1e-3
"""Error let through of a loss, relative to itself."""
TENSOR_TOLERANCE = 5e-3
"""Error let through of a tensor, relative to how far it has moved.

float32 differs from float64 by about 1e-5, and by up to 2e-3 where rounding carries an activation across ReLU's kink; a
wrong kernel or a wrong rewrite by about 1.
"""
ROUNDING = 10.0
"""How much more than eager float32 a program may be off: it adds up in another order."""
ALL_ROUNDING = 100.0
"""The same for tensors that eager float32 is off by more than they move at all: they say nothing about a program."""
LAST_BITS = 3e-7
"""Size of the noise, relative to the input, that shows how a model amplifies rounding."""
DRAWS = 3
"""Random batches that are tried before a program that is a little off is refused."""
NEAR_A_KINK = 0.05
"""Error of a tensor, relative to its movement, that a single activation on the other side of a kink may make."""
VALUE_TOLERANCE = 1e-6
"""Error let through of a tensor, relative to its own norm: rounding is 6e-8 of a value a step."""
VANISHING = 1e-6
"""Tensors whose gradient is this much smaller than the largest are not compared: in float32 it is all rounding, and some
optimizers take steps of one size however small the gradient is."""
DIVERGED = 1e6
"""A loss above this says nothing about a model: its outputs are not normalised at all."""


@dataclass(frozen=True)
class Parity:
    """The largest relative errors found, of the losses and of the updated tensors, by how far those had moved."""

    loss_error: float
    tensor_error: float


@dataclass(frozen=True)
class Trained:
    """A model after some steps.

    Attributes
    ----------
    losses : list of float
        Of the last step's micro-batches.
    tensors : dict
        Parameters and statistics by name.
    gradient_norms : dict
        Of the parameters' gradients at the first step.
    """

    losses: list[float]
    tensors: dict[str, Tensor]
    gradient_norms: dict[str, float]

    @property
    def loss(self) -> float:
        """Of the last step."""
        return sum(self.losses) / len(self.losses)


Train = Callable[[Steps], Iterator[tuple[float, Mapping[str, Tensor]]]]
"""Takes steps in the runtime from the first weights at `LEARNING_RATE`, the seeds of dropout 0, 1, 2 ...; after each its loss,
and the parameters and statistics in the model's order."""


def check_parity(stage: Stage, options: ExportOptions, micro_batches: int, train: Train) -> Parity:
    """Train the same random batches in the runtime and in eager PyTorch, and compare all that changed after each step.

    Raises
    ------
    RunError
        Naming the stage, the step and what differs most; or that the stage trains nothing, or diverges at once.
    """
    for draw in range(DRAWS - 1):
        try:
            return _checked(stage, options, micro_batches, train, draw)
        except _NearlyRight:
            # Near a kink rounding may take a program another way than eager float32; a wrong one is off on any batch.
            continue
    return _checked(stage, options, micro_batches, train, DRAWS - 1)


class _NearlyRight(RunError):
    """A program is off by no more than a kink may make."""


def _checked(stage: Stage, options: ExportOptions, micro_batches: int, train: Train, draw: int) -> Parity:
    batches = [_random_batch(stage, options, draw * STEPS + step, step == PADDED) for step in range(STEPS)]
    parts = [list(zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True)) for x, y in batches]
    optimizer = options.optimizer
    exact = train_eagerly(stage, optimizer, parts, LEARNING_RATE)
    rounded = [
        train_eagerly(stage, optimizer, parts, LEARNING_RATE, torch.float32, noise)
        for noise in (0.0, LAST_BITS)
    ]
    ties = FirstOfEqual()  # type: ignore[no-untyped-call]
    rounded.append(train_eagerly(stage, optimizer, parts, LEARNING_RATE, torch.float32, ties=ties))
    before = {name: each.detach().double() for name, each in tensors_of(stage.model).items()}
    parity = Parity(0.0, 0.0)
    for step, ((loss, tensors), want, *near) in enumerate(zip(train(parts), exact, *rounded, strict=True), 1):
        _check_sound(stage, want)
        found = _errors(tensors, want, near, before)
        loss_error = abs(loss - want.loss) / max(abs(want.loss), VALUE_TOLERANCE)
        loss_limit = max(
            LOSS_TOLERANCE,
            *(ROUNDING * abs(each.loss - want.loss) / max(abs(want.loss), VALUE_TOLERANCE) for each in near),
        )
        worst = max(found, key=lambda name: _by_limit(found[name]))
        if not (loss_error <= loss_limit and _by_limit(found[worst]) <= 1):
            # The sum of a number and none is none.
            nearly = found[worst].error + loss_error <= NEAR_A_KINK
            raise (_NearlyRight if nearly else RunError)(
                f"stage {stage.name!r}: the {options.target.engine} program does not train as eager PyTorch does: in step "
                f"{step} the loss is off by {loss_error:.1e}, tensor {worst!r} by {found[worst].error:.1e} of its movement, "
                f"where rounding explains {found[worst].limit:.1e}"
            )
        # A not-a-number would not be the larger one.
        parity = Parity(
            max(parity.loss_error, loss_error), max(parity.tensor_error, max(e.error for e in found.values()))
        )
    return parity


@dataclass(frozen=True)
class _Error:
    """How far off a tensor is, and may be, relative to how far it has moved."""

    error: float
    limit: float


def _by_limit(error: _Error) -> float:
    """The error as a multiple of what is let through; without bound where it is no number."""
    share = error.error / error.limit
    return share if share == share else float("inf")


def _errors(
    tensors: Mapping[str, Tensor], want: Trained, near: Sequence[Trained], before: Mapping[str, Tensor]
) -> dict[str, _Error]:
    unmoved = VANISHING * max(want.gradient_norms.values())
    errors = {}
    for name, value in tensors.items():
        if want.gradient_norms.get(name, unmoved) < unmoved:
            continue
        exact = want.tensors[name]
        moved = float((exact - before[name]).norm())
        rounding = max(float((each.tensors[name].double() - exact).norm()) for each in near)
        # A tensor whose gradient vanishes (a bias before a norm) or is clipped moves by little more than rounding.
        scale = max(moved, VALUE_TOLERANCE / TENSOR_TOLERANCE * float(exact.norm()), VALUE_TOLERANCE)
        # One that is zero by construction, as the mean of what another norm made, moves by rounding alone.
        share = ROUNDING if moved > rounding else ALL_ROUNDING
        limit = max(TENSOR_TOLERANCE, share * rounding / scale)
        errors[name] = _Error(float((value.double() - exact).norm()) / scale, limit)
    return errors


def _check_sound(stage: Stage, want: Trained) -> None:
    """Refuse a stage that would train nothing, or nothing but noise."""
    moving = [want.tensors[name] for name in (*stage.trained, *stage.written)]
    if not abs(want.loss) <= DIVERGED or not all(bool(each.isfinite().all()) for each in moving):
        raise RunError(
            f"stage {stage.name!r} diverges on random samples, at a loss of {want.loss:.1e}: its outputs are not "
            "normalised; begin with smaller weights, or put norms between its layers"
        )
    if not any(want.gradient_norms.values()):
        raise RunError(
            f"stage {stage.name!r} trains nothing: no gradient reaches its parameters; look for a constant or dead layer "
            "between them and the logits"
        )


def _random_batch(stage: Stage, options: ExportOptions, seed: int, padded: bool = False) -> Batch:
    labels = torch.Generator().manual_seed(seed)
    y = torch.randint(0, options.classes, (options.batch,), generator=labels)
    return stage.random_batch(options.batch, seed, padded=padded), y


class FirstOfEqual(TorchDispatchMode):
    """Of equal values `topk` takes those that come first: PyTorch leaves it open, and so may a runtime."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.ops.aten.topk.default:
            return func(*args, **(kwargs or {}))

        def first(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:  # noqa: A002
            values, places = torch.sort(x, dim=dim, descending=largest, stable=True)
            return values.narrow(dim, 0, k), places.narrow(dim, 0, k)

        return first(*args, **(kwargs or {}))


@contextlib.contextmanager
def device_session(
    manifest: StageManifest, files: Mapping[str, bytes], tensors: Mapping[str, Tensor]
) -> Iterator[TrainingSession]:
    """A stage as a device opens it, with parameters and statistics in the model's order."""
    with tempfile.TemporaryDirectory() as folder:
        values = {name: each.numpy() for name, each in tensors.items()}
        write_artifact(Path(folder), manifest, files, values)
        session = open_runtime(manifest.engine).open_stage(manifest, BlobStore(Path(folder) / "files"))
        session.load(values)
        yield session


def train_on_device(
    session: TrainingSession, tensors: Mapping[str, Tensor], steps: Steps
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Train as a device does, from parameters and statistics by name, as `check_parity` asks for."""
    session.load({name: each.numpy() for name, each in tensors.items()})
    for parts in steps:
        loss, _ = session.step([(x.numpy(), y.numpy()) for x, y in parts], LEARNING_RATE)
        yield loss, {name: torch.from_numpy(np.array(each)) for name, each in session.trained().items()}


def check_evaluation(
    stage: Stage, options: ExportOptions, micro_batches: int, session: TrainingSession
) -> None:
    """Compare what a device's evaluation makes of a random batch, with the first weights, with what eager PyTorch does.

    Raises
    ------
    RunError
        Naming the stage.
    """
    x = _random_batch(stage, options, 0)[0].chunk(micro_batches)[0]
    logits = torch.from_numpy(session.evaluate(x.numpy()))
    exact, rounded = (_evaluated(stage.model, x, dtype) for dtype in (torch.float64, torch.float32))
    error, limit = _error_of(logits, exact, rounded)
    if not error <= limit:
        raise RunError(
            f"stage {stage.name!r}: the {options.target.engine} program does not evaluate as eager PyTorch does: logits off "
            f"by {error:.1e} of their norm, where rounding explains {limit:.1e}"
        )


def check_prefix(stage: Stage, engine: Engine, program: Program, content: bytes) -> None:
    """Compare what a device's program of a frozen block makes of a random batch with what the block does.

    Raises
    ------
    RunError
        Naming the block.
    """
    x = stage.random_batch(program.inputs[0].shape[0], seed=0)
    with tempfile.TemporaryDirectory() as folder:
        store = BlobStore(Path(folder))
        store.put(content)
        features = torch.from_numpy(open_runtime(engine).open_prefix(program, store).run(x.numpy()))
    exact, rounded = (_evaluated(stage.model.block, x, dtype) for dtype in (torch.float64, torch.float32))
    error, limit = _error_of(features, exact, rounded)
    if not error <= limit:
        raise RunError(
            f"block {stage.name!r}: the {engine} program of the frozen block is not what it is in eager PyTorch: features "
            f"off by {error:.1e} of their norm, where rounding explains {limit:.1e}"
        )


def _error_of(found: Tensor, exact: Tensor, rounded: Tensor) -> tuple[float, float]:
    """How far off values are, and may be, relative to their norm."""
    scale = max(float(exact[exact.isfinite()].norm()), VALUE_TOLERANCE)
    # A mask that is handed on may hold minus infinity, which less itself is no number.
    error, rounding = (
        float(torch.where(each.double() == exact, 0.0, each.double() - exact).norm()) / scale
        for each in (found, rounded)
    )
    return error, max(LOSS_TOLERANCE, ROUNDING * rounding)


def _evaluated(module: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    module = copy.deepcopy(module).to(dtype).eval()
    with torch.no_grad():
        outputs: Tensor = module(x.to(dtype) if x.is_floating_point() else x)
    return outputs


def train_eagerly(
    stage: Stage,
    settings: Optimizer,
    batches: Steps,
    learning_rate: float,
    dtype: torch.dtype = torch.float64,
    noise: float = 0.0,
    ties: contextlib.AbstractContextManager[object] | None = None,
) -> Iterator[Trained]:
    """What PyTorch makes of the same batches, by its own optimizers rather than ours, after each step.

    The seeds of dropout are 0, 1, 2 ... in the order of the micro-batches.

    Parameters
    ----------
    noise : float
        By how much float inputs are off, relative to each value.
    ties : FirstOfEqual, optional
        Which of equal values come first.
    """
    random = torch.Generator().manual_seed(0)
    model = copy.deepcopy(stage.model).to(dtype).train()
    trained = {name: p for name, p in model.named_parameters() if name in stage.trained}
    parameters = list(trained.values())
    received = [p.detach().clone() for p in parameters]
    optimizer = _of_torch(settings, parameters, learning_rate)
    gradient_norms: dict[str, float] = {}
    calls = 0
    for parts in batches:
        optimizer.zero_grad()
        losses: list[float] = []
        for x, y in parts:
            if x.is_floating_point():
                x = x.to(dtype) * (1 + noise * torch.randn(x.shape, generator=random, dtype=dtype))
            with ties or contextlib.nullcontext(), SeededDropout(torch.tensor(float(calls))):
                loss = F.cross_entropy(model(x), y)
            (loss / len(parts)).backward()
            losses.append(loss.item())
            calls += 1
        for (name, parameter), value in zip(trained.items(), received, strict=True):
            assert parameter.grad is not None
            gradient_norms.setdefault(name, float(parameter.grad.norm()))
            parameter.grad += settings.proximal * (parameter.detach() - value)
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimizer.step()
        yield Trained(
            losses, {n: each.detach().clone() for n, each in tensors_of(model).items()}, gradient_norms
        )


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
