from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frostline.protocol.errors import CorruptContent
from frostline.protocol.manifest import (
    MANIFEST_BYTES_LIMIT,
    PlannedMemory,
    Program,
    StageManifest,
    TensorSpec,
    decode_manifest,
)
from frostline.protocol.messages import BlobReference

COUNTS = st.integers(0, 2**53)
REFERENCES = st.builds(
    BlobReference, sha256=st.binary(min_size=32, max_size=32).map(bytes.hex), size=st.integers(1, 2**32)
)
SPECS = st.builds(
    TensorSpec,
    name=st.text(min_size=1, max_size=20),
    dtype=st.sampled_from(["float32", "int64"]),
    shape=st.lists(st.integers(0, 2**31), max_size=8).map(tuple),
)
PROGRAMS = st.builds(
    Program,
    file=REFERENCES,
    inputs=st.lists(SPECS, min_size=1, max_size=2),
    outputs=st.lists(SPECS, max_size=2),
    arena_bytes=COUNTS,
)
PLANNED = st.builds(
    PlannedMemory,
    arena=COUNTS,
    parameters=COUNTS,
    statistics=COUNTS,
    optimizer_state=COUNTS,
    batch=COUNTS,
    program=COUNTS,
)
MANIFESTS = st.builds(
    StageManifest,
    stage=COUNTS,
    stages=st.integers(1, 10_000),
    name=st.text(max_size=20),
    engine=st.just("executorch"),
    batch=st.integers(1, 65_536),
    classes=st.integers(1, 10_000_000),
    parameters=st.lists(SPECS, max_size=2),
    statistics=st.lists(SPECS, max_size=2),
    optimizer_state=st.lists(SPECS, max_size=2),
    training=PROGRAMS,
    evaluation=PROGRAMS,
    prefix=st.lists(PROGRAMS, max_size=2),
    planned=PLANNED,
)


def make_manifest(prefixes: int = 1) -> StageManifest:
    weight = TensorSpec(name="weight", shape=(3, 4))
    mean = TensorSpec(name="mean", shape=(4,))
    features = TensorSpec(name="x", shape=(8, 4))

    def program(digit: str, inputs: list[TensorSpec]) -> Program:
        file = BlobReference(sha256=digit * 64, size=100)
        return Program(file=file, inputs=inputs, outputs=[features], arena_bytes=64)

    image = TensorSpec(name="image", shape=(8, 1, 2, 2))
    return StageManifest(
        stage=1,
        stages=2,
        name="small",
        engine="executorch",
        batch=8,
        classes=3,
        parameters=[weight],
        statistics=[mean],
        optimizer_state=[],
        training=program("1", [weight, mean, features]),
        evaluation=program("2", [weight, mean, features]),
        prefix=[program(str(3 + i), [image if i == 0 else features]) for i in range(prefixes)],
        planned=PlannedMemory(
            arena=1, parameters=10, statistics=100, optimizer_state=1000, batch=10_000, program=100_000
        ),
    )


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=50, deadline=None)
@given(manifest=MANIFESTS)
def test_encode_then_decode_gives_the_manifest_and_its_bytes_back(manifest: StageManifest) -> None:
    content = manifest.encode()
    decoded = decode_manifest(content, "phone")
    assert decoded == manifest
    assert decoded.encode() == content


@given(content=st.binary(max_size=300))
def test_any_bytes_are_only_ever_corrupt(content: bytes) -> None:
    with pytest.raises(CorruptContent, match=r"^phone: not a stage manifest: "):
        decode_manifest(content, "phone")


@given(position=st.floats(0, 1), replacement=st.binary(max_size=3))
def test_a_damaged_manifest_is_a_manifest_or_corrupt(position: float, replacement: bytes) -> None:
    content = make_manifest().encode()
    cut = int(position * len(content))
    try:
        decode_manifest(content[:cut] + replacement + content[cut + 1 :], "phone")
    except CorruptContent as error:
        assert str(error).startswith("phone: ")


@pytest.mark.parametrize("name", [name for name in StageManifest.model_fields if name != "schema_version"])
def test_a_missing_field_is_named_with_what_to_do(name: str) -> None:
    document = json.loads(make_manifest().encode())
    del document[name]
    with pytest.raises(CorruptContent, match=f"{name}: Field required; export the artifact again$"):
        decode_manifest(json.dumps(document).encode(), "phone")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["schema_version"], 2),
        (["stage"], -1),
        (["stages"], 0),
        (["batch"], 0),
        (["classes"], 0),
        (["engine"], "cuda"),
        (["parameters", 0, "dtype"], "float16"),
        (["parameters", 0, "name"], ""),
        (["parameters", 0, "name"], "x" * 513),
        (["parameters", 0, "shape"], [-1]),
        (["parameters", 0, "shape"], [2**31 + 1]),
        (["parameters", 0, "shape"], [1] * 9),
        (["training", "file", "sha256"], "../" * 21 + "x"),
        (["training", "file", "size"], 0),
        (["training", "arena_bytes"], -1),
        (["training", "inputs"], []),
        (["evaluation", "inputs"], []),
        (["prefix", 0, "inputs"], []),
        (["planned", "arena"], -1),
        (["planned", "arena"], None),
    ],
    ids=str,
)
def test_values_out_of_bounds_are_corrupt_by_field(path: list[Any], value: Any) -> None:
    document = json.loads(make_manifest().encode())
    inner = document
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    where = r"\.".join(str(part) for part in path)
    with pytest.raises(CorruptContent, match=f"^phone: not a stage manifest: {where}"):
        decode_manifest(json.dumps(document).encode(), "phone")


def test_the_longest_manifest_is_accepted_and_one_byte_more_refused() -> None:
    longest = make_manifest().encode().ljust(MANIFEST_BYTES_LIMIT)
    assert decode_manifest(longest, "phone") == make_manifest()
    with pytest.raises(CorruptContent, match=f"at most {MANIFEST_BYTES_LIMIT} bytes"):
        decode_manifest(longest + b" ", "phone")


@pytest.mark.parametrize(("prefixes", "sample_shape"), [(0, (4,)), (1, (1, 2, 2)), (2, (1, 2, 2))])
def test_shapes_are_those_of_the_stage_and_of_the_first_block(
    prefixes: int, sample_shape: tuple[int, ...]
) -> None:
    manifest = make_manifest(prefixes)
    assert manifest.input_shape == (4,)
    assert manifest.sample_shape == sample_shape


def test_every_file_is_named_and_what_travels_is_what_was_trained() -> None:
    manifest = make_manifest(prefixes=2)
    assert [file.sha256[0] for file in manifest.files] == ["1", "2", "3", "4"]
    assert [spec.name for spec in manifest.trained] == ["weight", "mean"]


def test_planned_total_adds_every_kind() -> None:
    assert make_manifest().planned.total == 111_111


@pytest.mark.parametrize(
    ("shape", "dtype", "size"),
    [((), "float32", 4), ((), "int64", 8), ((2, 3), "float32", 24), ((2, 0, 3), "int64", 0)],
)
def test_size_bytes_is_that_of_the_values(shape: tuple[int, ...], dtype: Any, size: int) -> None:
    assert TensorSpec(name="t", dtype=dtype, shape=shape).size_bytes == size


def test_the_plan_covers_the_largest_frozen_block() -> None:
    planned = PlannedMemory(arena=10, parameters=10, statistics=0, optimizer_state=0, batch=0, program=10)
    x = TensorSpec(name="x", shape=(1, 5))
    small, large = (
        Program(file=BlobReference(sha256="0" * 64, size=size), inputs=[x], outputs=[x], arena_bytes=arena)
        for size, arena in ((1, 1), (100, 7))
    )
    assert planned.behind([]).total == planned.total == 30
    assert planned.behind([small]).total == 1 + 2 * 1 + 2 * 20
    assert planned.behind([small, large]).total == 7 + 2 * 100 + 2 * 20
