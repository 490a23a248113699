"""Pooling in all its options."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.frames import BY_NAME, WIDTH, function_on, on_images, on_series, on_tokens, on_volumes, refused


class Unpooled(nn.Module):
    """SegNet's way up: each maximum goes back to where it came from."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, stride=2, return_indices=True)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.unpool = nn.MaxUnpool2d(2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x, indices = self.pool(x)
        return self.unpool(self.conv(x), indices)


class BlurPool(nn.Module):
    """Zhang: a fixed kernel, one for all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 2.0, 1.0])
        kernel = (taps[:, None] * taps[None, :] / 16).expand(channels, 1, 3, 3).clone()
        self.register_buffer("kernel", kernel, persistent=False)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), self.kernel, stride=2, groups=self.channels)


class GeM(nn.Module):
    """A generalised mean whose exponent is learnt."""

    def __init__(self, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.p, self.eps = nn.Parameter(torch.ones(1) * p), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x.clamp(min=self.eps).pow(self.p), (2, 2)).pow(1.0 / self.p)


class MixedPool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        a = torch.sigmoid(self.alpha)
        return a * F.max_pool2d(x, 3, 2, 1) + (1 - a) * F.avg_pool2d(x, 3, 2, 1)


class SpatialPyramid(nn.Module):
    """Several grids, flattened and put beside each other."""

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.adaptive_max_pool2d(x, size).flatten(2) for size in (1, 2, 3)]
        return torch.cat(parts, dim=2).unsqueeze(-1)


ENTRIES = (
    on_images("max_pool", lambda: nn.MaxPool2d(2)),
    on_images("max_pool_overlapping", lambda: nn.MaxPool2d(3, stride=2, padding=1)),
    on_images("max_pool_dilated", lambda: nn.MaxPool2d(3, stride=1, dilation=2)),
    on_images("max_pool_ceil", lambda: nn.MaxPool2d(3, stride=2, ceil_mode=True)),
    on_images("max_pool_rectangle", lambda: nn.MaxPool2d((3, 2), stride=(2, 1), padding=(1, 0))),
    on_series("max_pool_1d", lambda: nn.MaxPool1d(3, stride=2, padding=1)),
    on_volumes("max_pool_3d", lambda: nn.MaxPool3d(2)),
    on_images("max_unpool", Unpooled),
    on_images("lp_pool", lambda: nn.LPPool2d(2, 3, stride=2), notes="the root has no slope at zero"),
    on_series("lp_pool_1d", lambda: nn.Sequential(nn.Softplus(), nn.LPPool1d(1.5, 2))),
    on_images(
        "fractional_max_pool",
        lambda: nn.FractionalMaxPool2d(2, output_size=7),
        expected=refused("evaluation"),
        notes="random windows, in evaluation too",
    ),
    on_images("avg_pool", lambda: nn.AvgPool2d(2)),
    on_images("avg_pool_padded", lambda: nn.AvgPool2d(3, stride=2, padding=1)),
    on_images("avg_pool_exclude_pad", lambda: nn.AvgPool2d(3, 2, padding=1, count_include_pad=False)),
    on_images("avg_pool_ceil", lambda: nn.AvgPool2d(5, stride=2, ceil_mode=True)),
    on_images("avg_pool_divisor", lambda: nn.AvgPool2d(2, divisor_override=3)),
    on_series("avg_pool_1d", lambda: nn.AvgPool1d(4, stride=2, padding=2)),
    on_volumes("avg_pool_3d", lambda: nn.AvgPool3d(2, ceil_mode=True)),
    on_images("adaptive_avg_pool_odd", lambda: nn.AdaptiveAvgPool2d(5)),
    on_images("adaptive_avg_pool_rectangle", lambda: nn.AdaptiveAvgPool2d((None, 7))),
    on_images("adaptive_avg_pool_larger", lambda: nn.AdaptiveAvgPool2d(16)),
    on_images("adaptive_max_pool_odd", lambda: nn.AdaptiveMaxPool2d((5, 3))),
    on_series("adaptive_avg_pool_1d", lambda: nn.AdaptiveAvgPool1d(7)),
    on_series("adaptive_max_pool_1d", lambda: nn.AdaptiveMaxPool1d(1), blocks=BY_NAME),
    on_volumes("adaptive_avg_pool_3d", lambda: nn.AdaptiveAvgPool3d((4, 3, 1))),
    on_volumes("adaptive_max_pool_3d", lambda: nn.AdaptiveMaxPool3d(4)),
    on_images("blur_pool", lambda: BlurPool(WIDTH)),
    on_images("gem_pool", GeM),
    on_images("mixed_pool", MixedPool),
    on_images("spatial_pyramid_pool", SpatialPyramid),
    function_on(on_images, "global_max", lambda x: x * torch.sigmoid(x.amax(dim=(2, 3), keepdim=True))),
    function_on(on_images, "global_mean_named_axes", lambda x: x - x.mean([-1, -2], True)),
    function_on(on_tokens, "mean_and_max_of_tokens", lambda x: torch.stack([x.mean(1), x.max(1)[0]], dim=1)),
)
