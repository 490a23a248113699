"""Control messages: small JSON documents, validated on both sides.

Unknown fields are ignored, so that a newer peer can add some; missing or malformed ones reject the message. Times are
durations, never wall-clock readings: the clocks of devices cannot be trusted.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from frostline.protocol.errors import ProtocolViolation
from frostline.protocol.topics import NAME

PROTOCOL_VERSION = 1
MESSAGE_BYTES_LIMIT = 64 * 1024
"""Longest control message accepted, in bytes."""

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(pattern=f"^{NAME.pattern}$")]
Identifier = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Engine = Literal["executorch", "onnxruntime", "onnxruntime-training"]
"""A runtime that trains; an artifact is compiled for one."""
UpdateValues = Literal["float32", "float16", "int8"]
UpdateShare = Annotated[float, Field(gt=0, le=1)]
Compression = Literal["none", "zstd"]
Count = Annotated[int, Field(ge=0, le=2**53)]
Seconds = Annotated[float, Field(ge=0, le=10**7)]
# No control characters: a terminal would obey them.
Reason = Annotated[str, StringConstraints(max_length=500, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]


class Message(BaseModel):
    """Base of every message."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    def encode(self) -> bytes:
        """The message as UTF-8 JSON."""
        return self.model_dump_json(exclude_none=True).encode()


class BlobReference(Message):
    """Content named by its hash."""

    sha256: Sha256
    size: Annotated[int, Field(ge=1, le=2**32)]


class BlobIndex(BlobReference):
    """The chunks of content, in order, each named by its own hash."""

    chunk_size: Annotated[int, Field(ge=1024, le=8 * 2**20)]
    chunks: Annotated[list[Sha256], Field(min_length=1, max_length=2**16)]


class RunAnnouncement(Message):
    """Retained on `run`: which run is on and what it asks of devices."""

    protocol: Literal[1] = 1
    run: Identifier
    state: Literal["open", "finished"]
    asks_class_counts: bool = False
    chunk_size: Annotated[int, Field(ge=1024, le=8 * 2**20)]


class Presence(Message):
    """Retained on `from/<device>/presence`: what a device is. The last will has `state` "offline".

    Attributes
    ----------
    gigaflops : float
        10^9 floating-point operations a second of one thread in a small training step; 0 where not known.
    """

    protocol: Literal[1] = 1
    device: Name
    session: Identifier
    state: Literal["online", "offline"]
    memory_bytes: Count = 0
    gigaflops: Annotated[float, Field(ge=0, le=10**7)] = 0.0
    engines: list[Engine] = []
    samples: Count = 0
    class_counts: Annotated[list[Count], Field(max_length=100_000)] | None = None
    software: Annotated[str, Field(max_length=64)] = ""


class UpdateEncoding(Message):
    """How an update is to be sent, see `frostline.protocol.update_encoding`.

    Attributes
    ----------
    values : "float32", "float16" or "int8"
        What a parameter's values travel as.
    share : float
        The share of each parameter's values that travels: those of the largest magnitude.
    """

    values: UpdateValues = "float32"
    share: UpdateShare = 1.0
    compression: Compression = "none"

    @property
    def is_exact(self) -> bool:
        """Whether nothing is lost."""
        return self.values == "float32" and self.share == 1


class Lease(Message):
    """On `to/<device>/lease`: one stage to train for one round."""

    run: Identifier
    lease: Identifier
    round: Count
    manifest: BlobReference
    weights: BlobReference
    epochs: Annotated[int, Field(ge=1, le=1000)]
    learning_rate: Annotated[float, Field(gt=0, le=1000)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    evaluate: bool = False
    encoding: UpdateEncoding = UpdateEncoding()
    deadline_seconds: Seconds


class Answer(Message):
    """On `from/<device>/answer`: whether a device took a lease, gave it up, and why."""

    lease: Identifier
    answer: Literal["accepted", "refused", "failed"]
    reason: Reason = ""


class ContentRequest(Message):
    """On `from/<device>/request`: content awaited on `index/` or `chunk/` topics that did not come."""

    hashes: Annotated[list[Sha256], Field(min_length=1, max_length=64)]


class TrainingMetrics(Message):
    """What training a lease showed.

    Attributes
    ----------
    loss, squared_loss : float
        Means over the lease's steps of a batch's loss and of its square, which Oort's statistical utility is made of (Lai
        et al., OSDI 2021); devices of before do not send the latter.
    """

    samples: Annotated[int, Field(ge=1, le=2**40)]
    steps: Annotated[int, Field(ge=1, le=2**40)]
    loss: float
    squared_loss: Annotated[float, Field(ge=0)] | None = None
    seconds: Seconds
    evaluated: Count = 0
    correct: Count = 0

    @model_validator(mode="after")
    def _no_more_right_than_evaluated(self) -> Self:
        if self.correct > self.evaluated:
            raise ValueError("more right answers than samples evaluated")
        return self


class UpdateOffer(Message):
    """On `from/<device>/offer`: a finished update, ready to be sent."""

    update: Identifier
    lease: Identifier
    content: BlobIndex
    metrics: TrainingMetrics


class Receipt(Message):
    """On `to/<device>/receipt`: the server's word on an offered update.

    `have` lists chunks that are on the server's disk; `done` means counted, exactly once; `wait` asks for another
    offer after `retry_seconds`; `unknown` asks for the offer again; `rejected` ends it.
    """

    update: Identifier
    state: Literal["have", "wait", "done", "unknown", "rejected"]
    have: Annotated[list[Count], Field(max_length=2**16)] = []
    window: Annotated[int, Field(ge=1, le=64)] = 4
    retry_seconds: Seconds = 1.0
    reason: Reason = ""


def as_reason(text: str) -> str:
    """`text` on one line, printable, and short enough for a message's `reason`."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:500]


M = TypeVar("M", bound=Message)


def decode(kind: type[M], payload: bytes) -> M:
    """Parse and validate a message.

    Raises
    ------
    ProtocolViolation
        If it is too long, not JSON, or does not fit the schema; naming the first field at fault.
    """
    if len(payload) > MESSAGE_BYTES_LIMIT:
        raise ProtocolViolation(f"{kind.__name__} of {len(payload)} bytes: at most {MESSAGE_BYTES_LIMIT}")
    try:
        return kind.model_validate_json(payload)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise ProtocolViolation(f"{kind.__name__}: {where}: {first['msg']}") from None
