from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from frostline.protocol.errors import CorruptContent
from frostline.protocol.manifest import TensorSpec
from frostline.protocol.tensors import decode_tensors, encode_tensors

ARRAYS = st.one_of(
    npst.arrays(
        np.float32,
        npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
        elements=st.floats(allow_nan=False, allow_infinity=False, width=32),
    ),
    npst.arrays(np.int64, npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
)
TENSORS = st.dictionaries(st.text(min_size=1, max_size=30), ARRAYS, max_size=5)

WEIGHT = np.array([[1.5, -2.0], [0.25, 8.0]], dtype=np.float32)
COUNT = np.array(7, dtype=np.int64)
EXPECTED = [TensorSpec(name="weight", shape=(2, 2)), TensorSpec(name="count", dtype="int64", shape=())]


def specs_of(tensors: dict[str, Any]) -> list[TensorSpec]:
    return [
        TensorSpec.model_validate({"name": name, "dtype": array.dtype.name, "shape": array.shape})
        for name, array in tensors.items()
    ]


def file_of(header: Any, values: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + values


@settings(deadline=None)
@given(tensors=TENSORS)
def test_encode_then_decode_gives_the_arrays_back(tensors: dict[str, Any]) -> None:
    decoded = decode_tensors(encode_tensors(tensors), specs_of(tensors), "phone")
    assert decoded.keys() == tensors.keys()
    for name, array in tensors.items():
        assert decoded[name].dtype == array.dtype
        assert decoded[name].shape == array.shape
        assert decoded[name].tobytes() == array.tobytes()


@settings(deadline=None)
@given(tensors=TENSORS, order=st.randoms(use_true_random=False))
def test_equal_arrays_give_equal_bytes_in_any_order(tensors: dict[str, Any], order: Any) -> None:
    names = list(tensors)
    order.shuffle(names)
    assert encode_tensors({name: tensors[name].copy() for name in names}) == encode_tensors(tensors)


@pytest.mark.parametrize(
    "view",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4).T,
        np.arange(12, dtype=np.float32)[::2],
        np.arange(12, dtype=np.float32)[::-1],
        np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
        np.broadcast_to(np.float32(3), (2, 2)),
    ],
    ids=["transposed", "strided", "reversed", "column-major", "broadcast"],
)
def test_views_are_written_as_they_read(view: Any) -> None:
    decoded = decode_tensors(encode_tensors({"v": view}), specs_of({"v": view}), "phone")
    np.testing.assert_array_equal(decoded["v"], view)


@pytest.mark.parametrize("character", ["a", "\x01", "é", "😀", '"'])
def test_many_long_names_fit_the_bound(character: str) -> None:
    tensors = {character * 509 + f"{i:03}": np.zeros((), dtype=np.float32) for i in range(100)}
    assert len(decode_tensors(encode_tensors(tensors), specs_of(tensors), "phone")) == 100


@settings(deadline=None)
@given(content=st.binary(max_size=300))
def test_any_bytes_are_only_ever_corrupt(content: bytes) -> None:
    with pytest.raises(CorruptContent, match=r"^phone: "):
        decode_tensors(content, EXPECTED, "phone")


@settings(deadline=None)
@given(data=st.data(), replacement=st.binary(min_size=1, max_size=4))
def test_a_damaged_file_is_as_expected_or_corrupt(data: st.DataObject, replacement: bytes) -> None:
    content = encode_tensors({"weight": WEIGHT, "count": COUNT})
    cut = data.draw(st.integers(0, len(content) - 1))
    try:
        decoded = decode_tensors(
            content[:cut] + replacement + content[cut + len(replacement) :], EXPECTED, "phone"
        )
    except CorruptContent as error:
        assert str(error).startswith("phone: ")
    else:
        assert specs_of({spec.name: decoded[spec.name] for spec in EXPECTED}) == EXPECTED
        assert np.isfinite(decoded["weight"]).all()


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 101_000_000])
def test_a_header_longer_than_the_file_is_corrupt(length: int) -> None:
    with pytest.raises(CorruptContent, match=r"^phone: not a safetensors file"):
        decode_tensors(length.to_bytes(8, "little") + b"{}", EXPECTED, "phone")


def test_a_huge_header_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safetensors.numpy.load", lambda content: pytest.fail("parsed"))
    header = {"__metadata__": {"padding": "x" * 100_000}}
    with pytest.raises(CorruptContent, match="bytes where 24 bytes of tensors were expected"):
        decode_tensors(file_of(header), EXPECTED, "phone")


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        file_of(b"[]"),
        file_of(b"\xff\xff"),
        file_of(b"[" * 2000),
        file_of({"weight": ENTRY}),
        file_of({"weight": ENTRY}, b"\0" * 5),
        file_of({"weight": {**ENTRY, "data_offsets": [4, 0]}}, b"\0" * 4),
        file_of({"weight": {**ENTRY, "data_offsets": [0, 2**64 - 1]}}, b"\0" * 4),
        file_of({"weight": {**ENTRY, "shape": [2**62, 4]}}, b"\0" * 4),
        file_of({"weight": {**ENTRY, "shape": [-1]}}, b"\0" * 4),
        file_of({"weight": {**ENTRY, "dtype": "BF16", "shape": [2]}}, b"\0" * 4),
        file_of({"weight": {**ENTRY, "dtype": "F8_E4M3", "shape": [4]}}, b"\0" * 4),
        file_of({"weight": {**ENTRY, "dtype": "PICKLE"}}, b"\0" * 4),
        file_of({"weight": ENTRY, "count": ENTRY}, b"\0" * 4),
    ],
    ids=[
        "empty",
        "cut length",
        "no header",
        "list",
        "not text",
        "nested",
        "no values",
        "too many values",
        "backwards",
        "far offset",
        "overflow",
        "negative",
        "bfloat16",
        "float8",
        "unknown dtype",
        "overlap",
    ],
)
def test_malformed_files_are_corrupt(content: bytes) -> None:
    with pytest.raises(CorruptContent, match=r"^phone: "):
        decode_tensors(content, [TensorSpec(name="weight", shape=(1,))], "phone")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": WEIGHT}, "tensor 'count' is missing"),
        ({}, "tensor 'weight' is missing"),
        ({"weight": WEIGHT, "count": COUNT, "extra": COUNT}, "unexpected tensor 'extra'"),
        ({"weight": WEIGHT.T.reshape(4), "count": COUNT}, "tensor 'weight' is float32[4], not float32[2, 2]"),
        ({"weight": WEIGHT, "count": COUNT.reshape(1)}, "tensor 'count' is int64[1], not int64[]"),
        (
            {"weight": WEIGHT.astype(np.float64), "count": COUNT},
            "tensor 'weight' is float64[2, 2], not float32[2, 2]",
        ),
        ({"weight": WEIGHT, "count": COUNT.astype(np.float32)}, "tensor 'count' is float32[], not int64[]"),
        ({"weight": WEIGHT, "count": COUNT.astype(np.int32)}, "tensor 'count' is int32[], not int64[]"),
    ],
)
def test_tensors_other_than_expected_are_named(tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptContent) as raised:
        decode_tensors(encode_tensors(tensors), EXPECTED, "phone")
    assert str(raised.value) == f"phone: {message}"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [(0, 0), (1, 1)])
def test_values_that_are_not_finite_are_corrupt(value: float, position: tuple[int, int]) -> None:
    weight = WEIGHT.copy()
    weight[position] = value
    with pytest.raises(CorruptContent, match="tensor 'weight' holds values that are not finite"):
        decode_tensors(encode_tensors({"weight": weight, "count": COUNT}), EXPECTED, "phone")


def test_a_long_unexpected_name_is_shortened_in_the_error() -> None:
    tensors: dict[str, Any] = {"weight": WEIGHT, "count": COUNT, "x" * 3000: COUNT}
    with pytest.raises(CorruptContent, match="unexpected tensor") as raised:
        decode_tensors(encode_tensors(tensors), EXPECTED, "phone")
    assert len(str(raised.value)) < 300
