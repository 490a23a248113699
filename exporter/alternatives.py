"""What each way of cutting a model would cost, before anything is compiled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from frostline.exporter.artifact import ExportOptions
from frostline.exporter.cutting import CutModel
from frostline.exporter.output_module import OutputModuleKind
from frostline.exporter.planning import estimate_stage
from frostline.exporter.stage import (
    Stage,
    build_stage,
    build_whole_model,
    statistics_tensors,
    trainable_tensors,
)
from frostline.exporter.variant import WHOLE

FLOAT_BYTES = 4


@dataclass(frozen=True)
class StageFigures:
    """One stage of a cut.

    Attributes
    ----------
    block_parameters, output_module_parameters : int
        Numbers that the block and what stands in for the rest have.
    feature_bytes : int
        What the block hands on, and devices cache, for one sample.
    planned_bytes : int
        Memory for training in one piece, by estimate.
    travels_bytes : int
        What goes to a device in a round, and comes back, in float32.
    """

    name: str
    block_parameters: int
    output_module_parameters: int
    feature_bytes: int
    planned_bytes: int
    travels_bytes: int


def figures_of(
    parts: CutModel, options: ExportOptions, seed: int, kind: OutputModuleKind
) -> Iterator[StageFigures]:
    """The figures of each stage of a cut."""
    for index, block in enumerate(parts.blocks):
        last = index + 1 == len(parts.blocks)
        stage = build_stage(parts, index, seed, kind)
        yield _figures(stage, options, 0 if last else FLOAT_BYTES * math.prod(block.output_shape))


def figures_of_whole(parts: CutModel, options: ExportOptions) -> StageFigures:
    """The figures of training the whole model at once."""
    return _figures(build_whole_model(parts), options, 0)


def _figures(stage: Stage, options: ExportOptions, feature_bytes: int) -> StageFigures:
    tensors = {**trainable_tensors(stage), **statistics_tensors(stage)}
    return StageFigures(
        name=stage.name,
        block_parameters=_count(stage.model.block.parameters()),
        output_module_parameters=_count(stage.model.output_module.parameters()),
        feature_bytes=feature_bytes,
        planned_bytes=estimate_stage(stage, options, WHOLE).total,
        travels_bytes=sum(each.numel() * each.element_size() for each in tensors.values()),
    )


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(each.numel() for each in parameters)
