"""One step of training a stage, optimizer included, as a flat graph of ATen operators over tensors the caller owns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from frostline.exporter.optimizer import SGD
from frostline.exporter.stage import Stage, statistics_tensors, trainable_tensors

Rewrite = Callable[[fx.GraphModule, Sequence[Tensor]], fx.GraphModule]
"""Turns a traced graph into one its runtime executes well, given the graph's arguments."""


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
    stage: Stage, optimizer: SGD, state: StageState, x: Tensor, y: Tensor, rewrite: Rewrite
) -> TracedTrainingStep:
    """Trace a step on the shapes of `x` and `y`, with `rewrite` applied to the graph.

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

        # The model writes its running statistics in place; it gets copies, so that the caller's tensors change only
        # once the whole step has been computed.
        mutated = {name: value.clone() for name, value in {**statistics, **fixed}.items()}
        leaves = {
            name: stage.layout.model(name, value.detach()).requires_grad_()
            for name, value in parameters.items()
        }
        with torch.enable_grad():
            logits = functional_call(stage.model, {**leaves, **mutated}, (x,))
            loss = F.cross_entropy(logits, y)
        new_parameters: dict[str, Tensor] = {}
        new_state: dict[str, Tensor] = {}

        def update(name: str, gradient: Tensor) -> None:
            gradients = {name: stage.layout.held_view(name, gradient)}
            changed, state = optimizer.update(
                {name: parameters[name]}, gradients, optimizer_state, learning_rate
            )
            new_parameters.update(changed)
            new_state.update(state)

        # Each parameter is updated as soon as its gradient is known, so that gradients are never held together.
        for name, leaf in leaves.items():
            leaf.register_hook(partial(update, name))
        # Plain autograd, not torch.func.grad: that asks for gradients that can be differentiated again, and gets
        # norms taken apart into dozens of operators in place of their backward operators.
        torch.autograd.grad(loss, list(leaves.values()))
        correct = (logits.argmax(1) == y).sum()
        new_statistics = {name: mutated[name] for name in statistics_names}
        new = [
            *(new_parameters[name] for name in parameter_names),
            *new_statistics.values(),
            *(new_state[name] for name in state.optimizer_state),
        ]
        return new, loss.detach(), correct

    graph = _trace(step, [*state.tensors, x, y, torch.tensor(0.1)], rewrite)
    return TracedTrainingStep(graph)


def trace_evaluation(stage: Stage, state: StageState, x: Tensor, rewrite: Rewrite) -> TracedEvaluation:
    """Trace the stage's forward pass in evaluation mode."""
    stage.model.eval()
    names = [*state.parameters, *state.statistics]
    fixed = _fixed_buffers(stage)

    def evaluate(*arguments: Tensor) -> Tensor:
        *tensors, x = arguments
        values = {name: stage.layout.model(name, t) for name, t in zip(names, tensors, strict=True)}
        logits: Tensor = functional_call(stage.model, {**values, **fixed}, (x,))
        return logits

    tensors = [*state.parameters.values(), *state.statistics.values()]
    return TracedEvaluation(_trace(evaluate, [*tensors, x], rewrite))


def _fixed_buffers(stage: Stage) -> dict[str, Tensor]:
    return {name: b for name, b in stage.model.named_buffers() if not torch.is_floating_point(b)}


def _trace(function: Callable[..., Any], arguments: list[Tensor], rewrite: Rewrite) -> fx.GraphModule:
    traced = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)
    graph: fx.GraphModule = traced(*arguments)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return rewrite(graph, arguments)
