"""Small convolutional networks of ghosts, shuffles, fires and separable convolutions."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.efficient import ConvNormActivation
from tests.zoo.entry import CLASSES, architecture


class GhostModule(nn.Module):
    """Half of the channels are cheap images of the other half."""

    def __init__(self, inp: int, oup: int, relu: bool) -> None:
        super().__init__()
        self.oup = oup
        init_channels = (oup + 1) // 2
        activation = nn.ReLU(inplace=True) if relu else nn.Sequential()
        self.primary_conv = nn.Sequential(
            nn.Conv2d(inp, init_channels, 1, bias=False), nn.BatchNorm2d(init_channels), activation
        )
        self.cheap_operation = nn.Sequential(
            nn.Conv2d(init_channels, init_channels, 3, 1, 1, groups=init_channels, bias=False),
            nn.BatchNorm2d(init_channels),
            nn.ReLU(inplace=True) if relu else nn.Sequential(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary_conv(x)
        x2 = self.cheap_operation(x1)
        return torch.cat([x1, x2], dim=1)[:, : self.oup, :, :]


class GhostBottleneck(nn.Module):
    def __init__(self, i: int, mid: int, o: int, stride: int) -> None:
        super().__init__()
        self.ghost1, self.ghost2 = GhostModule(i, mid, relu=True), GhostModule(mid, o, relu=False)
        self.down = None
        if stride > 1:
            self.down = nn.Sequential(
                nn.Conv2d(mid, mid, 3, stride, 1, groups=mid, bias=False), nn.BatchNorm2d(mid)
            )
        self.shortcut = nn.Sequential()
        if stride > 1 or i != o:
            self.shortcut = nn.Sequential(
                nn.Conv2d(i, i, 3, stride, 1, groups=i, bias=False), nn.BatchNorm2d(i),
                nn.Conv2d(i, o, 1, bias=False), nn.BatchNorm2d(o),
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.ghost1(x)
        if self.down is not None:
            x = self.down(x)
        x = self.ghost2(x)
        x += self.shortcut(residual)
        return x


def ghostnet() -> nn.Module:
    return nn.Sequential(
        ConvNormActivation(3, 8, 3, 2), GhostBottleneck(8, 16, 9, 1), GhostBottleneck(9, 24, 16, 2),
        nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels (N, C, H, W) of the groups."""
    batchsize, num_channels, height, width = x.size()
    x = x.view(batchsize, groups, num_channels // groups, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batchsize, num_channels, height, width)


class ShuffleV1Unit(nn.Module):
    def __init__(self, i: int, o: int, stride: int, groups: int) -> None:
        super().__init__()
        self.groups, self.stride = groups, stride
        out = o - i if stride == 2 else o
        mid = o // 4
        self.compress = ConvNormActivation(i, mid, 1, groups=groups)
        self.depthwise = ConvNormActivation(mid, mid, 3, stride, groups=mid, activation_layer=None)
        self.expand = ConvNormActivation(mid, out, 1, groups=groups, activation_layer=None)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.avg_pool2d(x, kernel_size=3, stride=2, padding=1) if self.stride == 2 else x
        out = channel_shuffle(self.compress(x), self.groups)
        out = self.expand(self.depthwise(out))
        out = torch.cat((residual, out), 1) if self.stride == 2 else residual + out
        return F.relu(out)


def shufflenet_v1() -> nn.Module:
    return nn.Sequential(
        ConvNormActivation(3, 8, 3, 2), ShuffleV1Unit(8, 32, 2, 2), ShuffleV1Unit(32, 32, 1, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


class ShuffleV2Unit(nn.Module):
    def __init__(self, inp: int, oup: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        features = oup // 2
        if stride > 1:
            self.branch1 = nn.Sequential(
                ConvNormActivation(inp, inp, 3, stride, groups=inp, activation_layer=None),
                ConvNormActivation(inp, features, 1),
            )
        else:
            self.branch1 = nn.Sequential()
        self.branch2 = nn.Sequential(
            ConvNormActivation(inp if stride > 1 else features, features, 1),
            ConvNormActivation(features, features, 3, stride, groups=features, activation_layer=None),
            ConvNormActivation(features, features, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ConvNormActivation(3, 8, 3, 2)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.stage2 = nn.Sequential(ShuffleV2Unit(8, 16, 2), ShuffleV2Unit(16, 16, 1))
        self.stage3 = nn.Sequential(ShuffleV2Unit(16, 32, 2), ShuffleV2Unit(32, 32, 1))
        self.conv5 = ConvNormActivation(32, 48, 1)
        self.fc = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        x = self.stage2(x)
        x = self.stage3(x)
        x = self.conv5(x)
        x = x.mean([2, 3])
        return self.fc(x)


def shufflenet_v2() -> nn.Module:
    return ShuffleNetV2()


class Fire(nn.Module):
    def __init__(self, inplanes: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inplanes, squeeze, kernel_size=1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(squeeze, expand, kernel_size=1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


def squeezenet() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(
                nn.Conv2d(3, 16, kernel_size=3, stride=2),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
                Fire(16, 4, 12),
                Fire(24, 4, 12),
                nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
                Fire(24, 8, 16),
            ),
            dropout=nn.Dropout(p=0.5),
            final_conv=nn.Conv2d(32, CLASSES, kernel_size=1),
            relu=nn.ReLU(inplace=True),
            pool=nn.AdaptiveAvgPool2d((1, 1)),
            flatten=nn.Flatten(),
        )
    )


class SeparableConv2d(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, i, 3, 1, 1, groups=i, bias=False)
        self.pointwise = nn.Conv2d(i, o, 1, bias=False)
        self.bn = nn.BatchNorm2d(o)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.pointwise(self.conv1(x)))


class XceptionBlock(nn.Module):
    """The first ReLU may not be in place: the skip reads its input."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.skip = nn.Sequential(nn.Conv2d(i, o, 1, stride=2, bias=False), nn.BatchNorm2d(o))
        self.rep = nn.Sequential(
            nn.ReLU(inplace=False), SeparableConv2d(i, o), nn.ReLU(inplace=True), SeparableConv2d(o, o),
            nn.MaxPool2d(3, stride=2, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.rep(x) + self.skip(x)


def xception() -> nn.Module:
    return nn.Sequential(
        ConvNormActivation(3, 8, 3, 2), XceptionBlock(8, 16), XceptionBlock(16, 32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


ENTRIES = (
    architecture(ghostnet, notes="an odd number of channels is cut off a wider result"),
    architecture(shufflenet_v1),
    architecture(shufflenet_v2, blocks=3),
    architecture(squeezenet),
    architecture(xception),
)
