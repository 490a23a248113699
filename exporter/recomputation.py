"""Recomputes a block's activations in the backward pass, so that only what its segments hand on is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from frostline.exporter.cutting import cut
from frostline.exporter.dropout import SeededDropout
from frostline.exporter.inputs import zero_inputs
from frostline.exporter.stage import Stage
from frostline.protocol.errors import UsageError

MOST_SEGMENTS = 16


class RecomputingForward:
    """A stage's forward pass whose backward pass runs the block's segments again.

    Segments are the parts between places in the block where a single tensor passes.
    """

    def __init__(self, stage: Stage) -> None:
        self._output_module = stage.model.output_module
        self._segments = _segments(stage)

    def __call__(self, tensors: Mapping[str, Tensor], x: Tensor, dropout: SeededDropout) -> Tensor:
        """Features (N, *input_shape) to logits (N, classes), with `tensors` in place of the model's own."""
        parts = self._segments
        *others, last, rest = (_Segment(part, _of(tensors, "block.", part), dropout) for part in parts)
        for segment in others:
            x = checkpoint(segment, x, use_reentrant=False, preserve_rng_state=False)
        # The backward pass begins with the last one, before there is anything to be gained from forgetting it.
        module = self._output_module
        logits: Tensor = functional_call(module, _of(tensors, "output_module.", module), (rest(last(x)),))
        return logits


class _Segment:
    """Part of a block over given tensors; run again, it drops the same values."""

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor], dropout: SeededDropout) -> None:
        self._module = module
        self._tensors = dict(tensors)
        self._dropout = dropout
        self._draws: int | None = None
        """How many draws there had been before its first run, if that has been."""

    def __call__(self, x: Tensor) -> Tensor:
        if self._draws is None:
            self._draws = self._dropout.draws
            return self._features(x)
        with _without_statistics(self._module), self._dropout.again(self._draws):
            return self._features(x)

    def _features(self, x: Tensor) -> Tensor:
        features: Tensor = functional_call(self._module, self._tensors, (x,))
        return features


def _of(tensors: Mapping[str, Tensor], prefix: str, module: nn.Module) -> dict[str, Tensor]:
    # Frozen parameters are not among the tensors, buffers left out of the state_dict are.
    names = [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
    return {name: tensors[prefix + name] for name in names if prefix + name in tensors}


def _segments(stage: Stage) -> list[nn.Module]:
    """The block in as many parts as single-tensor boundaries allow, and what follows the last of them."""
    example = zero_inputs(2, stage.input_shape, stage.vocabulary)
    if stage.vocabulary is None:
        example = example.to(next((p.dtype for p in stage.model.parameters()), example.dtype))
    for count in range(MOST_SEGMENTS, 0, -1):
        with contextlib.suppress(UsageError):
            parts = cut(stage.model.block, count, example, stage.vocabulary)
            return [*(block.module for block in parts.blocks), parts.head]
    return [stage.model.block, nn.Identity()]


@contextlib.contextmanager
def _without_statistics(segment: nn.Module) -> Iterator[None]:
    """Batch norm counts each batch once, however often it is computed."""
    norms = [m for m in segment.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
