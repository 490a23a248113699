"""A model that ExecuTorch can train and ONNX has no words for: a margin that is reflected inwards."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Margins(nn.Module):
    """Adds a margin to images and takes it away again, the second time by reflecting a negative width."""

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same shape."""
        return F.pad(F.pad(x, (2, 2, 2, 2)), (-2, -2, -2, -2), mode="reflect")


def digits(width: int = 8, classes: int = 10) -> nn.Module:
    """Two convolutions on single-channel images; the second block has the margins."""
    stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
    body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), Margins(), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(64 * width, classes))
    return nn.Sequential(stem, body, head)
