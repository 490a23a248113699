"""Updates in fewer bytes: half precision or 8-bit integers, only the largest values, and zstd over the whole.

An update is a safetensors file of new minus received values. Encoded, a parameter `w` travels as

* `w`: its values, as float16 or as int8 that `w:scale` (float32, the largest magnitude over 127) is to be multiplied with;
* `w:kept`, where only a share of the values travels: one bit a value in C order, the first in a byte's highest, that says
  whether it is among those in `w`. A bit takes less than an index would above a share of 1/32, and less than values do
  below; zstd takes most of what there is to take.

Statistics of normalisation layers travel as they are. What encoding loses is for the device to add to its next update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import zstandard

from frostline.protocol.errors import CorruptContent
from frostline.protocol.manifest import TensorSpec
from frostline.protocol.messages import UpdateEncoding
from frostline.protocol.tensors import Array, DescribedTensor, decode_tensors, encode_tensors, largest_file

KEPT, SCALE = ":kept", ":scale"
_ITEM_BYTES = {"float32": 4, "float16": 2, "int8": 1, "uint8": 1}
_LARGEST_HALF = float(np.finfo(np.float16).max)


class TrainedTensors(Protocol):
    """The tensors of a stage that travel, as `frostline.protocol.manifest.StageManifest` lists them."""

    @property
    def parameters(self) -> Sequence[TensorSpec]:
        """What is encoded."""

    @property
    def statistics(self) -> Sequence[TensorSpec]:
        """What travels as it is."""


@dataclass(frozen=True)
class EncodedTensor:
    """One tensor of an encoded update; see `frostline.protocol.tensors.DescribedTensor`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def encode_update(update: Mapping[str, Array], stage: TrainedTensors, encoding: UpdateEncoding) -> bytes:
    """An update as it travels.

    Parameters
    ----------
    update : mapping of str to array
        New minus received values of the stage's parameters and statistics; float32, finite.
    """
    tensors = {spec.name: update[spec.name] for spec in stage.statistics}
    for spec in stage.parameters:
        tensors.update(_encode(spec.name, update[spec.name], encoding))
    content = encode_tensors(tensors)
    return zstandard.ZstdCompressor().compress(content) if encoding.compression == "zstd" else content


def decode_update(
    content: bytes, stage: TrainedTensors, encoding: UpdateEncoding, source: str
) -> dict[str, Array]:
    """The update again, float32: what it was but for what encoding lost.

    Raises
    ------
    CorruptContent
        Naming `source`, if it is not what a device of this stage and encoding sends.
    """
    expected = _expected(stage, encoding)
    if encoding.compression == "zstd":
        content = _decompress(content, largest_file(expected), source)
    tensors = decode_tensors(content, expected, source)
    update = {spec.name: tensors[spec.name] for spec in stage.statistics}
    for spec in stage.parameters:
        update[spec.name] = _decode(spec, tensors, encoding, source)
    return update


def encoded_bytes(stage: TrainedTensors, encoding: UpdateEncoding) -> int:
    """Bytes of an encoded update's values, before compression."""
    return sum(each.size_bytes for each in _expected(stage, encoding))


def largest_update(stage: TrainedTensors, encoding: UpdateEncoding) -> int:
    """Bytes that an encoded update may have at most."""
    plain = largest_file(_expected(stage, encoding))
    # What cannot be compressed grows by a few bytes a block of 128 KiB.
    return plain + plain // 1024 + 1024


def _expected(stage: TrainedTensors, encoding: UpdateEncoding) -> list[DescribedTensor]:
    parameters = (part for spec in stage.parameters for part in _encoded_specs(spec, encoding))
    return [*parameters, *stage.statistics]


def _encoded_specs(spec: TensorSpec, encoding: UpdateEncoding) -> list[EncodedTensor]:
    size = math.prod(spec.shape)
    kept = _kept(size, encoding)
    parts = [EncodedTensor(spec.name, encoding.values, spec.shape if kept == size else (kept,))]
    if kept < size:
        parts.append(EncodedTensor(spec.name + KEPT, "uint8", (-(-size // 8),)))
    if encoding.values == "int8":
        parts.append(EncodedTensor(spec.name + SCALE, "float32", (1,)))
    return parts


def _kept(size: int, encoding: UpdateEncoding) -> int:
    return min(size, max(1, math.ceil(size * encoding.share)))


def _encode(name: str, value: Array, encoding: UpdateEncoding) -> dict[str, Array]:
    encoded: dict[str, Array] = {}
    kept = _kept(value.size, encoding)
    if kept < value.size:
        chosen = np.zeros(value.size, bool)
        chosen[np.argpartition(np.abs(value), -kept, axis=None)[-kept:]] = True
        encoded[name + KEPT] = np.packbits(chosen)
        value = value.ravel()[chosen]
    match encoding.values:
        case "float32":
            encoded[name] = value
        case "float16":
            encoded[name] = value.clip(-_LARGEST_HALF, _LARGEST_HALF).astype(np.float16)
        case "int8":
            scale = np.float32(np.abs(value).max(initial=0.0)) / np.float32(127)
            encoded[name + SCALE] = np.array([scale], np.float32)
            # The smallest floats may round up to 128 of their scale.
            steps = np.rint(value / scale).clip(-127, 127) if scale else np.zeros_like(value)
            encoded[name] = steps.astype(np.int8)
    return encoded


def _decode(spec: TensorSpec, tensors: Mapping[str, Array], encoding: UpdateEncoding, source: str) -> Array:
    value = tensors[spec.name].astype(np.float32)
    if encoding.values == "int8":
        with np.errstate(over="ignore"):
            value = np.asarray(value * tensors[spec.name + SCALE][0])
        if not np.isfinite(value).all():
            raise CorruptContent(f"{source}: tensor {spec.name!r} has a scale that is not a difference's")
    if spec.name + KEPT not in tensors:
        return value
    size = math.prod(spec.shape)
    chosen = np.unpackbits(tensors[spec.name + KEPT], count=size).astype(bool)
    if int(chosen.sum()) != value.size:
        raise CorruptContent(
            f"{source}: tensor {spec.name!r} has {value.size} values for {chosen.sum()} places"
        )
    whole = np.zeros(size, np.float32)
    whole[chosen] = value
    return whole.reshape(spec.shape)


def _decompress(content: bytes, limit: int, source: str) -> bytes:
    """Decompress what says how long it is, and is no longer than it may be."""
    try:
        size = zstandard.frame_content_size(content)
        if not 0 <= size <= limit:
            raise CorruptContent(
                f"{source}: {size} bytes compressed where {limit} bytes at most were expected"
            )
        plain: bytes = zstandard.ZstdDecompressor(max_window_size=2**27).decompress(
            content, max_output_size=limit
        )
    except zstandard.ZstdError as error:
        raise CorruptContent(f"{source}: not compressed by zstd: {error}") from None
    return plain
