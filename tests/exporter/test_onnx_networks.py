"""Small networks as people write them, in training mode: a pass forward and backward, and what it writes.

ONNX Runtime in float32 against PyTorch in float64, with the same random numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from frostline.exporter.dropout import SeededDropout
from tests.exporter.onnx_programs import Function, draw, in_onnx

IMAGES, TOKENS, SIGNALS = draw(4, 3, 8, 8), draw(4, 5, 8), draw(4, 3, 16)
pytestmark = pytest.mark.slow

IDS = torch.tensor([[1, 4, 2, 1, 0, 9], [0, 3, 3, 2, 10, 7], [5, 5, 5, 6, 8, 1]])


class Lambda(nn.Module):
    """A function of itself and its input, over modules, parameters and buffers."""

    def __init__(
        self, function: Callable[[nn.Module, Tensor], Tensor], **members: nn.Module | nn.Buffer
    ) -> None:
        super().__init__()
        self._function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, x)


def image_net(*middle: nn.Module) -> nn.Module:
    ends = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, stride=2, padding=1)
    return nn.Sequential(ends[0], *middle, nn.ReLU(), ends[1], nn.Flatten(), nn.LazyLinear(3))


def token_net(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), *middle, nn.GELU(), nn.Linear(8, 8), nn.Flatten(), nn.LazyLinear(3))


def dropped_path(module: nn.Module, x: Tensor) -> Tensor:
    kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.7)
    return x * kept.div_(0.7)


def dropped_path_by_rand(module: nn.Module, x: Tensor) -> Tensor:
    kept = 0.7 + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype)
    return x.div(0.7) * kept.floor_()


def noisy(module: nn.Module, x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x) * torch.empty_like(x).exponential_()


def mixed(module: nn.Module, x: Tensor) -> Tensor:
    return 0.8 * x + 0.2 * x[torch.randperm(len(x))]


class Squeeze(nn.Module):
    """Channels weighted by their means."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.weigh(F.adaptive_avg_pool2d(x, 1)))


class UNet(nn.Module):
    """Down and up once, with batch norm and a skip connection."""

    def __init__(self, *, learned: bool) -> None:
        super().__init__()
        self.down, self.bottom, self.out = self._block(3, 4), self._block(4, 8), self._block(12, 4)
        enlarging = nn.ConvTranspose2d(8, 8, 2, 2), nn.Upsample(scale_factor=2, mode="bilinear")
        self.up = enlarging[0] if learned else enlarging[1]
        self.head = nn.Linear(4, 3)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Module:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        skipped = self.down(x)
        below = self.bottom(F.max_pool2d(skipped, 2))
        return self.head(self.out(torch.cat([skipped, self.up(below)], 1)).mean((2, 3)))


class ShiftedWindows(nn.Module):
    """Attention in rolled windows of 4 x 4 pixels, with a bias by relative position and an additive mask."""

    def __init__(self, shift: int = 2, side: int = 4, width: int = 6) -> None:
        super().__init__()
        self.shift, self.side = shift, side
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(draw((2 * side - 1) ** 2, 2) * 0.1)
        at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        apart = (at[:, :, None] - at[:, None]).permute(1, 2, 0) + side - 1
        self.register_buffer("index", (apart * torch.tensor([2 * side - 1, 1])).sum(-1))
        regions = self.windows(torch.arange(64.0).reshape(1, 8, 8, 1) // 32)[:, :, 0]
        apart = regions.unsqueeze(1) != regions.unsqueeze(2)
        self.register_buffer("mask", torch.zeros(apart.shape).masked_fill(apart, -torch.inf))

    def windows(self, x: Tensor) -> Tensor:
        n, height, width, channels = x.shape
        cut = x.view(n, height // self.side, self.side, width // self.side, self.side, channels)
        return cut.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.side**2, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        n, height, width, channels = x.shape
        windows = self.windows(torch.roll(x, (-self.shift, -self.shift), (1, 2)))
        split = self.inward(windows).unflatten(-1, (3, 2, channels // 2)).permute(2, 0, 3, 1, 4)
        query, key, value = split
        bias = self.bias[self.index.view(-1)].view(*self.index.shape, 2).permute(2, 0, 1)
        products = query @ key.transpose(-2, -1) + bias + self.mask.repeat(n, 1, 1)[:, None]
        z = self.outward((products.softmax(-1) @ value).transpose(1, 2).reshape(windows.shape))
        joined = z.view(n, height // self.side, width // self.side, self.side, self.side, channels)
        joined = joined.permute(0, 1, 3, 2, 4, 5).reshape(n, height, width, channels)
        return torch.roll(joined, (self.shift, self.shift), (1, 2)).permute(0, 3, 1, 2)


class GatedStack(nn.Module):
    """Dilated causal convolutions with gates and summed skips."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Conv1d(3, 6, 1)
        self.gates = nn.ModuleList(nn.Conv1d(6, 12, 2, dilation=2**k) for k in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(6, 6, 1) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, skipped = self.inward(x), 0
        for k, (gate, skip) in enumerate(zip(self.gates, self.skips, strict=True)):
            wave, opening = gate(F.pad(x, (2**k, 0))).chunk(2, 1)
            passed = torch.tanh(wave) * torch.sigmoid(opening)
            skipped = skipped + skip(passed)
            x = x + passed
        return self.head((F.relu(skipped) + x).mean(2))


class CausalAttention(nn.Module):
    """A mask of -inf, cut to the length."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(8, 24)
        self.register_buffer("mask", torch.full((16, 16), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        query, key, value = self.inward(x).view(n, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        products = query @ key.transpose(-1, -2) / 2 + self.mask[:length, :length]
        return x + (products.softmax(-1) @ value).transpose(1, 2).reshape(n, length, width)


class Recurrent(nn.Module):
    """A recurrent network's last output."""

    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.layers, self.head = kind(8, 6, batch_first=True, **options), nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0][:, -1])


def counted(module: nn.Module, x: Tensor) -> Tensor:
    module.steps.add_(1)
    return x * 1.0


def centred(module: nn.Module, x: Tensor) -> Tensor:
    module.mean.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
    return x - module.mean


def encoder(**options: object) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, **options)


def bags(mode: str) -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(11, 4, mode=mode), nn.Linear(4, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "alpha dropout": (lambda: token_net(nn.AlphaDropout(0.2)), TOKENS),
    "batch norm": (lambda: image_net(nn.BatchNorm2d(6)), IMAGES),
    "batch norm without statistics": (
        lambda: image_net(nn.BatchNorm2d(6, track_running_stats=False)),
        IMAGES,
    ),
    "batch norm without weights": (lambda: image_net(nn.BatchNorm2d(6, affine=False)), IMAGES),
    "bags of embeddings": (lambda: bags("mean"), IDS),
    "bags of maxima": (lambda: bags("max"), IDS),
    "causal mask of -inf": (lambda: token_net(CausalAttention()), TOKENS),
    "channel dropout": (lambda: image_net(nn.Dropout2d(0.3)), IMAGES),
    "counter": (lambda: token_net(Lambda(counted, steps=nn.Buffer(torch.tensor(0)))), TOKENS),
    "dropout": (lambda: token_net(nn.Dropout(0.2), nn.Dropout1d(0.3)), TOKENS),
    "dropout in place": (lambda: token_net(nn.Dropout(0.2, inplace=True)), TOKENS),
    "embeddings of bounded length": (
        lambda: nn.Sequential(nn.Embedding(11, 4, max_norm=1.0), nn.Flatten(), nn.LazyLinear(3)),
        IDS,
    ),
    "encoder layer": (lambda: token_net(encoder()), TOKENS),
    "encoder layer, norm first": (lambda: token_net(encoder(norm_first=True)), TOKENS),
    "feature dropout": (lambda: image_net(nn.FeatureAlphaDropout(0.2)), IMAGES),
    "gated dilated stack": (GatedStack, SIGNALS),
    "gated recurrent units": (lambda: Recurrent(nn.GRU), TOKENS),
    "instance norm with statistics": (
        lambda: image_net(nn.InstanceNorm2d(6, affine=True, track_running_stats=True)),
        IMAGES,
    ),
    "long short-term memory": (
        lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.2, bidirectional=True),
        TOKENS,
    ),
    "mixed samples": (lambda: image_net(Lambda(mixed)), IMAGES),
    "moving mean": (lambda: token_net(Lambda(centred, mean=nn.Buffer(torch.zeros(8)))), TOKENS),
    "noise": (lambda: image_net(Lambda(noisy)), IMAGES),
    "random slopes": (lambda: image_net(nn.RReLU()), IMAGES),
    "shifted windows": (lambda: image_net(ShiftedWindows()), IMAGES),
    "spectral norm": (lambda: token_net(parametrizations.spectral_norm(nn.Linear(8, 8))), TOKENS),
    "squeeze and excite": (lambda: image_net(nn.BatchNorm2d(6), Squeeze()), IMAGES),
    "stochastic depth": (lambda: image_net(Lambda(dropped_path)), IMAGES),
    "stochastic depth by rand": (lambda: image_net(Lambda(dropped_path_by_rand)), IMAGES),
    "U-Net, interpolating": (lambda: UNet(learned=False), IMAGES),
    "U-Net, learned": (lambda: UNet(learned=True), IMAGES),
    "weight norm": (lambda: image_net(parametrizations.weight_norm(nn.Conv2d(6, 6, 3))), IMAGES),
}


def training_pass(model: nn.Module) -> tuple[Function, list[Tensor]]:
    """A pass over (seed, x, parameters, buffers), and those tensors: the output, gradients and new buffers.

    Integer buffers are constants, which the model may write all the same.
    """
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    floating = {name: b for name, b in buffers.items() if b.is_floating_point()}
    fixed = {name: b for name, b in buffers.items() if name not in floating}

    def step(seed: Tensor, x: Tensor, *tensors: Tensor) -> list[Tensor]:
        given = dict(zip([*parameters, *floating], tensors, strict=True))
        leaves = {name: given[name].detach().requires_grad_() for name in parameters}
        written = {name: given[name].clone() for name in floating}
        counters = {name: b.clone() for name, b in fixed.items()}
        with SeededDropout(seed), torch.enable_grad():
            y = functional_call(model, {**leaves, **written, **counters}, (x,))
            weights = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape) % 5 - 2
            gradients = torch.autograd.grad((y * weights).sum(), list(leaves.values()))
        return [y.detach(), *gradients, *written.values()]

    return step, [each.detach().clone() for each in (*parameters.values(), *floating.values())]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pass_of_a_network(name: str) -> None:
    make, x = NETWORKS[name]
    torch.manual_seed(0)
    model = make().train()
    with torch.no_grad():
        model(x)
    step, tensors = training_pass(model)
    seed = torch.tensor(3.0)
    got = in_onnx(step, seed, x, *tensors)
    double = [each.double() if each.is_floating_point() else each.clone() for each in (x, *tensors)]
    for index, (have, want) in enumerate(zip(got, step(seed, *double), strict=True)):
        finite = want.isfinite()
        assert torch.equal(have.isfinite(), finite)
        have, want = have.double()[finite], want[finite]
        error = float((have - want).abs().max()) / max(float(want.abs().max()), 1.0)
        assert error < 1e-4, f"result {index}: off by {error:.1e}"
