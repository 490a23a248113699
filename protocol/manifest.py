"""The training artifact's manifest: what a stage's programs take, return and need in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from frostline.protocol.errors import CorruptContent
from frostline.protocol.messages import BlobReference, Count, Engine

SCHEMA_VERSION = 1
MANIFEST_BYTES_LIMIT = 2**20

DType = Literal["float32", "int64"]
Dimension = Annotated[int, Field(ge=0, le=2**31)]
STEP_INPUTS: dict[str, frozenset[str]] = {
    "training": frozenset({"x", "y", "learning_rate", "first", "seed"}),
    "update": frozenset({"learning_rate"}),
    "evaluation": frozenset({"x"}),
}
"""What each program may take that changes with every call."""
NEW = "new."
"""Where a runtime cannot write in place: before the name of an input, that of the output which takes its place."""
SEEDS = 2**24
"""How many values the input `seed` may have: the whole numbers that float32 holds exactly."""
_ITEM_BYTES = {"float32": 4, "int64": 8}


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class TensorSpec(_Document):
    """Name, dtype and shape of one tensor, as it travels.

    Attributes
    ----------
    held_axes : tuple of int or None
        Where a device holds the tensor in another order: its axes in that order.
    tile : int or None
        Where a program takes one tile of a tensor: which, `shape` being the tile's.
    vocabulary : int or None
        For an input of token ids: each is at least 0 and below this.
    """

    name: Annotated[str, Field(min_length=1, max_length=512)]
    dtype: DType = "float32"
    shape: Annotated[tuple[Dimension, ...], Field(max_length=8)]
    held_axes: Annotated[tuple[Dimension, ...], Field(max_length=8)] | None = None
    tile: Count | None = None
    vocabulary: Annotated[int, Field(ge=1, le=2**31)] | None = None

    @model_validator(mode="after")
    def _axes_fit(self) -> Self:
        if self.held_axes is not None and sorted(self.held_axes) != list(range(len(self.shape))):
            raise ValueError(f"{self.name!r} is held by axes {list(self.held_axes)}, which are not its own")
        return self

    @property
    def held_shape(self) -> tuple[int, ...]:
        """The shape a device holds it in."""
        return self.shape if self.held_axes is None else tuple(self.shape[axis] for axis in self.held_axes)

    def held(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A view of an array as it travels, in the order a device holds it."""
        return array if self.held_axes is None else array.transpose(self.held_axes)

    def travelling(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A view of an array as a device holds it, in the order it travels."""
        return array if self.held_axes is None else array.transpose(np.argsort(self.held_axes))

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's values."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


class Program(_Document):
    """A compiled method: `inputs` in call order, `outputs` as returned; inputs it writes are not returned.

    The inputs are the stage's own tensors by their names, and those of a step: `x`, `y`, `learning_rate`, `first`, which is
    1 for the first micro-batch of a step and 0 for the others, and `seed`, which tells dropout what to keep: a whole
    number below `SEEDS`, another one at each call.

    Attributes
    ----------
    flops : int
        Of a frozen block: operations on one batch of the program, counted as `StageManifest.flops`, in int8 as in
        float32; 0 where not known.
    """

    file: BlobReference
    inputs: Annotated[list[TensorSpec], Field(min_length=1)]
    outputs: list[TensorSpec]
    arena_bytes: Count
    flops: Count = 0


class PlannedMemory(_Document):
    """Bytes a device needs to train the stage, by kind; known before anything is sent.

    Attributes
    ----------
    arena : int
        What the runtime plans, or was measured to take, for the programs that are loaded at the same time.
    received : int
        The copy of the received parameters that a proximal term needs.
    second_buffers : int
        Where the runtime cannot write in place: as much again as what a step writes.
    batch : int
        One micro-batch.
    prefix : int
        What the largest frozen block takes beyond all the rest while it runs, before training; its weights counted
        twice, since XNNPACK packs a copy.
    """

    arena: Count
    parameters: Count
    statistics: Count
    optimizer_state: Count
    received: Count
    second_buffers: Count = 0
    batch: Count
    program: Count
    prefix: Count = 0

    def behind(self, prefix: Sequence[Program]) -> PlannedMemory:
        """The same stage behind these frozen blocks, which run one at a time before training."""
        rest = self.total - self.prefix
        largest = max((_running_bytes(program) for program in prefix), default=0)
        return self.model_copy(update={"prefix": max(largest - rest, 0)})

    @property
    def total(self) -> int:
        """The figure a device's memory budget is held against."""
        return sum(self.model_dump().values())


def _running_bytes(program: Program) -> int:
    tensors = sum(spec.size_bytes for spec in [*program.inputs, *program.outputs])
    return program.arena_bytes + 2 * program.file.size + tensors


class StageManifest(_Document):
    """One stage compiled for one engine.

    Attributes
    ----------
    variant : str
        How a step is carried out, such as "whole", "micro4" or "micro4+recompute".
    batch : int
        Samples in a step.
    micro_batches : int
        Equal parts a batch is trained in.
    received : list of TensorSpec
        Copies the device keeps of the parameters as it received them, named `received.<parameter>`.
    training : Program
        One micro-batch to (loss, correct), the stage's tensors written in place: a whole step, or where there is an
        `update`, its part of the gradients.
    update : Program or None
        The end of a step in micro-batches.
    evaluation : Program
        One micro-batch to logits.
    checkpoint : BlobReference or None
        What the programs of onnxruntime-training keep the stage's tensors in; they then take only a batch.
    prefix : list of Program
        The frozen blocks in order, each with its weights inside; the features of one are the input of the next.
    flops : int
        Floating-point operations of one step on the whole batch: the matrix products and convolutions of both passes, a
        multiply and an add counted as two; 0 where not known.
    """

    schema_version: Literal[1] = 1
    stage: Count
    stages: Annotated[int, Field(ge=1, le=10_000)]
    name: str
    engine: Engine
    variant: Annotated[str, Field(min_length=1, max_length=64)]
    batch: Annotated[int, Field(ge=1, le=65_536)]
    micro_batches: Annotated[int, Field(ge=1, le=65_536)]
    classes: Annotated[int, Field(ge=1, le=10_000_000)]
    parameters: list[TensorSpec]
    statistics: list[TensorSpec]
    optimizer_state: list[TensorSpec]
    received: list[TensorSpec]
    training: Program
    update: Program | None
    evaluation: Program
    checkpoint: BlobReference | None = None
    prefix: list[Program]
    planned: PlannedMemory
    flops: Count = 0

    @model_validator(mode="after")
    def _programs_fit(self) -> Self:
        held = {spec.name: spec for spec in [*self.trained, *self.optimizer_state, *self.received]}
        copies = {(f"received.{spec.name}", spec.dtype, spec.held_shape) for spec in self.parameters}
        for spec in self.received:
            if (spec.name, spec.dtype, spec.shape) not in copies:
                raise ValueError(f"{spec.name!r} is no copy of a parameter")
        programs = {"training": self.training, "update": self.update, "evaluation": self.evaluation}
        for kind, program in programs.items():
            for spec in program.inputs if program else ():
                if spec.name not in STEP_INPUTS[kind]:
                    _check_input(kind, spec, held)
        if self._input.name != "x" or not self._input.shape:
            raise ValueError("the last input of the evaluation is to be the batch x")
        if self.micro_batch * self.micro_batches != self.batch:
            raise ValueError(
                f"{self.micro_batches} parts of {self.micro_batch} samples make no batch of {self.batch}"
            )
        if (self.checkpoint is not None) != (self.engine == "onnxruntime-training"):
            raise ValueError("onnxruntime-training needs a checkpoint, and no other engine does")
        if (self.micro_batches > 1 or self.checkpoint is not None) != (self.update is not None):
            raise ValueError("a step in micro-batches ends with an update program, and no other does")
        return self

    @property
    def trained(self) -> list[TensorSpec]:
        """The tensors that travel each round."""
        return [*self.parameters, *self.statistics]

    @property
    def micro_batch(self) -> int:
        """Samples the programs take at a time."""
        return self._input.shape[0]

    @property
    def _input(self) -> TensorSpec:
        return self.evaluation.inputs[-1]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample at the stage's input, after the prefix."""
        return self._input.shape[1:]

    @property
    def samples(self) -> TensorSpec:
        """A batch of raw samples, before the prefix."""
        return self.prefix[0].inputs[0] if self.prefix else self._input

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one raw sample, before the prefix."""
        return self.samples.shape[1:]

    @property
    def files(self) -> list[BlobReference]:
        """Every file the manifest names."""
        programs = [self.training, *([self.update] if self.update else []), self.evaluation, *self.prefix]
        files = [program.file for program in programs]
        return [*files, self.checkpoint] if self.checkpoint else files

    def behind(self, prefix: Sequence[Program]) -> StageManifest:
        """The same stage behind these frozen blocks."""
        return self.model_copy(update={"prefix": list(prefix), "planned": self.planned.behind(prefix)})

    def encode(self) -> bytes:
        """The manifest as the bytes that are hashed."""
        return (self.model_dump_json(indent=1) + "\n").encode()


def _check_input(kind: str, spec: TensorSpec, held: Mapping[str, TensorSpec]) -> None:
    """Refuse a program's input that the device has no memory for."""
    if spec.name not in held:
        raise ValueError(f"the {kind} program takes {spec.name!r}, which the stage does not have")
    whole = held[spec.name]
    if spec.tile is None:
        fits = (spec.dtype, spec.shape) == (whole.dtype, whole.held_shape)
    else:
        size = spec.size_bytes
        fits = spec.dtype == whole.dtype and size > 0 and whole.size_bytes % size == 0
        fits = fits and (spec.tile + 1) * size <= whole.size_bytes
    if not fits:
        raise ValueError(f"the {kind} program takes {spec.name!r} in a shape that is not the stage's")


def decode_manifest(content: bytes, source: str) -> StageManifest:
    """Parse a manifest from `source`, a file or device named in errors.

    Raises
    ------
    CorruptContent
        If it is too long or does not fit the schema.
    """
    if len(content) > MANIFEST_BYTES_LIMIT:
        raise CorruptContent(f"{source}: a manifest has at most {MANIFEST_BYTES_LIMIT} bytes")
    try:
        return StageManifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise CorruptContent(
            f"{source}: not a stage manifest: {where}: {first['msg']}; export the artifact again"
        ) from None
