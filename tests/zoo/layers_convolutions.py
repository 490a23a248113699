"""Convolutions in all their options."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import Refusal
from tests.zoo.frames import (
    CLASSES,
    FEATURES,
    WIDTH,
    on_images,
    on_series,
    on_tokens,
    on_vectors,
    on_volumes,
    whole,
)


class FunctionalConv(nn.Module):
    """A weight of one's own and F.conv2d."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, 3, 3) * 0.1)
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, stride=1, padding=1)


class CoordConv(nn.Module):
    """Two channels more that tell where a pixel is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH + 2, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.size()
        ys = torch.linspace(-1, 1, h, device=x.device).view(1, 1, h, 1).expand(n, 1, h, w)
        xs = torch.linspace(-1, 1, w, device=x.device).view(1, 1, 1, w).expand(n, 1, h, w)
        return self.conv(torch.cat([x, ys, xs], dim=1))


class ConditionalConv(nn.Module):
    """A kernel for each sample, mixed of three; the batch runs as groups of one image."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.routing = nn.Linear(WIDTH, experts)
        self.weight = nn.Parameter(torch.randn(experts, WIDTH, WIDTH, 3, 3) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        routing = torch.sigmoid(self.routing(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        weight = torch.matmul(routing, self.weight.flatten(1)).view(b * WIDTH, c, 3, 3)
        out = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b)
        return out.view(b, WIDTH, h, w)


class MixConv(nn.Module):
    """Kernels of several sizes for several channels."""

    def __init__(self) -> None:
        super().__init__()
        self.splits = [5, 3]
        self.convs = nn.ModuleList(nn.Conv2d(c, c, k, padding=k // 2, groups=c) for c, k in ((5, 3), (3, 5)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(
            [conv(part) for conv, part in zip(self.convs, x.split(self.splits, 1), strict=True)], 1
        )


class Involution(nn.Module):
    """A kernel for each pixel, made of that pixel."""

    def __init__(self, kernel: int = 3, groups: int = 2) -> None:
        super().__init__()
        self.k, self.g = kernel, groups
        self.span = nn.Conv2d(WIDTH, kernel * kernel * groups, 1)
        self.unfold = nn.Unfold(kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        kernel = self.span(x).view(b, self.g, self.k * self.k, h, w).unsqueeze(2)
        patches = self.unfold(x).view(b, self.g, c // self.g, self.k * self.k, h, w)
        return (kernel * patches).sum(dim=3).view(b, c, h, w)


def _lazy() -> nn.Module:
    return nn.Sequential(
        nn.LazyConv2d(WIDTH, 3, padding=1), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(WIDTH, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(CLASSES),
    )  # fmt: skip


def _lazy_after_a_dry_run() -> nn.Module:
    model = _lazy()
    model(torch.zeros(2, 3, 12, 12))
    return model


def _conv(kernel: int | tuple[int, int], out: int = WIDTH, **options: object) -> nn.Module:
    return nn.Conv2d(WIDTH, out, kernel, **options)  # type: ignore[arg-type]


def _up(kernel: int, out: int = WIDTH, **options: int) -> nn.Module:
    return nn.ConvTranspose2d(WIDTH, out, kernel, **options)


ENTRIES = (
    on_images("conv_dilated", lambda: _conv(3, padding=2, dilation=2)),
    on_images("conv_dilated_unevenly", lambda: _conv((3, 3), padding=(1, 3), dilation=(1, 3))),
    on_images("conv_groups", lambda: _conv(3, padding=1, groups=4)),
    on_images("conv_depthwise", lambda: _conv(3, padding=1, groups=WIDTH)),
    on_images("conv_depthwise_multiplier", lambda: _conv(3, 2 * WIDTH, groups=WIDTH), out=2 * WIDTH),
    on_images("conv_reflect", lambda: _conv(3, padding=1, padding_mode="reflect")),
    on_images("conv_circular", lambda: _conv(3, padding=1, padding_mode="circular")),
    on_images("conv_replicate", lambda: _conv(5, padding=2, padding_mode="replicate")),
    on_images("conv_same", lambda: _conv(5, padding="same", dilation=2)),
    on_images("conv_same_even", lambda: _conv(4, padding="same")),
    on_images("conv_valid", lambda: _conv(3, padding="valid")),
    on_images("conv_even", lambda: _conv(2)),
    on_images("conv_patches", lambda: _conv(4, stride=4)),
    on_images("conv_stride_beyond_kernel", lambda: _conv(2, stride=3)),
    on_images("conv_strided_1x1", lambda: _conv(1, stride=2, bias=False)),
    on_images("conv_uneven", lambda: _conv((1, 5), stride=(2, 1), padding=(0, 2))),
    on_images("conv_large", lambda: _conv(7, padding=3, stride=2, bias=False)),
    on_images("conv_whole_image", lambda: _conv(12)),
    on_images("conv_padded_beyond_kernel", lambda: _conv(1, padding=2)),
    on_images("conv_transpose", lambda: _up(2, stride=2)),
    on_images("conv_transpose_output_padding", lambda: _up(3, stride=2, padding=1, output_padding=1)),
    on_images("conv_transpose_groups", lambda: _up(4, stride=2, padding=1, groups=4)),
    on_images("conv_transpose_dilated", lambda: _up(3, dilation=2, padding=1)),
    on_images("conv_transpose_depthwise", lambda: _up(3, stride=3, groups=WIDTH)),
    on_series("conv_1d_dilated_groups", lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=2, dilation=2, groups=2)),
    on_series("conv_1d_strided", lambda: nn.Conv1d(WIDTH, 12, 8, stride=4, bias=False), out=12),
    on_series("conv_transpose_1d", lambda: nn.ConvTranspose1d(WIDTH, WIDTH, 4, stride=2, padding=1)),
    on_volumes("conv_3d", lambda: nn.Conv3d(WIDTH, WIDTH, (3, 1, 3), stride=(1, 2, 1), padding=(1, 0, 1))),
    on_volumes("conv_3d_depthwise", lambda: nn.Conv3d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)),
    on_volumes("conv_transpose_3d", lambda: nn.ConvTranspose3d(WIDTH, WIDTH, 2, stride=2)),
    on_images("conv_functional", FunctionalConv),
    on_images("coord_conv", CoordConv),
    on_images("conditional_conv", ConditionalConv, notes="as many groups as samples"),
    on_images("mix_conv", MixConv),
    on_images("involution", Involution),
    on_vectors("linear_no_bias", lambda: nn.Linear(FEATURES, 7, bias=False), out=7),
    on_tokens("linear_on_tokens", lambda: nn.Linear(FEATURES, 24), out=24),
    whole(
        "lazy_modules",
        _lazy,
        (3, 12, 12),
        expected=Refusal(("'0'", "batch")),
        notes="the weights are made by the first batch",
    ),
    whole("lazy_modules_after_a_dry_run", _lazy_after_a_dry_run, (3, 12, 12)),
)
