"""Convolutional networks made for phones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import CLASSES, architecture


class ConvNormActivation(nn.Sequential):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        activation_layer: Callable[..., nn.Module] | None = nn.ReLU,
    ) -> None:
        padding = (kernel_size - 1) // 2
        layers = [
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False),
            norm_layer(out_channels),
        ]
        if activation_layer is not None:
            layers.append(activation_layer(inplace=True))
        super().__init__(*layers)
        self.out_channels = out_channels


def stochastic_depth(x: Tensor, p: float, training: bool) -> Tensor:
    """Drop a residual branch of whole samples."""
    if not training or p == 0.0:
        return x
    noise = torch.empty([x.shape[0]] + [1] * (x.ndim - 1), dtype=x.dtype, device=x.device)
    noise = noise.bernoulli_(1.0 - p)
    noise.div_(1.0 - p)
    return x * noise


class StochasticDepth(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return stochastic_depth(x, self.p, self.training)


class SqueezeExcitation(nn.Module):
    def __init__(
        self,
        channels: int,
        squeeze: int,
        activation: Callable[..., nn.Module] = nn.ReLU,
        scale: Callable[..., nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, channels, 1)
        self.activation = activation()
        self.scale_activation = scale()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.fc2(self.activation(self.fc1(self.avgpool(x))))
        return self.scale_activation(scale) * x


def mobilenet_v1() -> nn.Module:
    def conv_dw(i: int, o: int, s: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(i, i, 3, s, 1, groups=i, bias=False), nn.BatchNorm2d(i), nn.ReLU6(inplace=True),
            nn.Conv2d(i, o, 1, 1, 0, bias=False), nn.BatchNorm2d(o), nn.ReLU6(inplace=True),
        )  # fmt: skip

    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True),
        conv_dw(8, 16, 1), conv_dw(16, 32, 2), conv_dw(32, 32, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


class InvertedResidual(nn.Module):
    def __init__(self, inp: int, oup: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        hidden_dim = round(inp * expand_ratio)
        self.use_res_connect = stride == 1 and inp == oup
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers.append(ConvNormActivation(inp, hidden_dim, kernel_size=1, activation_layer=nn.ReLU6))
        layers.extend(
            [
                ConvNormActivation(
                    hidden_dim, hidden_dim, stride=stride, groups=hidden_dim, activation_layer=nn.ReLU6
                ),
                nn.Conv2d(hidden_dim, oup, 1, 1, 0, bias=False),
                nn.BatchNorm2d(oup),
            ]
        )
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = [ConvNormActivation(3, 8, stride=2, activation_layer=nn.ReLU6)]
        channel = 8
        for t, c, n, s in [(1, 8, 1, 1), (6, 8, 2, 2), (6, 16, 2, 2)]:
            for i in range(n):
                features.append(InvertedResidual(channel, c, s if i == 0 else 1, expand_ratio=t))
                channel = c
        features.append(ConvNormActivation(channel, 64, kernel_size=1, activation_layer=nn.ReLU6))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(p=0.2), nn.Linear(64, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        x = torch.flatten(x, 1)
        return self.classifier(x)


def mobilenet_v2() -> nn.Module:
    return MobileNetV2()


class MobileNetV3Block(nn.Module):
    def __init__(self, i: int, hidden: int, o: int, kernel: int, stride: int, se: bool, hswish: bool) -> None:
        super().__init__()
        self.residual = stride == 1 and i == o
        activation = nn.Hardswish if hswish else nn.ReLU
        norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)
        layers: list[nn.Module] = []
        if hidden != i:
            layers.append(
                ConvNormActivation(i, hidden, kernel_size=1, norm_layer=norm, activation_layer=activation)
            )
        layers.append(
            ConvNormActivation(
                hidden, hidden, kernel, stride, groups=hidden, norm_layer=norm, activation_layer=activation
            )
        )
        if se:
            layers.append(SqueezeExcitation(hidden, max(hidden // 4, 8), scale=nn.Hardsigmoid))
        layers.append(ConvNormActivation(hidden, o, kernel_size=1, norm_layer=norm, activation_layer=None))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.residual:
            result += x
        return result


class MobileNetV3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvNormActivation(3, 8, 3, 2, activation_layer=nn.Hardswish),
            MobileNetV3Block(8, 8, 8, 3, 2, se=True, hswish=False),
            MobileNetV3Block(8, 24, 16, 3, 1, se=False, hswish=False),
            MobileNetV3Block(16, 32, 16, 5, 1, se=True, hswish=True),
            ConvNormActivation(16, 48, 1, activation_layer=nn.Hardswish),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(48, 64),
            nn.Hardswish(inplace=True),
            nn.Dropout(p=0.2, inplace=True),
            nn.Linear(64, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        x = torch.flatten(x, 1)
        return self.classifier(x)


def mobilenet_v3() -> nn.Module:
    return MobileNetV3()


class MBConv(nn.Module):
    def __init__(self, i: int, o: int, kernel: int, stride: int, expand: int, drop: float) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and i == o
        hidden = i * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers.append(ConvNormActivation(i, hidden, 1, activation_layer=nn.SiLU))
        layers += [
            ConvNormActivation(hidden, hidden, kernel, stride, groups=hidden, activation_layer=nn.SiLU),
            SqueezeExcitation(hidden, max(1, i // 4), activation=partial(nn.SiLU, inplace=True)),
            ConvNormActivation(hidden, o, 1, activation_layer=None),
        ]
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result = self.stochastic_depth(result)
            result += x
        return result


class FusedMBConv(nn.Module):
    def __init__(self, i: int, o: int, stride: int, expand: int, drop: float) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and i == o
        self.block = nn.Sequential(
            ConvNormActivation(i, i * expand, 3, stride, activation_layer=nn.SiLU),
            ConvNormActivation(i * expand, o, 1, activation_layer=None),
        )
        self.stochastic_depth = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result = self.stochastic_depth(result)
            result += x
        return result


class EfficientNet(nn.Module):
    def __init__(self, stages: Sequence[nn.Module], first: int, last: int, wide: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvNormActivation(3, first, 3, 2, activation_layer=nn.SiLU),
            *stages,
            ConvNormActivation(last, wide, 1, activation_layer=nn.SiLU),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(p=0.2, inplace=True), nn.Linear(wide, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


def efficientnet_b0() -> nn.Module:
    stages = [
        nn.Sequential(MBConv(8, 8, 3, 1, 1, 0.0)),
        nn.Sequential(MBConv(8, 16, 3, 2, 4, 0.05), MBConv(16, 16, 3, 1, 4, 0.1)),
        nn.Sequential(MBConv(16, 24, 5, 2, 4, 0.15), MBConv(24, 24, 5, 1, 4, 0.2)),
    ]
    return EfficientNet(stages, 8, 24, 64)


def efficientnet_v2() -> nn.Module:
    stages = [
        nn.Sequential(FusedMBConv(8, 8, 1, 2, 0.05)),
        nn.Sequential(FusedMBConv(8, 16, 2, 4, 0.1)),
        nn.Sequential(MBConv(16, 24, 3, 2, 4, 0.15), MBConv(24, 24, 3, 1, 4, 0.2)),
    ]
    return EfficientNet(stages, 8, 24, 64)


def mnasnet() -> nn.Module:
    class Block(nn.Module):
        def __init__(self, i: int, o: int, kernel: int, stride: int, factor: int) -> None:
            super().__init__()
            mid = i * factor
            self.apply_residual = i == o and stride == 1
            self.layers = nn.Sequential(
                nn.Conv2d(i, mid, 1, bias=False), nn.BatchNorm2d(mid, momentum=0.0003), nn.ReLU(inplace=True),
                nn.Conv2d(mid, mid, kernel, padding=kernel // 2, stride=stride, groups=mid, bias=False),
                nn.BatchNorm2d(mid, momentum=0.0003), nn.ReLU(inplace=True),
                nn.Conv2d(mid, o, 1, bias=False), nn.BatchNorm2d(o, momentum=0.0003),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x) + x if self.apply_residual else self.layers(x)

    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(8, momentum=0.0003), nn.ReLU(inplace=True),
        Block(8, 12, 3, 2, 3), Block(12, 12, 3, 1, 3), Block(12, 16, 5, 2, 3), Block(16, 16, 5, 1, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(p=0.2, inplace=True), nn.Linear(16, CLASSES),
    )  # fmt: skip


ENTRIES = (
    architecture(mobilenet_v1),
    architecture(mobilenet_v2, blocks=3, notes="linear bottlenecks: means in front of a norm hardly move"),
    architecture(mobilenet_v3, blocks=3),
    architecture(efficientnet_b0, blocks=3, notes="stochastic depth by sample"),
    architecture(efficientnet_v2, blocks=3),
    architecture(mnasnet, notes="running statistics move by 0.0003 of the way"),
)
