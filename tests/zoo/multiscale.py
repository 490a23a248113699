"""Networks for images whose features meet again: several resolutions, skips over half the depth, gates over the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import CLASSES, architecture


def _conv_bn_relu(i: int, o: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))


class HighResolutionModule(nn.Module):
    """Branches of different resolution, each of which hears of all others."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(_conv_bn_relu(c, c) for c in channels)
        self.fuse_layers = nn.ModuleList()
        for i, to in enumerate(channels):
            row = nn.ModuleList()
            for j, of in enumerate(channels):
                if j > i:
                    row.append(nn.Sequential(nn.Conv2d(of, to, 1, bias=False), nn.BatchNorm2d(to)))
                elif j == i:
                    row.append(nn.Identity())
                else:
                    row.append(nn.Sequential(nn.Conv2d(of, to, 3, 2, 1, bias=False), nn.BatchNorm2d(to)))
            self.fuse_layers.append(row)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        x = [branch(part) for branch, part in zip(self.branches, x, strict=True)]
        fused = []
        for i, row in enumerate(self.fuse_layers):
            y = row[0](x[0])
            for j in range(1, len(x)):
                part = row[j](x[j])
                if j > i:
                    part = F.interpolate(part, size=x[i].shape[-2:], mode="bilinear", align_corners=False)
                y = y + part
            fused.append(F.relu(y))
        return fused


class HRNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn_relu(3, 8, 2)
        self.transition = nn.ModuleList([_conv_bn_relu(8, 8), _conv_bn_relu(8, 16, 2)])
        self.stage2 = HighResolutionModule((8, 16))
        self.stage3 = HighResolutionModule((8, 16))
        self.downsample = _conv_bn_relu(8, 16, 2)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        xs = self.stage3(self.stage2([layer(x) for layer in self.transition]))
        y = self.downsample(xs[0]) + xs[1]
        y = F.avg_pool2d(y, kernel_size=y.size()[2:]).view(y.size(0), -1)
        return self.classifier(y)


class DoubleConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            _conv_bn_relu(in_channels, out_channels), _conv_bn_relu(out_channels, out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class UNetEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inc = DoubleConv(3, 8)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(8, 16))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(16, 32))
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down2(self.down1(self.inc(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1))


def unet_encoder() -> nn.Module:
    return UNetEncoder()


class Up(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
        self.conv = DoubleConv(in_channels, out_channels)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        x1 = self.up(x1)
        dy, dx = x2.size(2) - x1.size(2), x2.size(3) - x1.size(3)
        x1 = F.pad(x1, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


class UNet(nn.Module):
    """One class for each pixel, or for the whole image."""

    def __init__(self, per_image: bool) -> None:
        super().__init__()
        self.inc = DoubleConv(3, 8)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(8, 16))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(16, 32))
        self.up1 = Up(32, 16)
        self.up2 = Up(16, 8)
        self.outc = nn.Conv2d(8, CLASSES, 1)
        self.per_image = per_image

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.up2(self.up1(x3, x2), x1)
        x = self.outc(x)
        return x.mean(dim=(2, 3)) if self.per_image else x


def hrnet() -> nn.Module:
    return HRNet()


def unet_image_head() -> nn.Module:
    return UNet(per_image=True)


class FeaturePyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1 = _conv_bn_relu(3, 8, 2)
        self.c2 = _conv_bn_relu(8, 16, 2)
        self.c3 = _conv_bn_relu(16, 32, 2)
        self.lateral = nn.ModuleList(nn.Conv2d(c, 16, 1) for c in (8, 16, 32))
        self.smooth = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(3 * 16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        c1 = self.c1(x)
        c2 = self.c2(c1)
        c3 = self.c3(c2)
        laterals = [conv(c) for conv, c in zip(self.lateral, (c1, c2, c3), strict=True)]
        for i in range(2, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(
                laterals[i], size=laterals[i - 1].shape[2:], mode="nearest"
            )
        pyramid = [conv(p) for conv, p in zip(self.smooth, laterals, strict=True)]
        return self.head(torch.cat([F.adaptive_max_pool2d(p, 1).flatten(1) for p in pyramid], dim=-1))


def fpn_classifier() -> nn.Module:
    return FeaturePyramid()


class ChannelGate(nn.Module):
    """One perceptron over the mean and over the maximum of each channel."""

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.max_pool = nn.AdaptiveMaxPool2d(1)
        self.fc = nn.Sequential(
            nn.Conv2d(channels, channels // ratio, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels // ratio, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(self.avg_pool(x)) + self.fc(self.max_pool(x)))


class SpatialGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        avg_out = torch.mean(x, dim=1, keepdim=True)
        max_out, _ = torch.max(x, dim=1, keepdim=True)
        return torch.sigmoid(self.conv(torch.cat([avg_out, max_out], dim=1)))


class CBAMBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv_bn_relu(channels, channels)
        self.ca, self.sa = ChannelGate(channels), SpatialGate()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        out = self.ca(out) * out
        out = self.sa(out) * out
        return F.relu(out + x)


def cbam_cnn() -> nn.Module:
    return nn.Sequential(
        _conv_bn_relu(3, 16, 2), CBAMBlock(16), _conv_bn_relu(16, 32, 2), CBAMBlock(32),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(32, CLASSES),
    )  # fmt: skip


class NonLocalBlock(nn.Module):
    """Every pixel looks at every other; its last norm starts at zero."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.inter = in_channels // 2
        self.g = nn.Conv2d(in_channels, self.inter, 1)
        self.theta = nn.Conv2d(in_channels, self.inter, 1)
        self.phi = nn.Sequential(nn.Conv2d(in_channels, self.inter, 1), nn.MaxPool2d(2))
        self.W = nn.Sequential(nn.Conv2d(self.inter, in_channels, 1), nn.BatchNorm2d(in_channels))
        nn.init.constant_(self.W[1].weight, 0)
        nn.init.constant_(self.W[1].bias, 0)

    def forward(self, x: Tensor) -> Tensor:
        b = x.size(0)
        g_x = F.max_pool2d(self.g(x), 2).view(b, self.inter, -1).permute(0, 2, 1)
        theta_x = self.theta(x).view(b, self.inter, -1).permute(0, 2, 1)
        phi_x = self.phi(x).view(b, self.inter, -1)
        f = F.softmax(torch.matmul(theta_x, phi_x), dim=-1)
        y = torch.matmul(f, g_x).permute(0, 2, 1).contiguous()
        y = y.view(b, self.inter, *x.size()[2:])
        return self.W(y) + x


def nonlocal_cnn() -> nn.Module:
    return nn.Sequential(
        _conv_bn_relu(3, 16, 2), _conv_bn_relu(16, 16, 2), NonLocalBlock(16), _conv_bn_relu(16, 32, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(32, CLASSES),
    )  # fmt: skip


class SqueezeExciteCNN(nn.Module):
    """Gates written out in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.down1, self.up1 = nn.Linear(16, 4), nn.Linear(4, 16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(32)
        self.down2, self.up2 = nn.Linear(32, 8), nn.Linear(8, 32)
        self.out = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        s = torch.sigmoid(self.up1(F.relu(self.down1(x.mean(-1).mean(-1)))))
        x = x * s[:, :, None, None]
        x = F.relu(self.bn2(self.conv2(x)))
        s = torch.sigmoid(self.up2(F.relu(self.down2(F.adaptive_avg_pool2d(x, 1).squeeze()))))
        x = x * s.unsqueeze(-1).unsqueeze(-1)
        return self.out(x.mean((-2, -1)))


def squeeze_excite_cnn() -> nn.Module:
    return SqueezeExciteCNN()


class DeepLabPool(nn.Module):
    """Atrous spatial pyramid pooling, with the mean of the image as one of its levels."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, padding=d, dilation=d, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            for d in (1, 2, 3)
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(i, o, 1, bias=False), nn.ReLU())
        self.project = nn.Sequential(
            nn.Conv2d(4 * o, o, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.Dropout(0.5)
        )

    def forward(self, x: Tensor) -> Tensor:
        res = [conv(x) for conv in self.convs]
        pooled = self.pool(x)
        res.append(F.interpolate(pooled, size=x.shape[-2:], mode="bilinear", align_corners=False))
        return self.project(torch.cat(res, dim=1))


def aspp_classifier() -> nn.Module:
    return nn.Sequential(
        _conv_bn_relu(3, 8, 2), _conv_bn_relu(8, 16, 2), DeepLabPool(16, 16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


ENTRIES = (
    architecture(hrnet, notes="two tensors cross between the stages"),
    architecture(unet_encoder, blocks=3),
    architecture(unet_image_head, blocks=3, notes="skips cross every boundary"),
    architecture(fpn_classifier, notes="two or three tensors cross"),
    architecture(cbam_cnn, blocks=("1", "3")),
    architecture(nonlocal_cnn, notes="the norm behind the attention starts at zero"),
    architecture(squeeze_excite_cnn, notes="squeeze() without a dimension"),
    architecture(aspp_classifier),
)
