from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frostline.exporter import layout
from frostline.exporter.executorch_target import EXECUTORCH
from frostline.exporter.optimizer import SGD, AdamW, Optimizer
from frostline.exporter.output_module import OutputModule
from frostline.exporter.rewrites.executorch import rewrite_for_executorch
from frostline.exporter.stage import Stage, StageModel
from frostline.exporter.tiles import pick
from frostline.exporter.training_step import (
    StageState,
    TracedProgram,
    initial_state,
    trace_accumulation,
    trace_evaluation,
    trace_training_step,
    trace_update,
)
from frostline.exporter.variant import WHOLE, Variant

# A rate that float32 holds exactly.
BATCH, CLASSES, RATE, STEPS = 6, 3, 0.125, 4
BITES, LOOSE = 0.3, 100.0
"""Norms to clip to: every gradient here is longer than the first and shorter than the second."""

OPTIMIZERS: dict[str, Optimizer] = {
    "plain": SGD(),
    "momentum": SGD(momentum=0.9),
    "weight decay": SGD(weight_decay=0.05),
    "momentum and weight decay": SGD(momentum=0.8, weight_decay=0.05),
    "nesterov": SGD(momentum=0.9, nesterov=True),
    "nesterov and weight decay": SGD(momentum=0.9, nesterov=True, weight_decay=0.05),
    "proximal": SGD(proximal=0.5),
    "momentum, weight decay and proximal": SGD(momentum=0.9, weight_decay=0.05, proximal=0.5),
    "clipped": SGD(clip_norm=BITES),
    "loosely clipped": SGD(momentum=0.9, clip_norm=LOOSE),
    "all of SGD": SGD(momentum=0.9, nesterov=True, weight_decay=0.05, proximal=0.5, clip_norm=BITES),
    "AdamW": AdamW(),
    "AdamW of other constants": AdamW(weight_decay=0.2, beta1=0.7, beta2=0.9, epsilon=1e-3),
    "all of AdamW": AdamW(weight_decay=0.1, proximal=0.5, clip_norm=BITES),
}
VARIANTS = {
    variant.name: variant
    for variant in (WHOLE, Variant(2), Variant(recompute=True), Variant(3, recompute=True))
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
    return {name: value.clone() for name, value in state.by_name.items()}


def _in_model_order(order: layout.Layout, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kinds = ("momentum.", "mean.", "square.")

    def of_model(name: str) -> str:
        kind = next((kind for kind in kinds if name.startswith(kind)), "")
        return name.removeprefix(kind)

    return {name: order.model(of_model(name), value) for name, value in held.items()}


def _floats(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


def _assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], msg=lambda text, name=name: f"{name}: {text}")


def _run(program: TracedProgram, state: StageState, **batch: Tensor) -> tuple[Tensor, ...]:
    tensors = {**state.by_name, **batch}
    results: tuple[Tensor, ...] = program(*(pick(tensors, name) for name in program.inputs))
    return results


class _Compiled:
    """The programs of a step in one variant, run as a device runs them."""

    def __init__(self, stage: Stage, optimizer: Optimizer, variant: Variant = WHOLE) -> None:
        self._variant = variant
        self.state = initial_state(stage, optimizer, variant, EXECUTORCH.layout(stage.model))
        x, y = (each[: BATCH // variant.micro_batches] for each in _batch(stage, 99))
        if variant.micro_batches == 1:
            self.training = trace_training_step(
                stage, optimizer, self.state, x, y, rewrite_for_executorch, variant
            )
            return
        self.training = trace_accumulation(
            stage, optimizer, self.state, x, y, rewrite_for_executorch, variant
        )
        self.update = trace_update(stage, optimizer, self.state, rewrite_for_executorch)

    def step(self, x: Tensor, y: Tensor, rate: float = RATE) -> tuple[Tensor, int]:
        """One batch: its mean loss, and how many were right."""
        count, learning_rate = self._variant.micro_batches, torch.tensor(rate)
        losses, right = [], 0
        for part_x, part_y in zip(x.chunk(count), y.chunk(count), strict=True):
            first = torch.tensor(float(not losses))
            batch = {"x": part_x, "y": part_y, "first": first, "learning_rate": learning_rate}
            loss, correct = _run(self.training, self.state, **batch)
            losses.append(loss)
            right += int(correct)
        if count > 1:
            _run(self.update, self.state, learning_rate=learning_rate)
        return torch.stack(losses).mean(), right

    def trained(self, stage: Stage) -> dict[str, Tensor]:
        return _in_model_order(self.state.layout, {**self.state.parameters, **self.state.statistics})


class _Eager:
    """The same in PyTorch as one would write it by hand."""

    def __init__(self, stage: Stage, settings: Optimizer, parts: int = 1) -> None:
        self._settings, self._parts = settings, parts
        self.model = copy.deepcopy(stage.model).train()
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._received = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = _of_torch(settings, self.parameters)
        self.gradient_norms: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
        self.optimizer.zero_grad()
        losses, right = [], 0
        for part_x, part_y in zip(x.chunk(self._parts), y.chunk(self._parts), strict=True):
            logits = self.model(part_x)
            loss = F.cross_entropy(logits, part_y)
            (loss / self._parts).backward()
            losses.append(loss.detach())
            right += int((logits.argmax(1) == part_y).sum())
        if self._settings.proximal:
            distance = sum(((p - self._received[name]) ** 2).sum() for name, p in self.parameters.items())
            (self._settings.proximal / 2 * distance).backward()
        limit = self._settings.clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        self.gradient_norms.append(float(norm))
        self.optimizer.step()
        return torch.stack(losses).mean(), right

    @property
    def state(self) -> dict[str, Tensor]:
        """The optimizer's, under our names."""
        kinds = {"momentum_buffer": "momentum", "exp_avg": "mean", "exp_avg_sq": "square"}
        return {
            f"{kinds[kind]}.{name}": value
            for name, p in self.parameters.items()
            for kind, value in self.optimizer.state[p].items()
            if kind in kinds and value is not None
        }


def _of_torch(settings: Optimizer, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    decay = settings.weight_decay
    if isinstance(settings, SGD):
        return torch.optim.SGD(
            parameters.values(), RATE, settings.momentum, weight_decay=decay, nesterov=settings.nesterov
        )
    assert isinstance(settings, AdamW)
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(parameters.values(), RATE, betas, settings.epsilon, decay)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(
    ("stage", "variant"),
    [
        ("group", WHOLE),
        ("batch", WHOLE),
        ("group", Variant(2)),
        ("batch", Variant(3, recompute=True)),
        ("group", Variant(recompute=True)),
    ],
    indirect=["stage"],
    ids=lambda value: value.name if isinstance(value, Variant) else value,
)
def test_steps_equal_those_of_torch(stage: Stage, optimizer: Optimizer, variant: Variant) -> None:
    compiled = _Compiled(stage, optimizer, variant)
    # Batch norm sees one part at a time; all else makes no difference between a batch and the sum of its parts.
    parts = variant.micro_batches if compiled.state.statistics else 1
    eager = _Eager(stage, optimizer, parts)
    for seed in range(STEPS):
        batch = _batch(stage, seed)
        (loss, right), (want_loss, want_right) = compiled.step(*batch), eager.step(*batch)
        torch.testing.assert_close(loss, want_loss)
        assert right == want_right
    if optimizer.clip_norm:
        bitten = [norm > optimizer.clip_norm for norm in eager.gradient_norms]
        assert bitten == [optimizer.clip_norm == BITES] * STEPS
    trained, want_trained = compiled.trained(stage), _floats(eager.model)
    _assert_same({name: trained[name] for name in want_trained}, want_trained)
    assert set(trained) == set(want_trained)
    kept = {n: v for n, v in compiled.state.optimizer_state.items() if not n.startswith("gradient.")}
    if isinstance(optimizer, AdamW):
        assert float(kept.pop("steps")) == STEPS
    _assert_same(_in_model_order(compiled.state.layout, kept), eager.state)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("name", ["momentum and weight decay", "all of SGD", "all of AdamW"])
def test_kernels_in_tiles_train_as_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, name: str, variant: Variant
) -> None:
    monkeypatch.setattr(layout, "TILED_BYTES", 0)
    monkeypatch.setattr(layout, "TILED_CHANNELS", 2)
    torch.manual_seed(1)
    stage, optimizer = _stage(nn.GroupNorm(2, 4)), OPTIMIZERS[name]
    compiled, eager = _Compiled(stage, optimizer, variant), _Eager(stage, optimizer)
    assert compiled.state.layout.tiled == {"block.0.weight"}
    assert "block.0.weight" not in compiled.training.inputs
    for seed in range(STEPS):
        batch = _batch(stage, seed)
        (loss, right), (want_loss, want_right) = compiled.step(*batch), eager.step(*batch)
        torch.testing.assert_close(loss, want_loss)
        assert right == want_right
    _assert_same(compiled.trained(stage), _floats(eager.model))


@pytest.mark.parametrize("variant", [Variant(2), Variant(2, recompute=True)], ids=lambda v: v.name)
def test_batch_norm_counts_every_micro_batch_once(variant: Variant) -> None:
    torch.manual_seed(1)
    stage = _stage(nn.BatchNorm2d(4, momentum=0.25))
    compiled = _Compiled(stage, SGD(), variant)
    x, y = _batch(stage, 0)
    model = copy.deepcopy(stage.model.block)
    norm = model[1]
    for part in x.chunk(2):
        model(part)
    compiled.step(x, y)
    statistics = compiled.state.statistics
    _assert_same(
        statistics, {"block.1.running_mean": norm.running_mean, "block.1.running_var": norm.running_var}
    )
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_gradients_are_held_only_where_the_momentum_cannot_take_them(optimizer: Optimizer) -> None:
    stage = _stage(nn.GroupNorm(2, 4))
    names = list(initial_state(stage, optimizer).parameters)
    in_momentum = isinstance(optimizer, SGD) and optimizer.momentum > 0
    needed = not in_momentum or optimizer.clip_norm > 0 or getattr(optimizer, "nesterov", False)
    for variant, wanted in [(WHOLE, False), (Variant(2), needed), (Variant(recompute=True), False)]:
        state = initial_state(stage, optimizer, variant)
        buffers = [name for name in state.optimizer_state if name.startswith("gradient.")]
        assert buffers == ([f"gradient.{name}" for name in names] if wanted else [])
        assert all(
            state.optimizer_state[f"gradient.{n}"].shape == p.shape
            for n, p in state.parameters.items()
            if wanted
        )


@pytest.mark.parametrize("variant", [WHOLE, Variant(2)], ids=lambda v: v.name)
def test_learning_rate_is_an_argument(stage: Stage, variant: Variant) -> None:
    compiled = _Compiled(stage, SGD(), variant)
    before = _values(compiled.state)
    compiled.step(*_batch(stage, 0), rate=0.0)
    parameters = compiled.state.parameters
    _assert_same(parameters, {name: before[name] for name in parameters})


def test_tracing_changes_nothing(stage: Stage) -> None:
    optimizer = AdamW(proximal=0.1)
    for variant in VARIANTS.values():
        state = initial_state(stage, optimizer, variant)
        before, model_before = _values(state), copy.deepcopy(stage.model.state_dict())
        x, y = _batch(stage, 0)
        trace_training_step(stage, optimizer, state, x, y, rewrite_for_executorch, variant)
        trace_evaluation(stage, state, x, rewrite_for_executorch)
        if variant.micro_batches > 1:
            trace_accumulation(stage, optimizer, state, x, y, rewrite_for_executorch, variant)
            trace_update(stage, optimizer, state, rewrite_for_executorch)
        _assert_same(_values(state), before)
        _assert_same(stage.model.state_dict(), model_before)


@pytest.mark.parametrize("recompute", [False, True])
def test_step_mutates_the_callers_tensors_and_no_others(stage: Stage, recompute: bool) -> None:
    optimizer = SGD(momentum=0.9, proximal=0.1)
    model_before = copy.deepcopy(stage.model.state_dict())
    compiled = _Compiled(stage, optimizer, Variant(recompute=recompute))
    state, step = compiled.state, compiled.training
    x, y = _batch(stage, 0)
    before, addresses = _values(state), [t.data_ptr() for t in list(state.by_name.values())]
    inputs = {"x": x.clone(), "y": y.clone(), "learning_rate": torch.tensor(RATE)}
    _run(step, state, **inputs)
    changed = [name for name, value in _values(state).items() if not torch.equal(value, before[name])]
    assert changed == [name for name in before if not name.startswith("received.")]
    assert set(step.written) == set(changed)
    assert [t.data_ptr() for t in list(state.by_name.values())] == addresses
    assert torch.equal(inputs["x"], x)
    assert torch.equal(inputs["y"], y)
    _assert_same(stage.model.state_dict(), model_before)


@pytest.mark.parametrize(
    ("optimizer", "accumulated"),
    [(SGD(momentum=0.9), "momentum"), (SGD(momentum=0.9, nesterov=True), "gradient"), (AdamW(), "gradient")],
    ids=["momentum", "nesterov", "AdamW"],
)
def test_parameters_wait_for_the_last_micro_batch(
    stage: Stage, optimizer: Optimizer, accumulated: str
) -> None:
    compiled = _Compiled(stage, optimizer, Variant(2))
    state = compiled.state
    names = list(state.parameters)
    assert set(compiled.training.written) == {f"{accumulated}.{name}" for name in names} | {*state.statistics}
    assert set(compiled.update.written) == {
        *names,
        *(name for name in state.optimizer_state if not name.startswith(f"{accumulated}.")),
    }
    assert "learning_rate" not in compiled.training.inputs
    assert not {"x", "y", "first", *state.statistics} & set(compiled.update.inputs)


def test_programs_name_no_tensor_they_do_not_use(stage: Stage) -> None:
    plain = _Compiled(stage, SGD(momentum=0.9, proximal=0.1), Variant(2))
    held = list(plain.state.by_name)
    assert list(plain.training.inputs) == [*held, "x", "y", "first"]
    assert list(plain.update.inputs) == [
        *plain.state.parameters,
        *plain.state.optimizer_state,
        "learning_rate",
    ]
    whole = _Compiled(stage, AdamW(proximal=0.1))
    assert list(whole.training.inputs) == [*whole.state.by_name, "x", "y", "learning_rate"]


def test_received_values_are_copies_kept_only_for_the_proximal_term(stage: Stage) -> None:
    assert initial_state(stage, SGD()).received == {}
    state = initial_state(stage, SGD(proximal=0.1))
    _assert_same(state.received, {f"received.{name}": p for name, p in state.parameters.items()})
    shared = {p.data_ptr() for p in state.parameters.values()}
    assert not shared & {value.data_ptr() for value in state.received.values()}


@pytest.mark.parametrize(("label", "expected"), [(0, BATCH), (1, 0)])
@pytest.mark.parametrize("variant", [WHOLE, Variant(2)], ids=lambda v: v.name)
def test_correct_counts_before_the_step(stage: Stage, variant: Variant, label: int, expected: int) -> None:
    last = stage.model.output_module.head[2]  # type: ignore[index]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    x, _ = _batch(stage, 0)
    y = torch.full((BATCH,), label)
    compiled = _Compiled(stage, SGD(), variant)
    _, right = compiled.step(x, y, rate=8.0)
    assert right == expected
    half = {"x": x[: BATCH // variant.micro_batches], "y": y[: BATCH // variant.micro_batches]}
    scalars = {"learning_rate": torch.tensor(0.0), "first": torch.tensor(1.0)}
    loss, correct = _run(compiled.training, compiled.state, **half, **scalars)
    assert correct.dtype == torch.int64
    assert loss.shape == correct.shape == ()


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("optimizer", [SGD(momentum=0.9, weight_decay=0.05), AdamW()], ids=["SGD", "AdamW"])
def test_frozen_parameters_are_no_state_and_stay(
    stage: Stage, optimizer: Optimizer, variant: Variant
) -> None:
    frozen = stage.model.block[3]  # type: ignore[index]
    frozen.weight.requires_grad_(False)
    stage = dataclasses.replace(stage)
    before = frozen.weight.detach().clone()
    compiled = _Compiled(stage, optimizer, variant)
    state = compiled.state
    assert "block.3.weight" not in state.parameters
    assert not [name for name in state.optimizer_state if name.endswith("block.3.weight")]

    eager = _Eager(stage, optimizer, variant.micro_batches if state.statistics else 1)
    x, y = _batch(stage, 0)
    (loss, _), (want, _) = compiled.step(x, y), eager.step(x, y)
    torch.testing.assert_close(loss, want)
    after = eager.model.state_dict()
    torch.testing.assert_close(state.parameters["block.3.bias"], after["block.3.bias"])
    trained = compiled.trained(stage)
    _assert_same(trained, {name: after[name] for name in trained})
    assert torch.equal(frozen.weight, before)


def test_evaluation_uses_running_statistics_and_leaves_the_state(stage: Stage) -> None:
    compiled = _Compiled(stage, SGD(momentum=0.9))
    state = compiled.state
    x, y = _batch(stage, 0)
    evaluation = trace_evaluation(stage, state, x, rewrite_for_executorch)
    assert list(evaluation.inputs) == [*state.parameters, *state.statistics, "x"]
    assert evaluation.written == ()
    for _ in range(3):
        compiled.step(x, y)
    before = _values(state)
    (logits,) = _run(evaluation, state, x=x)
    _assert_same(_values(state), before)

    model = copy.deepcopy(stage.model).eval()
    model.load_state_dict(compiled.trained(stage), strict=False)
    torch.testing.assert_close(logits, model(x).detach())
    (turned,) = _run(evaluation, state, x=x.roll(1, 0))
    torch.testing.assert_close(turned.roll(-1, 0), logits)
    assert torch.allclose(logits, model.train()(x)) == (not state.statistics)


def test_state_names_are_in_the_order_of_the_arguments() -> None:
    state = initial_state(_stage(nn.BatchNorm2d(4)), SGD(momentum=0.9, proximal=0.1))
    assert list(state.statistics) == ["block.1.running_mean", "block.1.running_var"]
    assert list(state.optimizer_state) == [f"momentum.{name}" for name in state.parameters]
    kinds = (state.parameters, state.statistics, state.optimizer_state, state.received)
    parts = [value for kind in kinds for value in kind.values()]
    assert all(a is b for a, b in zip(list(state.by_name.values()), parts, strict=True))
    assert list(state.by_name) == [name for kind in kinds for name in kind]
