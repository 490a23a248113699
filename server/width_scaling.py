"""Whole models of several widths over one set of weights: HeteroFL, the baseline for fleets of unequal memory.

Diao, Ding and Tarokh, "HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous Clients",
ICLR 2021: a narrow model is the leading part of a wide one, along each axis of each tensor; the server averages each
coordinate over the devices that hold it. What is not taken over: their scaler and their static batch norm, since the
models here normalise by groups, which keeps activations at one scale whatever the width and has no statistics to share;
and their loss over a device's own classes only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from frostline.protocol.errors import UsageError
from frostline.protocol.manifest import PlannedMemory
from frostline.protocol.messages import Engine
from frostline.protocol.tensors import Array
from frostline.server.aggregation import narrowed
from frostline.server.schedule import GrowingSchedule, PreparedStage


class WidthSchedule:
    """One stage, the whole model, in several widths; each device trains the widest that it can hold in one piece.

    Parameters
    ----------
    schedules : sequence of (float, GrowingSchedule)
        Each width with the model of that width in one block, full width first; the first holds the weights.

    Raises
    ------
    UsageError
        If a narrower model is not a part of the full one.
    """

    def __init__(self, schedules: Sequence[tuple[float, GrowingSchedule]]) -> None:
        self._full = schedules[0][1]
        self._schedules = schedules
        for width, narrow in schedules[1:]:
            _check_part(narrow.shapes(0), self._full.shapes(0), width)

    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        """The name of the stage."""
        return self._full.name(index)

    def weights(self, index: int) -> dict[str, Array]:
        """The full width's."""
        return self._full.weights(index)

    def begin(self, index: int, engine: Engine) -> None:
        """Have the full width compiled meanwhile."""
        self._full.begin(index, engine)

    def plan(self, index: int, engine: Engine) -> PlannedMemory:
        """What training the full width takes."""
        return self._full.plan(index, engine)

    def estimate_whole_model(self) -> PlannedMemory:
        """The same, estimated: the full width is the whole model."""
        return self._full.estimate_whole_model()

    def prepare(self, index: int, engine: Engine) -> PreparedStage:
        """The full width."""
        return self._prepared(0, index, engine)

    def prepare_within(self, index: int, engine: Engine, budget: int) -> PreparedStage | None:
        """The widest form that fits a budget; None if none does."""
        for number in range(len(self._schedules)):
            prepared = self._prepared(number, index, engine)
            if prepared.manifest.planned.total <= budget:
                return prepared
        return None

    def smallest(self, index: int, engine: Engine) -> PreparedStage:
        """The narrowest form."""
        return self._prepared(len(self._schedules) - 1, index, engine)

    def narrower(self, index: int, engine: Engine) -> list[PreparedStage]:
        """All but the full width, widest first."""
        return [self._prepared(number, index, engine) for number in range(1, len(self._schedules))]

    def last_layer(self, index: int) -> list[str]:
        """Names of the tensors of the last layer."""
        return self._full.last_layer(index)

    def accuracy(self, index: int, weights: Mapping[str, Array]) -> float | None:
        """Fraction of the held-out samples that the full width classifies correctly."""
        return self._full.accuracy(index, weights)

    def freeze(self, index: int, weights: Mapping[str, Array]) -> float | None:
        """Fix the weights."""
        return self._full.freeze(index, weights)

    def reopen(self, index: int) -> None:
        """Nothing is frozen before the one stage there is."""

    def trained_model(self) -> torch.nn.Module:
        """The full width."""
        return self._full.trained_model()

    def example(self, batch: int) -> Tensor:
        """A batch of zeros as the model takes it."""
        return self._full.example(batch)

    def close(self) -> None:
        """Compile nothing more."""
        for _, schedule in self._schedules:
            schedule.close()

    def _prepared(self, number: int, index: int, engine: Engine) -> PreparedStage:
        width, schedule = self._schedules[number]
        whole = self._full.prepare(index, engine)
        form = schedule.prepare(index, engine)
        return replace(form, width=width, weights=narrowed(whole.weights, form.manifest.trained))


def _check_part(
    narrow: Mapping[str, tuple[int, ...]], full: Mapping[str, tuple[int, ...]], width: float
) -> None:
    for name, shape in narrow.items():
        wide = full.get(name, ())
        if len(wide) != len(shape) or any(
            part > all_of_it for part, all_of_it in zip(shape, wide, strict=True)
        ):
            raise UsageError(
                f"model.widths: at width {width:g} tensor {name!r} of shape {list(shape)} is no part of the full model's; "
                "its option `width` has to scale channels and nothing else"
            )
