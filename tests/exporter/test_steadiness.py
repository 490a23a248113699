"""Random numbers that a compiled step does not have, and what is seen of them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from frostline.exporter.cutting import cut
from frostline.protocol.errors import UsageError

EXAMPLE = torch.zeros(1, 6)


class Skipped(nn.Module):
    """A layer that is left out now and then, as Python's random numbers say."""

    def __init__(self, probability: float, draw: str = "random") -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.probability, self.draw = probability, draw

    def forward(self, x: Tensor) -> Tensor:
        drawn = random.uniform(0, 1) if self.draw == "random" else np.random.rand()
        return x if self.training and drawn < self.probability else x + self.layer(x)


def refusal(*layers: nn.Module) -> str:
    with pytest.raises(UsageError) as caught:
        cut(nn.Sequential(nn.Linear(6, 6), *layers, nn.Linear(6, 3)), 1, EXAMPLE)
    return str(caught.value)


@pytest.mark.parametrize("draw", ["random", "numpy"])
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_a_layer_that_is_skipped_now_and_then_is_refused(probability: float, draw: str) -> None:
    assert "module '1' returns other values when the same batch comes again" in refusal(
        Skipped(probability, draw)
    )


def test_random_numbers_that_change_nothing_are_let_through() -> None:
    module = nn.Sequential(nn.Linear(6, 6), Skipped(0.0), nn.Linear(6, 3))
    assert cut(module, 1, EXAMPLE)


def test_a_small_random_scale_is_refused_every_time() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + 1e-3 * random.random()) if self.training else x

    for seed in range(20):
        random.seed(seed)
        assert "random numbers of Python's" in refusal(Scaled())


def test_what_a_generator_of_its_own_hides_is_named_where_it_shows() -> None:
    class Doubled(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.own = random.Random(seed)

        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if self.training and self.own.random() < 0.2 else x

    messages = []
    for seed in range(12):
        try:
            cut(nn.Sequential(nn.Linear(6, 6), Doubled(seed), nn.Linear(6, 3)), 1, EXAMPLE)
        except UsageError as error:
            messages.append(str(error))
    assert messages
    assert all("other values when the same batch comes again" in each for each in messages)


def test_the_caller_s_random_numbers_go_on_as_if_nothing_had_happened() -> None:
    random.seed(3)
    np.random.seed(3)
    expected = random.random(), np.random.rand()
    random.seed(3)
    np.random.seed(3)
    refusal(Skipped(0.5))
    assert (random.random(), np.random.rand()) == expected
