"""A model that ExecuTorch can train and ONNX has no words for: distances between the samples of a batch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ByDistance(nn.Module):
    """Divides features (N, ...) by the mean distance between the samples, as if it were a constant."""

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same shape."""
        return x / (1 + F.pdist(x.detach().flatten(1)).mean())


def digits(width: int = 8, classes: int = 10) -> nn.Module:
    """Two convolutions on single-channel images, of which the second block compares samples."""
    stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
    body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), ByDistance(), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(64 * width, classes))
    return nn.Sequential(stem, body, head)
