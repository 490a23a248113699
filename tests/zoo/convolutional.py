"""Convolutional networks for images that are not chains of residual blocks."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import CLASSES, architecture


class VGG(nn.Module):
    def __init__(self, features: nn.Module, width: int) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(width * 2 * 2, 32),
            nn.ReLU(True),
            nn.Dropout(p=0.5),
            nn.Linear(32, 32),
            nn.ReLU(True),
            nn.Dropout(p=0.5),
            nn.Linear(32, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


def _vgg_features(configuration: list[int | str], batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    in_channels = 3
    for v in configuration:
        if isinstance(v, str):
            layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
            continue
        layers += [nn.Conv2d(in_channels, v, kernel_size=3, padding=1)]
        layers += [nn.BatchNorm2d(v)] if batch_norm else []
        layers += [nn.ReLU(inplace=True)]
        in_channels = v
    return nn.Sequential(*layers)


def vgg11_bn() -> nn.Module:
    return VGG(_vgg_features([8, "M", 16, "M", 16, 16, "M", 32, 32, "M"], batch_norm=True), 32)


def alexnet() -> nn.Module:
    features = nn.Sequential(
        nn.Conv2d(3, 8, kernel_size=5, stride=2, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(8, 16, kernel_size=5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(16, 16, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
    )
    return VGG(features, 16)


def lenet5() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(16 * 5 * 5, 32), nn.Tanh(), nn.Linear(32, CLASSES),
    )  # fmt: skip


def newcomer_cnn() -> nn.Module:
    """Three times Conv-BatchNorm-ReLU: the first network that anybody writes."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


def all_convolutional() -> nn.Module:
    """Springenberg et al.: strides instead of pools, and a 1x1 convolution as classifier."""
    return nn.Sequential(
        nn.Dropout2d(0.1), nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, 2, 1), nn.ReLU(),
        nn.Dropout2d(0.2), nn.Conv2d(12, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(24, CLASSES, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class BasicConv2d(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, **kwargs: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class InceptionA(nn.Module):
    def __init__(self, in_channels: int, pool_features: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(in_channels, 8, kernel_size=1)
        self.branch5x5_1 = BasicConv2d(in_channels, 4, kernel_size=1)
        self.branch5x5_2 = BasicConv2d(4, 8, kernel_size=5, padding=2)
        self.branch1x7 = BasicConv2d(in_channels, 8, kernel_size=(1, 7), padding=(0, 3))
        self.branch7x1 = BasicConv2d(8, 8, kernel_size=(7, 1), padding=(3, 0))
        self.branch_pool = BasicConv2d(in_channels, pool_features, kernel_size=1)

    def _forward(self, x: Tensor) -> list[Tensor]:
        branch1x1 = self.branch1x1(x)
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch7x7 = self.branch7x1(self.branch1x7(x))
        branch_pool = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        return [branch1x1, branch5x5, branch7x7, self.branch_pool(branch_pool)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self._forward(x), 1)


class InceptionReduction(nn.Module):
    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3 = BasicConv2d(in_channels, 16, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch3x3(x), F.max_pool2d(x, kernel_size=3, stride=2)], 1)


def inception() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            Conv2d_1a=BasicConv2d(3, 8, kernel_size=3, stride=2),
            Conv2d_2a=BasicConv2d(8, 16, kernel_size=3, padding=1),
            Mixed_5b=InceptionA(16, 8),
            Mixed_6a=InceptionReduction(32),
            Mixed_6b=InceptionA(48, 8),
            avgpool=nn.AdaptiveAvgPool2d((1, 1)),
            dropout=nn.Dropout(p=0.5),
            flatten=nn.Flatten(),
            fc=nn.Linear(32, CLASSES),
        )
    )


class DenseLayer(nn.Module):
    def __init__(self, num_input_features: int, growth_rate: int, bn_size: int, drop_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(num_input_features, bn_size * growth_rate, kernel_size=1, bias=False)
        self.norm2 = nn.BatchNorm2d(bn_size * growth_rate)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bn_size * growth_rate, growth_rate, kernel_size=3, padding=1, bias=False)
        self.drop_rate = float(drop_rate)

    def forward(self, inputs: Tensor | list[Tensor]) -> Tensor:
        prev_features = [inputs] if isinstance(inputs, Tensor) else inputs
        bottleneck = self.conv1(self.relu1(self.norm1(torch.cat(prev_features, 1))))
        new_features = self.conv2(self.relu2(self.norm2(bottleneck)))
        if self.drop_rate > 0:
            new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
        return new_features


class DenseBlock(nn.ModuleDict):
    def __init__(self, num_layers: int, num_input_features: int, growth_rate: int, drop_rate: float) -> None:
        super().__init__()
        for i in range(num_layers):
            layer = DenseLayer(num_input_features + i * growth_rate, growth_rate, 2, drop_rate)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self, growth_rate: int = 8, drop_rate: float = 0.1) -> None:
        super().__init__()
        self.features = nn.Sequential(OrderedDict([("conv0", nn.Conv2d(3, 16, 3, 2, 1, bias=False))]))
        channels = 16
        for i, layers in enumerate((2, 3)):
            self.features.add_module(
                f"denseblock{i + 1}", DenseBlock(layers, channels, growth_rate, drop_rate)
            )
            channels += layers * growth_rate
            if i == 0:
                transition = nn.Sequential(
                    OrderedDict(
                        norm=nn.BatchNorm2d(channels),
                        relu=nn.ReLU(inplace=True),
                        conv=nn.Conv2d(channels, channels // 2, kernel_size=1, bias=False),
                        pool=nn.AvgPool2d(kernel_size=2, stride=2),
                    )
                )
                self.features.add_module(f"transition{i + 1}", transition)
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        out = F.relu(features, inplace=True)
        out = F.adaptive_avg_pool2d(out, (1, 1))
        out = torch.flatten(out, 1)
        return self.classifier(out)


def densenet() -> nn.Module:
    return DenseNet()


def _conv_bn_silu(ch_in: int, ch_out: int, k: int = 3, s: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(ch_in, ch_out, k, s, k // 2, bias=False),
        nn.BatchNorm2d(ch_out, eps=1e-3, momentum=0.03),
        nn.SiLU(inplace=True),
    )


class CSPLayer(nn.Module):
    """Half of the channels pass by the bottlenecks."""

    def __init__(self, channels: int, n: int) -> None:
        super().__init__()
        self.c = channels // 2
        self.cv1 = _conv_bn_silu(channels, 2 * self.c, 1)
        self.cv2 = _conv_bn_silu((2 + n) * self.c, channels, 1)
        self.m = nn.ModuleList(
            nn.Sequential(_conv_bn_silu(self.c, self.c), _conv_bn_silu(self.c, self.c)) for _ in range(n)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(y[-1] + m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = _conv_bn_silu(channels, channels // 2, 1)
        self.cv2 = _conv_bn_silu(channels * 2, channels, 1)
        self.m = nn.MaxPool2d(kernel_size=5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        return self.cv2(torch.cat((x, y1, y2, self.m(y2)), 1))


class DarkNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            _conv_bn_silu(3, 8, 3, 2),
            _conv_bn_silu(8, 16, 3, 2),
            CSPLayer(16, 1),
            _conv_bn_silu(16, 32, 3, 2),
            CSPLayer(32, 1),
            SPPF(32),
        )
        self.linear = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for m in self.model:
            x = m(x)
        return self.linear(x.mean([2, 3]))


def darknet_csp() -> nn.Module:
    return DarkNet()


class RepVGGBlock(nn.Module):
    """Three branches in training, which deployment would sum into one kernel."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        same = in_channels == out_channels and stride == 1
        self.rbr_identity = nn.BatchNorm2d(in_channels) if same else None
        self.rbr_dense = self._conv_bn(in_channels, out_channels, 3, stride, 1)
        self.rbr_1x1 = self._conv_bn(in_channels, out_channels, 1, stride, 0)
        self.nonlinearity = nn.ReLU()

    @staticmethod
    def _conv_bn(i: int, o: int, kernel_size: int, stride: int, padding: int) -> nn.Sequential:
        result = nn.Sequential()
        result.add_module("conv", nn.Conv2d(i, o, kernel_size, stride, padding, bias=False))
        result.add_module("bn", nn.BatchNorm2d(o))
        return result

    def forward(self, inputs: Tensor) -> Tensor:
        id_out: Tensor | int = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        return self.nonlinearity(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out)


def repvgg() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            stage0=RepVGGBlock(3, 8, 2),
            stage1=nn.Sequential(RepVGGBlock(8, 16, 2), RepVGGBlock(16, 16)),
            stage2=nn.Sequential(RepVGGBlock(16, 32, 2), RepVGGBlock(32, 32)),
            gap=nn.AdaptiveAvgPool2d(output_size=1),
            flat=nn.Flatten(),
            linear=nn.Linear(32, CLASSES),
        )
    )


class MaxoutConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, pieces: int) -> None:
        super().__init__()
        self.pieces = pieces
        self.conv = nn.Conv2d(in_channels, out_channels * pieces, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        n, c, h, w = x.shape
        return x.view(n, c // self.pieces, self.pieces, h, w).max(dim=2)[0]


def maxout_cnn() -> nn.Module:
    return nn.Sequential(
        MaxoutConv(3, 8, 2), nn.MaxPool2d(2), MaxoutConv(8, 16, 2), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 8 * 8, CLASSES),
    )  # fmt: skip


ENTRIES = (
    architecture(vgg11_bn, blocks=3),
    architecture(alexnet),
    architecture(lenet5, (1, 28, 28)),
    architecture(newcomer_cnn, blocks=3),
    architecture(all_convolutional, notes="the classes are channels of the last convolution"),
    architecture(inception, (3, 35, 35), blocks=3),
    architecture(densenet, blocks=3),
    architecture(darknet_csp, blocks=3),
    architecture(repvgg, blocks=3),
    architecture(maxout_cnn),
)
