"""Residual networks for images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import CLASSES, architecture


def _conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 3, stride, padding=1, groups=groups, bias=False)


def _conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 1, stride, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int,
        downsample: nn.Module | None,
        groups: int = 1,
        base_width: float = 1.0,
        attention: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        width = int(planes * base_width) * groups
        outplanes = planes * self.expansion
        self.conv1 = _conv1x1(inplanes, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv1x1(width, outplanes)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.attention = attention(outplanes) if attention else None
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.attention is not None:
            out = self.attention(out)
        out += identity
        return self.relu(out)


class Res2NetBlock(nn.Module):
    """Splits the channels and hands each part's result on to the next."""

    expansion = 2

    def __init__(
        self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None, scale: int = 4
    ) -> None:
        super().__init__()
        self.width, self.scale, self.first = planes // 2, scale, downsample is not None
        self.conv1 = _conv1x1(inplanes, self.width * scale)
        self.bn1 = nn.BatchNorm2d(self.width * scale)
        self.convs = nn.ModuleList(_conv3x3(self.width, self.width, stride) for _ in range(scale - 1))
        self.bns = nn.ModuleList(nn.BatchNorm2d(self.width) for _ in range(scale - 1))
        self.pool = nn.AvgPool2d(3, stride, padding=1)
        self.conv3 = _conv1x1(self.width * scale, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        parts = torch.split(self.relu(self.bn1(self.conv1(x))), self.width, 1)
        outs: list[Tensor] = []
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
            part = parts[i] if i == 0 or self.first else outs[-1] + parts[i]
            outs.append(self.relu(bn(conv(part))))
        outs.append(self.pool(parts[-1]) if self.first else parts[-1])
        out = self.bn3(self.conv3(torch.cat(outs, 1)))
        return self.relu(out + residual)


class ResNet(nn.Module):
    def __init__(
        self, block: Callable[..., nn.Module], layers: tuple[int, ...], expansion: int, width: int = 8
    ) -> None:
        super().__init__()
        self.inplanes = width
        self.expansion = expansion
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, width, layers[0], 1)
        self.layer2 = self._make_layer(block, 2 * width, layers[1], 2)
        self.layer3 = self._make_layer(block, 4 * width, layers[2], 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(4 * width * expansion, CLASSES)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def _make_layer(
        self, block: Callable[..., nn.Module], planes: int, blocks: int, stride: int
    ) -> nn.Sequential:
        downsample = None
        outplanes = planes * self.expansion
        if stride != 1 or self.inplanes != outplanes:
            downsample = nn.Sequential(_conv1x1(self.inplanes, outplanes, stride), nn.BatchNorm2d(outplanes))
        layers = [block(self.inplanes, planes, stride, downsample)]
        self.inplanes = outplanes
        layers.extend(block(self.inplanes, planes, 1, None) for _ in range(1, blocks))
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


def resnet18() -> nn.Module:
    return ResNet(BasicBlock, (2, 2, 2), 1)


def resnet50() -> nn.Module:
    return ResNet(Bottleneck, (2, 1, 1), 4)


def resnext50() -> nn.Module:
    return ResNet(partial(Bottleneck, groups=4, base_width=0.5), (1, 2, 1), 4)


def se_resnext() -> nn.Module:
    return ResNet(partial(Bottleneck, groups=4, base_width=0.5, attention=SqueezeExcite), (1, 1, 1), 4)


def res2net() -> nn.Module:
    return ResNet(Res2NetBlock, (1, 2, 1), 2)


class WideBlock(nn.Module):
    """Norm and ReLU come before each convolution."""

    def __init__(self, in_planes: int, out_planes: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = _conv3x3(in_planes, out_planes, stride)
        self.bn2 = nn.BatchNorm2d(out_planes)
        self.conv2 = _conv3x3(out_planes, out_planes)
        self.droprate = dropout
        self.equal = in_planes == out_planes
        self.shortcut = None if self.equal else _conv1x1(in_planes, out_planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x), inplace=True)
        if not self.equal:
            x = out
        out = F.relu(self.bn2(self.conv1(out)), inplace=True)
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, training=self.training)
        out = self.conv2(out)
        return torch.add(x if self.shortcut is None else self.shortcut(x), out)


class WideResNet(nn.Module):
    def __init__(self, depth: int, widen: int, dropout: float) -> None:
        super().__init__()
        widths = [4, 4 * widen, 8 * widen, 16 * widen]
        n = (depth - 4) // 6
        self.conv1 = _conv3x3(3, widths[0])
        self.block1 = self._group(widths[0], widths[1], n, 1, dropout)
        self.block2 = self._group(widths[1], widths[2], n, 2, dropout)
        self.block3 = self._group(widths[2], widths[3], n, 2, dropout)
        self.bn = nn.BatchNorm2d(widths[3])
        self.width = widths[3]
        self.fc = nn.Linear(widths[3], CLASSES)

    @staticmethod
    def _group(in_planes: int, out_planes: int, n: int, stride: int, dropout: float) -> nn.Sequential:
        return nn.Sequential(
            *(
                WideBlock(in_planes if i == 0 else out_planes, out_planes, stride if i == 0 else 1, dropout)
                for i in range(n)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = F.relu(self.bn(out))
        out = F.avg_pool2d(out, 8)
        out = out.view(-1, self.width)
        return self.fc(out)


def wide_resnet() -> nn.Module:
    return WideResNet(depth=10, widen=2, dropout=0.3)


class RegNetBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int, stride: int, group_width: int) -> None:
        super().__init__()
        self.proj = None
        if width_in != width_out or stride != 1:
            self.proj = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out)
            )
        self.f = nn.Sequential()
        self.f.add_module(
            "a", nn.Sequential(_conv1x1(width_in, width_out), nn.BatchNorm2d(width_out), nn.ReLU())
        )
        self.f.add_module(
            "b",
            nn.Sequential(
                _conv3x3(width_out, width_out, stride, width_out // group_width),
                nn.BatchNorm2d(width_out),
                nn.ReLU(inplace=True),
            ),
        )
        self.f.add_module("se", SqueezeExcite(width_out))
        self.f.add_module("c", nn.Sequential(_conv1x1(width_out, width_out), nn.BatchNorm2d(width_out)))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x) + self.f(x) if self.proj is not None else x + self.f(x)
        return self.activation(x)


class RegNet(nn.Module):
    def __init__(self, depths: tuple[int, ...], widths: tuple[int, ...], group_width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.trunk_output = nn.Sequential()
        current = 8
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stage = nn.Sequential()
            for j in range(depth):
                stage.add_module(
                    f"block{i}-{j}", RegNetBlock(current, width, 2 if j == 0 else 1, group_width)
                )
                current = width
            self.trunk_output.add_module(f"stage{i}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(current, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk_output(self.stem(x))
        x = self.avgpool(x).flatten(start_dim=1)
        return self.fc(x)


def regnet_y() -> nn.Module:
    return RegNet((1, 2, 1), (8, 16, 32), 8)


class ScaledConv2d(nn.Conv2d):
    """Standardises its weight in every forward pass."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2)
        self.gain = nn.Parameter(torch.ones(out_channels, 1, 1, 1))
        self.scale = self.weight[0].numel() ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=[1, 2, 3], keepdim=True)
        var = self.weight.var(dim=[1, 2, 3], keepdim=True, unbiased=False)
        weight = (self.weight - mean) * torch.rsqrt(var + 1e-5) * (self.scale * self.gain)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class NormFreeBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int, beta: float) -> None:
        super().__init__()
        self.conv1 = ScaledConv2d(channels, out_channels, 1)
        self.conv2 = ScaledConv2d(out_channels, out_channels, 3, stride)
        self.conv3 = ScaledConv2d(out_channels, out_channels, 1)
        self.shortcut = (
            nn.Sequential(nn.AvgPool2d(stride), ScaledConv2d(channels, out_channels, 1))
            if stride > 1
            else None
        )
        self.skip_gain = nn.Parameter(torch.full((), 0.1))
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        out = F.gelu(x) * 1.7 * self.beta
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = F.gelu(self.conv1(out)) * 1.7
        out = F.gelu(self.conv2(out)) * 1.7
        return self.conv3(out).mul_(self.skip_gain) * 0.2 + shortcut


def nfnet() -> nn.Module:
    return nn.Sequential(
        ScaledConv2d(3, 8, 3, 2),
        NormFreeBlock(8, 16, 2, 1.0),
        NormFreeBlock(16, 16, 1, 0.98),
        NormFreeBlock(16, 32, 2, 0.96),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(32, CLASSES),
    )


def fixup_resnet() -> nn.Module:
    """No norm at all: scalar biases and a scale in each block."""

    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.bias1, self.bias2 = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
            self.scale = nn.Parameter(torch.ones(1))
            self.conv1, self.conv2 = _conv3x3(channels, channels), _conv3x3(channels, channels)
            nn.init.constant_(self.conv2.weight, 0)

        def forward(self, x: Tensor) -> Tensor:
            out = F.relu(self.conv1(x + self.bias1))
            return F.relu(self.conv2(out) * self.scale + self.bias2 + x)

    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        Block(16),
        Block(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


ENTRIES = (
    architecture(resnet18, blocks=("layer1", "layer2", "layer3")),
    architecture(resnet50, blocks=3, notes="torchvision's way; two additions in the first layer"),
    architecture(resnext50, blocks=3),
    architecture(se_resnext, blocks=3),
    architecture(res2net, blocks=3),
    architecture(wide_resnet, blocks=3, notes="the head begins with a norm; dropout inside the blocks"),
    architecture(regnet_y, blocks=3, notes="modules are called block0-0"),
    architecture(nfnet),
    architecture(
        fixup_resnet, notes="the second convolutions start at zero, so the first get no gradient at once"
    ),
)
