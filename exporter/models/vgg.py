"""Plain convolutional networks (Simonyan & Zisserman, ICLR 2015) in the form used for small images.

The convolutions follow the paper's table 1, each with normalisation; the three fully connected layers shrink to
one behind global average pooling, because the features of a small image end at about one pixel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from frostline.exporter.models.layers import check_sizes, initialise_convolutions, normalisation

VGG_BLOCKS = ("block1", "block2", "block3", "block4", "block5")

WIDTH_FACTORS = (1, 2, 4, 8, 8)


class ConvolutionBlock(nn.Sequential):
    """3×3 convolutions with normalisation and ReLU, then 2×2 max pooling if ``pool``.

    Parameters
    ----------
    depth
        Number of convolutions.
    inputs, outputs
        Channels in and out.
    norm
        ``"group"`` or ``"batch"``.
    pool
        Halve height and width (rounded down) at the end; needs both to be at least two.

    Raises
    ------
    UsageError
        ``norm`` is neither of the two.
    """

    def __init__(self, depth: int, inputs: int, outputs: int, norm: str, pool: bool) -> None:
        layers: list[nn.Module] = []
        for index in range(depth):
            incoming = inputs if index == 0 else outputs
            layers.append(nn.Conv2d(incoming, outputs, 3, padding=1, bias=False))
            layers += [normalisation(norm, outputs), nn.ReLU()]
        if pool:
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers)


class VGG(nn.Module):
    """Five convolution blocks, global average pooling and a linear classifier.

    A block leaves its pooling out where the features are one pixel high and wide already.

    Parameters
    ----------
    depths
        Convolutions in each of the five blocks.
    classes
        Logits per image.
    channels
        Channels of the input image.
    width
        Channels of ``block1``; the later blocks have 2, 4, 8 and 8 times as many.
    norm
        ``"group"`` or ``"batch"``.
    input_size
        Height and width of the images in pixels.

    Raises
    ------
    UsageError
        A size is not a whole number of at least one, or ``norm`` is unknown.
    """

    def __init__(
        self, depths: Sequence[int], classes: int, channels: int, width: int, norm: str, input_size: int
    ) -> None:
        super().__init__()
        check_sizes(classes=classes, channels=channels, width=width, input_size=input_size)
        incoming, size = channels, input_size
        for name, depth, factor in zip(VGG_BLOCKS, depths, WIDTH_FACTORS, strict=True):
            self.add_module(name, ConvolutionBlock(depth, incoming, factor * width, norm, pool=size > 1))
            incoming, size = factor * width, max(size // 2, 1)
        self.fc = nn.Linear(incoming, classes)
        initialise_convolutions(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (batch, classes) of float32 ``images`` (batch, channels, height, width)."""
        features = images
        for name in VGG_BLOCKS:
            features = self.get_submodule(name)(features)
        logits: torch.Tensor = self.fc(features.mean((2, 3)))
        return logits


def vgg11(
    classes: int = 10, channels: int = 3, width: int = 64, norm: str = "group", input_size: int = 32
) -> VGG:
    """Build configuration A of the paper: eight convolutions; options as in `VGG`.

    Returns
    -------
    VGG
        Weights drawn from torch's global CPU generator.

    Raises
    ------
    UsageError
        A size is not a whole number of at least one, or ``norm`` is unknown.
    """
    return VGG((1, 1, 2, 2, 2), classes, channels, width, norm, input_size)


def vgg16(
    classes: int = 10, channels: int = 3, width: int = 64, norm: str = "group", input_size: int = 32
) -> VGG:
    """Build configuration D of the paper: thirteen convolutions; options as in `VGG`.

    Returns
    -------
    VGG
        Weights drawn from torch's global CPU generator.

    Raises
    ------
    UsageError
        A size is not a whole number of at least one, or ``norm`` is unknown.
    """
    return VGG((2, 2, 3, 3, 3), classes, channels, width, norm, input_size)
