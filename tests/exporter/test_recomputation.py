"""Recomputing a block's segments: the same training, with less held at a time."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frostline.exporter.artifact import ExportOptions, plan_stage
from frostline.exporter.dropout import SeededDropout
from frostline.exporter.optimizer import SGD
from frostline.exporter.output_module import OutputModule
from frostline.exporter.recomputation import RecomputingForward
from frostline.exporter.rewrites.executorch import rewrite_for_executorch
from frostline.exporter.stage import Stage, StageModel
from frostline.exporter.training_step import TracedProgram, initial_state, trace_training_step
from frostline.exporter.variant import WHOLE, Variant
from tests.exporter.small_stages import LENGTH, WIDTH, Perceptron, token_stage

CHANNELS, CLASSES, BATCH = 4, 3, 4
RECOMPUTED = Variant(recompute=True)
aten = torch.ops.aten


class Residual(nn.Module):
    """relu(x + conv(relu(norm(conv(x))))): between its ends, two tensors pass everywhere."""

    def __init__(self, norm: str = "group") -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(2, CHANNELS) if norm == "group" else nn.BatchNorm2d(CHANNELS)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.norm(self.first(x)))))


def _stage(depth: int, norm: str = "group", size: int = 5) -> Stage:
    torch.manual_seed(0)
    block = nn.Sequential(*(Residual(norm) for _ in range(depth)))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, CLASSES))
    return Stage(0, 1, "deep", StageModel(block, OutputModule({}, head)), (CHANNELS, size, size))


def _doubled(stage: Stage) -> Stage:
    stage.model.double()
    return stage


def _batch(stage: Stage) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    dtype = next(stage.model.parameters()).dtype
    x = torch.randn(BATCH, *stage.input_shape, generator=random, dtype=dtype)
    return x, torch.randint(0, CLASSES, (BATCH,), generator=random)


def _dropout() -> SeededDropout:
    return SeededDropout(torch.tensor(0.0))


def _counted(stage: Stage, variant: Variant) -> int:
    """How many convolutions the graph of a step runs forwards."""
    x, y = _batch(stage)
    state = initial_state(stage, SGD())
    traced = trace_training_step(stage, SGD(), state, x, y, lambda graph, arguments: graph, variant)
    graph = traced.graph_module.graph
    return len(graph.find_nodes(op="call_function", target=aten.convolution.default))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_every_residual_block_but_the_last_runs_twice(depth: int, dtype: torch.dtype) -> None:
    """The backward pass begins with the last, which is still there."""
    stage = _stage(depth)
    stage.model.to(dtype)
    assert _counted(stage, WHOLE) == 2 * depth
    assert _counted(stage, RECOMPUTED) == 2 * depth + 2 * (depth - 1)


def test_segments_end_where_a_single_tensor_passes() -> None:
    stage = _stage(3)
    segments = RecomputingForward(stage)._segments
    x, _ = _batch(stage)
    with torch.no_grad():
        for segment, residual in zip(segments, stage.model.block.children(), strict=True):
            assert torch.equal(segment(x), residual(x))
            x = residual(x)


class Tangled(nn.Module):
    """A block that cannot be traced, and so has no places to be cut at."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        return y if len(list(y.shape)) == 4 and y.shape[0] > 0 else x


@pytest.mark.parametrize("block", [Tangled(), nn.ReLU()], ids=["untraceable", "without parameters"])
def test_a_block_without_boundaries_is_kept_whole(block: nn.Module) -> None:
    stage = _stage(1)
    stage.model.block = block
    forward = RecomputingForward(stage)
    x, _ = _batch(stage)
    tensors = {**dict(stage.model.named_parameters()), **dict(stage.model.named_buffers())}
    torch.testing.assert_close(forward(tensors, x, _dropout()), stage.model(x))


def _gradients(logits: Tensor, y: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(F.cross_entropy(logits, y), list(tensors.values()))
    return dict(zip(tensors, gradients, strict=True))


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_gradients_and_statistics_are_those_of_the_plain_passes(norm: str) -> None:
    stage = _doubled(_stage(3, norm))
    x, y = _batch(stage)
    plain = copy.deepcopy(stage.model).train()
    want = _gradients(plain(x), y, dict(plain.named_parameters()))

    stage.model.train()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in stage.model.named_parameters()}
    buffers = {name: b.clone() for name, b in stage.model.named_buffers()}
    logits = RecomputingForward(stage)({**leaves, **buffers}, x, _dropout())
    got = _gradients(logits, y, leaves)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient)
    for name, value in plain.named_buffers():
        if value.is_floating_point():
            torch.testing.assert_close(buffers[name], value)
            assert not torch.equal(value, stage.model.get_buffer(name))
    assert bool(buffers) == (norm == "batch")


def test_statistics_keep_their_own_momentum_afterwards() -> None:
    stage = _stage(2, "batch")
    norms = [module for module in stage.model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm, momentum in zip(norms, (0.3, 0.7), strict=True):
        norm.momentum = momentum
    _counted(stage, RECOMPUTED)
    assert [norm.momentum for norm in norms] == [0.3, 0.7]


def _traced(stage: Stage, variant: Variant) -> TracedProgram:
    x, y = _batch(stage)
    state = initial_state(stage, SGD())
    return trace_training_step(stage, SGD(), state, x, y, rewrite_for_executorch, variant)


class Shifted(nn.Module):
    """A layer with a buffer that is left out of the model's state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.register_buffer("shift", torch.ones(CHANNELS, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x) + self.get_buffer("shift"))


def test_buffers_that_no_step_writes_are_constants() -> None:
    stage = _stage(1)
    stage.model.block = nn.Sequential(Shifted(), Shifted())
    stage = dataclasses.replace(stage)
    assert not initial_state(stage, SGD()).statistics
    assert _traced(stage, RECOMPUTED).inputs == _traced(stage, WHOLE).inputs


def test_a_block_that_takes_token_ids_is_recomputed_too() -> None:
    layers = (Perceptron() for _ in range(3))
    stage = token_stage(nn.Embedding(5, WIDTH), *layers, classes=CLASSES, vocabulary=5)
    assert len(RecomputingForward(stage)._segments) > 3


def test_recomputing_lowers_the_arena_of_a_deep_block() -> None:
    batch, depth = 16, 4
    stage = token_stage(*(Perceptron() for _ in range(depth)), classes=CLASSES)
    options = ExportOptions(batch, CLASSES)
    whole, recomputed = plan_stage(stage, options), plan_stage(stage, options, RECOMPUTED)
    activations = batch * LENGTH * 8 * WIDTH * 4
    assert whole.arena > depth * activations
    assert recomputed.arena < 0.7 * whole.arena
    assert recomputed.model_copy(update={"arena": whole.arena, "program": whole.program}) == whole
