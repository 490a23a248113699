"""What the zoo tells of one model: how to build it, what it takes, and what the exporter should do with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from frostline.exporter.inputs import random_inputs

IMAGE = (3, 32, 32)
CLASSES = 10


@dataclass(frozen=True)
class Refusal:
    """Why the exporter should not compile a model.

    Attributes
    ----------
    mentions
        What the message must contain: the module's path where there is one, and the true cause.
    gives
        What the eager model gives for a batch: logits (N, classes), something else, or an error.
    """

    mentions: tuple[str, ...]
    gives: Literal["logits", "other", "error"] = "logits"


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes
    ----------
    name
        Unique in the zoo.
    kind
        An architecture as a whole, or a layer or habit in a net of two or three layers.
    build
        Makes the model; its weights follow from the global seed.
    input_shape
        Shape of one sample.
    classes
        Classes that the exporter is asked for.
    vocabulary
        Bound of the int64 ids that the model takes; ``None`` for float32 features.
    blocks
        Number of blocks, or the names of the modules that end them.
    expected
        What a compiler without gaps does with it.
    frozen
        Prefixes of the parameters that train by their flag and get no gradient all the same, and of the running
        statistics that stay, in the author's own training step. It gives every other one a gradient or moves it.
    notes
        What is special about it.
    """

    name: str
    kind: Literal["architecture", "layer"]
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    classes: int = CLASSES
    vocabulary: int | None = None
    blocks: int | tuple[str, ...] = 2
    expected: Literal["compiles"] | Refusal = "compiles"
    frozen: tuple[str, ...] = ()
    notes: str = ""

    def model(self, seed: int = 0) -> nn.Module:
        """Build the model with the weights of a seed; the global random state stays as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()

    def example(self, batch: int, seed: int = 0) -> Tensor:
        r"""Return a batch (batch, \*input_shape): float32 normal deviates, or int64 ids below the vocabulary."""
        generator = torch.Generator().manual_seed(seed)
        return random_inputs(batch, self.input_shape, self.vocabulary, generator)


def to_training(model: nn.Module) -> None:
    """Put a model into the mode that its author trains it in.

    That is what its own ``train()`` gives. A module that came in evaluation mode while the model as a whole came in
    training mode was put there on purpose, and stays.
    """
    kept = [module for module in model.modules() if not module.training] if model.training else []
    model.train()
    for module in kept:
        module.eval()


def architecture(
    build: Callable[[], nn.Module],
    input_shape: tuple[int, ...] = IMAGE,
    *,
    vocabulary: int | None = None,
    blocks: int | tuple[str, ...] = 2,
    expected: Literal["compiles"] | Refusal = "compiles",
    frozen: tuple[str, ...] = (),
    notes: str = "",
) -> Entry:
    """Return the entry of an architecture, named as the function that builds it."""
    return Entry(
        name=build.__name__,
        kind="architecture",
        build=build,
        input_shape=input_shape,
        vocabulary=vocabulary,
        blocks=blocks,
        expected=expected,
        frozen=frozen,
        notes=notes,
    )
