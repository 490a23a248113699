from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from frostline.exporter.cutting import cut
from frostline.exporter.stage import build_stage
from tests.exporter.padded_tokens import PaddedTokens


def _images() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def test_random_batches_are_what_the_blocks_before_make() -> None:
    parts = cut(_images(), ["1", "3"], torch.zeros(2, 3, 8, 8))
    first, second = (build_stage(parts, index, seed=0) for index in range(2))
    assert bool((first.random_batch(5, seed=1) < 0).any())
    features = second.random_batch(5, seed=1)
    assert features.shape == (5, 4, 6, 6)
    assert bool((features >= 0).all()) and bool((features > 0).any())
    torch.testing.assert_close(features, parts.blocks[0].module(first.random_batch(5, seed=1)))
    assert torch.equal(features, second.random_batch(5, seed=1))
    assert not torch.equal(features, second.random_batch(5, seed=2))


def test_a_mask_that_is_handed_on_stays_one() -> None:
    parts = cut(PaddedTokens(), 3, torch.ones(2, 6, dtype=torch.int64), 11)
    mask, tokens = parts.blocks[0].outputs
    packed = build_stage(parts, 1, seed=0).random_batch(16, seed=0)
    assert set(packed[:, : mask.size].unique().tolist()) == {-math.inf, 0.0}
    assert bool(packed[:, mask.size :].isfinite().all()) and packed.shape[1] == mask.size + tokens.size


def test_features_lie_as_a_device_holds_them() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.fc = nn.Conv1d(3, 4, 1), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.one(x).transpose(1, 2)
            return self.fc(torch.relu(self.two(tokens)).mean(1))  # type: ignore[no-any-return]

    parts = cut(Turned(), ["one+transpose", "two"], torch.zeros(2, 3, 5))
    assert build_stage(parts, 1, seed=0).random_batch(4, seed=0).is_contiguous()
