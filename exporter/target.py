"""What stages are compiled for: one of the runtimes that devices have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, fx, nn

from frostline.exporter.layout import Layout
from frostline.exporter.training_step import TracedProgram
from frostline.protocol.messages import Engine

Run = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]
"""Runs a program over tensors by name, those that it writes written in place; returns its results."""


@dataclass(frozen=True)
class LoweredProgram:
    """A program as its runtime reads it.

    Attributes
    ----------
    inputs : tuple of str
        Names of the arguments, in order.
    written : tuple of str
        Those whose new values the program returns into memory of their own, for want of writing in place.
    arena_bytes : int
        What the runtime takes for intermediate tensors.
    """

    content: bytes
    inputs: tuple[str, ...]
    arena_bytes: int
    written: tuple[str, ...] = ()


class Target(Protocol):
    """Turns traced programs into those of one engine, and runs them in its real runtime.

    Attributes
    ----------
    engine : Engine
        The engine that devices need.
    writes_in_place : bool
        Whether its programs write their arguments; if not, a device holds those twice.
    recomputes : bool
        Whether it has variants with recomputation.
    delegates : bool
        Whether frozen blocks are lowered to a library of fast kernels, and can be to the runtime's own.
    """

    engine: Engine
    writes_in_place: bool
    recomputes: bool
    delegates: bool

    def layout(self, model: nn.Module) -> Layout:
        """The order in which devices hold the tensors of a stage's model."""

    def rewrite(self, graph: fx.GraphModule, arguments: Sequence[Tensor]) -> fx.GraphModule:
        """A flat graph of ATen operators in those that the runtime executes well."""

    def lower(
        self, program: TracedProgram, tensors: Mapping[str, Tensor], results: Sequence[str]
    ) -> LoweredProgram:
        """A rewritten program over tensors by name; what it returns gets the names `results`."""

    def lower_frozen(
        self, block: nn.Module, x: Tensor, calibration: Tensor | None = None, *, delegated: bool = True
    ) -> LoweredProgram:
        """A block in evaluation mode with its weights inside, from one batch `x` to `features`.

        In int8, by a calibration sample, where the target can; else in float32.
        """

    def load(self, program: LoweredProgram) -> Run:
        """A lowered program in its runtime."""
