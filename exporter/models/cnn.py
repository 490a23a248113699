"""A small convolutional network for demonstrations and boards with little memory."""

from __future__ import annotations

import torch
from torch import nn

from frostline.exporter.models.layers import check_sizes, initialise_convolutions
from frostline.exporter.models.vgg import ConvolutionBlock

SMALL_CNN_BLOCKS = ("block1", "block2", "block3")


class SmallCNN(nn.Module):
    """Three blocks of one convolution each, global average pooling and a linear classifier.

    A block leaves its pooling out where the features are one pixel high and wide already.

    Parameters
    ----------
    classes
        Logits per image.
    channels
        Channels of the input image.
    width
        Channels of ``block1``; the later blocks have two and four times as many.
    norm
        ``"group"`` or ``"batch"``.
    input_size
        Height and width of the images in pixels.

    Raises
    ------
    UsageError
        A size is not a whole number of at least one, or ``norm`` is unknown.
    """

    def __init__(self, classes: int, channels: int, width: int, norm: str, input_size: int) -> None:
        super().__init__()
        check_sizes(classes=classes, channels=channels, width=width, input_size=input_size)
        self.block1 = ConvolutionBlock(1, channels, width, norm, pool=input_size > 1)
        self.block2 = ConvolutionBlock(1, width, 2 * width, norm, pool=input_size // 2 > 1)
        self.block3 = ConvolutionBlock(1, 2 * width, 4 * width, norm, pool=input_size // 4 > 1)
        self.fc = nn.Linear(4 * width, classes)
        initialise_convolutions(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (batch, classes) of float32 ``images`` (batch, channels, height, width)."""
        features = self.block3(self.block2(self.block1(images)))
        logits: torch.Tensor = self.fc(features.mean((2, 3)))
        return logits


def small_cnn(
    classes: int = 10, channels: int = 3, width: int = 32, norm: str = "group", input_size: int = 32
) -> SmallCNN:
    """Build the network; options as in `SmallCNN`.

    Returns
    -------
    SmallCNN
        Weights drawn from torch's global CPU generator.

    Raises
    ------
    UsageError
        A size is not a whole number of at least one, or ``norm`` is unknown.
    """
    return SmallCNN(classes, channels, width, norm, input_size)
