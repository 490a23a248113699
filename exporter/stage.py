"""A stage: the active block with the output module that stands in for the rest of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from frostline.exporter.cutting import CutModel
from frostline.exporter.inputs import pad, random_inputs
from frostline.exporter.named_tensors import tensors_of
from frostline.exporter.output_module import OutputModule, OutputModuleKind, build_output_module
from frostline.exporter.part import Part, joined
from frostline.exporter.semantics import observe_step
from frostline.exporter.support import explain
from frostline.protocol.errors import RunError

OBSERVED_BATCH = 2
"""Samples in the step that shows what a stage trains."""


class StageModel(nn.Module):
    """Maps a stage's input features to logits: `block`, then `output_module`."""

    def __init__(self, block: nn.Module, output_module: OutputModule) -> None:
        super().__init__()
        self.block = block
        self.output_module = output_module

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, *input_shape) to logits (N, classes)."""
        logits: Tensor = self.output_module(self.block(x))
        return logits


@dataclass(frozen=True)
class Stage:
    """One stage of a cut model, ready to be traced.

    Attributes
    ----------
    index : int
        Position of the active block, from 0.
    count : int
        How many stages the model has.
    name : str
        The active block's name.
    model : StageModel
        The active block and its output module.
    input_shape : tuple of int
        Shape of one sample of the stage's input, without the batch axis.
    vocabulary : int or None
        Where the input is token ids, int64, how many there are; None where it is float32.
    before : Part or None
        The blocks in front of it, which make its input of the model's; None for the first stage.
    trained : frozenset of str
        The parameters that a step moves: those that ask for a gradient and get one. All others are constants.
    written : frozenset of str
        The buffers that a step writes, such as running statistics. All others are constants.
    """

    index: int
    count: int
    name: str
    model: StageModel
    input_shape: tuple[int, ...]
    vocabulary: int | None = None
    before: Part | None = None
    trained: frozenset[str] = field(init=False)
    written: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        x = self.random_batch(OBSERVED_BATCH, seed=0)
        dtype = next((each.dtype for each in self.model.parameters()), torch.float32)
        x = x.to(dtype) if x.is_floating_point() else x
        try:
            seen = observe_step(self.model, x)
        except Exception as error:  # it runs the model, which may raise anything
            raise RunError(
                f"stage {self.name!r} cannot be compiled: {explain(error, self.model, x)}"
            ) from error
        # What has two names is known by the first.
        parameters, buffers = (
            dict(each) for each in (self.model.named_parameters(), self.model.named_buffers())
        )
        object.__setattr__(self, "trained", frozenset(seen.gradients.keys() & parameters.keys()))
        object.__setattr__(self, "written", frozenset(seen.written.keys() & {**parameters, **buffers}.keys()))

    def random_batch(self, count: int, seed: int, *, padded: bool = False) -> Tensor:
        r"""What the stage takes, (count, \*input_shape), of samples drawn at random.

        It is what the blocks in front of it make of them: masks, counts and values that are never negative stay such.
        `padded` samples end in zeros, as those that are shorter than the others do.
        """
        random = torch.Generator().manual_seed(seed)
        if self.before is None:
            x = random_inputs(count, self.input_shape, self.vocabulary, random)
            return pad(x) if padded else x
        (source,) = self.before.span.inputs
        x = random_inputs(count, source.shape, self.before.span.captures.vocabulary, random)
        x = pad(x) if padded else x
        self.before.eval()
        with torch.no_grad():
            features: Tensor = self.before(x)
        return features.contiguous()


def build_stage(
    cut: CutModel, index: int, seed: int, output_module: OutputModuleKind = "convolutions"
) -> Stage:
    """Stage `index` of `cut`; the output module's values come from `seed`."""
    block = cut.blocks[index]
    model = StageModel(block.module, build_output_module(cut, index, seed, output_module))
    before = joined([each.module for each in cut.blocks[:index]]) if index else None
    return Stage(index, len(cut.blocks), block.name, model, block.input_shape, block.vocabulary, before)


def build_whole_model(cut: CutModel) -> Stage:
    """Train every block at once: the footprint that stages are compared with."""
    model = StageModel(joined([block.module for block in cut.blocks]), OutputModule({}, cut.head))
    return Stage(0, 1, "whole model", model, cut.blocks[0].input_shape, cut.blocks[0].vocabulary)


def trainable_tensors(stage: Stage) -> dict[str, Tensor]:
    """Copies of the stage's trained parameters by name."""
    return {
        name: p.detach().clone(memory_format=torch.contiguous_format)
        for name, p in stage.model.named_parameters()
        if name in stage.trained
    }


def statistics_tensors(stage: Stage) -> dict[str, Tensor]:
    """Copies of the floating-point buffers a step writes, such as batch norm's running statistics.

    Integer buffers (batch norm's counter of batches) stay behind: no operator of a step reads them.
    """
    return {
        name: b.detach().clone()
        for name, b in stage.model.named_buffers()
        if torch.is_floating_point(b) and name in stage.written
    }


def load_tensors(stage: Stage, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` over the stage's values of the same name; others are left out."""
    own = tensors_of(stage.model)
    with torch.no_grad():
        for name, value in tensors.items():
            if name in own:
                own[name].copy_(value)
