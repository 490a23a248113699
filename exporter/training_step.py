"""One step of training a stage, optimizer included, as flat graphs of ATen operators over tensors the caller owns."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from frostline.exporter.dropout import SeededDropout
from frostline.exporter.executorch_lowering import without_collection
from frostline.exporter.layout import MODEL_ORDER, Layout
from frostline.exporter.optimizer import Optimizer
from frostline.exporter.part import prepare_parts
from frostline.exporter.recomputation import RecomputingForward
from frostline.exporter.rewrites.extremes import bound_gradients
from frostline.exporter.rewrites.functional import name_what_is_written
from frostline.exporter.stage import Stage, statistics_tensors, trainable_tensors
from frostline.exporter.tiles import kernel, pick, tile_name, tiles_of
from frostline.exporter.update_order import update_early
from frostline.exporter.variant import WHOLE, Variant

INPUT = "frostline input"
"""Where a traced graph's placeholders say which input of the program they are."""

Rewrite = Callable[[fx.GraphModule, Sequence[Tensor]], fx.GraphModule]
"""Turns a traced graph into one its runtime executes well, given the graph's arguments."""

Forward = Callable[[Mapping[str, Tensor], Tensor, SeededDropout], Tensor]
"""Tensors by the names of the stage's model and features (N, *input_shape), to logits (N, classes), within the dropout."""

Results = tuple[Mapping[str, Tensor], list[Tensor]]
"""New values of arguments by name, and what is returned."""


@dataclass(frozen=True)
class StageState:
    """The tensors a device holds for training, by name.

    Attributes
    ----------
    layout : Layout
        The order they are held in.
    received : dict
        The parameters as they came, as `received.<name>`, where the optimizer draws towards them; never written.
    """

    parameters: dict[str, Tensor]
    statistics: dict[str, Tensor]
    optimizer_state: dict[str, Tensor]
    received: dict[str, Tensor] = field(default_factory=dict)
    layout: Layout = MODEL_ORDER

    @property
    def by_name(self) -> dict[str, Tensor]:
        """All of them."""
        return {**self.parameters, **self.statistics, **self.optimizer_state, **self.received}


def step_inputs(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What a step's programs may take beside the state: a micro-batch, and scalars float32."""
    scalars = {"learning_rate": 0.1, "first": 1.0, "seed": 0.0}
    return {"x": x, "y": y, **{name: torch.tensor(value) for name, value in scalars.items()}}


def initial_state(
    stage: Stage, optimizer: Optimizer, variant: Variant = WHOLE, layout: Layout = MODEL_ORDER
) -> StageState:
    """The stage's present values with a fresh optimizer state."""
    parameters = {name: layout.held(name, value) for name, value in trainable_tensors(stage).items()}
    received = {f"received.{name}": p.clone() for name, p in parameters.items() if optimizer.proximal}
    accumulating = variant.micro_batches > 1
    optimizer_state = optimizer.initial_state(parameters, accumulating=accumulating)
    return StageState(parameters, statistics_tensors(stage), optimizer_state, received, layout)


class TracedProgram(nn.Module):
    """A flat graph over tensors the caller owns.

    Attributes
    ----------
    inputs : tuple of str
        Names of the arguments, in order.
    written : tuple of str
        Those that are written in place.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[str], written: Sequence[str]) -> None:
        super().__init__()
        self.graph_module = graph
        self.inputs = tuple(inputs)
        self.written = tuple(written)

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Run the graph once; what it returns beside the arguments it writes."""
        results = self.graph_module(*arguments)
        for name, value in zip(self.written, results, strict=False):
            arguments[self.inputs.index(name)].copy_(value)
        return tuple(results[len(self.written) :])

    def arguments(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Copies of the arguments, picked by name: none shares memory with another."""
        return [pick(tensors, name).clone() for name in self.inputs]


def trace_training_step(
    stage: Stage,
    optimizer: Optimizer,
    state: StageState,
    x: Tensor,
    y: Tensor,
    rewrite: Rewrite,
    variant: Variant = WHOLE,
) -> TracedProgram:
    """Trace a step in one piece: `(state..., x, y, learning_rate, seed) -> (loss, correct)`, the state written in place.

    `x` is (N, *input_shape), `y` (N,) int64, `learning_rate` and `loss` scalars float32, `correct` a scalar int64: how
    many of the batch the stage classified right before the step. The loss is the mean cross-entropy of its logits. What
    dropout keeps depends on `seed`, a scalar float32 of a whole number below 2**24; a graph without dropout does not take
    it. The shapes of `x` and `y` are fixed in the graph, and `rewrite` is applied to it.
    """
    forward = _forward(stage, variant, len(x))
    names = _in_tiles(state.layout, state.parameters)

    def step(tensors: Mapping[str, Tensor]) -> Results:
        parameters = {name: tensors[name] for name in names}
        new: dict[str, Tensor] = {}
        held: dict[str, Tensor] = {}

        def update(gradients: Mapping[str, Tensor]) -> None:
            chosen = {name: parameters[name] for name in gradients}
            changed, new_state = optimizer.update(chosen, gradients, tensors, tensors["learning_rate"])
            new.update({**changed, **new_state})

        def on_gradient(name: str, gradient: Tensor) -> None:
            gradient = optimizer.penalized(gradient, parameters[name], tensors.get(f"received.{name}"))
            # Each parameter is updated as soon as its gradient is known, so that gradients are never held together,
            # unless their common norm is asked for.
            if optimizer.clip_norm:
                held[name] = gradient
            else:
                update({name: gradient})

        statistics, results = _backward(stage, forward, 1.0, state, tensors, on_gradient)
        if held:
            update(optimizer.clipped({name: held[name] for name in parameters}))
        return {**new, **statistics}, results

    inputs = _in_tiles(state.layout, state.by_name)
    return _trace(step, {**inputs, **step_inputs(x, y)}, rewrite)


def trace_accumulation(
    stage: Stage,
    optimizer: Optimizer,
    state: StageState,
    x: Tensor,
    y: Tensor,
    rewrite: Rewrite,
    variant: Variant,
) -> TracedProgram:
    """Trace one micro-batch of a step: `(state..., x, y, first, seed) -> (loss, correct)`.

    Its share of the gradients is added to the optimizer's state; `first`, a scalar float32, is 1 for the first
    micro-batch of a step and 0 for the others. `x` and `y` hold the micro-batch, `loss` is its mean. Each micro-batch has
    a `seed` of its own.
    """
    forward, share = _forward(stage, variant, len(x)), 1 / variant.micro_batches

    def accumulate(tensors: Mapping[str, Tensor]) -> Results:
        new: dict[str, Tensor] = {}

        def on_gradient(name: str, gradient: Tensor) -> None:
            parameter = tensors[name]
            gradient = optimizer.penalized(gradient, parameter, tensors.get(f"received.{name}"), share)
            entry, value = optimizer.accumulate(name, parameter, gradient, tensors, tensors["first"], share)
            new[entry] = value

        statistics, results = _backward(stage, forward, share, state, tensors, on_gradient)
        return {**new, **statistics}, results

    inputs = _in_tiles(state.layout, state.by_name)
    return _trace(accumulate, {**inputs, **step_inputs(x, y)}, rewrite)


def trace_update(stage: Stage, optimizer: Optimizer, state: StageState, rewrite: Rewrite) -> TracedProgram:
    """Trace the end of a step in micro-batches: `(state..., learning_rate) -> learning_rate`, the state written.

    ExecuTorch takes no program without a result.
    """
    names = _in_tiles(state.layout, state.parameters)

    def finish(tensors: Mapping[str, Tensor]) -> Results:
        parameters = {name: tensors[name] for name in names}
        changed, new_state = optimizer.finish(parameters, tensors, tensors["learning_rate"])
        return {**changed, **new_state}, [tensors["learning_rate"].clone()]

    inputs = _in_tiles(state.layout, state.by_name)
    return _trace(finish, {**inputs, "learning_rate": torch.tensor(0.1)}, rewrite)


def trace_evaluation(stage: Stage, state: StageState, x: Tensor, rewrite: Rewrite) -> TracedProgram:
    """Trace the forward pass in evaluation mode: `(parameters..., statistics..., x) -> logits (N, classes)`."""

    def evaluate(tensors: Mapping[str, Tensor]) -> Results:
        values = _of_model(state, tensors) | {name: tensors[name] for name in state.statistics}
        logits: Tensor = functional_call(stage.model, values, (tensors["x"],))
        return {}, [logits]

    stage.model.eval()
    prepare_parts(stage.model, len(x))
    inputs = _in_tiles(state.layout, {**state.parameters, **state.statistics})
    return _trace(evaluate, {**inputs, "x": x}, rewrite)


def trace_frozen(block: nn.Module, x: Tensor, rewrite: Rewrite) -> TracedProgram:
    """Trace a block in evaluation mode with its weights inside: `x -> features`."""
    block.eval()
    prepare_parts(block, len(x))

    def forward(tensors: Mapping[str, Tensor]) -> Results:
        return {}, [block(tensors["x"])]

    with torch.no_grad():
        return _trace(forward, {"x": x}, rewrite)


def _backward(
    stage: Stage,
    forward: Forward,
    share: float,
    state: StageState,
    tensors: Mapping[str, Tensor],
    on_gradient: Callable[[str, Tensor], None],
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Both passes over one (micro-)batch: the new statistics, and loss and right answers.

    `on_gradient` is told of each parameter's gradient, as devices hold it, while the backward pass goes on.
    """
    # The model writes its running statistics in place; it gets copies, so that the caller's tensors change only once
    # the whole step has been computed.
    counters = {
        n: each for n, each in stage.model.named_buffers() if n in stage.written - state.statistics.keys()
    }
    mutated = {n: each.clone() for n, each in counters.items()}
    mutated |= {name: tensors[name].clone() for name in state.statistics}
    leaves = {n: tensors[n].detach().requires_grad_() for n in _in_tiles(state.layout, state.parameters)}
    # The backward pass too: what is computed again drops the same values again.
    with SeededDropout(tensors["seed"]) as dropout:
        with torch.enable_grad():
            logits = forward({**_of_model(state, leaves), **mutated}, tensors["x"], dropout)
            loss = F.cross_entropy(logits, tensors["y"])
        for name, leaf in leaves.items():
            leaf.register_hook(partial(on_gradient, name))
        # Plain autograd, not torch.func.grad: that asks for gradients that can be differentiated again, and gets norms
        # taken apart into dozens of operators in place of their backward operators.
        torch.autograd.grad(loss, list(leaves.values()), torch.full_like(loss, share))
    correct = (logits.argmax(1) == tensors["y"]).sum()
    return {name: mutated[name] for name in state.statistics}, [loss.detach(), correct]


def _in_tiles(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as programs take them."""
    taken: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if layout.is_tiled(name):
            taken |= {tile_name(name, index): tile for index, tile in enumerate(tiles_of(tensor))}
        else:
            taken[name] = tensor
    return taken


def _of_model(state: StageState, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's parameters, from `tensors` as programs take them."""
    values: dict[str, Tensor] = {}
    for name, held in state.parameters.items():
        if state.layout.is_tiled(name):
            *size, _, _ = held.shape
            values[name] = kernel([tensors[tile_name(name, i)] for i in range(math.prod(size))], size)
        else:
            values[name] = state.layout.model(name, tensors[name])
            if name in state.layout.axes:
                # As the model's own is: what PyTorch does differently for other strides has no meaning on a device.
                values[name] = values[name].clone(memory_format=torch.contiguous_format)
    return values


def _forward(stage: Stage, variant: Variant, batch: int) -> Forward:
    """The stage's forward pass in training mode, as a function of the tensors that take the place of its own."""
    stage.model.train()
    prepare_parts(stage.model, batch)
    if variant.recompute:
        recomputing = RecomputingForward(stage)
        recomputing.prepare(batch)
        return recomputing
    return lambda tensors, x, dropout: functional_call(stage.model, dict(tensors), (x,))


def _trace(
    function: Callable[[Mapping[str, Tensor]], Results], inputs: Mapping[str, Tensor], rewrite: Rewrite
) -> TracedProgram:
    written: list[str] = []

    def flat(*arguments: Tensor) -> list[Tensor]:
        new, results = function(dict(zip(inputs, arguments, strict=True)))
        written[:] = new
        return [*new.values(), *results]

    traced = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)
    with without_collection():
        with _without_onednn():
            graph: fx.GraphModule = traced(*inputs.values())
        name_what_is_written(graph)
        bound_gradients(graph)
        graph.graph.eliminate_dead_code()
        update_early(graph.graph, written)
        used = _drop_unused(graph, inputs, written)
        return TracedProgram(rewrite(graph, [inputs[name] for name in used]), used, written)


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    """Where it is there, PyTorch has it compute a recurrent layer at once: an operator that no device knows."""
    enabled, *_ = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled, _fp32_precision=None)


def _drop_unused(graph: fx.GraphModule, inputs: Mapping[str, Tensor], written: Sequence[str]) -> list[str]:
    """Take away arguments the graph neither reads nor writes; the names of the others."""
    used = []
    for name, node in zip(inputs, graph.graph.find_nodes(op="placeholder"), strict=True):
        if node.users or name in written:
            used.append(name)
            node.meta[INPUT] = name
        else:
            graph.graph.erase_node(node)
    graph.recompile()
    return used
