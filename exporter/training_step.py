"""One step of training a stage, optimizer included, as a flat graph of ATen operators over tensors the caller owns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call, grad_and_value
from torch.fx.experimental.proxy_tensor import make_fx

from frostline.exporter.optimizer import SGD
from frostline.exporter.stage import Stage, statistics_tensors, trainable_tensors

Rewrites = Mapping[Any, Callable[..., Any]]


@dataclass(frozen=True)
class StageState:
    """The tensors a training step mutates, by name, in the order of its arguments."""

    parameters: dict[str, Tensor]
    statistics: dict[str, Tensor]
    optimizer_state: dict[str, Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, flat."""
        return [*self.parameters.values(), *self.statistics.values(), *self.optimizer_state.values()]


def initial_state(stage: Stage, optimizer: SGD) -> StageState:
    """The stage's present values with a fresh optimizer state."""
    parameters = trainable_tensors(stage)
    return StageState(parameters, statistics_tensors(stage), optimizer.initial_state(parameters))


class TracedTrainingStep(nn.Module):
    """`(state..., x, y, learning_rate) -> (loss, correct)`, the state mutated in place.

    `x` is (N, *input_shape) float32, `y` (N,) int64, `learning_rate` and `loss` scalars float32, `correct` a scalar
    int64: how many of the batch the stage classified right before the step.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph

    def forward(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        """Run the step once."""
        new, loss, correct = self.graph_module(*arguments)
        for old, value in zip(arguments, new, strict=False):
            old.copy_(value)
        return loss, correct


class TracedEvaluation(nn.Module):
    """`(parameters..., statistics..., x) -> logits`, with the stage in evaluation mode."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph

    def forward(self, *arguments: Tensor) -> Tensor:
        """Logits (N, classes) of a batch."""
        logits: Tensor = self.graph_module(*arguments)
        return logits


def trace_training_step(
    stage: Stage, optimizer: SGD, state: StageState, x: Tensor, y: Tensor, rewrites: Rewrites
) -> TracedTrainingStep:
    """Trace a step on the shapes of `x` and `y`, with `rewrites` applied to forward and backward alike.

    The loss is the mean cross-entropy of the stage's logits.
    """
    stage.model.train()
    parameter_names, statistics_names = list(state.parameters), list(state.statistics)
    fixed = _fixed_buffers(stage)

    def step(*arguments: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        *tensors, x, y, learning_rate = arguments
        parameters = dict(zip(parameter_names, tensors, strict=False))
        rest = tensors[len(parameter_names) :]
        statistics = dict(zip(statistics_names, rest, strict=False))
        optimizer_state = dict(zip(state.optimizer_state, rest[len(statistics_names) :], strict=True))

        def loss_of(parameters: dict[str, Tensor]) -> tuple[Tensor, tuple[dict[str, Tensor], Tensor]]:
            # The model writes its running statistics in place; it gets copies, so that the caller's tensors change
            # only once the whole step has been computed.
            mutated = {name: value.clone() for name, value in {**statistics, **fixed}.items()}
            logits = functional_call(stage.model, {**parameters, **mutated}, (x,))
            return F.cross_entropy(logits, y), (mutated, (logits.argmax(1) == y).sum())

        gradients, (loss, (mutated, correct)) = grad_and_value(loss_of, has_aux=True)(parameters)
        new_parameters, new_state = optimizer.update(parameters, gradients, optimizer_state, learning_rate)
        new_statistics = {name: mutated[name] for name in statistics_names}
        return [*new_parameters.values(), *new_statistics.values(), *new_state.values()], loss, correct

    graph = _trace(step, [*state.tensors, x, y, torch.tensor(0.1)], rewrites)
    return TracedTrainingStep(graph)


def trace_evaluation(stage: Stage, state: StageState, x: Tensor, rewrites: Rewrites) -> TracedEvaluation:
    """Trace the stage's forward pass in evaluation mode."""
    stage.model.eval()
    names = [*state.parameters, *state.statistics]
    fixed = _fixed_buffers(stage)

    def evaluate(*arguments: Tensor) -> Tensor:
        *tensors, x = arguments
        logits: Tensor = functional_call(
            stage.model, {**dict(zip(names, tensors, strict=True)), **fixed}, (x,)
        )
        return logits

    tensors = [*state.parameters.values(), *state.statistics.values()]
    return TracedEvaluation(_trace(evaluate, [*tensors, x], rewrites))


def _fixed_buffers(stage: Stage) -> dict[str, Tensor]:
    return {name: b for name, b in stage.model.named_buffers() if not torch.is_floating_point(b)}


def _trace(function: Callable[..., Any], arguments: list[Tensor], rewrites: Rewrites) -> fx.GraphModule:
    traced = make_fx(
        function, decomposition_table=dict(rewrites), tracing_mode="fake", _allow_non_fake_inputs=True
    )
    graph: fx.GraphModule = traced(*arguments)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
