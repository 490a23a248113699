from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from frostline.exporter.rewrites import reduction, turning
from tests.exporter.rewriting import draw, names, rewritten, turns

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((512, 64), [1, 0]),
        ((512, 144), [1, 0]),
        ((300, 37), [1, 0]),
        ((512, 131), [1, 0]),
        ((8, 64, 4, 32), [0, 2, 1, 3]),
        ((64, 8, 4, 32), [1, 2, 0, 3]),
        ((32, 64, 64), [0, 2, 1]),
        ((8, 64, 16, 16), [0, 2, 3, 1]),
        ((8, 1, 64, 1, 64), [4, 1, 0, 3, 2]),
    ],
)
def test_large_tensors_are_turned_by_cheaper_means(shape: tuple[int, ...], axes: list[int]) -> None:
    x = draw(*shape)
    got = turning.permuted(x, axes)
    assert torch.equal(got, x.permute(axes))
    assert got.is_contiguous()
    graph = rewritten(lambda x: aten.mul(aten.permute(x, axes).clone(), 2), x)
    prime = shape[-1] == 131
    assert bool(turns(graph)) == prime


def test_integers_are_turned_too() -> None:
    x = torch.arange(512 * 64).reshape(512, 64)
    assert torch.equal(turning.permuted(x, [1, 0]), x.t())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=5), st.randoms())
def test_any_turn(shape: list[int], random: Any) -> None:
    axes = list(range(len(shape)))
    random.shuffle(axes)
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    assert torch.equal(turning.permuted(x, axes), x.permute(axes))


@st.composite
def reductions(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    return shape, draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(reductions())
def test_sums_over_any_axes_and_their_transpose(case: tuple[list[int], list[int]]) -> None:
    shape, axes = case
    x = draw(*shape)
    total = x.sum(axes, keepdim=True)
    torch.testing.assert_close(reduction.sum_over(x, axes), total)
    assert torch.equal(reduction.expanded(total, shape), total.expand(shape))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(reductions(), st.booleans())
def test_broadcasting_over_any_axes(case: tuple[list[int], list[int]], swapped: bool) -> None:
    shape, axes = case
    x, y = draw(*shape), draw(*(1 if axis in axes else size for axis, size in enumerate(shape)))
    a, b = (y, x) if swapped else (x, y)
    assert torch.equal(reduction.broadcast(torch.sub, a, b), a - b)
    assert torch.equal(reduction.broadcast(torch.sub, a, b[0]), a - b[0])


def _assigned(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1:3] = x[:, :2]
    y.transpose(0, 3)[0, ..., 1] *= 3
    return y + x


VIEWS: dict[str, Callable[[Tensor], Any]] = {
    "split": lambda x: x.reshape(2, 2, 6, 4, 5),
    "split inner": lambda x: x.reshape(4, 2, 3, 2, 2, 5),
    "ones": lambda x: x.reshape(1, 4, 1, 6, 4, 1, 5, 1),
    "join last": lambda x: x.reshape(4, 6, 20),
    "join all": lambda x: x.reshape(-1),
    "join first": lambda x: x.reshape(24, 4, 5),
    "regroup": lambda x: x.reshape(4, 6, 2, 10),
    "chunk": lambda x: [part * 2 for part in x.chunk(3, 1)],
    "split sizes": lambda x: [part * 2 for part in x.split([1, 2, 3], 1)],
    "slice": lambda x: x[:, 1:5, :, -2:] * 2,
    "slice with a step": lambda x: x[:, ::2] * 2,
    "select": lambda x: x[:, -2] * 2,
    "unbind": lambda x: [part * 2 for part in x.unbind(2)],
    "stack": lambda x: torch.stack([x, x * 2], 1),
    "cat": lambda x: torch.cat([x, aten.mul(x, 2)], 1),
    "cat with plain": lambda x: torch.cat([x, torch.ones(4, 1, 4, 5, dtype=x.dtype)], 1),
    "unsqueeze": lambda x: x.unsqueeze(1).unsqueeze(-1) * 2,
    "squeeze": lambda x: x[:, :1].squeeze(1) * 2,
    "squeeze nothing": lambda x: x.squeeze(1) * 2,
    "sum": lambda x: (x.sum(1), x.sum([0, 2], keepdim=True), x.mean([1, 3]), x.mean(-1, keepdim=True)),
    "softmax": lambda x: (x.softmax(1), x.log_softmax(1), x.softmax(-1)),
    "expand": lambda x: (x[:, :, :1, :1].expand(4, 6, 3, 3) * 2, x[:1].expand(3, -1, -1, -1) * 2),
    "broadcast": lambda x: x * x.mean([2, 3], keepdim=True) + x[0, :, 0, 0].reshape(6, 1, 1),
    "in place": lambda x: (x * 2).relu_() + x.clone().mul_(3),
    "assignment": lambda x: _assigned(x),
    "fallback": lambda x: torch.where(x > 0, x, x.flip(1)),
}


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2), (1, 0, 2, 3), (3, 2, 1, 0)], ids=str)
@pytest.mark.parametrize("function", VIEWS.values(), ids=VIEWS)
def test_axes_of_held_values(function: Callable[[Tensor], Any], order: tuple[int, ...]) -> None:
    held = draw(4, 6, 4, 5).permute([order.index(axis) for axis in range(4)]).contiguous()

    def step(held: Tensor) -> Any:
        return function(aten.permute(held, order)), held * 3

    rewritten(step, held)

    def backward(held: Tensor) -> Any:
        leaf = held.detach().requires_grad_()
        with torch.enable_grad():
            result = function(leaf.permute(order))
            parts = result if isinstance(result, list | tuple) else [result]
            total = sum(((part * part * part).sum() for part in parts), torch.zeros((), dtype=held.dtype))
        return torch.autograd.grad(total, leaf)

    rewritten(backward, held)


@pytest.mark.parametrize("name", ["chunk", "slice", "cat", "unsqueeze", "sum", "broadcast", "split inner"])
def test_images_are_cut_and_joined_without_turning(name: str) -> None:
    def step(held: Tensor) -> Any:
        result = VIEWS[name](aten.permute(held, [0, 3, 1, 2]))
        parts = result if isinstance(result, list | tuple) else [result]
        return [part.movedim(1, -1) if part.dim() == 4 else part.sum() for part in parts]

    assert not turns(rewritten(step, draw(4, 4, 5, 6)))


def test_small_powers_are_products() -> None:
    graph = rewritten(lambda x: [x**1, x**2, x**3, x.abs() ** 0.5], draw(3, 4))
    assert [target for target in graph.graph.nodes if target.target is aten.pow.Tensor_Scalar].__len__() == 1
    assert "mul" in names(graph)


@pytest.mark.parametrize("factor", [2, 3])
def test_shuffles(factor: int) -> None:
    def step(held: Tensor) -> Any:
        x = aten.permute(held, [0, 3, 1, 2])
        y = aten.pixel_shuffle(x, factor)
        return y, aten.pixel_unshuffle(y, factor), aten.channel_shuffle(x, factor)

    rewritten(step, draw(2, 3, 4, 36))
    rewritten(lambda x: aten.pixel_unshuffle(aten.pixel_shuffle(x, factor), factor), draw(2, 36, 3, 4))
