from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from frostline.protocol.errors import CorruptContent
from frostline.protocol.manifest import StageManifest, TensorSpec
from frostline.protocol.messages import UpdateEncoding
from frostline.protocol.tensors import Array, encode_tensors
from frostline.protocol.update_encoding import decode_update, encode_update, encoded_bytes, largest_update
from tests.server.builders import stage_manifest

VALUES = st.floats(-(2.0**20), 2.0**20, allow_nan=False, width=32)
SHAPES = npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)
UPDATES = st.dictionaries(
    st.sampled_from(["a", "b.weight", "b.weight.0"]),
    npst.arrays(np.float32, SHAPES, elements=VALUES),
    min_size=1,
)
ENCODINGS = st.builds(
    UpdateEncoding,
    values=st.sampled_from(["float32", "float16", "int8"]),
    share=st.one_of(st.just(1.0), st.floats(0.001, 1.0)),
    compression=st.sampled_from(["none", "zstd"]),
)


def manifest_of(update: dict[str, Array], statistics: tuple[str, ...] = ()) -> StageManifest:
    specs = {name: TensorSpec(name=name, shape=value.shape) for name, value in update.items()}
    return stage_manifest(
        parameters=[spec for name, spec in specs.items() if name not in statistics],
        statistics=[specs[name] for name in statistics],
    )


def both_ways(update: dict[str, Array], encoding: UpdateEncoding) -> dict[str, Array]:
    manifest = manifest_of(update)
    return decode_update(encode_update(update, manifest, encoding), manifest, encoding, "phone")


@settings(deadline=None)
@given(update=UPDATES, encoding=ENCODINGS)
def test_an_update_comes_back_within_what_its_encoding_loses(
    update: dict[str, Any], encoding: UpdateEncoding
) -> None:
    found = both_ways(update, encoding)
    assert found.keys() == update.keys()
    for name, value in update.items():
        assert found[name].dtype == np.float32 and found[name].shape == value.shape
        largest = np.abs(value).max(initial=0)
        step = {"float32": 0.0, "float16": 2.0**-11 * np.abs(value) + 2.0**-25, "int8": largest / 253}
        lost = np.abs(np.clip(value, -65504, 65504) if encoding.values == "float16" else value)
        lost = np.abs(found[name] - np.copysign(lost, value))
        sent = found[name] != 0
        assert (lost[sent] <= np.broadcast_to(step[encoding.values], value.shape)[sent]).all()
        if encoding.values == "float32":
            # What did not travel is no larger than anything that did.
            kept = min(value.size, max(1, int(np.ceil(value.size * encoding.share))))
            smallest = np.sort(np.abs(value), axis=None)[-kept] if kept else 0
            assert np.abs(value)[~sent].max(initial=0) <= smallest


@settings(deadline=None)
@given(update=UPDATES, encoding=ENCODINGS)
def test_sizes_are_known_before(update: dict[str, Any], encoding: UpdateEncoding) -> None:
    manifest = manifest_of(update)
    content = encode_update(update, manifest, encoding)
    assert len(content) <= largest_update(manifest, encoding)
    plain = encode_update(update, manifest, encoding.model_copy(update={"compression": "none"}))
    header = 8 + int.from_bytes(plain[:8], "little")
    assert len(plain) - header == encoded_bytes(manifest, encoding)


def test_without_an_encoding_it_is_the_plain_file() -> None:
    update = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "mean": np.ones(2, np.float32)}
    content = encode_update(update, manifest_of(update, ("mean",)), UpdateEncoding())
    assert content == encode_tensors(update)


def test_int8_takes_a_quarter_and_a_tenth_of_it_a_twentieth() -> None:
    update = {"w": np.random.default_rng(0).normal(size=(64, 64, 3, 3)).astype(np.float32)}
    manifest = manifest_of(update)
    whole = len(encode_update(update, manifest, UpdateEncoding()))
    assert len(encode_update(update, manifest, UpdateEncoding(values="int8"))) < 0.27 * whole
    tenth = UpdateEncoding(values="int8", share=0.1)
    assert len(encode_update(update, manifest, tenth)) < 0.06 * whole
    # One bit in ten is set: its place takes 0.47 bits where a bitmap takes one.
    squeezed = tenth.model_copy(update={"compression": "zstd"})
    assert len(encode_update(update, manifest, squeezed)) < 0.05 * whole


def test_statistics_travel_as_they_are() -> None:
    update = {"w": np.ones(8, np.float32), "mean": np.array([0.1, 1e-9], np.float32)}
    manifest = manifest_of(update, ("mean",))
    encoding = UpdateEncoding(values="int8", share=0.25)
    found = decode_update(encode_update(update, manifest, encoding), manifest, encoding, "phone")
    assert found["mean"].tobytes() == update["mean"].tobytes()
    assert np.count_nonzero(found["w"]) == 2


@pytest.mark.parametrize("value", [0.0, 1e-45, 3e38, -3e38])
@pytest.mark.parametrize("values", ["float32", "float16", "int8"])
def test_extremes_stay_finite(value: float, values: str) -> None:
    encoding = UpdateEncoding.model_validate({"values": values})
    found = both_ways({"w": np.array([value, 0, value], np.float32)}, encoding)
    assert np.isfinite(found["w"]).all() and found["w"][1] == 0


UPDATE = {"w": np.linspace(-1, 1, 20, dtype=np.float32)}
MANIFEST = manifest_of(UPDATE)
SPARSE = UpdateEncoding(values="int8", share=0.25)
SQUEEZED = UpdateEncoding(compression="zstd")


def sparse(**changes: Array) -> bytes:
    parts: dict[str, Array] = {
        "w": np.ones(5, np.int8),
        "w:kept": np.array([0b11111000, 0, 0], np.uint8),
        "w:scale": np.ones(1, np.float32),
    }
    return encode_tensors({**parts, **{name.replace("_", ":"): value for name, value in changes.items()}})


def test_the_documented_form() -> None:
    found = decode_update(sparse(w_scale=np.array([0.5], np.float32)), MANIFEST, SPARSE, "phone")
    assert found["w"].tolist() == [0.5] * 5 + [0.0] * 15


@pytest.mark.parametrize(
    ("content", "encoding", "mentions"),
    [
        (sparse(w_kept=np.array([0b11110000, 0, 0], np.uint8)), SPARSE, "5 values for 4 places"),
        (sparse(w_kept=np.array([255, 255, 255], np.uint8)), SPARSE, "5 values for 20 places"),
        (sparse(w_kept=np.zeros(2, np.uint8)), SPARSE, "'w:kept' is uint8[2]"),
        (sparse(w=np.ones(6, np.int8)), SPARSE, "'w' is int8[6]"),
        (sparse(w=np.ones(5, np.float32)), SPARSE, "'w' is float32[5]"),
        (sparse(w_scale=np.array([np.nan], np.float32)), SPARSE, "not finite"),
        (sparse(w=np.full(5, 127, np.int8), w_scale=np.array([3e38], np.float32)), SPARSE, "scale"),
        (sparse(w_more=np.ones(1, np.float32)), SPARSE, "unexpected"),
        (encode_tensors(UPDATE), SPARSE, "'w' is float32[20]"),
        (encode_tensors(UPDATE), SQUEEZED, "not compressed by zstd"),
        (zstandard.compress(bytes(10**8)), SQUEEZED, "100000000 bytes compressed"),
        (zstandard.compress(encode_tensors(UPDATE))[:-4], SQUEEZED, "zstd"),
        (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10**8)), SQUEEZED, "-1 bytes"),
        (b"", SQUEEZED, "zstd"),
    ],
)
def test_what_no_device_sends_is_refused(content: bytes, encoding: UpdateEncoding, mentions: str) -> None:
    with pytest.raises(CorruptContent) as caught:
        decode_update(content, MANIFEST, encoding, "update of phone")
    assert "update of phone" in str(caught.value) and mentions in str(caught.value)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), encoding=st.sampled_from([SPARSE, SQUEEZED, UpdateEncoding(values="float16")]))
def test_damage_is_refused_or_gives_finite_values(data: st.DataObject, encoding: UpdateEncoding) -> None:
    content = bytearray(encode_update(UPDATE, MANIFEST, encoding))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        found = decode_update(damaged, MANIFEST, encoding, "phone")
    except CorruptContent:
        return
    assert found["w"].shape == (20,) and np.isfinite(found["w"]).all()
