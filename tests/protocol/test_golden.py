"""The golden vectors are what the code writes, and read as the values that other implementations must see too."""

from __future__ import annotations

import hashlib
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frostline.protocol import messages
from frostline.protocol.blobs import BlobStore, index_of, split_chunks
from frostline.protocol.errors import ProtocolViolation
from frostline.protocol.manifest import TensorSpec, decode_manifest
from frostline.protocol.messages import BlobIndex, Message, decode
from frostline.protocol.tensors import decode_tensors, encode_tensors
from frostline.protocol.topics import Received, Topics
from frostline.protocol.update_encoding import decode_update, encode_update
from tests.server.builders import stage_manifest

GOLDEN = Path(__file__).parents[1] / "golden"
GENERATED: dict[str, bytes] = runpy.run_path(str(GOLDEN / "make.py"))["golden_files"]()
MESSAGES = sorted(name for name in GENERATED if name.startswith("messages/"))

# Written out here, not taken from make.py: they are what the format promises.
RUN = "00112233445566778899aabbccddeeff"
LEASE = "0123456789abcdef0123456789abcdef"
UPDATE = "fedcba9876543210fedcba9876543210"
SESSION = "0f1e2d3c4b5a69788796a5b4c3d2e1f0"
CONTENT = "24161446185db1f9d343bdf78f0ff8c1a98fd39536f01f6e2d5bc79dda50d14f"
CHUNKS = [
    "4bd515be315046716e9ee4f36aa67051080e122a1eececa2708739e6fa5860ab",
    "110a348438ce4c5e8904fb58140ceed07452d0857cc482aa6e52e711d013bb8e",
]
MANIFEST = "0bb85438605fa5c33aeb800d0224dbe2f12a81b2f221053836c1c50bebffdf4f"
INDEX = {"sha256": CONTENT, "size": 1100, "chunk_size": 1024, "chunks": CHUNKS}
VALUES: dict[str, dict[str, Any]] = {
    "RunAnnouncement": {
        "protocol": 1,
        "run": RUN,
        "state": "open",
        "asks_class_counts": True,
        "chunk_size": 262_144,
    },
    "Presence": {
        "protocol": 1,
        "device": "pixel-7",
        "session": SESSION,
        "state": "online",
        "memory_bytes": 536_870_912,
        "gigaflops": 12.5,
        "engines": ["executorch"],
        "samples": 120,
        "class_counts": [60, 0, 60],
        "software": "frostline 0.1.0 \u2014 \u00b5",
    },
    "Presence.offline": {
        "protocol": 1,
        "device": "pixel-7",
        "session": SESSION,
        "state": "offline",
        "memory_bytes": 0,
        "gigaflops": 0.0,
        "engines": [],
        "samples": 0,
        "class_counts": None,
        "software": "",
    },
    "Lease": {
        "run": RUN,
        "lease": LEASE,
        "round": 3,
        "manifest": {"sha256": MANIFEST, "size": 6850},
        "weights": {"sha256": CONTENT, "size": 1100},
        "epochs": 2,
        "learning_rate": 0.05,
        "seed": 4_294_967_295,
        "evaluate": True,
        "encoding": {"values": "int8", "share": 0.25, "compression": "zstd"},
        "deadline_seconds": 600.0,
    },
    "Answer": {"lease": LEASE, "answer": "refused", "reason": 'needs 12 MB, has "8 MB" \\ µ'},
    "ContentRequest": {"hashes": CHUNKS},
    "BlobIndex": INDEX,
    "UpdateOffer": {
        "update": UPDATE,
        "lease": LEASE,
        "content": INDEX,
        "metrics": {
            "samples": 120,
            "steps": 30,
            "loss": 2.302585092994046,
            "squared_loss": 5.5,
            "seconds": 1.25,
            "evaluated": 20,
            "correct": 11,
        },
    },
    "Receipt": {
        "update": UPDATE,
        "state": "have",
        "have": [1],
        "window": 8,
        "retry_seconds": 0.5,
        "reason": "",
    },
    "Receipt.rejected": {
        "update": UPDATE,
        "state": "rejected",
        "have": [],
        "window": 4,
        "retry_seconds": 1.0,
        "reason": "the round is over",
    },
}


def read(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


def kind_of(name: str) -> type[Message]:
    kind: type[Message] = getattr(messages, Path(name).name.split(".")[0])
    assert issubclass(kind, Message)
    return kind


def test_the_folder_holds_the_generated_files_and_no_other() -> None:
    found = {
        path.relative_to(GOLDEN).as_posix()
        for path in GOLDEN.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert found == {*GENERATED, "make.py"}
    assert sum(len(read(name)) for name in GENERATED) < 24_000


@pytest.mark.parametrize("name", GENERATED)
def test_files_are_current(name: str) -> None:
    assert read(name) == GENERATED[name], "run tests/golden/make.py if the wire format was meant to change"


def test_every_message_on_a_topic_has_a_vector() -> None:
    nested = {"BlobReference", "TrainingMetrics", "UpdateEncoding"}
    kinds = {
        name
        for name, value in vars(messages).items()
        if isinstance(value, type) and issubclass(value, Message) and value is not Message
    }
    assert {kind_of(name).__name__ for name in MESSAGES} == kinds - nested
    assert {f"messages/{name}.json" for name in VALUES} == set(MESSAGES)


@pytest.mark.parametrize("name", VALUES)
def test_messages_decode_to_the_documented_values(name: str) -> None:
    payload = read(f"messages/{name}.json")
    message = decode(kind_of(name), payload)
    assert message.model_dump() == VALUES[name]
    assert message.encode() == payload


@pytest.mark.parametrize("refused", json.loads(read("refused.json")), ids=lambda entry: entry["payload"][:60])
def test_refused_payloads_are_refused(refused: dict[str, str]) -> None:
    with pytest.raises(ProtocolViolation):
        decode(kind_of(refused["kind"]), refused["payload"].encode())


def test_content_is_the_documented_bytes_and_hashes(tmp_path: Path) -> None:
    content = read("content.bin")
    assert content == bytes((7 * i + i // 256) % 256 for i in range(1100))
    assert hashlib.sha256(content).hexdigest() == CONTENT
    assert [hashlib.sha256(chunk).hexdigest() for chunk in (content[:1024], content[1024:])] == CHUNKS
    index = decode(BlobIndex, read("messages/BlobIndex.json"))
    assert index == index_of(content, 1024)
    store = BlobStore(tmp_path)
    for sha256, chunk in zip(index.chunks, split_chunks(content, index.chunk_size), strict=True):
        store.put_chunk(sha256, chunk)
    assert store.assemble(index).read_bytes() == content


def test_updates_decode_to_the_documented_values() -> None:
    document = json.loads(read("updates.json"))
    manifest = stage_manifest(
        parameters=[TensorSpec(name="block.weight", shape=(2, 5))],
        statistics=[TensorSpec(name="mean", shape=(2,))],
    )
    update = {name: np.array(values, np.float32) for name, values in document["update"].items()}
    assert {name: value.shape for name, value in update.items()} == {"block.weight": (2, 5), "mean": (2,)}
    for vector in document["vectors"]:
        encoding = messages.UpdateEncoding.model_validate(vector["encoding"])
        content = bytes.fromhex(vector["content"])
        assert encode_update(update, manifest, encoding) == content
        decoded = decode_update(content, manifest, encoding, "golden")
        assert {name: value.tolist() for name, value in decoded.items()} == {
            name: np.array(values, np.float32).tolist() for name, values in vector["decoded"].items()
        }
    # By hand: 2.0 / 127 is the scale, and the two largest of ten are in the first and the last place.
    last = document["vectors"][-1]
    assert last["encoding"] == {"values": "int8", "share": 0.2, "compression": "none"}
    assert (
        last["decoded"]["block.weight"][0][0] == -2.0
        and last["decoded"]["block.weight"][1][4] == 1.5118110179901123
    )
    assert b"\x80\x40" in bytes.fromhex(last["content"])


def test_tensors_decode_to_the_documented_values() -> None:
    documents = json.loads(read("tensors.json"))
    content = read("tensors.safetensors")
    expected = [TensorSpec.model_validate_json(json.dumps(document)) for document in documents]
    tensors = decode_tensors(content, expected, "golden")
    for document in documents:
        values = np.array(document["values"], dtype=document["dtype"]).reshape(document["shape"])
        assert tensors[document["name"]].tobytes() == values.tobytes()
    assert {spec.name: spec.shape for spec in expected} == {
        "block.weight": (2, 3),
        "norm.batches": (),
        "labels": (3,),
        "empty": (0, 4),
    }
    weight = tensors["block.weight"]
    assert weight.view(np.uint32).tolist() == [
        [0x00000000, 0xBFC00000, 0x3DCCCCCD],
        [0x7F7FFFFF, 0x00000001, 0x80000000],
    ]
    # Not representable as a double: a reader that goes through floating point is off by one.
    assert tensors["norm.batches"] == 2**53 + 1
    assert tensors["labels"].tolist() == [-1, 0, 2**63 - 1]
    assert encode_tensors(tensors) == content


def test_the_manifest_has_the_documented_hash_and_values() -> None:
    content = read("manifest.json")
    assert hashlib.sha256(content).hexdigest() == MANIFEST
    assert read("manifest.sha256").decode() == f"{MANIFEST}\n"
    manifest = decode_manifest(content, "golden")
    assert manifest.encode() == content
    assert (manifest.stage, manifest.stages, manifest.name) == (1, 2, "digits-cnn")
    assert (manifest.engine, manifest.batch, manifest.classes) == ("executorch", 16, 10)
    assert (manifest.variant, manifest.micro_batches, manifest.micro_batch) == ("micro2+recompute", 2, 8)
    assert manifest.input_shape == (4, 4, 4)
    assert manifest.sample_shape == (1, 8, 8)
    assert [(spec.name, spec.held_axes) for spec in manifest.trained] == [
        ("block.weight", (0, 2, 3, 1)),
        ("head.weight", None),
        ("norm.running_mean", None),
    ]
    assert manifest.samples.vocabulary == 256
    assert [spec.name for spec in manifest.received] == ["received.block.weight", "received.head.weight"]
    tiles = [(spec.name, spec.tile, spec.shape) for spec in manifest.training.inputs if spec.tile is not None]
    assert tiles == [("momentum.head.weight", 0, (5, 64)), ("momentum.head.weight", 1, (5, 64))]
    assert manifest.update is not None
    assert [spec.name for spec in manifest.update.inputs][-1] == "learning_rate"
    assert [(file.sha256, file.size) for file in manifest.files] == [
        ("11" * 32, 40_960),
        ("44" * 32, 5_120),
        ("22" * 32, 20_480),
        ("33" * 32, 10_240),
    ]
    assert manifest.planned.total == 127_252
    assert (manifest.flops, [program.flops for program in manifest.prefix]) == (152_064, [36_864])
    assert manifest.planned.parameters == sum(spec.size_bytes for spec in manifest.parameters)
    assert manifest.planned.statistics == sum(spec.size_bytes for spec in manifest.statistics)
    assert manifest.planned.received == sum(spec.size_bytes for spec in manifest.received)


def test_topics_are_the_documented_ones() -> None:
    document = json.loads(read("topics.json"))
    root = "frostline/v1/greenhouse"
    assert document["topics"] == {
        "run": f"{root}/run",
        "index": f"{root}/index/{CONTENT[:32]}",
        "chunk": f"{root}/chunk/{CONTENT[:32]}",
        "presence": f"{root}/from/pixel-7/presence",
        "answer": f"{root}/from/pixel-7/answer",
        "request": f"{root}/from/pixel-7/request",
        "offer": f"{root}/from/pixel-7/offer",
        "update_chunk": f"{root}/from/pixel-7/chunk/{UPDATE}/12",
        "lease": f"{root}/to/pixel-7/lease",
        "receipt": f"{root}/to/pixel-7/receipt",
    }
    assert (document["fleet"], document["device"], document["sha256"]) == ("greenhouse", "pixel-7", CONTENT)
    assert (document["update"], document["index"]) == (UPDATE, 12)
    assert sum(received is not None for received in document["parsed"].values()) == 5


@pytest.mark.parametrize(("topic", "received"), json.loads(read("topics.json"))["parsed"].items())
def test_topics_parse_as_documented(topic: str, received: dict[str, Any] | None) -> None:
    topics = Topics("greenhouse")
    if received is None:
        with pytest.raises(ProtocolViolation):
            topics.parse(topic)
    else:
        assert topics.parse(topic) == Received(**received)
