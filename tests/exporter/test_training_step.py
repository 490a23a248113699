from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frostline.exporter.optimizer import SGD
from frostline.exporter.output_module import OutputModule
from frostline.exporter.rewrites.executorch import rewrite_for_executorch
from frostline.exporter.stage import Stage, StageModel
from frostline.exporter.training_step import (
    StageState,
    initial_state,
    trace_evaluation,
    trace_training_step,
)

BATCH, CLASSES, RATE = 6, 3, 0.1

OPTIMIZERS = {
    "plain": SGD(),
    "momentum": SGD(0.9),
    "weight decay": SGD(0.0, 0.05),
    "momentum and weight decay": SGD(0.8, 0.05),
}


def _stage(norm: nn.Module) -> Stage:
    block = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False), norm, nn.ReLU(), nn.Conv2d(4, 4, 1)
    )
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    model = StageModel(block.double(), OutputModule({}, head.double()))
    return Stage(0, 1, "block", model, (2, 6, 6))


@pytest.fixture(params=["group", "batch"])
def stage(request: pytest.FixtureRequest) -> Stage:
    torch.manual_seed(1)
    return _stage(nn.GroupNorm(2, 4) if request.param == "group" else nn.BatchNorm2d(4))


def _batch(stage: Stage, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, *stage.input_shape, generator=random, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (BATCH,), generator=random)


def _values(state: StageState) -> dict[str, Tensor]:
    return {
        name: value.clone()
        for name, value in {**state.parameters, **state.statistics, **state.optimizer_state}.items()
    }


def _in_model_order(stage: Stage, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: stage.layout.model(name.removeprefix("momentum."), value) for name, value in held.items()}


def _floats(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


def _assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_equal_those_of_torch(stage: Stage, optimizer: SGD) -> None:
    model = copy.deepcopy(stage.model).train()
    eager = torch.optim.SGD(
        model.parameters(), RATE, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay
    )
    state = initial_state(stage, optimizer)
    step = trace_training_step(stage, optimizer, state, *_batch(stage, 99), rewrite_for_executorch)
    for seed in range(4):
        x, y = _batch(stage, seed)
        loss, correct = step(*state.tensors, x, y, torch.tensor(RATE))
        eager.zero_grad()
        logits = model(x)
        want = F.cross_entropy(logits, y)
        want.backward()
        eager.step()
        torch.testing.assert_close(loss, want.detach())
        assert int(correct) == int((logits.argmax(1) == y).sum())
    trained = _in_model_order(stage, {**state.parameters, **state.statistics})
    want_trained = _floats(model)
    _assert_same({name: trained[name] for name in want_trained}, want_trained)
    assert set(trained) == set(want_trained)
    buffers = {
        f"momentum.{name}": eager.state[p]["momentum_buffer"]
        for name, p in model.named_parameters()
        if optimizer.momentum
    }
    _assert_same(_in_model_order(stage, state.optimizer_state), buffers)


def test_learning_rate_is_an_argument(stage: Stage) -> None:
    state = initial_state(stage, SGD())
    x, y = _batch(stage, 0)
    before = _values(state)
    trace_training_step(stage, SGD(), state, x, y, rewrite_for_executorch)(
        *state.tensors, x, y, torch.tensor(0.0)
    )
    _assert_same(state.parameters, {name: before[name] for name in state.parameters})


def test_tracing_changes_nothing(stage: Stage) -> None:
    state = initial_state(stage, SGD(0.9))
    before, model_before = _values(state), copy.deepcopy(stage.model.state_dict())
    x, y = _batch(stage, 0)
    trace_training_step(stage, SGD(0.9), state, x, y, rewrite_for_executorch)
    trace_evaluation(stage, state, x, rewrite_for_executorch)
    _assert_same(_values(state), before)
    _assert_same(stage.model.state_dict(), model_before)


def test_step_mutates_the_callers_tensors_and_no_others(stage: Stage) -> None:
    state = initial_state(stage, SGD(0.9))
    model_before = copy.deepcopy(stage.model.state_dict())
    x, y = _batch(stage, 0)
    step = trace_training_step(stage, SGD(0.9), state, x, y, rewrite_for_executorch)
    before, addresses = _values(state), [t.data_ptr() for t in state.tensors]
    inputs = (x.clone(), y.clone(), torch.tensor(RATE))
    step(*state.tensors, *inputs)
    changed = [name for name, value in _values(state).items() if not torch.equal(value, before[name])]
    assert changed == list(before)
    assert [t.data_ptr() for t in state.tensors] == addresses
    assert torch.equal(inputs[0], x)
    assert torch.equal(inputs[1], y)
    _assert_same(stage.model.state_dict(), model_before)


@pytest.mark.parametrize(("label", "expected"), [(0, BATCH), (1, 0)])
def test_correct_counts_before_the_step(stage: Stage, label: int, expected: int) -> None:
    last = stage.model.output_module.head[2]  # type: ignore[index]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    state = initial_state(stage, SGD())
    x, _ = _batch(stage, 0)
    y = torch.full((BATCH,), label)
    loss, correct = trace_training_step(stage, SGD(), state, x, y, rewrite_for_executorch)(
        *state.tensors, x, y, torch.tensor(10.0)
    )
    assert correct.dtype == torch.int64
    assert int(correct) == expected
    assert loss.shape == correct.shape == ()


def test_frozen_parameters_are_no_state_and_stay(stage: Stage) -> None:
    optimizer = SGD(0.9, 0.05)
    frozen = stage.model.block[3]  # type: ignore[index]
    frozen.weight.requires_grad_(False)
    before = frozen.weight.detach().clone()
    state = initial_state(stage, optimizer)
    assert "block.3.weight" not in state.parameters
    assert "momentum.block.3.weight" not in state.optimizer_state

    x, y = _batch(stage, 0)
    step = trace_training_step(stage, optimizer, state, x, y, rewrite_for_executorch)
    loss, _ = step(*state.tensors, x, y, torch.tensor(RATE))
    eager = copy.deepcopy(stage.model).train()
    want = F.cross_entropy(eager(x), y)
    torch.testing.assert_close(loss, want.detach())
    want.backward()
    torch.optim.SGD(eager.parameters(), RATE, momentum=0.9, weight_decay=0.05).step()
    torch.testing.assert_close(state.parameters["block.3.bias"], eager.state_dict()["block.3.bias"])
    assert torch.equal(frozen.weight, before)


def test_evaluation_uses_running_statistics_and_leaves_the_state(stage: Stage) -> None:
    optimizer = SGD(0.9)
    state = initial_state(stage, optimizer)
    x, y = _batch(stage, 0)
    step = trace_training_step(stage, optimizer, state, x, y, rewrite_for_executorch)
    evaluation = trace_evaluation(stage, state, x, rewrite_for_executorch)
    for _ in range(3):
        step(*state.tensors, x, y, torch.tensor(RATE))
    trained = {**state.parameters, **state.statistics}
    before = _values(state)
    logits = evaluation(*trained.values(), x)
    _assert_same(_values(state), before)

    model = copy.deepcopy(stage.model).eval()
    model.load_state_dict(_in_model_order(stage, trained), strict=False)
    torch.testing.assert_close(logits, model(x).detach())
    halves = [evaluation(*trained.values(), x.roll(1, 0)).roll(-1, 0), logits]
    torch.testing.assert_close(*halves)
    assert torch.allclose(logits, model.train()(x)) == (not state.statistics)


def test_state_names_are_in_the_order_of_the_arguments() -> None:
    state = initial_state(_stage(nn.BatchNorm2d(4)), SGD(0.9))
    assert list(state.statistics) == ["block.1.running_mean", "block.1.running_var"]
    assert list(state.optimizer_state) == [f"momentum.{name}" for name in state.parameters]
    parts = [*state.parameters.values(), *state.statistics.values(), *state.optimizer_state.values()]
    assert all(a is b for a, b in zip(state.tensors, parts, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizer_is_pure_and_equals_torch(optimizer: SGD) -> None:
    torch.manual_seed(0)
    parameters = {"a": torch.randn(2, 3, dtype=torch.float64), "b": torch.randn(4, dtype=torch.float64)}
    leaves = {name: nn.Parameter(value.clone()) for name, value in parameters.items()}
    eager = torch.optim.SGD(
        leaves.values(), RATE, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay
    )
    state: Mapping[str, Tensor] = optimizer.initial_state(parameters)
    for _ in range(5):
        gradients = {name: torch.randn_like(value) for name, value in parameters.items()}
        for name, leaf in leaves.items():
            leaf.grad = gradients[name].clone()
        eager.step()
        old = {name: value.clone() for name, value in {**parameters, **state, **gradients}.items()}
        new, new_state = optimizer.update(parameters, gradients, state, torch.tensor(RATE))
        _assert_same({**parameters, **state, **gradients}, old)
        parameters, state = new, new_state
    _assert_same(parameters, {name: leaf.detach() for name, leaf in leaves.items()})


@pytest.mark.parametrize(("momentum", "names"), [(0.0, []), (0.9, ["momentum.w"])])
def test_optimizer_keeps_state_only_with_momentum(momentum: float, names: list[str]) -> None:
    parameter = torch.ones(2, 3, dtype=torch.float64)
    state = SGD(momentum).initial_state({"w": parameter})
    assert list(state) == names
    for value in state.values():
        assert torch.equal(value, torch.zeros_like(parameter))
        assert value.dtype == parameter.dtype
