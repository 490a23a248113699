"""Write the golden vectors that every implementation of the protocol is checked against.

Run `python tests/golden/make.py` after a deliberate change of the wire format, and read the difference it makes.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from frostline.protocol.blobs import index_of, reference_to, sha256_of
from frostline.protocol.errors import ProtocolViolation
from frostline.protocol.manifest import PlannedMemory, Program, StageManifest, TensorSpec
from frostline.protocol.messages import (
    Answer,
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
)
from frostline.protocol.tensors import Array, encode_tensors
from frostline.protocol.topics import Topics
from frostline.protocol.update_encoding import decode_update, encode_update

FOLDER = Path(__file__).parent

RUN = "00112233445566778899aabbccddeeff"
LEASE = "0123456789abcdef0123456789abcdef"
UPDATE = "fedcba9876543210fedcba9876543210"
SESSION = "0f1e2d3c4b5a69788796a5b4c3d2e1f0"
FLEET = "greenhouse"
DEVICE = "pixel-7"

CHUNK_SIZE = 1024
CONTENT = bytes((7 * i + i // 256) % 256 for i in range(1100))

TENSORS: dict[str, Array] = {
    "block.weight": np.array([[0.0, -1.5, 0.1], [3.4028235e38, 1e-45, -0.0]], dtype=np.float32),
    "norm.batches": np.array(9_007_199_254_740_993, dtype=np.int64),
    "labels": np.array([-1, 0, 9_223_372_036_854_775_807], dtype=np.int64),
    "empty": np.zeros((0, 4), dtype=np.float32),
}


def _tensors() -> list[dict[str, object]]:
    return [
        {"name": name, "dtype": array.dtype.name, "shape": array.shape, "values": array.ravel().tolist()}
        for name, array in TENSORS.items()
    ]


def _manifest() -> StageManifest:
    kernel = TensorSpec(name="block.weight", shape=(4, 4, 3, 3), held_axes=(0, 2, 3, 1))
    held = TensorSpec(name="block.weight", shape=(4, 3, 3, 4))
    weight = TensorSpec(name="head.weight", shape=(10, 64))
    mean = TensorSpec(name="norm.running_mean", shape=(4,))
    momentum = [
        TensorSpec(name="momentum.block.weight", shape=(4, 3, 3, 4)),
        TensorSpec(name="momentum.head.weight", shape=(10, 64)),
    ]
    received = [
        TensorSpec(name="received.block.weight", shape=(4, 3, 3, 4)),
        TensorSpec(name="received.head.weight", shape=(10, 64)),
    ]
    # Half of the head's rows at a time.
    tiles = [TensorSpec(name="momentum.head.weight", shape=(5, 64), tile=tile) for tile in (0, 1)]
    features = TensorSpec(name="x", shape=(8, 4, 4, 4))
    labels = TensorSpec(name="y", dtype="int64", shape=(8,))
    rate = TensorSpec(name="learning_rate", shape=())
    return StageManifest(
        stage=1,
        stages=2,
        name="digits-cnn",
        engine="executorch",
        variant="micro2+recompute",
        batch=16,
        micro_batches=2,
        classes=10,
        parameters=[kernel, weight],
        statistics=[mean],
        optimizer_state=momentum,
        received=received,
        training=Program(
            file=BlobReference(sha256="11" * 32, size=40_960),
            inputs=[
                held,
                weight,
                mean,
                momentum[0],
                *tiles,
                *received,
                features,
                labels,
                TensorSpec(name="first", shape=()),
            ],
            outputs=[TensorSpec(name="loss", shape=()), TensorSpec(name="correct", dtype="int64", shape=())],
            arena_bytes=65_536,
        ),
        update=Program(
            file=BlobReference(sha256="44" * 32, size=5_120),
            inputs=[held, weight, *momentum, rate],
            outputs=[rate],
            arena_bytes=4_096,
        ),
        evaluation=Program(
            file=BlobReference(sha256="22" * 32, size=20_480),
            inputs=[held, weight, mean, features],
            outputs=[TensorSpec(name="logits", shape=(8, 10))],
            arena_bytes=32_768,
        ),
        prefix=[
            Program(
                file=BlobReference(sha256="33" * 32, size=10_240),
                inputs=[TensorSpec(name="image", dtype="int64", shape=(8, 1, 8, 8), vocabulary=256)],
                outputs=[features],
                arena_bytes=16_384,
                flops=36_864,
            )
        ],
        planned=PlannedMemory(
            arena=69_632,
            parameters=3_136,
            statistics=16,
            optimizer_state=3_136,
            received=3_136,
            batch=2_116,
            program=46_080,
        ),
        flops=152_064,
    )


def _messages() -> dict[str, Message]:
    index = index_of(CONTENT, CHUNK_SIZE)
    return {
        "RunAnnouncement": RunAnnouncement(run=RUN, state="open", asks_class_counts=True, chunk_size=262_144),
        "Presence": Presence(
            device=DEVICE,
            session=SESSION,
            state="online",
            memory_bytes=536_870_912,
            gigaflops=12.5,
            engines=["executorch"],
            samples=120,
            class_counts=[60, 0, 60],
            software="frostline 0.1.0 — µ",
        ),
        "Presence.offline": Presence(device=DEVICE, session=SESSION, state="offline"),
        "Lease": Lease(
            run=RUN,
            lease=LEASE,
            round=3,
            manifest=reference_to(_manifest().encode()),
            weights=reference_to(CONTENT),
            epochs=2,
            learning_rate=0.05,
            seed=4_294_967_295,
            evaluate=True,
            encoding=UpdateEncoding(values="int8", share=0.25, compression="zstd"),
            deadline_seconds=600.0,
        ),
        "Answer": Answer(lease=LEASE, answer="refused", reason='needs 12 MB, has "8 MB" \\ µ'),
        "ContentRequest": ContentRequest(hashes=[*index.chunks]),
        "BlobIndex": index,
        "UpdateOffer": UpdateOffer(
            update=UPDATE,
            lease=LEASE,
            content=index,
            metrics=TrainingMetrics(
                samples=120,
                steps=30,
                loss=2.302585092994046,
                squared_loss=5.5,
                seconds=1.25,
                evaluated=20,
                correct=11,
            ),
        ),
        "Receipt": Receipt(update=UPDATE, state="have", have=[1], window=8, retry_seconds=0.5),
        "Receipt.rejected": Receipt(update=UPDATE, state="rejected", reason="the round is over"),
    }


def _refused() -> list[dict[str, str]]:
    metrics = '{"samples":1,"steps":1,"loss":%s,"seconds":1.0}'
    presence = f'{{"device":"%s","session":"{SESSION}","state":"online"}}'
    return [
        {"kind": kind, "payload": payload}
        for kind, payload in [
            ("Answer", ""),
            ("Answer", "[]"),
            ("Answer", "{"),
            ("Answer", f'{{"lease":"{LEASE}"}}'),
            ("Answer", f'{{"lease":"{LEASE}","answer":"maybe"}}'),
            ("Answer", f'{{"lease":"{LEASE.upper()}","answer":"accepted"}}'),
            ("TrainingMetrics", metrics % "NaN"),
            ("TrainingMetrics", metrics % "Infinity"),
            ("TrainingMetrics", metrics % "1e999"),
            ("TrainingMetrics", metrics % "null"),
            ("Presence", presence % ".."),
            ("Presence", presence % "a/b"),
            ("Presence", presence % "A"),
            ("Presence", presence % "-a"),
            ("Presence", presence % ""),
            ("Presence", presence % ("a" * 65)),
            ("Presence", f'{{"device":"{DEVICE}","session":"{SESSION}","state":"online","gigaflops":-1.0}}'),
            ("BlobReference", f'{{"sha256":"{"0" * 64}","size":0}}'),
            ("ContentRequest", '{"hashes":[]}'),
            ("RunAnnouncement", f'{{"protocol":2,"run":"{RUN}","state":"open","chunk_size":4096}}'),
        ]
    ]


def _updates() -> dict[str, object]:
    update = {
        "block.weight": np.array([[-2.0, 0.1, 0.0, 0.25, -0.3], [1.0, -1e-9, 0.5, 0.125, 1.51]], np.float32),
        "mean": np.array([0.1, -3.0], np.float32),
    }
    specs = {name: TensorSpec(name=name, shape=value.shape) for name, value in update.items()}
    fields = {"parameters": [specs["block.weight"]], "statistics": [specs["mean"]]}
    manifest = _manifest().model_copy(update=fields)
    vectors = []
    for encoding in (
        UpdateEncoding(),
        UpdateEncoding(values="float16"),
        UpdateEncoding(values="int8"),
        UpdateEncoding(share=0.5),
        UpdateEncoding(values="int8", share=0.2),
    ):
        content = encode_update(update, manifest, encoding)
        decoded = decode_update(content, manifest, encoding, "golden")
        vectors.append({
            "encoding": encoding.model_dump(),
            "content": content.hex(),
            "decoded": {name: value.tolist() for name, value in decoded.items()},
        })  # fmt: skip
    return {"update": {name: value.tolist() for name, value in update.items()}, "vectors": vectors}


def _topics() -> dict[str, object]:
    topics = Topics(FLEET)
    sha256 = sha256_of(CONTENT)
    names = {
        "run": topics.run,
        "index": topics.index(sha256),
        "chunk": topics.chunk(sha256),
        "presence": topics.presence(DEVICE),
        "answer": topics.answer(DEVICE),
        "request": topics.request(DEVICE),
        "offer": topics.offer(DEVICE),
        "update_chunk": topics.update_chunk(DEVICE, UPDATE, 12),
        "lease": topics.lease(DEVICE),
        "receipt": topics.receipt(DEVICE),
    }
    candidates = [
        *names.values(),
        f"{topics.root}/from/{DEVICE}/chunk/{UPDATE}/012",
        f"{topics.root}/from/{DEVICE}/chunk/{UPDATE}/-1",
        f"{topics.root}/from/{DEVICE}/chunk/{UPDATE[:31]}/1",
        f"{topics.root}/from/../presence",
        f"{topics.root}/from/{DEVICE}/presence/",
        f"frostline/v2/{FLEET}/from/{DEVICE}/presence",
        f"frostline/v1/other/from/{DEVICE}/presence",
    ]
    parsed: dict[str, object] = {}
    for topic in candidates:
        try:
            parsed[topic] = asdict(topics.parse(topic))
        except ProtocolViolation:
            parsed[topic] = None
    return {
        "fleet": FLEET,
        "device": DEVICE,
        "sha256": sha256,
        "update": UPDATE,
        "index": 12,
        "topics": names,
        "server_filters": topics.server_filters,
        "parsed": parsed,
    }


def _document(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def golden_files() -> dict[str, bytes]:
    """Return the content of every golden file by its path below this folder."""
    manifest = _manifest().encode()
    return {
        **{f"messages/{name}.json": message.encode() for name, message in _messages().items()},
        "refused.json": _document(_refused()),
        "topics.json": _document(_topics()),
        "content.bin": CONTENT,
        "tensors.safetensors": encode_tensors(TENSORS),
        "tensors.json": _document(_tensors()),
        "updates.json": _document(_updates()),
        "manifest.json": manifest,
        "manifest.sha256": f"{sha256_of(manifest)}\n".encode(),
    }


def main() -> None:
    """Replace the golden files."""
    for name, content in golden_files().items():
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


if __name__ == "__main__":
    main()
