"""Random numbers of a step: as PyTorch would draw them, but from the seed alone, in the runtime too."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from frostline.exporter.dropout import LARGEST_PERMUTATION, SeededDropout
from frostline.exporter.executorch_lowering import UnsupportedOperators
from tests.exporter.onnx_programs import in_onnx

SHAPE = (64, 512)
COUNT = math.prod(SHAPE)

Draw = Callable[[Tensor], Tensor]
"""From a tensor of chances to random numbers of its shape."""

FILLINGS: dict[str, Draw] = {
    "bernoulli": lambda p: torch.bernoulli(p),
    "bernoulli by chance": lambda p: p.bernoulli(0.3),
    "cauchy": lambda p: torch.atan(torch.empty_like(p).cauchy_()),
    "exponential": lambda p: torch.empty_like(p).exponential_(2.0),
    "filled by chances": lambda p: torch.empty_like(p).bernoulli_(p),
    "geometric": lambda p: torch.empty_like(p).geometric_(0.4),
    "log normal": lambda p: torch.empty_like(p).log_normal_(0.1, 0.2),
    "normal": lambda p: torch.empty_like(p).normal_(1.0, 2.0),
    "normal around": lambda p: torch.normal(p, p),
    "normal around a tensor": lambda p: torch.normal(p, 0.5),
    "normal of a tensor": lambda p: torch.normal(0.5, p),
    "normal of a size": lambda p: torch.normal(1.0, 2.0, p.shape),
    "rand": lambda p: torch.rand(p.shape),
    "rand like": lambda p: torch.rand_like(p),
    "randint": lambda p: torch.randint(2, 7, p.shape).float(),
    "randint like": lambda p: torch.randint_like(p, 5),
    "randn": lambda p: torch.randn(p.shape),
    "randn like": lambda p: torch.randn_like(p),
    "random": lambda p: torch.empty_like(p).random_(3),
    "random from": lambda p: torch.empty_like(p).random_(2, 4),
    "uniform": lambda p: torch.empty_like(p).uniform_(-1.0, 3.0),
}


def _seeded(draw: Callable[..., Tensor], *arguments: Tensor, seed: int = 0) -> Tensor:
    with SeededDropout(torch.tensor(float(seed))):
        return draw(*arguments)


@pytest.mark.parametrize("draw", FILLINGS.values(), ids=FILLINGS)
def test_numbers_are_distributed_as_pytorch_draws_them(draw: Draw) -> None:
    chances = torch.full(SHAPE, 0.3)
    torch.manual_seed(0)
    theirs, ours = draw(chances).double(), _seeded(draw, chances).double()
    deviation = theirs.std().item()
    assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=6 * deviation / math.sqrt(COUNT))
    assert ours.std().item() == pytest.approx(deviation, rel=0.05)
    places = theirs.flatten().sort()[0]
    below = torch.searchsorted(ours.flatten().sort()[0], places, right=True)
    expected = torch.searchsorted(places, places, right=True)
    assert (below - expected).abs().max() / COUNT < 0.02


@pytest.mark.parametrize("draw", FILLINGS.values(), ids=FILLINGS)
def test_numbers_depend_on_seed_and_order_alone(draw: Draw) -> None:
    chances = torch.full((8, 16), 0.3)
    first = _seeded(draw, chances, seed=5)
    torch.manual_seed(3)
    assert torch.equal(first, _seeded(draw, chances, seed=5))
    assert not torch.equal(first, _seeded(draw, chances, seed=6))
    with SeededDropout(torch.tensor(5.0)) as draws:
        assert torch.equal(draw(chances), first)
        after = draws.draws
        assert not torch.equal(draw(chances), first)
        with draws.again(0):
            assert torch.equal(draw(chances), first)
    assert after > 0


def test_the_runtime_makes_the_same_numbers() -> None:
    def step(seed: Tensor, chances: Tensor) -> list[Tensor]:
        with SeededDropout(seed):
            return [draw(chances) + 0.0 for draw in FILLINGS.values()]

    seed, chances = torch.tensor(2.0**24 - 1), torch.full((8, 16), 0.3)
    made = in_onnx(step, seed, chances)
    for name, got, want in zip(FILLINGS, made, step(seed, chances), strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6, msg=lambda t, name=name: f"{name}: {t}")


def test_numbers_in_float64_are_those_of_float32() -> None:
    """The check of a program compares it with PyTorch in float64."""
    for draw in FILLINGS.values():
        single = _seeded(draw, torch.full((4, 8), 0.25))
        double = _seeded(draw, torch.full((4, 8), 0.25, dtype=torch.float64))
        torch.testing.assert_close(double.to(single.dtype), single, atol=1e-6, rtol=1e-6)


def test_the_ends_of_an_interval_are_left_out() -> None:
    """Or logarithms of what is drawn would be infinite."""
    for seed in range(12):
        drawn = _seeded(lambda: torch.rand(256, 512), seed=seed)
        assert drawn.min() > 0 and drawn.max() < 1
        assert torch.isfinite(_seeded(lambda: torch.empty(256, 512).exponential_().log(), seed=seed)).all()


def test_normal_numbers_have_the_moments_of_their_distribution() -> None:
    drawn = _seeded(lambda: torch.randn(512, 1024)).double()
    for power, moment, deviation in [(1, 0, 1), (2, 1, 1.5), (3, 0, 4), (4, 3, 10)]:
        assert (drawn**power).mean().item() == pytest.approx(moment, abs=5 * deviation / math.sqrt(2**19))
    lines = drawn[:, :512] @ drawn[:, 512:].t() / math.sqrt(512)
    assert lines.abs().max() < 6


def test_permutations_hold_every_number_once() -> None:
    orders = [_seeded(lambda: torch.randperm(7), seed=seed) for seed in range(300)]
    assert all(order.sort()[0].tolist() == list(range(7)) for order in orders)
    shares = F.one_hot(torch.stack(orders), 7).double().mean(0)
    assert (shares - 1 / 7).abs().max() < 0.09


def test_noisy_slopes_are_the_same_in_both_passes() -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with SeededDropout(torch.tensor(1.0)):
        y = F.rrelu(x, 0.1, 0.4, training=True)
    (slopes,) = torch.autograd.grad(y.sum(), [x])
    torch.testing.assert_close(y, x * slopes)
    negative = slopes[x < 0]
    assert (slopes[x >= 0] == 1).all() and negative.min() > 0.1 and negative.max() < 0.4
    assert negative.mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(_seeded(lambda x: F.rrelu(x, 0.1, 0.3), x.detach()), F.leaky_relu(x, 0.2).detach())


def test_values_dropped_by_the_fused_operator() -> None:
    y, kept = _seeded(lambda: torch.native_dropout(torch.ones(SHAPE), 0.25, True))
    torch.testing.assert_close(y, kept.float() / 0.75)
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.02)
    assert _seeded(lambda: torch.native_dropout(torch.ones(4), 0.25, False)[0]).tolist() == [1] * 4


@pytest.mark.parametrize(
    ("draw", "what"),
    [
        (lambda: torch.poisson(torch.ones(3)), r"aten\.poisson: .* step's seed"),
        (lambda: torch.multinomial(torch.ones(3), 1), r"aten\.multinomial"),
        (lambda: torch.randperm(LARGEST_PERMUTATION + 1), r"aten\.randperm: more than 2048"),
        (lambda: torch.randint(2**30, (3,)), r"aten\.randint: more than 16736281"),
    ],
)
def test_other_random_numbers_are_refused(draw: Callable[[], Tensor], what: str) -> None:
    with pytest.raises(UnsupportedOperators, match=what):
        _seeded(draw)


def test_attention_without_dropout_draws_nothing() -> None:
    query = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    with SeededDropout(torch.tensor(0.0)) as draws:
        F.scaled_dot_product_attention(query, query, query)
        assert draws.draws == 0
