"""A convolutional network over windows of sensor readings, such as a phone's accelerometer and gyroscope.

Convolutions along time that share their weights over the window (Yang et al., "Deep Convolutional Neural Networks on
Multichannel Time Series for Human Activity Recognition", IJCAI 2015), with kernels of five readings as in DeepConvLSTM
(Ordóñez & Roggen, Sensors 16(1), 2016). The default input is that of Anguita et al., "A Public Domain Dataset for Human
Activity Recognition Using Smartphones" (ESANN 2013): nine channels, 128 readings, six activities.
"""

from __future__ import annotations

import torch
from torch import nn

from frostline.exporter.models.layers import check_sizes, initialise_convolutions, normalisation

SENSOR_BLOCKS = ("block1", "block2", "block3", "block4")

WIDTH_FACTORS = (1, 2, 4, 4)

KERNEL = 5


class SensorBlock(nn.Sequential):
    """A convolution along time with normalisation and ReLU, then max pooling by two if ``pool``.

    Parameters
    ----------
    inputs, outputs
        Channels in and out.
    norm
        ``"group"`` or ``"batch"``.
    pool
        Halve the length (rounded down) at the end; needs it to be at least two.

    Raises
    ------
    UsageError
        ``norm`` is neither of the two.
    """

    def __init__(self, inputs: int, outputs: int, norm: str, pool: bool) -> None:
        convolution = nn.Conv1d(inputs, outputs, KERNEL, padding=KERNEL // 2, bias=False)
        layers: list[nn.Module] = [convolution, normalisation(norm, outputs, dimensions=1), nn.ReLU()]
        if pool:
            layers.append(nn.MaxPool1d(2))
        super().__init__(*layers)


class SensorCNN(nn.Module):
    """Four blocks of one convolution each, the mean over time and a linear classifier.

    A block leaves its pooling out where one reading is left already.

    Parameters
    ----------
    classes
        Logits per window.
    channels
        Readings at each moment.
    length
        Moments in a window.
    width
        Channels of ``block1``; the later blocks have 2, 4 and 4 times as many.
    norm
        ``"group"`` or ``"batch"``.

    Raises
    ------
    UsageError
        A size is not a whole number of at least one, or ``norm`` is unknown.
    """

    def __init__(self, classes: int, channels: int, length: int, width: int, norm: str) -> None:
        super().__init__()
        check_sizes(classes=classes, channels=channels, length=length, width=width)
        incoming = channels
        for name, factor in zip(SENSOR_BLOCKS, WIDTH_FACTORS, strict=True):
            self.add_module(name, SensorBlock(incoming, factor * width, norm, pool=length > 1))
            incoming, length = factor * width, max(length // 2, 1)
        self.fc = nn.Linear(incoming, classes)
        initialise_convolutions(self)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (batch, classes) of float32 ``windows`` (batch, channels, length)."""
        features = windows
        for name in SENSOR_BLOCKS:
            features = self.get_submodule(name)(features)
        logits: torch.Tensor = self.fc(features.mean(2))
        return logits


def sensor_cnn(
    classes: int = 6, channels: int = 9, length: int = 128, width: int = 32, norm: str = "group"
) -> SensorCNN:
    """Build the network; options as in `SensorCNN`.

    Returns
    -------
    SensorCNN
        Weights drawn from torch's global CPU generator.

    Raises
    ------
    UsageError
        A size is not a whole number of at least one, or ``norm`` is unknown.
    """
    return SensorCNN(classes, channels, length, width, norm)
