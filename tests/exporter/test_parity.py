from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from frostline.exporter.artifact import ExportOptions, compile_stage
from frostline.exporter.optimizer import SGD
from frostline.exporter.output_module import OutputModule
from frostline.exporter.rewrites import interpreter
from frostline.exporter.stage import Stage, StageModel
from frostline.protocol.errors import RunError

aten = torch.ops.aten
OPTIONS = ExportOptions(batch=4, classes=3, optimizer=SGD(0.9, 1e-3))


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


def _scaled(rewrite: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **named: 1.01 * rewrite(*arguments, **named)


def _scaled_weight_gradient(rewrite: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*arguments: Any) -> Any:
        grad_x, grad_weight, grad_bias = rewrite(*arguments)
        return grad_x, interpreter.Permuted(1.01 * grad_weight.tensor, grad_weight.axes), grad_bias

    return wrong


@pytest.mark.parametrize(
    ("operator", "wrong", "tensor"),
    [
        (aten.convolution_backward.default, _scaled_weight_gradient, r"block\.0\.weight"),
        (aten.addmm.default, _scaled, ".+"),
    ],
    ids=["convolution's gradient 1% off", "logits 1% off"],
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


class _WrongMomentum(SGD):
    def update(self, parameters: Any, gradients: Any, state: Any, learning_rate: Any) -> Any:
        return SGD(self.momentum * 0.98, self.weight_decay).update(
            parameters, gradients, state, learning_rate
        )


def test_a_wrong_optimizer_is_caught(stage: Stage) -> None:
    with pytest.raises(RunError, match=r"'narrow part'.*tensor '[a-z_]+"):
        compile_stage(stage, ExportOptions(4, 3, _WrongMomentum(0.9)))


def test_frozen_parameters_are_constants_of_the_programs(stage: Stage) -> None:
    stage.model.get_parameter("block.0.weight").requires_grad_(False)
    compiled = compile_stage(stage, OPTIONS)
    assert "block.0.weight" not in [spec.name for spec in compiled.manifest.trained]
    assert compiled.parity.tensor_error < 1e-4
    content = stage.model.get_parameter("block.0.weight").detach().numpy().tobytes()
    assert all(content in file for file in compiled.files.values())


def test_dropout_is_refused_in_one_line_that_names_the_stage(stage: Stage) -> None:
    stage.model.block.add_module("dropout", torch.nn.Dropout(0.5))
    with pytest.raises(
        RunError, match=r"stage 'narrow part' cannot be compiled: .*dropout cannot be trained yet"
    ):
        compile_stage(stage, OPTIONS)
