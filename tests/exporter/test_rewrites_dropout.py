from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from frostline.exporter.rewrites.dropout import PRIME, bernoulli
from tests.exporter.rewriting import run

SIDE = 256
SEEDS = [0, 1, 2, PRIME - 1, PRIME, PRIME + 1, 10**6, 2**24 - 2]


def _kept(
    seed: int, layer: int = 0, shape: tuple[int, ...] = (SIDE, SIDE), probability: float = 0.75
) -> Tensor:
    """What is drawn, as standardised numbers."""
    drawn = bernoulli(shape, probability, torch.tensor(float(seed)), layer)
    chance = round(probability * PRIME) / PRIME
    return (drawn.double() - chance) / math.sqrt(chance * (1 - chance))


def _deviation(products: Tensor) -> float:
    """How many standard deviations the mean of independent standardised numbers is off."""
    return products.mean().item() * math.sqrt(products.numel())


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5, 0.9])
def test_ones_are_as_frequent_as_asked(probability: float) -> None:
    drawn = bernoulli((SIDE, SIDE), probability, torch.tensor(3.0), 1)
    assert drawn.dtype == torch.float32
    assert drawn.unique().tolist() == [0, 1]
    assert drawn.mean().item() == pytest.approx(probability, abs=0.01)
    for seed in SEEDS:
        assert abs(_deviation(_kept(seed, probability=probability))) < 4.5


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_and_columns_show_no_pattern(seed: int) -> None:
    kept = _kept(seed)
    for lines in (kept, kept.t()):
        sums = lines.sum(1) / math.sqrt(SIDE)
        assert sums.abs().max() < 4.5
        assert 0.8 < sums.var().item() < 1.25
        between = (lines @ lines.t() / math.sqrt(SIDE)).fill_diagonal_(0)
        assert between.abs().max() < 6
        assert 0.95 < between.var().item() < 1.05
    # A product of a row's and a column's pattern would stand out among the singular values, a period in the spectrum.
    assert torch.linalg.svdvals(kept)[0] < 2.2 * math.sqrt(SIDE)
    assert torch.fft.fft2(kept).abs().flatten()[1:].max() / SIDE < 5
    pairs = kept[1:] * kept[:-1]
    assert abs(_deviation(pairs[:, 1:] * pairs[:, :-1])) < 4.5


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds_and_layers_are_independent(seed: int) -> None:
    kept = _kept(seed)
    for other in (_kept(seed + 1), _kept(seed, 1), _kept(seed, 2), _kept(seed + 1, 1)):
        assert abs(_deviation(kept * other)) < 4.5
        assert abs(_deviation(kept[1:] * other[:-1])) < 4.5
        assert abs(_deviation(kept[:, :-1] * other[:, 1:])) < 4.5


def test_each_value_is_one_in_its_share_of_the_steps() -> None:
    kept = torch.stack([_kept(seed, shape=(32, 32)) for seed in range(200)])
    by_value = kept.sum(0) / math.sqrt(200)
    assert by_value.abs().max() < 5
    assert 0.85 < by_value.var().item() < 1.15
    assert abs(_deviation(kept[1:] * kept[:-1])) < 4.5


def test_what_is_drawn_depends_on_nothing_but_the_arguments() -> None:
    first = bernoulli((3, 5, 7), 0.3, torch.tensor(11.0), 4)
    torch.rand(3)
    assert torch.equal(first, bernoulli((3, 5, 7), 0.3, torch.tensor(11), 4))
    assert first.shape == (3, 5, 7)
    assert not torch.equal(first, bernoulli((3, 5, 7), 0.3, torch.tensor(12), 4))
    assert not torch.equal(first, bernoulli((3, 5, 7), 0.3, torch.tensor(11), 5))


@pytest.mark.parametrize(("probability", "value"), [(0.0, 0.0), (1.0, 1.0)])
def test_all_or_nothing(probability: float, value: float) -> None:
    assert torch.equal(bernoulli((2, 3), probability, torch.tensor(1), 0), torch.full((2, 3), value))


@pytest.mark.parametrize("shape", [(8, 16, 32), (3, 5000), (4, 6, 5, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_the_runtime_draws_the_same(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    class Draw(nn.Module):
        def forward(self, seed: Tensor) -> Tensor:
            return bernoulli(shape, 0.2, seed, 7)

    for value in (0, 12345, 2**24 - 1):
        seed = torch.tensor(value, dtype=dtype)
        assert torch.equal(run(Draw(), [seed])[0], bernoulli(shape, 0.2, seed, 7))
