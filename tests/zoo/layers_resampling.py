"""Upsampling, shuffles between pixels and channels, folds and pads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.frames import WIDTH, function_on, on_images, on_series, on_volumes


class UnfoldedAttention(nn.Module):
    """Patches to tokens and back."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH * 9, WIDTH * 9)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, kernel_size=3, stride=3).transpose(1, 2)
        patches = patches + self.proj(patches)
        return F.fold(patches.transpose(1, 2), output_size=x.shape[-2:], kernel_size=3, stride=3)


class OverlappingFold(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, kernel_size=3, padding=1, stride=2)
        return F.fold(patches * patches, output_size=(12, 12), kernel_size=3, padding=1, stride=2)


class ShiftedChannels(nn.Module):
    """A quarter of the channels moves a pixel to each side."""

    def forward(self, x: Tensor) -> Tensor:
        g = x.shape[1] // 4
        out = torch.zeros_like(x)
        out[:, 0 * g : 1 * g, :, :-1] = x[:, 0 * g : 1 * g, :, 1:]
        out[:, 1 * g : 2 * g, :, 1:] = x[:, 1 * g : 2 * g, :, :-1]
        out[:, 2 * g : 3 * g, :-1, :] = x[:, 2 * g : 3 * g, 1:, :]
        out[:, 3 * g :, 1:, :] = x[:, 3 * g :, :-1, :]
        return out


class UpLike(nn.Module):
    """Down by a stride and up again to the size of what it came from."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(WIDTH, WIDTH, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.interpolate(self.down(x), x.size()[2:], mode="bilinear", align_corners=True)


ENTRIES = (
    on_images("upsample_nearest", lambda: nn.Upsample(scale_factor=2)),
    on_images("upsample_nearest_odd", lambda: nn.Upsample(size=(17, 5), mode="nearest")),
    on_images("upsample_nearest_exact", lambda: nn.Upsample(size=19, mode="nearest-exact")),
    on_images("upsample_bilinear", lambda: nn.Upsample(scale_factor=2, mode="bilinear")),
    on_images("upsample_bilinear_corners", lambda: nn.UpsamplingBilinear2d(scale_factor=2)),
    on_images("downsample_bilinear", lambda: nn.Upsample(size=(7, 5), mode="bilinear")),
    on_images("upsample_bicubic", lambda: nn.Upsample(scale_factor=2, mode="bicubic", align_corners=False)),
    on_series("upsample_linear", lambda: nn.Upsample(scale_factor=2, mode="linear", align_corners=True)),
    on_volumes("upsample_trilinear", lambda: nn.Upsample(scale_factor=2, mode="trilinear")),
    on_images("upsample_like", UpLike),
    function_on(on_images, "interpolate_area", lambda x: F.interpolate(x, size=5, mode="area")),
    function_on(
        on_images,
        "interpolate_antialias",
        lambda x: F.interpolate(x, size=(6, 6), mode="bilinear", antialias=True),
    ),
    function_on(
        on_images,
        "interpolate_scale_kept",
        lambda x: F.interpolate(x, scale_factor=1.3, mode="bilinear", recompute_scale_factor=False),
    ),
    on_images("pixel_shuffle", lambda: nn.PixelShuffle(2), out=WIDTH // 4),
    on_images("pixel_unshuffle", lambda: nn.PixelUnshuffle(2), out=WIDTH * 4),
    on_images("channel_shuffle", lambda: nn.ChannelShuffle(4)),
    on_images("shift_channels", ShiftedChannels),
    on_images("unfold_and_fold", UnfoldedAttention),
    on_images("fold_overlapping", OverlappingFold),
    function_on(on_series, "unfold_tensor", lambda x: x.unfold(2, 4, 2).mean(-1)),
    function_on(
        on_images,
        "space_to_depth",
        lambda x: torch.cat([x[..., ::2, ::2], x[..., 1::2, 1::2]], 1),
        out=2 * WIDTH,
    ),
    function_on(on_images, "pad_constant", lambda x: F.pad(x, (1, 2, 0, 3), value=0.5)),
    function_on(on_images, "pad_negative", lambda x: F.pad(x, (-1, -2, -1, 0))),
    function_on(on_images, "pad_channels", lambda x: F.pad(x, (0, 0, 0, 0, 2, 2)), out=WIDTH + 4),
    on_images("pad_zero", lambda: nn.ZeroPad2d((1, 0, 1, 0))),
    on_images("pad_reflect", lambda: nn.ReflectionPad2d(3)),
    on_images("pad_replicate", lambda: nn.ReplicationPad2d((1, 2, 3, 4))),
    on_images("pad_circular", lambda: nn.CircularPad2d(2)),
    on_series("pad_reflect_1d", lambda: nn.ReflectionPad1d((2, 0))),
    on_series("pad_circular_1d", lambda: nn.CircularPad1d((3, 1))),
    on_volumes("pad_replicate_3d", lambda: nn.ReplicationPad3d(1)),
)
