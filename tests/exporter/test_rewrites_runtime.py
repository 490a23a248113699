"""Rewritten graphs in the runtime they are made for, in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from frostline.exporter.rewrites.executorch import rewrite_for_executorch
from tests.exporter.rewriting import gradients, run


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class _SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x)
        factor = torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return torch.cat([x, y * factor], 1)


class _Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, 32, 4, 4), nn.Parameter(torch.randn(1, 1, 32))
        self.positions = nn.Parameter(torch.randn(1, 17, 32))
        self.layer = nn.TransformerEncoderLayer(32, 2, 64, 0.0, activation="gelu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(x.shape[0], -1, -1), tokens], 1) + self.positions
        return self.layer(tokens)[:, 0]


TARGET = torch.tensor([0, 3, 2, 1])

MODELS: dict[str, tuple[nn.Module, Tensor]] = {
    "transposed convolution": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), torch.randn(2, 4, 5, 6)),
    "adaptive pooling": (
        nn.Sequential(nn.AdaptiveMaxPool2d((5, 4)), nn.AdaptiveAvgPool2d((3, 2))),
        torch.randn(2, 3, 7, 7),
    ),
    "average pooling": (
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        torch.randn(2, 3, 6, 6),
    ),
    "enlarging": (
        nn.Sequential(nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=1.5, mode="bilinear")),
        torch.randn(2, 3, 4, 4),
    ),
    "activations": (
        nn.Sequential(nn.GELU(), nn.Hardswish(), nn.SiLU(), nn.LeakyReLU(), nn.ReLU6(), nn.Tanh()),
        3 * torch.randn(2, 3, 4, 5),
    ),
    "squeeze and excite": (_SqueezeExcite(), torch.randn(2, 8, 6, 6)),
    "series": (
        nn.Sequential(nn.Conv1d(4, 8, 5, 2, 2), nn.GroupNorm(2, 8), nn.MaxPool1d(2), nn.AvgPool1d(2)),
        torch.randn(2, 4, 24),
    ),
    "volumes": (
        nn.Sequential(nn.Conv3d(2, 4, 2), nn.MaxPool3d(2), nn.ReLU(), nn.AdaptiveAvgPool3d(1)),
        torch.randn(2, 2, 5, 5, 5),
    ),
    "vision transformer": (_Patches(), torch.randn(2, 3, 16, 16)),
    "transformer": (
        nn.TransformerEncoderLayer(32, 2, 64, 0.0, activation="gelu", norm_first=True),
        torch.randn(6, 3, 32),
    ),
    "causal attention": (
        _Function(lambda x: F.scaled_dot_product_attention(x, x * 2, x + 1, is_causal=True)),
        torch.randn(2, 2, 6, 8),
    ),
    "root mean square norm": (nn.RMSNorm(16), torch.randn(2, 5, 16)),
    "embedding": (
        nn.Sequential(nn.Embedding(12, 8, padding_idx=0), nn.Linear(8, 4)),
        torch.randint(0, 12, (3, 5)),
    ),
    "large embedding": (nn.Embedding(500, 8), torch.randint(0, 12, (3, 5))),
    "cross entropy": (_Function(lambda x: F.cross_entropy(x, TARGET).reshape(1)), torch.randn(4, 5)),
    "smoothed cross entropy": (
        _Function(lambda x: F.cross_entropy(x, TARGET, label_smoothing=0.1).reshape(1)),
        torch.randn(4, 5),
    ),
    "squared error": (_Function(lambda x: F.mse_loss(x, x.detach() + 1).reshape(1)), torch.randn(4, 5)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_runtime_agrees_with_pytorch(name: str) -> None:
    model, x = MODELS[name]
    arguments = [x, *(parameter.detach() for parameter in model.parameters())]
    graph = make_fx(gradients(model, x), tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments]
    want = gradients(model.double(), exact[0])(*exact)
    model.float()
    for got, expected in zip(run(rewrite_for_executorch(graph, arguments), arguments), want, strict=True):
        scale = expected.abs().max().item() + 1e-3
        torch.testing.assert_close(got.double() / scale, expected / scale, atol=3e-6, rtol=0)
