"""MobileNetV2 for small images (Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018).

The plan of the paper's table 2. As is usual for 32×32 images, the stem and the second row keep the resolution, so that
the features end at 4×4 pixels.
"""

from __future__ import annotations

import torch
from torch import nn

from frostline.exporter.models.layers import check_sizes, initialise_convolutions, normalisation
from frostline.protocol.errors import UsageError

MOBILENET_BLOCKS = ("block1", "block2", "block3", "block4", "block5")

PLAN = (
    ("block1", 1, 16, 1, 1),
    ("block1", 6, 24, 2, 1),
    ("block2", 6, 32, 3, 2),
    ("block3", 6, 64, 4, 2),
    ("block4", 6, 96, 3, 1),
    ("block5", 6, 160, 3, 2),
    ("block5", 6, 320, 1, 1),
)
"""Rows of table 2: the block of ours, expansion, channels, units, and the stride of the first unit."""

STEM, LAST = 32, 1280
"""Channels of the first and the last convolution at a width of 1."""


class InvertedResidual(nn.Module):
    """Expansion, depthwise 3×3 convolution and linear projection (figure 3b and table 1 of the paper).

    The input is added where the shape stays the same. Without expansion the first convolution is left out.

    Parameters
    ----------
    inputs, outputs
        Channels in and out.
    expansion
        How many times as many channels the depthwise convolution has as the input.
    stride
        Stride of the depthwise convolution.
    norm
        ``"group"`` or ``"batch"``.

    Raises
    ------
    UsageError
        ``norm`` is neither of the two.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, norm: str) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand: nn.Module = nn.Identity()
        if expansion != 1:
            self.expand = _convolution(inputs, hidden, 1, 1, norm)
        self.depthwise = _convolution(hidden, hidden, 3, stride, norm, groups=hidden)
        self.project = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.norm = normalisation(norm, outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return float features (batch, outputs, height / stride, width / stride), rounded up."""
        projected: torch.Tensor = self.norm(self.project(self.depthwise(self.expand(features))))
        return features + projected if self.residual else projected


class MobileNetV2(nn.Module):
    """Stem, inverted residuals, a 1×1 convolution, global average pooling and a linear classifier.

    The five blocks divide table 2 of the paper where channels or resolution change. The last 1×1 convolution follows
    the last block and so belongs to the head: a stand-in that leads to its 1280 channels would be larger than all the
    blocks before it.

    Parameters
    ----------
    classes
        Logits per image.
    channels
        Channels of the input image.
    width
        Multiplier of every layer's channels, which are then rounded to a multiple of eight; the last convolution keeps
        1280 below a width of one (section 4 of the paper).
    norm
        ``"group"`` or ``"batch"``.

    Raises
    ------
    UsageError
        A size is not a whole number of at least one, ``width`` is not above zero, or ``norm`` is unknown.
    """

    def __init__(self, classes: int, channels: int, width: float, norm: str) -> None:
        super().__init__()
        check_sizes(classes=classes, channels=channels)
        if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width < float("inf"):
            raise UsageError(f"model option 'width' is {width!r}: give a multiplier above 0, such as 0.5")
        incoming = _rounded(STEM * width)
        self.stem = _convolution(channels, incoming, 3, 1, norm)
        units: dict[str, list[nn.Module]] = {name: [] for name in MOBILENET_BLOCKS}
        for name, expansion, planned, count, stride in PLAN:
            outgoing = _rounded(planned * width)
            for index in range(count):
                step = stride if index == 0 else 1
                units[name].append(InvertedResidual(incoming, outgoing, expansion, step, norm))
                incoming = outgoing
        for name in MOBILENET_BLOCKS:
            self.add_module(name, nn.Sequential(*units[name]))
        last = _rounded(LAST * max(width, 1.0))
        self.last = _convolution(incoming, last, 1, 1, norm)
        self.fc = nn.Linear(last, classes)
        initialise_convolutions(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (batch, classes) of float32 ``images`` (batch, channels, height, width)."""
        features = self.stem(images)
        for name in MOBILENET_BLOCKS:
            features = self.get_submodule(name)(features)
        logits: torch.Tensor = self.fc(self.last(features).mean((2, 3)))
        return logits


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int, norm: str, groups: int = 1
) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, normalisation(norm, outputs), nn.ReLU6())


def _rounded(channels: float) -> int:
    """Round to the nearest multiple of eight, up where that would lose more than a tenth of the channels."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def mobilenet_v2(
    classes: int = 10, channels: int = 3, width: float = 1.0, norm: str = "group", input_size: int = 32
) -> MobileNetV2:
    """Build the network.

    Parameters
    ----------
    classes, channels, width, norm
        As in `MobileNetV2`.
    input_size
        Height and width of the images in pixels; the weights do not depend on it.

    Returns
    -------
    MobileNetV2
        Weights drawn from torch's global CPU generator.

    Raises
    ------
    UsageError
        A size is not a whole number of at least one, ``width`` is not above zero, or ``norm`` is unknown.
    """
    check_sizes(input_size=input_size)
    return MobileNetV2(classes, channels, width, norm)
