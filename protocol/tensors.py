"""Tensor files: safetensors, read only against the list of tensors that is expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from frostline.protocol.errors import CorruptContent

Array = npt.NDArray[Any]


class DescribedTensor(Protocol):
    """What is known of a tensor before it comes."""

    @property
    def name(self) -> str:
        """Its name in the file."""

    @property
    def dtype(self) -> str:
        """Its dtype by NumPy's name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""


def encode_tensors(tensors: Mapping[str, Array]) -> bytes:
    """Serialize named arrays; equal arrays give equal bytes."""
    ordered = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    content: bytes = safetensors.numpy.save(ordered)
    return content


def largest_file(expected: Sequence[DescribedTensor]) -> int:
    """Bytes that a file of `expected` may have at most."""
    # JSON may spend twelve bytes on one character of a name.
    return sum(spec.size_bytes + 12 * len(spec.name) + 512 for spec in expected) + 4096


def decode_tensors(content: bytes, expected: Sequence[DescribedTensor], source: str) -> dict[str, Array]:
    """Parse a tensor file that must hold exactly `expected`, all values finite.

    Raises
    ------
    CorruptContent
        Naming `source` and the first tensor that is missing, unexpected, of another dtype or shape, or not finite.
    """
    if len(content) > largest_file(expected):
        budget = sum(spec.size_bytes for spec in expected)
        raise CorruptContent(f"{source}: {len(content)} bytes where {budget} bytes of tensors were expected")
    try:
        tensors: dict[str, Array] = safetensors.numpy.load(content)
    except Exception as error:
        raise CorruptContent(f"{source}: not a safetensors file: {error}") from None
    for spec in expected:
        _check(tensors.get(spec.name), spec, source)
    unexpected = tensors.keys() - {spec.name for spec in expected}
    if unexpected:
        raise CorruptContent(f"{source}: unexpected tensor {min(unexpected)[:200]!r}")
    return tensors


def _check(tensor: Array | None, spec: DescribedTensor, source: str) -> None:
    if tensor is None:
        raise CorruptContent(f"{source}: tensor {spec.name!r} is missing")
    if tensor.dtype.name != spec.dtype or tensor.shape != spec.shape:
        found = f"{tensor.dtype.name}{list(tensor.shape)}"
        raise CorruptContent(f"{source}: tensor {spec.name!r} is {found}, not {spec.dtype}{list(spec.shape)}")
    if not np.isfinite(tensor).all():
        raise CorruptContent(f"{source}: tensor {spec.name!r} holds values that are not finite")
