"""Operators that people train with, each alone, forward and backward, in the ExecuTorch runtime against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.parametrizations import weight_norm

from frostline.exporter.executorch_lowering import UnsupportedOperators
from frostline.exporter.rewrites.executorch import rewrite_for_executorch
from tests.exporter.rewriting import gradients, run

ROUNDING = 3e-6

PLACES = torch.tensor([1, 0, 3, 3])
ROWS = torch.tensor([0, 1, 1, 2, 4])
GRID = torch.linspace(-0.9, 0.9, 2 * 4 * 4 * 2).reshape(2, 4, 4, 2)


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Sequences(nn.Module):
    """What a recurrent layer returns of each step."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        sequences: Tensor = self.layer(x)[0]
        return sequences


class Weighted(nn.Module):
    """Bags of rows that count differently, and may be empty."""

    def __init__(self) -> None:
        super().__init__()
        self.bags, self.shares = nn.EmbeddingBag(10, 4, mode="sum"), nn.Parameter(torch.randn(6))

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.bags(ids, torch.tensor([0, 2, 2, 5]), per_sample_weights=self.shares)
        return found


def _written(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = x[:, 1] * 2
    y[:, 1].add_(1.0)
    y[..., 1:].mul_(2)
    return y


def _unpooled(x: Tensor) -> Tensor:
    largest, places = F.max_pool2d(x * 1.5, 2, return_indices=True)
    return F.max_unpool2d(largest, places, 2)


def _put(x: Tensor) -> Tensor:
    zeros = torch.zeros(2, 4, 6, 6, dtype=x.dtype)
    return zeros.index_put((torch.tensor([0, 1]), torch.tensor([1, 2])), x[:, 0])


def _at(x: Tensor) -> Tensor:
    return F.grid_sample(x, GRID.to(x.dtype), align_corners=False)


OF_IMAGES: dict[str, nn.Module | Callable[[Tensor], Tensor]] = {
    "local response norm": nn.LocalResponseNorm(3),
    "unfold": nn.Unfold((2, 3), dilation=(2, 1), stride=2, padding=(1, 0)),
    "negative padding": lambda x: F.pad(x * 2, (-1, 2, 1, -2), value=3.0),
    "negative padding of a convolution": nn.Sequential(
        nn.Conv2d(4, 4, 1), Function(lambda x: F.pad(x, (-1, -1, 0, 1)))
    ),
    "unpooling": _unpooled,
    "cubic": nn.Upsample(scale_factor=2, mode="bicubic"),
    "cubic, corners aligned": nn.Upsample(size=(9, 5), mode="bicubic", align_corners=True),
    "cubic, shrinking smoothly": lambda x: F.interpolate(x, (3, 4), mode="bicubic", antialias=True),
    "linear, shrinking smoothly": lambda x: F.interpolate(x, (3, 4), mode="bilinear", antialias=True),
    "nearest, exactly": nn.Upsample(size=(5, 9), mode="nearest-exact"),
    "area": lambda x: F.interpolate(x, (3, 4), mode="area"),
    "powers pooled": nn.LPPool2d(2, 2),
    "reflection": nn.ReflectionPad2d((2, 1, 0, 3)),
    "replication": nn.ReplicationPad2d((2, 1, 0, 3)),
    "circular": nn.CircularPad2d(1),
    "constant": nn.ConstantPad2d(1, 2.0),
    "padding by reflection": nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"),
    "same padding": nn.Conv2d(4, 5, 3, padding="same", dilation=2),
    "weight norm": weight_norm(nn.Conv2d(4, 6, 3)),
    "instance norm": nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "transposed depthwise": nn.ConvTranspose2d(4, 4, 3, 2, groups=4),
    "pooling by ceiling": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "dilated pooling": nn.MaxPool2d(2, 1, dilation=2),
    "index": lambda x: x[:, PLACES],
    "two indices": lambda x: x[:, PLACES, PLACES],
    "index_select": lambda x: x.index_select(2, PLACES),
    "index_put": _put,
    "written in place": _written,
    "every second": lambda x: x[:, ::2] * 2,
    "softmax over channels": nn.Softmax2d(),
    "channel shuffle": nn.ChannelShuffle(2),
    "pixel unshuffle": nn.PixelUnshuffle(2),
    "sampled anywhere": _at,
    "moved axes": lambda x: x.movedim(1, -1) * 2,
}

OF_TOKENS: dict[str, nn.Module | Callable[[Tensor], Tensor]] = {
    "LSTM": Sequences(nn.LSTM(8, 6, batch_first=True)),
    "projected LSTM": Sequences(nn.LSTM(8, 6, proj_size=3)),
    "two layers of GRU, both ways": Sequences(nn.GRU(8, 4, 2, batch_first=True, bidirectional=True)),
    "RNN": Sequences(nn.RNN(8, 6)),
    "attention": lambda x: F.scaled_dot_product_attention(x, x + 1, x * 2),
    "weight norm": weight_norm(nn.Linear(8, 3)),
    "root mean square norm": nn.RMSNorm(8),
    "log sigmoid": nn.LogSigmoid(),
    "SELU": nn.SELU(),
    "CELU": nn.CELU(),
    "hard shrink": nn.Hardshrink(),
    "soft shrink": nn.Softshrink(),
    "tanh shrink": nn.Tanhshrink(),
    "soft sign": nn.Softsign(),
    "threshold": nn.Threshold(0.1, 20),
    "GLU": nn.GLU(),
    "softmin": nn.Softmin(-1),
    "sort": lambda x: x.sort(-1, descending=True)[0] * x.sort(1)[0],
    "argsort": lambda x: x.gather(1, x.argsort(1)),
    "topk": lambda x: x.topk(3)[0],
    "median": lambda x: x.median(-1)[0],
    "kthvalue": lambda x: x.kthvalue(2, 1)[0],
    "maximum along an axis": lambda x: x.max(1)[0] + x.amin(1),
    "cumsum": lambda x: x.cumsum(1),
    "cumprod": lambda x: x.cumprod(1),
    "prod": lambda x: x.prod(-1),
    "flip": lambda x: x.flip(1) * 2,
    "roll": lambda x: x.roll((-1, 2), (1, 2)) * x,
    "logsumexp": lambda x: x.logsumexp(-1),
    "norm": lambda x: x.norm(dim=-1),
    "normalize": lambda x: F.normalize(x, dim=1),
    "norm of a matrix": torch.linalg.matrix_norm,
    "variance": lambda x: x.var(-1) + x.std(2),
    "power": lambda x: (x.abs() + 1).pow(2.5),
    "power of a tensor": lambda x: (x.abs() + 1) ** x,
    "logarithms": lambda x: (x.abs() + 1).log2() + x.abs().log1p() + x.expm1(),
    "circular functions": lambda x: x.sin() * x.cos() + torch.atan2(x, x + 3),
    "erf": torch.erf,
    "fmod": lambda x: x.fmod(0.7) * x,
    "remainder": lambda x: x.remainder(0.7) * x,
    "clamp": lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0.1),
    "clamp by a tensor": lambda x: torch.clamp(x, min=x.mean()),
    "maximum": lambda x: torch.maximum(x, x.flip(0)),
    "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.5),
    "lerp": lambda x: torch.lerp(x, x * 2, 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
    "logaddexp": lambda x: torch.logaddexp(x, -x),
    "xlogy": lambda x: torch.xlogy(x.abs() + 0.1, x.abs() + 0.1),
    "logit": lambda x: torch.logit(x.sigmoid(), 1e-6),
    "rounding": lambda x: x.trunc() + x.round() + x.floor() + x,
    "nan_to_num": lambda x: x.nan_to_num(),
    "masks": lambda x: x * (x > 0) * (x < 1),
    "whole numbers": lambda x: x * (torch.arange(8) // 2),
    "einsum": lambda x: torch.einsum("bij,bkj->bik", x, x),
    "baddbmm": lambda x: torch.baddbmm(x @ x.mT, x, x.mT),
    "matrix by vector": lambda x: torch.mv(x[0], x[1, 0]),
    "bilinear": lambda x: F.bilinear(x, x, torch.ones(3, 8, 8, dtype=x.dtype)),
    "distances": lambda x: torch.cdist(x, x.flip(1) + 1),
    "distances by sums": lambda x: torch.cdist(x, x.flip(1) + 1, 1.0),
    "cosine similarity": lambda x: F.cosine_similarity(x, x.flip(1), -1),
    "pairwise distance": lambda x: F.pairwise_distance(x, x + 1),
    "repeat": lambda x: x.repeat(1, 2, 3),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "tril": lambda x: x.tril() + x.triu(),
    "diagonal": lambda x: x.diagonal(1, 1, 2) * 2,
    "diag_embed": lambda x: x.diag_embed(-1),
    "sliding windows": lambda x: x.unfold(1, 3, 1),
    "chunks": lambda x: torch.cat(x.chunk(3, 1)[::-1], 1),
    "stack": lambda x: torch.stack([x, x * 2], 1),
    "select_scatter": lambda x: x.select_scatter(x[:, 0] * 2, 1, 1),
    "gather": lambda x: x.gather(2, torch.full((2, 5, 3), 2)),
    "scatter_add": lambda x: torch.zeros_like(x).scatter_add(1, ROWS.reshape(1, 5, 1).expand(2, 5, 8), x),
    "index_add": lambda x: torch.zeros_like(x).index_add(1, ROWS, x),
    "binary cross entropy": lambda x: F.binary_cross_entropy_with_logits(x, x.sigmoid().detach()),
    "Huber loss": lambda x: F.huber_loss(x, torch.ones_like(x), reduction="none"),
    "absolute error": lambda x: F.l1_loss(x, torch.ones_like(x), reduction="none"),
    "divergence": lambda x: F.kl_div(x.log_softmax(-1), x.softmax(-1).detach(), reduction="none"),
    "straight through": lambda x: (x.sign() - x).detach() + x,
}

OTHERS: dict[str, tuple[nn.Module, Tensor]] = {
    "fold": (nn.Fold((4, 4), 2, stride=2, padding=1), torch.randn(2, 12, 9)),
    "response norm of a series": (nn.LocalResponseNorm(2), torch.randn(2, 4, 6)),
    "volumes, linear": (nn.Upsample(scale_factor=2, mode="trilinear"), torch.randn(1, 2, 3, 3, 3)),
    "volumes, nearest": (nn.Upsample(scale_factor=2), torch.randn(1, 2, 3, 3, 3)),
    "volumes, replicated": (nn.ReplicationPad3d(1), torch.randn(1, 2, 3, 3, 3)),
    "volumes, transposed": (nn.ConvTranspose3d(2, 3, 2, 2), torch.randn(1, 2, 3, 3, 3)),
    "volumes, pooled": (nn.Sequential(nn.MaxPool3d(2), nn.AvgPool3d(2)), torch.randn(1, 2, 4, 4, 4)),
    "volumes, averaged": (nn.AdaptiveAvgPool3d((2, 1, 3)), torch.randn(1, 2, 4, 4, 5)),
    "volumes, normalized": (nn.BatchNorm3d(2), torch.randn(2, 2, 3, 3, 3)),
    "series, linear": (nn.Upsample(scale_factor=2, mode="linear"), torch.randn(1, 2, 5)),
    "series, reflected": (nn.ReflectionPad1d(2), torch.randn(2, 3, 6)),
    "series, pooled": (nn.AdaptiveMaxPool1d(3), torch.randn(2, 4, 7)),
    "features, normalized": (nn.BatchNorm1d(8), torch.randn(4, 8)),
    "bags, summed": (nn.EmbeddingBag(10, 4, mode="sum"), torch.randint(0, 10, (3, 5))),
    "bags, averaged": (nn.EmbeddingBag(10, 4, padding_idx=2), torch.randint(0, 10, (3, 5))),
    "bags, largest": (nn.EmbeddingBag(10, 4, mode="max"), torch.randint(0, 10, (3, 5))),
    "bags, weighted": (Weighted(), torch.randint(0, 10, (6,))),
}

CASES: dict[str, tuple[nn.Module | Callable[[Tensor], Tensor], Tensor]] = {
    **{f"images: {name}": (model, torch.randn(2, 4, 6, 6)) for name, model in OF_IMAGES.items()},
    **{f"tokens: {name}": (model, torch.randn(2, 5, 8)) for name, model in OF_TOKENS.items()},
    **OTHERS,
}


def _agrees(model: nn.Module, x: Tensor) -> None:
    """The runtime's results and gradients are as near to float64 as PyTorch's own in float32, or within rounding."""
    arguments = [x, *(parameter.detach().clone() for parameter in model.parameters())]
    enabled, *_ = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
    graph = make_fx(gradients(model, x), tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    torch.backends.mkldnn.set_flags(_enabled=enabled, _fp32_precision=None)
    eager = gradients(model, x)(*arguments)
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments]
    want = gradients(model.double(), exact[0])(*exact)
    model.float()
    got = run(rewrite_for_executorch(graph, arguments), arguments)
    for ours, theirs, expected in zip(got, eager, want, strict=True):
        assert ours.shape == expected.shape
        scale = expected.abs().max() + 1e-3
        tolerance = max(ROUNDING, 4 * ((theirs.double() - expected) / scale).abs().max().item())
        torch.testing.assert_close(ours.double() / scale, expected / scale, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_an_operator_agrees_with_pytorch(name: str) -> None:
    model, x = CASES[name]
    _agrees(model if isinstance(model, nn.Module) else Function(model), x)


@pytest.mark.parametrize(
    ("function", "operator"),
    [(torch.erfinv, "erfinv"), (torch.lgamma, "lgamma"), (torch.special.i0, "i0")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_operator_without_a_kernel_is_refused(function: Callable[[Tensor], Tensor], operator: str) -> None:
    with pytest.raises(UnsupportedOperators, match=operator):
        _agrees(Function(function), torch.rand(2, 4, 6, 6) * 0.5)
