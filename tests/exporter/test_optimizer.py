from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from frostline.exporter.optimizer import SGD, AdamW, Optimizer
from frostline.protocol.errors import UsageError

RATE = 0.125

OF_TORCH: dict[str, tuple[Optimizer, Callable[..., torch.optim.Optimizer]]] = {
    "plain": (SGD(), lambda p: torch.optim.SGD(p, RATE)),
    "momentum": (SGD(momentum=0.9), lambda p: torch.optim.SGD(p, RATE, 0.9)),
    "weight decay": (SGD(weight_decay=0.05), lambda p: torch.optim.SGD(p, RATE, weight_decay=0.05)),
    "both": (
        SGD(momentum=0.8, weight_decay=0.05),
        lambda p: torch.optim.SGD(p, RATE, 0.8, weight_decay=0.05),
    ),
    "nesterov": (
        SGD(momentum=0.8, weight_decay=0.05, nesterov=True),
        lambda p: torch.optim.SGD(p, RATE, 0.8, weight_decay=0.05, nesterov=True),
    ),
    "AdamW": (AdamW(), lambda p: torch.optim.AdamW(p, RATE, weight_decay=0)),
    "AdamW of other constants": (
        AdamW(beta1=0.5, beta2=0.8, epsilon=0.1, weight_decay=0.2),
        lambda p: torch.optim.AdamW(p, RATE, (0.5, 0.8), 0.1, 0.2),
    ),
}


def _parameters() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"a": torch.randn(2, 3, dtype=torch.float64), "b": torch.randn(4, dtype=torch.float64)}


def _assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("optimizer", "of_torch"), OF_TORCH.values(), ids=OF_TORCH)
def test_optimizer_is_pure_and_equals_torch(
    optimizer: Optimizer, of_torch: Callable[..., torch.optim.Optimizer]
) -> None:
    parameters = _parameters()
    leaves = {name: nn.Parameter(value.clone()) for name, value in parameters.items()}
    eager = of_torch(leaves.values())
    state: Mapping[str, Tensor] = optimizer.initial_state(parameters)
    for _ in range(5):
        gradients = {name: torch.randn_like(value) for name, value in parameters.items()}
        for name, leaf in leaves.items():
            leaf.grad = gradients[name].clone()
        eager.step()
        old = {name: value.clone() for name, value in {**parameters, **state}.items()}
        held = {name: value.clone() for name, value in gradients.items()}
        new, new_state = optimizer.update(parameters, gradients, state, torch.tensor(RATE))
        _assert_same({**parameters, **state}, old)
        _assert_same(gradients, held)
        parameters, state = new, new_state
    _assert_same(parameters, {name: leaf.detach() for name, leaf in leaves.items()})


@pytest.mark.parametrize(
    ("optimizer", "names"),
    [
        (SGD(), []),
        (SGD(momentum=0.9), ["momentum.w"]),
        (SGD(momentum=0.9, nesterov=True), ["momentum.w"]),
        (SGD(clip_norm=1.0, proximal=1.0), []),
        (AdamW(), ["mean.w", "square.w"]),
    ],
    ids=str,
)
def test_optimizers_keep_no_more_state_than_they_need(optimizer: Optimizer, names: list[str]) -> None:
    parameter = torch.ones(2, 3, dtype=torch.float64)
    state = optimizer.initial_state({"w": parameter})
    if isinstance(optimizer, AdamW):
        steps = state.pop("steps")
        assert (steps.shape, steps.dtype, float(steps)) == ((), torch.float64, 0.0)
    assert list(state) == names
    for value in state.values():
        assert torch.equal(value, torch.zeros_like(parameter))
        assert value.dtype == parameter.dtype


def test_the_first_steps_of_adamw_are_right_in_float32() -> None:
    """The correction 1 - beta2 ** steps, taken as a difference in float32, would be off by 1e-4."""
    exact = {name: value.float().double() for name, value in _parameters().items()}
    gradients = {name: torch.randn_like(value).float().double() for name, value in exact.items()}
    optimizer, rate = AdamW(weight_decay=0.0), torch.tensor(RATE)
    new, _ = optimizer.update(exact, gradients, optimizer.initial_state(exact), rate)
    narrow = {name: value.float() for name, value in exact.items()}
    narrow_gradients = {name: value.float() for name, value in gradients.items()}
    got, _ = optimizer.update(narrow, narrow_gradients, optimizer.initial_state(narrow), rate)
    for name, value in got.items():
        moved, want = (value - narrow[name]).double(), new[name] - exact[name]
        assert value.dtype == torch.float32
        assert float((moved - want).abs().max()) < 3e-6 * RATE


@pytest.mark.parametrize(("clip_norm", "scale"), [(0.0, 1.0), (2.5, 0.5), (5.0, 1.0), (50.0, 1.0)])
def test_clipping_scales_all_gradients_together(clip_norm: float, scale: float) -> None:
    gradients = {"a": torch.tensor([[3.0]]), "b": torch.tensor([0.0, -4.0])}
    clipped = SGD(clip_norm=clip_norm).clipped(gradients)
    for name, value in gradients.items():
        torch.testing.assert_close(clipped[name], scale * value)


def test_clipping_leaves_gradients_of_zero_at_zero() -> None:
    clipped = SGD(clip_norm=1.0).clipped({"a": torch.zeros(3)})
    assert torch.equal(clipped["a"], torch.zeros(3))


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kind", "field", "values"),
    [
        *[
            (kind, field, (-0.1, NAN, INFINITY, -INFINITY))
            for kind in (SGD, AdamW)
            for field in ("weight_decay", "proximal", "clip_norm")
        ],
        (SGD, "momentum", (-0.1, 1.1, NAN, INFINITY)),
        (AdamW, "beta1", (-0.1, 0.0, 1.0, 1.1, NAN)),
        (AdamW, "beta2", (-0.1, 0.0, 1.0, 1.1, NAN)),
        (AdamW, "epsilon", (-1e-8, 0.0, NAN, INFINITY)),
    ],
    ids=lambda part: getattr(part, "__name__", part) if not isinstance(part, tuple) else "",
)
def test_settings_out_of_range_are_named_with_their_value(
    kind: type[Optimizer], field: str, values: tuple[float, ...]
) -> None:
    for value in values:
        with pytest.raises(UsageError, match=rf"^{kind.__name__}: {field} is {value}; give ") as caught:
            kind(**{field: value})
        assert "\n" not in str(caught.value)


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^SGD: nesterov .* momentum, which is 0; set a momentum$"):
        SGD(nesterov=True)


def test_settings_are_named() -> None:
    """Given by position, a momentum could pass for a weight decay."""
    with pytest.raises(TypeError):
        SGD(0.9)  # type: ignore[misc]
