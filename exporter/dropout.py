"""Random numbers in a step: what PyTorch would draw is a function of the step's seed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from frostline.exporter.executorch_lowering import UnsupportedOperators
from frostline.exporter.rewrites import dropout

aten = torch.ops.aten

NOT_DRAWN = "random numbers of this kind cannot be made from a step's seed"

LARGEST_PERMUTATION = 2048
"""Every number is compared with every other."""


class SeededDropout(TorchDispatchMode):
    """Within it, all that PyTorch drops or draws depends on `seed`, a scalar of a whole number from 0 to 2**24 - 1.

    Every kind of dropout (of values, of channels, of attention's weights, alpha dropout, stochastic depth) fills a tensor by
    `bernoulli_`; noise comes from `randn_like`, `uniform_` and their kin. They are replaced here: below autograd, and inside
    PyTorch's own functions. Draws are told apart by their order.

    Attributes
    ----------
    draws : int
        How many there have been.

    Raises
    ------
    UnsupportedOperators
        From within, at an operator that draws by rejection, or from given chances.
    """

    def __init__(self, seed: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self.draws = 0

    @contextlib.contextmanager
    def again(self, draws: int) -> Iterator[None]:
        """Draw once more what was drawn when `draws` stood there."""
        before, self.draws = self.draws, draws
        try:
            yield
        finally:
            self.draws = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        draw = _DRAWS.get(func)
        if draw is not None:
            return draw(self, *args, **{n: v for n, v in options.items() if n not in _PLACEMENT})
        if torch.Tag.nondeterministic_seeded in func.tags and not _is_attention(func):
            raise UnsupportedOperators([func._schema.name], NOT_DRAWN)
        return func(*args, **options)

    def bernoulli(self, shape: Sequence[int], probability: float) -> Tensor:
        """1 with one probability for all, else 0."""
        return self._next(1, lambda layer: dropout.bernoulli(shape, probability, self._seed, layer))

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Numbers between 0 and 1."""
        return self._next(2, lambda layer: dropout.uniform(shape, self._seed, layer))

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Numbers of mean 0 and deviation 1."""
        return self._next(4, lambda layer: dropout.normal(shape, self._seed, layer))

    def exponential(self, shape: Sequence[int]) -> Tensor:
        """Numbers above 0 of mean 1."""
        return self._next(2, lambda layer: dropout.exponential(shape, self._seed, layer))

    def whole_numbers(self, shape: Sequence[int], low: int, high: int) -> Tensor:
        """From `low` to below `high`."""
        if high - low > dropout.PRIME**2:
            raise UnsupportedOperators(
                ["aten.randint"], f"more than {dropout.PRIME**2} numbers to choose from"
            )
        return self._next(2, lambda layer: dropout.whole_numbers(shape, low, high, self._seed, layer))

    def permutation(self, count: int) -> Tensor:
        """The numbers below `count` in some order."""
        if count > LARGEST_PERMUTATION:
            raise UnsupportedOperators(
                ["aten.randperm"], f"more than {LARGEST_PERMUTATION} numbers to shuffle"
            )
        return self._next(2, lambda layer: dropout.permutation(count, self._seed, layer))

    def _next(self, layers: int, draw: Callable[[int], Tensor]) -> Tensor:
        drawn = draw(self.draws)
        self.draws += layers
        return drawn


_PLACEMENT = {"device", "generator", "layout", "memory_format", "pin_memory"}


def _is_attention(func: Any) -> bool:
    """Fused attention, which a processor runs without dropout only."""
    return "scaled_dot_product" in func._schema.name or func is aten._fused_sdp_choice.default


Sample = Callable[..., Tensor]
"""Numbers for a shape, drawn from a `SeededDropout`, given the parameters of their distribution."""


def _filling(sample: Sample) -> Callable[..., Tensor]:
    """An operator that overwrites its first argument."""

    def fill(draws: SeededDropout, filled: Tensor, *parameters: Any, **options: Any) -> Tensor:
        return filled.copy_(sample(draws, filled.shape, *parameters, **options).to(filled.dtype))

    return fill


def _like(sample: Sample) -> Callable[..., Tensor]:
    """An operator that returns as many numbers as its first argument has, in its dtype if in no other."""

    def make(
        draws: SeededDropout, x: Tensor, *parameters: Any, dtype: torch.dtype | None = None, **options: Any
    ) -> Tensor:
        return sample(draws, x.shape, *parameters, **options).to(dtype or x.dtype)

    return make


def _of_size(sample: Sample, dtype: torch.dtype | None = None) -> Callable[..., Tensor]:
    """An operator whose last positional argument is the shape."""
    usual = dtype

    def make(draws: SeededDropout, *given: Any, dtype: torch.dtype | None = None) -> Tensor:
        *parameters, size = given
        return sample(draws, size, *parameters).to(dtype or usual or torch.get_default_dtype())

    return make


def _bernoulli(draws: SeededDropout, shape: Sequence[int], p: Any = 0.5) -> Tensor:
    if isinstance(p, Tensor):
        return draws.uniform(shape) < p
    return draws.bernoulli(shape, p)


def _bernoulli_of(draws: SeededDropout, probabilities: Tensor) -> Tensor:
    return (draws.uniform(probabilities.shape) < probabilities).to(probabilities.dtype)


# PyTorch gives the lower end by position or by its name, which is a word of Python's.
def _uniform(draws: SeededDropout, shape: Sequence[int], *limits: float, **named: float) -> Tensor:
    low, high = (*limits, *(named.get("from", 0.0), named.get("to", 1.0))[len(limits) :])
    drawn = draws.uniform(shape)
    return drawn if (low, high) == (0, 1) else drawn * (high - low) + low


def _normal(draws: SeededDropout, shape: Sequence[int], mean: Any = 0.0, std: Any = 1.0) -> Tensor:
    drawn = draws.normal(shape)
    if isinstance(mean, Tensor) or isinstance(std, Tensor):
        return torch.add(std * drawn.to(torch.result_type(mean, std)), mean)
    return drawn if (mean, std) == (0, 1) else drawn * std + mean


def _normal_around(draws: SeededDropout, mean: Any, std: Any = 1.0) -> Tensor:
    shapes = [each.shape for each in (mean, std) if isinstance(each, Tensor)]
    return _normal(draws, torch.broadcast_shapes(*shapes), mean, std)


def _normal_of_size(
    draws: SeededDropout, mean: float, std: float, size: Sequence[int], *, dtype: torch.dtype | None = None
) -> Tensor:
    return _normal(draws, size, mean, std).to(dtype or torch.get_default_dtype())


def _log_normal(draws: SeededDropout, shape: Sequence[int], mean: float = 1.0, std: float = 2.0) -> Tensor:
    return torch.exp(_normal(draws, shape, mean, std))


def _exponential(draws: SeededDropout, shape: Sequence[int], lambd: float = 1.0) -> Tensor:
    drawn = draws.exponential(shape)
    return drawn if lambd == 1 else drawn / lambd


def _cauchy(draws: SeededDropout, shape: Sequence[int], median: float = 0.0, sigma: float = 1.0) -> Tensor:
    return torch.tan(math.pi * (draws.uniform(shape) - 0.5)) * sigma + median


def _geometric(draws: SeededDropout, shape: Sequence[int], p: float) -> Tensor:
    return torch.floor(torch.log(draws.uniform(shape)) / math.log(1 - p)) + 1


def _whole(draws: SeededDropout, shape: Sequence[int], *limits: int) -> Tensor:
    low, high = limits if len(limits) == 2 else (0, *limits)
    return draws.whole_numbers(shape, low, high)


def _permutation(draws: SeededDropout, count: int, *, dtype: torch.dtype | None = None) -> Tensor:
    return draws.permutation(count).to(dtype or torch.int64)


def _dropped(draws: SeededDropout, x: Tensor, p: float, train: bool | None = True) -> tuple[Tensor, Tensor]:
    """`native_dropout`: the values, and which of them are kept."""
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    kept = draws.bernoulli(x.shape, 1 - p)
    return x * kept.to(x.dtype) * (0.0 if p == 1 else 1 / (1 - p)), kept.to(torch.bool)


def _leaky(
    draws: SeededDropout,
    x: Tensor,
    noise: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
) -> Tensor:
    """`rrelu`: each negative value has a slope of its own, which is handed to the backward pass as `noise`."""
    if not training:
        same: Tensor = aten.leaky_relu(x, (lower + upper) / 2)
        return same
    slopes = _uniform(draws, x.shape, lower, upper).to(x.dtype)
    chosen = torch.where(x <= 0, slopes, 1.0)
    noise.copy_(chosen)
    return x * chosen


def _leaky_in_place(draws: SeededDropout, x: Tensor, *given: Any) -> Tensor:
    return x.copy_(_leaky(draws, x, *given))


_DRAWS: dict[Any, Callable[..., Any]] = {
    aten.bernoulli.Tensor: _like(_bernoulli),
    aten.bernoulli.default: _bernoulli_of,
    aten.bernoulli.p: _like(_bernoulli),
    aten.bernoulli_.Tensor: _filling(_bernoulli),
    aten.bernoulli_.float: _filling(_bernoulli),
    aten.cauchy.default: _like(_cauchy),
    aten.cauchy_.default: _filling(_cauchy),
    aten.exponential.default: _like(_exponential),
    aten.exponential_.default: _filling(_exponential),
    aten.geometric.default: _like(_geometric),
    aten.geometric_.default: _filling(_geometric),
    aten.log_normal.default: _like(_log_normal),
    aten.log_normal_.default: _filling(_log_normal),
    aten.native_dropout.default: _dropped,
    aten.normal.Tensor_Tensor: _normal_around,
    aten.normal.Tensor_float: _normal_around,
    aten.normal.float_Tensor: _normal_around,
    aten.normal.float_float: _normal_of_size,
    aten.normal_.default: _filling(_normal),
    aten.normal_functional.default: _like(_normal),
    aten.rand.default: _of_size(_uniform),
    aten.rand.generator: _of_size(_uniform),
    aten.rand_like.default: _like(_uniform),
    aten.rand_like.generator: _like(_uniform),
    aten.randint.default: _of_size(_whole, torch.int64),
    aten.randint.generator: _of_size(_whole, torch.int64),
    aten.randint.low: _of_size(_whole, torch.int64),
    aten.randint.low_generator: _of_size(_whole, torch.int64),
    aten.randint_like.default: _like(_whole),
    aten.randint_like.low_dtype: _like(_whole),
    aten.randn.default: _of_size(_normal),
    aten.randn.generator: _of_size(_normal),
    aten.randn_like.default: _like(_normal),
    aten.randn_like.generator: _like(_normal),
    getattr(aten.random_, "from"): _filling(_whole),
    aten.random_.to: _filling(_whole),
    aten.randperm.default: _permutation,
    aten.randperm.generator: _permutation,
    aten.rrelu_with_noise.default: _leaky,
    aten.rrelu_with_noise_.default: _leaky_in_place,
    aten.uniform.default: _like(_uniform),
    aten.uniform_.default: _filling(_uniform),
}
