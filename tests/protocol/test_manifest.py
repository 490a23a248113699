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
SHAPES = st.lists(st.integers(0, 2**31), max_size=8).map(tuple)
SPECS = st.builds(
    TensorSpec,
    name=st.text(min_size=1, max_size=20),
    dtype=st.sampled_from(["float32", "int64"]),
    shape=SHAPES,
    vocabulary=st.none() | st.integers(1, 2**31),
)
PROGRAMS = st.builds(
    Program,
    file=REFERENCES,
    inputs=st.lists(SPECS, min_size=1, max_size=2),
    outputs=st.lists(SPECS, max_size=2),
    arena_bytes=COUNTS,
    flops=COUNTS,
)
PLANNED = st.builds(
    PlannedMemory,
    arena=COUNTS,
    parameters=COUNTS,
    statistics=COUNTS,
    optimizer_state=COUNTS,
    received=COUNTS,
    batch=COUNTS,
    program=COUNTS,
    prefix=COUNTS,
)


@st.composite
def manifests(draw: st.DrawFn) -> StageManifest:
    """Manifests whose programs take tensors of the stage, whole or in tiles."""
    names = iter(f"tensor {index}" for index in range(20))

    def specs() -> list[TensorSpec]:
        found = draw(st.lists(SPECS, max_size=2))
        return [spec.model_copy(update={"name": next(names)}) for spec in found]

    parameters, statistics, optimizer_state = specs(), specs(), specs()
    copies = [spec.model_copy(update={"name": f"received.{spec.name}"}) for spec in parameters]
    received = draw(st.sampled_from([[], copies]))
    held = [*parameters, *statistics, *optimizer_state, *received]
    held += [
        spec.model_copy(update={"shape": spec.shape[1:], "tile": draw(st.integers(0, spec.shape[0] - 1))})
        for spec in held
        if spec.shape and spec.size_bytes
    ]
    micro_batch = draw(st.integers(1, 256))
    micro_batches = draw(st.integers(1, 256))
    x = TensorSpec(name="x", shape=(micro_batch, *draw(SHAPES)[:7]))
    y = TensorSpec(name="y", dtype="int64", shape=(micro_batch,))

    def program(*step: TensorSpec) -> Program:
        inputs = draw(st.lists(st.sampled_from(held), max_size=3)) if held else []
        return draw(PROGRAMS).model_copy(update={"inputs": [*inputs, *step]})

    rate, first, seed = (TensorSpec(name=name, shape=()) for name in ("learning_rate", "first", "seed"))
    return StageManifest(
        stage=draw(COUNTS),
        stages=draw(st.integers(1, 10_000)),
        name=draw(st.text(max_size=20)),
        engine="executorch",
        variant=draw(st.text(min_size=1, max_size=64)),
        batch=micro_batch * micro_batches,
        micro_batches=micro_batches,
        classes=draw(st.integers(1, 10_000_000)),
        parameters=parameters,
        statistics=statistics,
        optimizer_state=optimizer_state,
        received=received,
        training=program(x, y, first if micro_batches > 1 else rate, seed),
        update=program(rate) if micro_batches > 1 else None,
        evaluation=program(x),
        prefix=draw(st.lists(PROGRAMS, max_size=2)),
        planned=draw(PLANNED),
        flops=draw(COUNTS),
    )


def make_manifest(prefixes: int = 1, micro_batches: int = 1) -> StageManifest:
    weight = TensorSpec(name="weight", shape=(3, 4))
    mean = TensorSpec(name="mean", shape=(4,))
    gradient = TensorSpec(name="gradient.weight", shape=(3, 4))
    received = TensorSpec(name="received.weight", shape=(3, 4))
    features = TensorSpec(name="x", shape=(8, 4))
    rate = TensorSpec(name="learning_rate", shape=())
    inputs = [weight, mean, gradient, received, features]

    def program(digit: str, inputs: list[TensorSpec]) -> Program:
        file = BlobReference(sha256=digit * 64, size=100)
        return Program(file=file, inputs=inputs, outputs=[features], arena_bytes=64)

    image = TensorSpec(name="image", shape=(8, 1, 2, 2))
    return StageManifest(
        stage=1,
        stages=2,
        name="small",
        engine="executorch",
        variant="whole" if micro_batches == 1 else f"micro{micro_batches}",
        batch=8 * micro_batches,
        micro_batches=micro_batches,
        classes=3,
        parameters=[weight],
        statistics=[mean],
        optimizer_state=[gradient],
        received=[received],
        training=program("1", inputs),
        update=program("9", [weight, gradient, rate]) if micro_batches > 1 else None,
        evaluation=program("2", [weight, mean, features]),
        prefix=[program(str(3 + i), [image if i == 0 else features]) for i in range(prefixes)],
        planned=PlannedMemory(
            arena=1,
            parameters=10,
            statistics=100,
            optimizer_state=1000,
            received=10_000,
            batch=100_000,
            program=1_000_000,
        ),
    )


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=50, deadline=None)
@given(manifest=manifests())
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


@pytest.mark.parametrize(
    "name", [name for name, field in StageManifest.model_fields.items() if field.is_required()]
)
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
        (["batch"], 65_537),
        (["micro_batches"], 0),
        (["micro_batches"], 65_537),
        (["variant"], ""),
        (["variant"], "x" * 65),
        (["received"], None),
        (["received", 0, "shape"], [-1]),
        (["classes"], 0),
        (["engine"], "cuda"),
        (["parameters", 0, "dtype"], "float16"),
        (["parameters", 0, "name"], ""),
        (["parameters", 0, "name"], "x" * 513),
        (["parameters", 0, "shape"], [-1]),
        (["parameters", 0, "shape"], [2**31 + 1]),
        (["parameters", 0, "shape"], [1] * 9),
        (["training", "inputs", 0, "tile"], -1),
        (["training", "inputs", 0, "tile"], 0.5),
        (["training", "file", "sha256"], "../" * 21 + "x"),
        (["training", "file", "size"], 0),
        (["training", "arena_bytes"], -1),
        (["training", "inputs"], []),
        (["update"], {}),
        (["evaluation", "inputs"], []),
        (["prefix", 0, "inputs"], []),
        (["planned", "arena"], -1),
        (["planned", "arena"], None),
        (["planned", "received"], -1),
        (["flops"], -1),
        (["flops"], 2**53 + 1),
        (["flops"], 1.5),
        (["training", "flops"], -1),
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


def test_operations_are_not_known_of_what_was_exported_before_they_were_counted() -> None:
    document = json.loads(make_manifest().encode())
    for part in (document, document["training"], *document["prefix"]):
        del part["flops"]
    manifest = decode_manifest(json.dumps(document).encode(), "phone")
    assert (manifest.flops, manifest.prefix[0].flops) == (0, 0)


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
    in_parts = make_manifest(prefixes=1, micro_batches=2)
    assert [file.sha256[0] for file in in_parts.files] == ["1", "9", "2", "3"]
    assert [spec.name for spec in manifest.trained] == ["weight", "mean"]


def test_planned_total_adds_every_kind() -> None:
    assert make_manifest().planned.total == 1_111_111


@pytest.mark.parametrize(
    ("shape", "dtype", "size"),
    [((), "float32", 4), ((), "int64", 8), ((2, 3), "float32", 24), ((2, 0, 3), "int64", 0)],
)
def test_size_bytes_is_that_of_the_values(shape: tuple[int, ...], dtype: Any, size: int) -> None:
    assert TensorSpec(name="t", dtype=dtype, shape=shape).size_bytes == size


def test_the_plan_covers_the_largest_frozen_block() -> None:
    planned = PlannedMemory(
        arena=10, parameters=5, statistics=0, optimizer_state=0, received=5, batch=0, program=10
    )
    x = TensorSpec(name="x", shape=(1, 5))
    small, large = (
        Program(file=BlobReference(sha256="0" * 64, size=size), inputs=[x], outputs=[x], arena_bytes=arena)
        for size, arena in ((1, 1), (100, 7))
    )
    assert planned.behind([]).total == planned.total == 30
    assert planned.behind([small]).total == 1 + 2 * 1 + 2 * 20
    assert planned.behind([small, large]).total == 7 + 2 * 100 + 2 * 20


def _refused(document: dict[str, Any]) -> str:
    with pytest.raises(CorruptContent) as raised:
        decode_manifest(json.dumps(document).encode(), "phone")
    message = str(raised.value)
    assert "\n" not in message
    start, end = "phone: not a stage manifest: document: Value error, ", "; export the artifact again"
    assert message.startswith(start)
    assert message.endswith(end)
    return message.removeprefix(start).removesuffix(end)


def _document(micro_batches: int = 2) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(make_manifest(micro_batches=micro_batches).encode())
    return document


def _spec(name: str, *shape: int, **rest: Any) -> dict[str, Any]:
    return {"name": name, "shape": list(shape), **rest}


def test_a_manifest_in_micro_batches_is_accepted() -> None:
    manifest = decode_manifest(json.dumps(_document()).encode(), "phone")
    assert (manifest.batch, manifest.micro_batches, manifest.micro_batch) == (16, 2, 8)
    assert manifest == make_manifest(micro_batches=2)


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("training", "momentum.weight"),
        ("training", "weigh"),
        ("training", "image"),
        ("update", "received.mean"),
        ("evaluation", """ 'quoted' """),
        # Each program has the inputs of its own part of a step.
        ("update", "x"),
        ("update", "y"),
        ("update", "first"),
        ("update", "seed"),
        ("evaluation", "y"),
        ("evaluation", "learning_rate"),
        ("evaluation", "first"),
        ("evaluation", "seed"),
    ],
)
def test_an_input_the_stage_does_not_have_is_refused(program: str, name: str) -> None:
    document = _document()
    document[program]["inputs"].insert(0, _spec(name, 3, 4))
    assert _refused(document) == f"the {program} program takes {name!r}, which the stage does not have"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("weight", {"shape": [4, 3]}),
        ("weight", {"shape": [12]}),
        ("weight", {"shape": [3, 5]}),
        ("weight", {"shape": []}),
        ("weight", {"dtype": "int64"}),
        ("mean", {"shape": [1, 4]}),
        ("received.weight", {"shape": [3]}),
        # Tiles.
        ("weight", {"shape": [4], "tile": 3}),
        ("weight", {"shape": [1, 4], "tile": 3}),
        ("weight", {"shape": [12], "tile": 1}),
        ("weight", {"shape": [5], "tile": 0}),
        ("weight", {"shape": [24], "tile": 0}),
        ("weight", {"shape": [0, 4], "tile": 0}),
        ("weight", {"shape": [4], "tile": 2**53}),
        ("weight", {"shape": [2], "tile": 0, "dtype": "int64"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("program", ["training", "update", "evaluation"])
def test_an_input_that_is_not_the_stages_is_refused(program: str, name: str, changes: dict[str, Any]) -> None:
    document = _document()
    document[program]["inputs"].insert(0, {**_spec(name, 3, 4), **changes})
    assert _refused(document) == f"the {program} program takes {name!r} in a shape that is not the stage's"


@pytest.mark.parametrize(
    ("shape", "tile"),
    [((4,), 0), ((4,), 2), ((1, 4), 1), ((2, 2), 2), ((3, 4), 0), ((), 11), ((6,), 1)],
)
def test_tiles_lie_within_their_tensor(shape: tuple[int, ...], tile: int) -> None:
    document = _document()
    document["training"]["inputs"].insert(0, _spec("weight", *shape, tile=tile))
    manifest = decode_manifest(json.dumps(document).encode(), "phone")
    assert manifest.training.inputs[0] == TensorSpec(name="weight", shape=shape, tile=tile)


@pytest.mark.parametrize(
    ("received", "complaint"),
    [
        (_spec("weight", 3, 4), "'weight'"),
        (_spec("received.mean", 4), "'received.mean'"),
        (_spec("received.bias", 4), "'received.bias'"),
        (_spec("received.weight", 4, 3), "'received.weight'"),
        (_spec("received.weight", 3, 4, dtype="int64"), "'received.weight'"),
    ],
    ids=str,
)
def test_received_tensors_are_copies_of_parameters(received: dict[str, Any], complaint: str) -> None:
    document = _document()
    document["received"] = [received]
    assert _refused(document) == f"{complaint} is no copy of a parameter"


@pytest.mark.parametrize(("batch", "micro_batches"), [(8, 2), (17, 2), (16, 3), (24, 2), (16, 16)])
def test_parts_make_up_the_batch(batch: int, micro_batches: int) -> None:
    document = {**_document(), "batch": batch, "micro_batches": micro_batches}
    assert _refused(document) == f"{micro_batches} parts of 8 samples make no batch of {batch}"


def test_a_step_in_micro_batches_has_an_update_and_no_other() -> None:
    complaint = "a step in micro-batches ends with an update program, and no other does"
    update = _document(2)["update"]
    assert _refused({**_document(2), "update": None}) == complaint
    assert _refused({**_document(1), "update": update}) == complaint


@pytest.mark.parametrize(
    "last", [_spec("weight", 3, 4), _spec("x")], ids=["not the batch", "without a batch axis"]
)
def test_the_evaluation_ends_with_the_batch(last: dict[str, Any]) -> None:
    document = _document()
    document["evaluation"]["inputs"][-1] = last
    assert _refused(document) == "the last input of the evaluation is to be the batch x"
