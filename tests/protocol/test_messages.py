from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from frostline.protocol.errors import ProtocolViolation
from frostline.protocol.messages import (
    MESSAGE_BYTES_LIMIT,
    Answer,
    BlobIndex,
    BlobReference,
    ContentRequest,
    Lease,
    Message,
    Presence,
    Receipt,
    RunAnnouncement,
    TrainingMetrics,
    UpdateEncoding,
    UpdateOffer,
    as_reason,
    decode,
)
from frostline.protocol.topics import NAME

HASHES = st.binary(min_size=32, max_size=32).map(bytes.hex)
IDENTIFIERS = st.binary(min_size=16, max_size=16).map(bytes.hex)
COUNTS = st.integers(0, 2**53)
SECONDS = st.floats(0, 10**7)
REASONS = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=500)
CHUNK_SIZES = st.integers(1024, 8 * 2**20)
NAMES = st.from_regex(NAME, fullmatch=True)

REFERENCES = st.builds(BlobReference, sha256=HASHES, size=st.integers(1, 2**32))
INDICES = st.builds(
    BlobIndex,
    sha256=HASHES,
    size=st.integers(1, 2**32),
    chunk_size=CHUNK_SIZES,
    chunks=st.lists(HASHES, min_size=1, max_size=8),
)
METRICS = st.builds(
    lambda correct, wrong, **rest: TrainingMetrics(evaluated=correct + wrong, correct=correct, **rest),
    correct=st.integers(0, 2**52),
    wrong=st.integers(0, 2**52),
    samples=st.integers(1, 2**40),
    steps=st.integers(1, 2**40),
    loss=st.floats(allow_nan=False, allow_infinity=False),
    squared_loss=st.none() | st.floats(0, allow_nan=False, allow_infinity=False),
    seconds=SECONDS,
)
ENCODINGS = st.builds(
    UpdateEncoding,
    values=st.sampled_from(["float32", "float16", "int8"]),
    share=st.floats(0, 1, exclude_min=True),
    compression=st.sampled_from(["none", "zstd"]),
)
MESSAGES: dict[type[Message], st.SearchStrategy[Any]] = {
    BlobReference: REFERENCES,
    BlobIndex: INDICES,
    RunAnnouncement: st.builds(
        RunAnnouncement,
        run=IDENTIFIERS,
        state=st.sampled_from(["open", "finished"]),
        asks_class_counts=st.booleans(),
        chunk_size=CHUNK_SIZES,
    ),
    Presence: st.builds(
        Presence,
        device=NAMES,
        session=IDENTIFIERS,
        state=st.sampled_from(["online", "offline"]),
        memory_bytes=COUNTS,
        gigaflops=st.floats(0, 10**7),
        engines=st.lists(st.just("executorch"), max_size=2),
        samples=COUNTS,
        class_counts=st.none() | st.lists(COUNTS, max_size=20),
        software=st.text(max_size=64),
    ),
    Lease: st.builds(
        Lease,
        run=IDENTIFIERS,
        lease=IDENTIFIERS,
        round=COUNTS,
        manifest=REFERENCES,
        weights=REFERENCES,
        epochs=st.integers(1, 1000),
        learning_rate=st.floats(0, 1000, exclude_min=True),
        seed=st.integers(0, 2**32 - 1),
        evaluate=st.booleans(),
        encoding=ENCODINGS,
        deadline_seconds=SECONDS,
    ),
    UpdateEncoding: ENCODINGS,
    Answer: st.builds(
        Answer, lease=IDENTIFIERS, answer=st.sampled_from(["accepted", "refused", "failed"]), reason=REASONS
    ),
    ContentRequest: st.builds(ContentRequest, hashes=st.lists(HASHES, min_size=1, max_size=64)),
    TrainingMetrics: METRICS,
    UpdateOffer: st.builds(
        UpdateOffer, update=IDENTIFIERS, lease=IDENTIFIERS, content=INDICES, metrics=METRICS
    ),
    Receipt: st.builds(
        Receipt,
        update=IDENTIFIERS,
        state=st.sampled_from(["have", "wait", "done", "unknown", "rejected"]),
        have=st.lists(COUNTS, max_size=20),
        window=st.integers(1, 64),
        retry_seconds=SECONDS,
        reason=REASONS,
    ),
}
KINDS = st.sampled_from(list(MESSAGES))

HASH = "0" * 64
IDENTIFIER = "a" * 32
REFERENCE = {"sha256": HASH, "size": 10}
VALID: dict[type[Message], dict[str, Any]] = {
    BlobReference: REFERENCE,
    BlobIndex: {**REFERENCE, "chunk_size": 1024, "chunks": [HASH]},
    RunAnnouncement: {"run": IDENTIFIER, "state": "open", "chunk_size": 1024},
    Presence: {"device": "pixel-7", "session": IDENTIFIER, "state": "online"},
    Lease: {
        "run": IDENTIFIER,
        "lease": IDENTIFIER,
        "round": 0,
        "manifest": REFERENCE,
        "weights": REFERENCE,
        "epochs": 1,
        "learning_rate": 0.1,
        "seed": 0,
        "deadline_seconds": 1.0,
    },
    UpdateEncoding: {},
    Answer: {"lease": IDENTIFIER, "answer": "accepted"},
    ContentRequest: {"hashes": [HASH]},
    TrainingMetrics: {"samples": 1, "steps": 1, "loss": 0.5, "seconds": 1.0},
    UpdateOffer: {
        "update": IDENTIFIER,
        "lease": IDENTIFIER,
        "content": {**REFERENCE, "chunk_size": 1024, "chunks": [HASH]},
        "metrics": {"samples": 1, "steps": 1, "loss": 0.5, "seconds": 1.0},
    },
    Receipt: {"update": IDENTIFIER, "state": "done"},
}
"""The least that each kind of message must hold."""


def test_every_kind_of_message_is_tested() -> None:
    kinds = {Message}
    while more := {child for kind in kinds for child in kind.__subclasses__()} - kinds:
        kinds |= more
    assert kinds - {Message} == set(MESSAGES) == set(VALID)


@given(data=st.data(), kind=KINDS)
def test_encode_then_decode_gives_the_message_back(data: st.DataObject, kind: type[Message]) -> None:
    message = data.draw(MESSAGES[kind])
    payload = message.encode()
    assert decode(kind, payload) == message
    json.loads(payload, parse_constant=pytest.fail)


@given(payload=st.binary(max_size=400), kind=KINDS)
def test_any_bytes_are_a_message_or_a_violation(payload: bytes, kind: type[Message]) -> None:
    try:
        message = decode(kind, payload)
    except ProtocolViolation as error:
        assert str(error).startswith(f"{kind.__name__}: ")
        assert "\n" not in str(error)
    else:
        assert decode(kind, message.encode()) == message


@given(data=st.data(), kind=KINDS, position=st.floats(0, 1), replacement=st.binary(max_size=3))
def test_damaged_messages_are_messages_or_violations(
    data: st.DataObject, kind: type[Message], position: float, replacement: bytes
) -> None:
    payload = data.draw(MESSAGES[kind]).encode()
    cut = int(position * len(payload))
    damaged = payload[:cut] + replacement + payload[cut + 1 :]
    try:
        message = decode(kind, damaged)
    except ProtocolViolation:
        return
    assert decode(kind, message.encode()) == message


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | HASHES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data(), kind=KINDS, value=JSON_VALUES)
def test_a_field_of_any_type_is_a_message_or_a_violation(
    data: st.DataObject, kind: type[Message], value: Any
) -> None:
    field = data.draw(st.sampled_from(list(kind.model_fields)))
    payload = json.dumps({**VALID[kind], field: value}).encode()
    try:
        message = decode(kind, payload)
    except ProtocolViolation as error:
        # A value may also contradict another field; no field alone is to blame then.
        contradicts = kind is TrainingMetrics and field in ("evaluated", "correct")
        contradiction = f"{kind.__name__}: document: Value error, more right answers than samples"
        assert (
            field in str(error)
            or "Invalid JSON" in str(error)
            or (contradicts and contradiction in str(error))
        )
    else:
        assert decode(kind, message.encode()) == message


@pytest.mark.parametrize("kind", VALID, ids=lambda kind: kind.__name__)
def test_unknown_fields_are_ignored_and_dropped(kind: type[Message]) -> None:
    plain = decode(kind, json.dumps(VALID[kind]).encode())
    newer = decode(kind, json.dumps({**VALID[kind], "from_the_future": {"a": [1]}}).encode())
    assert newer == plain
    assert b"future" not in newer.encode()


@pytest.mark.parametrize(
    ("kind", "field"),
    [(kind, field) for kind, document in VALID.items() for field in document],
    ids=lambda part: part if isinstance(part, str) else part.__name__,
)
def test_a_missing_field_is_named(kind: type[Message], field: str) -> None:
    document = {name: value for name, value in VALID[kind].items() if name != field}
    with pytest.raises(ProtocolViolation, match=f"^{kind.__name__}: {field}: Field required$"):
        decode(kind, json.dumps(document).encode())


@pytest.mark.parametrize("kind", VALID, ids=lambda kind: kind.__name__)
def test_the_longest_message_is_accepted_and_one_byte_more_refused(kind: type[Message]) -> None:
    document = json.dumps(VALID[kind]).encode()
    longest = document.ljust(MESSAGE_BYTES_LIMIT)
    decode(kind, longest)
    with pytest.raises(ProtocolViolation, match=f"{kind.__name__} of {MESSAGE_BYTES_LIMIT + 1} bytes"):
        decode(kind, longest + b" ")


FLOATS = [
    (kind, path)
    for kind, path in [
        (Lease, ("learning_rate",)),
        (Lease, ("deadline_seconds",)),
        (TrainingMetrics, ("loss",)),
        (TrainingMetrics, ("seconds",)),
        (UpdateOffer, ("metrics", "loss")),
        (Receipt, ("retry_seconds",)),
    ]
]


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", '"nan"', '"inf"', "null"])
@pytest.mark.parametrize(("kind", "path"), FLOATS)
def test_numbers_that_are_not_finite_are_refused(
    kind: type[Message], path: tuple[str, ...], literal: str
) -> None:
    document: dict[str, Any] = json.loads(json.dumps(VALID[kind]))
    inner = document
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = "@"
    with pytest.raises(ProtocolViolation, match=f": {'.'.join(path)}: "):
        decode(kind, json.dumps(document).replace('"@"', literal).encode())


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "1e999", "-1", '"1"'])
@pytest.mark.parametrize(("kind", "field"), [(Presence, "gigaflops"), (TrainingMetrics, "squared_loss")])
def test_speeds_and_squares_are_finite_and_not_negative(
    kind: type[Message], field: str, literal: str
) -> None:
    document = json.dumps({**VALID[kind], field: "@"}).replace('"@"', literal)
    with pytest.raises(ProtocolViolation, match=f"{kind.__name__}: {field}: "):
        decode(kind, document.encode())


def test_what_devices_of_before_do_not_send_is_not_known() -> None:
    assert decode(Presence, json.dumps(VALID[Presence]).encode()).gigaflops == 0
    assert decode(TrainingMetrics, json.dumps(VALID[TrainingMetrics]).encode()).squared_loss is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_cannot_be_sent(value: float) -> None:
    with pytest.raises(ValidationError):
        TrainingMetrics(samples=1, steps=1, loss=value, seconds=1.0)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/etc/passwd", "C:\\x", "A", "a\n", "a\0", "+", "#", "-a", "a" * 65],
)
def test_device_names_that_look_like_paths_or_filters_are_refused(name: str) -> None:
    with pytest.raises(ProtocolViolation, match=r"^Presence: device: "):
        decode(Presence, json.dumps({**VALID[Presence], "device": name}).encode())


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (BlobReference, "sha256", "0" * 63),
        (BlobReference, "sha256", "0" * 65),
        (BlobReference, "sha256", "A" * 64),
        (BlobReference, "sha256", "0" * 64 + "\n"),
        (BlobReference, "size", 0),
        (BlobReference, "size", -1),
        (BlobReference, "size", 2**32 + 1),
        (BlobReference, "size", 1.5),
        (BlobIndex, "chunk_size", 1023),
        (BlobIndex, "chunk_size", 8 * 2**20 + 1),
        (BlobIndex, "chunks", []),
        (BlobIndex, "chunks", ["../../etc/passwd"]),
        (RunAnnouncement, "protocol", 2),
        (RunAnnouncement, "state", "paused"),
        (Presence, "protocol", 0),
        (Presence, "memory_bytes", -1),
        (Presence, "memory_bytes", 2**53 + 1),
        (Presence, "engines", ["cuda"]),
        (Presence, "class_counts", [-1]),
        (Presence, "software", "x" * 65),
        (Lease, "epochs", 0),
        (Lease, "epochs", 1001),
        (Lease, "learning_rate", 0),
        (Lease, "learning_rate", -0.1),
        (Lease, "seed", 2**32),
        (Lease, "deadline_seconds", -1),
        (Lease, "encoding", {"values": "int4"}),
        (UpdateEncoding, "values", "float64"),
        (UpdateEncoding, "share", 0),
        (UpdateEncoding, "share", 1.01),
        (UpdateEncoding, "compression", "gzip"),
        (Lease, "manifest", {"sha256": HASH}),
        (Answer, "lease", "a" * 31),
        (Answer, "answer", "maybe"),
        (Answer, "reason", "x" * 501),
        (ContentRequest, "hashes", []),
        (ContentRequest, "hashes", [HASH] * 65),
        (TrainingMetrics, "samples", 0),
        (TrainingMetrics, "steps", 0),
        (Receipt, "have", [-1]),
        (Receipt, "window", 0),
        (Receipt, "window", 65),
        (Receipt, "state", "DONE"),
    ],
)
def test_values_out_of_bounds_are_refused_by_field(kind: type[Message], field: str, value: Any) -> None:
    with pytest.raises(ProtocolViolation, match=rf"^{kind.__name__}: {field}\b"):
        decode(kind, json.dumps({**VALID[kind], field: value}).encode())


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"[]",
        b"{}x",
        b"\xff\xfe{}",
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b'{"hashes":' + b"1" * 60_000 + b"}",
        b'{"hashes":["\\ud800"]}',
    ],
    ids=lambda payload: payload[:12].hex() or "empty",
)
@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_hostile_documents_are_violations(kind: type[Message], payload: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        decode(kind, payload)


def test_messages_do_not_change_after_they_were_made() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Answer(lease=IDENTIFIER, answer="accepted").answer = "failed"  # type: ignore[misc]


def test_no_device_gets_more_right_than_it_evaluated() -> None:
    payload = b'{"samples": 1, "steps": 1, "loss": 0.5, "seconds": 1, "evaluated": 1, "correct": 2}'
    with pytest.raises(ProtocolViolation, match="more right answers"):
        decode(TrainingMetrics, payload)


@pytest.mark.parametrize("character", ["\x1b", "\n", "\x00", "\x9b"])
def test_a_reason_cannot_move_the_cursor(character: str) -> None:
    payload = json.dumps({"lease": "0" * 32, "answer": "failed", "reason": f"a{character}[2Jb"}).encode()
    with pytest.raises(ProtocolViolation, match="reason"):
        decode(Answer, payload)


@given(st.text())
def test_any_text_can_be_made_a_reason(text: str) -> None:
    answer = Answer(lease="0" * 32, answer="failed", reason=as_reason(text))
    assert decode(Answer, answer.encode()) == answer
