"""The training artifact's manifest: what a stage's programs take, return and need in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from frostline.protocol.errors import CorruptContent
from frostline.protocol.messages import BlobReference, Count, Engine

SCHEMA_VERSION = 1
MANIFEST_BYTES_LIMIT = 2**20

DType = Literal["float32", "int64"]
Dimension = Annotated[int, Field(ge=0, le=2**31)]
_ITEM_BYTES = {"float32": 4, "int64": 8}


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class TensorSpec(_Document):
    """Name, dtype and shape of one tensor.

    Attributes
    ----------
    model_axes : tuple of int or None
        Where devices hold a parameter in another order than the model: the model's axes in the order they are held.
    """

    name: Annotated[str, Field(min_length=1, max_length=512)]
    dtype: DType = "float32"
    shape: Annotated[tuple[Dimension, ...], Field(max_length=8)]
    model_axes: Annotated[tuple[Dimension, ...], Field(max_length=8)] | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's values."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


class Program(_Document):
    """A compiled method: `inputs` in call order, `outputs` as returned; mutated inputs are not returned."""

    file: BlobReference
    inputs: Annotated[list[TensorSpec], Field(min_length=1)]
    outputs: list[TensorSpec]
    arena_bytes: Count


class PlannedMemory(_Document):
    """Bytes a device needs to train the stage, by kind; known before anything is sent.

    Attributes
    ----------
    prefix : int
        What the largest frozen block takes beyond all the rest while it runs, before training; its weights counted
        twice, since XNNPACK packs a copy.
    """

    arena: Count
    parameters: Count
    statistics: Count
    optimizer_state: Count
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
    training : Program
        One optimizer step: (parameters, statistics, optimizer state, x, y, learning rate), the first three mutated in
        place, to (loss, correct).
    evaluation : Program
        (parameters, statistics, x) to logits.
    prefix : list of Program
        The frozen blocks in order, each with its weights inside; the features of one are the input of the next.
    """

    schema_version: Literal[1] = 1
    stage: Count
    stages: Annotated[int, Field(ge=1, le=10_000)]
    name: str
    engine: Engine
    batch: Annotated[int, Field(ge=1, le=65_536)]
    classes: Annotated[int, Field(ge=1, le=10_000_000)]
    parameters: list[TensorSpec]
    statistics: list[TensorSpec]
    optimizer_state: list[TensorSpec]
    training: Program
    evaluation: Program
    prefix: list[Program]
    planned: PlannedMemory

    @property
    def trained(self) -> list[TensorSpec]:
        """The tensors that travel each round."""
        return [*self.parameters, *self.statistics]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample at the stage's input, after the prefix."""
        return self.evaluation.inputs[-1].shape[1:]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one raw sample, before the prefix."""
        return self.prefix[0].inputs[0].shape[1:] if self.prefix else self.input_shape

    @property
    def files(self) -> list[BlobReference]:
        """Every file the manifest names."""
        return [self.training.file, self.evaluation.file, *(p.file for p in self.prefix)]

    def encode(self) -> bytes:
        """The manifest as the bytes that are hashed."""
        return (self.model_dump_json(indent=1) + "\n").encode()


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
