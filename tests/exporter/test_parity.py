from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostline.exporter import recomputation
from frostline.exporter.artifact import ExportOptions, compile_stage
from frostline.exporter.optimizer import SGD, AdamW, Optimizer
from frostline.exporter.output_module import OutputModule
from frostline.exporter.parity import LEARNING_RATE, Steps, check_parity, train_eagerly
from frostline.exporter.rewrites import interpreter
from frostline.exporter.stage import Stage, StageModel
from frostline.exporter.variant import WHOLE, Variant
from frostline.protocol.errors import RunError

aten = torch.ops.aten
OPTIONS = ExportOptions(batch=4, classes=3, optimizer=SGD(momentum=0.9, weight_decay=1e-3))


def _stage(norm: nn.Module) -> Stage:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(1, 4, 2, bias=False), norm, nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    return Stage(0, 1, "narrow part", StageModel(block, OutputModule({}, head)), (1, 4, 4))


@pytest.fixture
def stage() -> Stage:
    return _stage(nn.GroupNorm(2, 4))


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.BatchNorm2d(4)], ids=["group", "batch"])
def test_a_right_program_passes(norm: nn.Module) -> None:
    stage = _stage(norm)
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    parity = compile_stage(stage, OPTIONS).parity
    assert all(torch.equal(value, before[name]) for name, value in stage.model.state_dict().items())
    assert 0 <= parity.loss_error < 1e-4
    assert 0 < parity.tensor_error < 1e-4


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def _scaled(rewrite: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **named: 1.02 * rewrite(*arguments, **named)


def _scaled_weight_gradient(rewrite: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*arguments: Any) -> Any:
        grad_x, grad_weight, grad_bias = rewrite(*arguments)
        return grad_x, interpreter.Permuted(1.02 * grad_weight.tensor, grad_weight.axes), grad_bias

    return wrong


@pytest.mark.parametrize(
    ("operator", "wrong", "tensor"),
    [
        (aten.convolution_backward.default, _scaled_weight_gradient, r"block\.0\.weight"),
        (aten.addmm.default, _scaled, ".+"),
    ],
    ids=["convolution's gradient 2% off", "logits 2% off"],
)
def test_a_wrong_rewrite_is_caught(
    monkeypatch: pytest.MonkeyPatch, stage: Stage, operator: Any, wrong: Callable[..., Any], tensor: str
) -> None:
    monkeypatch.setitem(interpreter.REWRITES, operator, wrong(interpreter.REWRITES[operator]))
    with pytest.raises(
        RunError, match=f"'narrow part'.*does not train as eager.*tensor '{tensor}'"
    ) as raised:
        compile_stage(stage, OPTIONS)
    assert "\n" not in str(raised.value)


def test_what_rounding_alone_amplifies_passes() -> None:
    """Deep and narrow with batch norm: a last bit becomes a percent within a few steps, in eager float32 too."""
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        for _ in range(6)
    ]
    # Behind a norm and a linear bottleneck, the means of the next norm are zero but for rounding.
    bottleneck = nn.Sequential(
        nn.Conv2d(4, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Conv2d(2, 8, 1, bias=False)
    )
    block = nn.Sequential(nn.Conv2d(1, 4, 1), *layers, bottleneck, nn.BatchNorm2d(8), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    stage = Stage(0, 1, "deep", StageModel(block, OutputModule({}, head)), (1, 6, 6))
    assert compile_stage(stage, OPTIONS).parity.loss_error < 1e-3


@pytest.mark.parametrize("last", [nan, inf])
def test_what_is_no_number_fails(last: float, stage: Stage) -> None:
    def train(steps: Steps) -> Iterator[tuple[float, Mapping[str, Tensor]]]:
        for step, each in enumerate(train_eagerly(stage, OPTIONS.optimizer, steps, LEARNING_RATE)):
            tensors = {name: value for name, value in each.tensors.items() if name in stage.trained}
            if step:
                tensors["output_module.head.1.bias"] = torch.full((3,), last)
            yield each.loss, tensors

    with pytest.raises(RunError, match=r"in step 2 .* tensor 'output_module\.head\.1\.bias'"):
        check_parity(stage, OPTIONS, 1, train)


@pytest.mark.parametrize(("off", "draws", "passes"), [(0.02, 1, True), (0.02, 3, False), (0.2, 1, False)])
def test_what_is_a_little_off_is_tried_on_other_batches(
    off: float, draws: int, passes: bool, stage: Stage
) -> None:
    before = dict(stage.model.named_parameters())
    calls: list[Steps] = []

    def train(steps: Steps) -> Iterator[tuple[float, Mapping[str, Tensor]]]:
        calls.append(steps)
        for each in train_eagerly(stage, OPTIONS.optimizer, steps, LEARNING_RATE):
            tensors = {name: value for name, value in each.tensors.items() if name in stage.trained}
            if len(calls) <= draws:
                moved = tensors["block.0.weight"] - before["block.0.weight"].detach()
                tensors["block.0.weight"] = tensors["block.0.weight"] + off * moved
            yield each.loss, tensors

    with nullcontext() if passes else pytest.raises(RunError, match=r"tensor 'block\.0\.weight'"):
        check_parity(stage, OPTIONS, 1, train)
    assert len(calls) == (1 if off > 0.1 else draws + passes)
    assert len({float(x.sum()) for steps in calls for parts in steps for x, _ in parts}) == 3 * len(calls)


def test_a_loss_that_is_no_number_fails(stage: Stage) -> None:
    def train(steps: Steps) -> Iterator[tuple[float, Mapping[str, Tensor]]]:
        for each in train_eagerly(stage, OPTIONS.optimizer, steps, LEARNING_RATE):
            yield nan, {name: value for name, value in each.tensors.items() if name in stage.trained}

    with pytest.raises(RunError, match="in step 1 the loss is off by nan"):
        check_parity(stage, OPTIONS, 1, train)


def test_a_stage_that_trains_nothing_or_diverges_is_refused(stage: Stage) -> None:
    dead = copy.deepcopy(stage.model)
    dead.output_module.head.append(Scaled(0.0))  # type: ignore[operator]
    with pytest.raises(RunError, match="trains nothing"):
        compile_stage(dataclasses.replace(stage, model=dead), OPTIONS)
    wild = copy.deepcopy(stage.model)
    wild.output_module.head.append(Scaled(1e18))  # type: ignore[operator]
    with pytest.raises(RunError, match="diverges on random samples, at a loss of"):
        compile_stage(dataclasses.replace(stage, model=wild), OPTIONS)


@pytest.fixture
def perceptron() -> Stage:
    """A stage that is compiled in a moment."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6))
    return Stage(0, 1, "narrow part", StageModel(block, OutputModule({}, nn.Linear(6, 3))), (5,))


@pytest.mark.parametrize(
    ("optimizer", "variant"),
    [
        (SGD(momentum=0.9, nesterov=True, weight_decay=1e-3, proximal=0.5, clip_norm=0.1), Variant(2)),
        (SGD(momentum=0.9, weight_decay=1e-3, proximal=0.5), Variant(2)),
        (AdamW(proximal=0.5, clip_norm=0.1), WHOLE),
        (AdamW(weight_decay=0.1), Variant(2)),
    ],
    ids=["all of SGD", "in the momentum", "all of AdamW", "AdamW"],
)
def test_every_optimizer_passes(perceptron: Stage, optimizer: Optimizer, variant: Variant) -> None:
    parity = compile_stage(perceptron, ExportOptions(4, 3, optimizer), variant=variant).parity
    assert 0 <= parity.loss_error < 1e-4
    assert 0 < parity.tensor_error < 1e-3


class _WrongMomentum(SGD):
    def update(self, parameters: Any, gradients: Any, state: Any, learning_rate: Any) -> Any:
        less = SGD(momentum=self.momentum * 0.95, weight_decay=self.weight_decay)
        return less.update(parameters, gradients, state, learning_rate)


class _WrongShare(SGD):
    def accumulate(self, name: Any, parameter: Any, gradient: Any, *rest: Any) -> Any:
        return super().accumulate(name, parameter, 1.02 * gradient, *rest)


class _ForgottenPart(SGD):
    def accumulate(self, name: Any, parameter: Any, gradient: Any, state: Any, first: Any, share: Any) -> Any:
        return super().accumulate(name, parameter, gradient, state, torch.ones_like(first), share)


class _WrongStep(SGD):
    def finish(self, parameters: Any, state: Any, learning_rate: Any) -> Any:
        return super().finish(parameters, state, 1.02 * learning_rate)


class _OneParameterLeftOut(SGD):
    def finish(self, parameters: Any, state: Any, learning_rate: Any) -> Any:
        changed, new_state = super().finish(parameters, state, learning_rate)
        changed.pop("block.2.bias")
        return changed, new_state


class _ForgottenTerm(SGD):
    def penalized(self, gradient: Any, parameter: Any, received: Any, share: float = 1.0) -> Any:
        return gradient


class _ClippedOneByOne(SGD):
    def clipped(self, gradients: Any) -> Any:
        return {name: 0.1 * g / g.norm() for name, g in gradients.items()}


@pytest.mark.parametrize(
    ("optimizer", "variant", "tensor"),
    [
        (_WrongMomentum(momentum=0.9), WHOLE, ".+"),
        (_WrongShare(momentum=0.9), Variant(2), ".+"),
        (_ForgottenPart(), Variant(2), ".+"),
        (_WrongStep(momentum=0.9), Variant(2), ".+"),
        (_OneParameterLeftOut(momentum=0.9), Variant(2), r"block\.2\.bias"),
        (_ForgottenTerm(proximal=10.0), WHOLE, ".+"),
        (_ClippedOneByOne(clip_norm=0.1), WHOLE, ".+"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Optimizer) else "",
)
def test_a_wrong_optimizer_is_caught(
    perceptron: Stage, optimizer: Optimizer, variant: Variant, tensor: str
) -> None:
    with pytest.raises(
        RunError, match=f"'narrow part'.*does not train as eager.*tensor '{tensor}'"
    ) as raised:
        compile_stage(perceptron, ExportOptions(4, 3, optimizer), variant=variant)
    assert "\n" not in str(raised.value)


def test_statistics_that_are_recomputed_twice_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norm's running statistics are compared as the parameters are."""
    monkeypatch.setattr(recomputation, "_copied", lambda tensors, names: {})
    stage = _stage(nn.BatchNorm2d(4))
    stage.model.block.append(nn.Conv2d(4, 4, 1))  # type: ignore[operator]
    stage = dataclasses.replace(stage)
    assert compile_stage(stage, OPTIONS).parity.tensor_error < 1e-4
    with pytest.raises(RunError, match=r"tensor 'block\.1\.running_"):
        compile_stage(stage, OPTIONS, variant=Variant(recompute=True))


def test_frozen_parameters_are_constants_of_the_programs(stage: Stage) -> None:
    stage.model.get_parameter("block.0.weight").requires_grad_(False)
    stage = dataclasses.replace(stage)
    compiled = compile_stage(stage, OPTIONS)
    assert "block.0.weight" not in [spec.name for spec in compiled.manifest.trained]
    assert compiled.parity.tensor_error < 1e-4
    content = stage.model.get_parameter("block.0.weight").detach().numpy().tobytes()
    assert all(content in file for file in compiled.files.values())
