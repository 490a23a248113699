"""What PyTorch does differently with other strides means the same on a device, which has none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from frostline.exporter.artifact import ExportOptions, compile_stage
from frostline.exporter.output_module import OutputModule
from frostline.exporter.rewrites.executorch import rewrite_for_executorch
from frostline.exporter.stage import Stage, StageModel
from tests.exporter.rewriting import gradients, run


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


ENDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "pooled to one pixel": lambda x: F.adaptive_avg_pool2d(x, 1),
    "pooled to four": lambda x: F.adaptive_avg_pool2d(x, 2),
    "squeeze and excite": lambda x: x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1)),
    "pooled beside": lambda x: torch.cat([x, F.adaptive_avg_pool2d(x, 1).expand_as(x)], 1),
    "mean": lambda x: x.mean((2, 3)),
    "flattened": lambda x: x.flatten(1),
    "interpolated": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "repeated": lambda x: F.interpolate(x, scale_factor=2.0),
    "shuffled": lambda x: F.pixel_shuffle(x, 2),
    "largest": lambda x: F.max_pool2d(x, 2),
    "a window over its memory": lambda x: x.as_strided((2, 3, 4), (1, 2, 3), 1),
    "a dense window": lambda x: x.as_strided((6, 2, 4, 6), (48, 24, 6, 1)),
}

FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x * 2,
    "asked for": lambda x: (x * 2).contiguous(memory_format=torch.channels_last),
    "converted": lambda x: (x * 2).to(memory_format=torch.channels_last),
    "cloned": lambda x: x.clone(memory_format=torch.channels_last),
    "by permuting": lambda x: (x.permute(0, 2, 3, 1) * 2).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_an_ending_means_the_same_whatever_the_strides_before_it(ending: str, memory: str) -> None:
    model = Function(lambda x: ENDINGS[ending](FORMATS[memory](x)))
    x = torch.randn(2, 4, 6, 6)
    graph = make_fx(gradients(model, x), tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    want = gradients(model, x.double())(x.double())
    for got, expected in zip(run(rewrite_for_executorch(graph, [x]), [x]), want, strict=True):
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


def _layer(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["plain", "turned"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen below"])
def test_what_a_newcomer_writes_is_compiled(memory: torch.memory_format, frozen: bool) -> None:
    block = nn.Sequential(_layer(3, 8), _layer(8, 8)).to(memory_format=memory)
    block[0].requires_grad_(not frozen)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    stage = Stage(0, 1, "block", StageModel(block, OutputModule({}, head)), (3, 8, 8))
    assert compile_stage(stage, ExportOptions(4, 4)).parity.tensor_error < 1e-3
