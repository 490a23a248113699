"""Recomputes a block's activations in the backward pass, so that only what its segments hand on is kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import pairwise

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from frostline.exporter.boundaries import Layout, segment_ends
from frostline.exporter.dropout import SeededDropout
from frostline.exporter.named_tensors import tensors_of
from frostline.exporter.part import Captures, Part, Span
from frostline.exporter.stage import Stage

MOST_SEGMENTS = 16
CAPTURED_BATCH = 3
BLOCK = "block."
OUTPUT_MODULE = "output_module."


class RecomputingForward:
    """A stage's forward pass whose backward pass runs the block's segments again.

    Segments are what lies between places in the block where a single tensor passes.
    """

    def __init__(self, stage: Stage) -> None:
        self._output_module = stage.model.output_module
        self._segments = [_part(span, stage) for span in _spans(stage)]
        self._written = {name.removeprefix(BLOCK) for name in stage.written}

    def prepare(self, batch: int) -> None:
        """Have every segment ready for batches of a size."""
        for part in self._segments:
            part.prepare(batch)

    def __call__(self, tensors: Mapping[str, Tensor], x: Tensor, dropout: SeededDropout) -> Tensor:
        """Features (N, *input_shape) to logits (N, classes), with `tensors` in place of the model's own."""
        given = _of(tensors, BLOCK)
        *others, last = self._segments
        for part in others:
            segment = _Segment(part, given, self._written, dropout)
            x = checkpoint(segment, x, use_reentrant=False, preserve_rng_state=False)
        # The backward pass begins with the last one, before there is anything to be gained from forgetting it.
        features = functional_call(last, _own(last, given), (x,))
        logits: Tensor = functional_call(self._output_module, _of(tensors, OUTPUT_MODULE), (features,))
        return logits


class _Segment:
    """Part of a block over given tensors; run again, it drops the same values and leaves alone what the first run wrote."""

    def __init__(
        self, part: nn.Module, tensors: Mapping[str, Tensor], written: Collection[str], dropout: SeededDropout
    ) -> None:
        self._part = part
        self._tensors = _own(part, tensors)
        self._before = _copied(self._tensors, written)
        self._dropout = dropout
        self._draws: int | None = None
        """How many draws there had been before its first run, if that has been."""

    def __call__(self, x: Tensor) -> Tensor:
        if self._draws is None:
            self._draws = self._dropout.draws
            first: Tensor = functional_call(self._part, self._tensors, (x,))
            return first
        with self._dropout.again(self._draws):
            again: Tensor = functional_call(self._part, {**self._tensors, **self._before}, (x,))
        return again


def _copied(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """What a segment writes, as it is before its first run."""
    return {name: each.clone() for name, each in tensors.items() if name in names}


def _of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def _own(part: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # What the model has frozen is not among the tensors.
    return {name: tensors[name] for name in tensors_of(part) if name in tensors}


def _spans(stage: Stage) -> list[Span]:
    """The block in as many segments as single-tensor boundaries allow, and what follows the last of them."""
    block = stage.model.block
    whole = block.span if isinstance(block, Part) else _span(stage, block)
    made = whole.captures.of(training=True)
    model = tensors_of(whole.captures.module)
    layout = Layout(made, model, [name for name, each in model.items() if each.requires_grad], made)
    ends = segment_ends(layout, *whole.bounds(made), MOST_SEGMENTS)
    boundaries = [whole.start, *(layout.boundary(end) for end in ends), whole.end]
    features = [whole.inputs, *(tuple(layout.features(end) or ()) for end in ends), whole.outputs]
    return [
        Span(whole.captures, start, end, inputs, outputs)
        for (start, end), (inputs, outputs) in zip(pairwise(boundaries), pairwise(features), strict=True)
    ]


def _span(stage: Stage, block: nn.Module) -> Span:
    x = stage.random_batch(CAPTURED_BATCH, seed=0)
    if x.is_floating_point():
        x = x.to(next((each.dtype for each in block.parameters()), x.dtype))
    return Span(Captures(block, x), None, None, (), ())


def _part(span: Span, stage: Stage) -> Part:
    tensors = tensors_of(stage.model.block)
    names = span.graph(training=True).names
    return Part(span, {name: tensors[name] for name in names}, names).train()
