"""Stages that are compiled in a moment."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from frostline.exporter.output_module import OutputModule
from frostline.exporter.stage import Stage, StageModel

WIDTH, LENGTH = 8, 4


class Perceptron(nn.Module):
    """x + w(relu(v(x))): wide in the middle, where two tensors pass."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(8 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.relu(self.widen(x)))


def token_stage(*layers: nn.Module, classes: int, vocabulary: int | None = None) -> Stage:
    """Layers over LENGTH tokens of WIDTH features each, or of token ids where there is a vocabulary."""
    head = nn.Sequential(nn.Flatten(), nn.Linear(LENGTH * WIDTH, classes))
    model = StageModel(nn.Sequential(*layers), OutputModule({}, head))
    return Stage(0, 1, "tokens", model, (LENGTH, WIDTH) if vocabulary is None else (LENGTH,), vocabulary)
