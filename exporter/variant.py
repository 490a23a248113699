"""Variants of a stage: the same training step at different peaks of memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MICRO_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Variant:
    """How a step is carried out.

    Attributes
    ----------
    micro_batches : int
        Equal parts a batch is trained in, their gradients accumulated before the update. The mathematics is that of
        the whole batch, but for batch norm, which then sees the statistics of one part at a time.
    recompute : bool
        Whether the block keeps only what its segments hand on, and computes the rest again in the backward pass
        (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv 1604.06174).
    """

    micro_batches: int = 1
    recompute: bool = False

    @property
    def name(self) -> str:
        """As manifests, tables and the command line name it, such as "whole", "micro4" or "micro4+recompute"."""
        parts = "whole" if self.micro_batches == 1 else f"micro{self.micro_batches}"
        return f"{parts}+recompute" if self.recompute else parts


WHOLE = Variant()


def variants_of(batch: int) -> Iterator[Variant]:
    """The variants of a step on `batch` samples, fastest first.

    Recomputing costs about a third of a step; cutting the batch up costs little, until products get small.
    """
    for recompute in (False, True):
        for count in MICRO_BATCHES:
            if batch % count == 0:
                yield Variant(count, recompute)
