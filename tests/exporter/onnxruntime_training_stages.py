"""Stages with layers that the built-in models lack."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frostline.exporter.output_module import OutputModule
from frostline.exporter.stage import Stage, StageModel
from tests.exporter.small_stages import WIDTH, token_stage


def dropout(classes: int) -> Stage:
    return token_stage(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3), nn.ReLU(), nn.Dropout(0.5), classes=classes)


def attention(classes: int) -> Stage:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.1, batch_first=True, norm_first=True)
    return token_stage(layer, classes=classes)


def activations(classes: int) -> Stage:
    layers = [
        nn.Hardswish(),
        nn.SiLU(),
        nn.GELU(),
        nn.Mish(),
        nn.ELU(),
        nn.LeakyReLU(),
        nn.Softplus(),
        nn.Tanh(),
    ]
    pairs = [each for layer in layers for each in (nn.Linear(WIDTH, WIDTH), layer)]
    return token_stage(*pairs, nn.Hardsigmoid(), nn.Sigmoid(), nn.ReLU6(), classes=classes)


def frozen(classes: int) -> Stage:
    first, norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
    first.weight.requires_grad_(False)
    norm.weight.requires_grad_(False)
    return _images(
        first, norm, nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.InstanceNorm2d(8), classes=classes
    )


def repeated(classes: int) -> Stage:
    norm = nn.BatchNorm2d(3)
    return _images(norm, nn.Conv2d(3, 3, 3, padding=1), norm, nn.ReLU(), classes=classes)


def pooling(classes: int) -> Stage:
    layers = (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Dropout2d(0.4),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 1),
        nn.AvgPool2d(2),
    )
    return _images(*layers, classes=classes)


def cumulative(classes: int) -> Stage:
    return _images(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), classes=classes)


class _Accumulated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x).cumsum(-1) + x.cumprod(-1)


def no_gradient(classes: int) -> Stage:
    return _images(nn.Conv2d(3, 4, 3), _Accumulated(), classes=classes)


def transposed(classes: int) -> Stage:
    return _images(nn.ConvTranspose2d(3, 4, 2, 2), nn.ReLU(), classes=classes)


def _images(*layers: nn.Module, classes: int) -> Stage:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(classes))
    model = StageModel(nn.Sequential(*layers), OutputModule({}, head))
    model(torch.zeros(2, 3, 8, 8))
    return Stage(0, 1, "images", model, (3, 8, 8))
