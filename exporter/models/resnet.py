"""Residual networks for small images (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016).

The four-layer plan of the paper's table 1 with basic residual units, behind the stem its section 4.2 uses for
CIFAR: one 3×3 convolution of stride 1 and no max pooling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from frostline.exporter.models.layers import check_sizes, initialise_convolutions, normalisation

RESNET_BLOCKS = ("layer1", "layer2", "layer3", "layer4")


class ResidualUnit(nn.Module):
    """Two 3×3 convolutions added to a shortcut (figure 2 of the paper).

    The shortcut is the identity, or a 1×1 convolution with normalisation where the shape changes (option B).

    Parameters
    ----------
    inputs, outputs
        Channels in and out.
    stride
        Stride of the first convolution and of the shortcut.
    norm
        ``"group"`` or ``"batch"``.

    Raises
    ------
    UsageError
        ``norm`` is neither of the two.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = normalisation(norm, outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = normalisation(norm, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), normalisation(norm, outputs)
            )
        self.relu2 = nn.ReLU()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return float features (batch, outputs, height / stride, width / stride), rounded up."""
        residual = self.relu1(self.norm1(self.conv1(features)))
        residual = self.norm2(self.conv2(residual))
        activated: torch.Tensor = self.relu2(residual + self.shortcut(features))
        return activated


class ResNet(nn.Module):
    """Stem, four layers of residual units, global average pooling and a linear classifier.

    Parameters
    ----------
    units
        Residual units in each of the four layers.
    classes
        Logits per image.
    channels
        Channels of the input image.
    width
        Channels of the stem and of ``layer1``; each later layer doubles it.
    norm
        ``"group"`` or ``"batch"``.
    stem_stride
        Stride of the stem: 2 quarters the memory and the work of every layer.

    Raises
    ------
    UsageError
        A size is not a whole number of at least one, or ``norm`` is unknown.
    """

    def __init__(
        self, units: Sequence[int], classes: int, channels: int, width: int, norm: str, stem_stride: int = 1
    ) -> None:
        super().__init__()
        check_sizes(classes=classes, channels=channels, width=width, stem_stride=stem_stride)
        self.conv1 = nn.Conv2d(channels, width, 3, stem_stride, padding=1, bias=False)
        self.norm1 = normalisation(norm, width)
        self.relu = nn.ReLU()
        self.layer1 = _layer(units[0], width, width, 1, norm)
        self.layer2 = _layer(units[1], width, 2 * width, 2, norm)
        self.layer3 = _layer(units[2], 2 * width, 4 * width, 2, norm)
        self.layer4 = _layer(units[3], 4 * width, 8 * width, 2, norm)
        self.fc = nn.Linear(8 * width, classes)
        initialise_convolutions(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (batch, classes) of float32 ``images`` (batch, channels, height, width)."""
        features = self.relu(self.norm1(self.conv1(images)))
        features = self.layer4(self.layer3(self.layer2(self.layer1(features))))
        logits: torch.Tensor = self.fc(features.mean((2, 3)))
        return logits


def _layer(units: int, inputs: int, outputs: int, stride: int, norm: str) -> nn.Sequential:
    first = ResidualUnit(inputs, outputs, stride, norm)
    return nn.Sequential(first, *(ResidualUnit(outputs, outputs, 1, norm) for _ in range(units - 1)))


def resnet10(
    classes: int = 10,
    channels: int = 3,
    width: int = 64,
    norm: str = "group",
    stem_stride: int = 1,
    input_size: int = 32,
) -> ResNet:
    """Build a ResNet with one residual unit in each layer.

    Parameters
    ----------
    classes, channels, width, norm, stem_stride
        As in `ResNet`.
    input_size
        Height and width of the images in pixels; the weights do not depend on it.

    Returns
    -------
    ResNet
        Weights drawn from torch's global CPU generator.

    Raises
    ------
    UsageError
        A size is not a whole number of at least one, or ``norm`` is unknown.
    """
    check_sizes(input_size=input_size)
    return ResNet((1, 1, 1, 1), classes, channels, width, norm, stem_stride)


def resnet18(
    classes: int = 10,
    channels: int = 3,
    width: int = 64,
    norm: str = "group",
    stem_stride: int = 1,
    input_size: int = 32,
) -> ResNet:
    """Build a ResNet with two residual units in each layer (table 1 of the paper); options as in `resnet10`.

    Returns
    -------
    ResNet
        Weights drawn from torch's global CPU generator.

    Raises
    ------
    UsageError
        A size is not a whole number of at least one, or ``norm`` is unknown.
    """
    check_sizes(input_size=input_size)
    return ResNet((2, 2, 2, 2), classes, channels, width, norm, stem_stride)


def resnet34(
    classes: int = 10,
    channels: int = 3,
    width: int = 64,
    norm: str = "group",
    stem_stride: int = 1,
    input_size: int = 32,
) -> ResNet:
    """Build a ResNet with 3, 4, 6 and 3 residual units (table 1 of the paper); options as in `resnet10`.

    Returns
    -------
    ResNet
        Weights drawn from torch's global CPU generator.

    Raises
    ------
    UsageError
        A size is not a whole number of at least one, or ``norm`` is unknown.
    """
    check_sizes(input_size=input_size)
    return ResNet((3, 4, 6, 3), classes, channels, width, norm, stem_stride)
