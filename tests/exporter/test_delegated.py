"""Programs delegated to XNNPACK, of modules whose tensors have names that its passes would lose."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from frostline.exporter.executorch_lowering import lower_delegated
from frostline.exporter.executorch_target import EXECUTORCH
from frostline.exporter.target import LoweredProgram


def _named(name: str) -> nn.Module:
    module = nn.Sequential()
    module.add_module(name, nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    return module.eval()


@pytest.mark.parametrize("name", ["plain", "0", "block0-0", "with space"])
def test_names_do_not_matter(name: str) -> None:
    torch.manual_seed(0)
    module, x = _named(name), torch.randn(2, 3, 6, 6)
    lowered = lower_delegated(module, [x])
    run = EXECUTORCH.load(LoweredProgram(lowered.content, ("x",), lowered.arena_bytes))
    torch.testing.assert_close(run({"x": x})[-1], module(x), rtol=1e-4, atol=1e-5)


def test_a_module_under_two_names_keeps_its_tensors() -> None:
    layer = nn.Linear(4, 4)
    module = nn.Sequential()
    for name in ("one", "two"):
        module.add_module(name, layer)
    weight = layer.weight
    lower_delegated(module.eval(), [torch.zeros(1, 4)])
    assert layer.weight is weight
