"""Topic names. Exact topics of at most seven slashes in [a-z0-9/-], which every broker accepts.

A device writes only below `from/<device>` and reads only below `to/<device>` and the shared topics, so two lines of a
broker's access list isolate devices from each other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from frostline.protocol.errors import ProtocolViolation, UsageError

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")
"""Names of fleets and devices: they become topic levels and folder names, so nothing else is let in."""

HASH_DIGITS = 32
"""How many hexadecimal digits of a SHA-256 address content in a topic; the whole hash is checked on arrival."""


def checked_name(name: str, what: str) -> str:
    """Return `name` if it may stand in a topic.

    Raises
    ------
    UsageError
        Naming `what` (such as "device name") otherwise.
    """
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{what} {name!r}: use 1 to 64 lower-case letters, digits and inner hyphens, such as 'pixel-7'"
        )
    return name


@dataclass(frozen=True)
class Topics:
    """Every topic of one fleet."""

    fleet: str

    def __post_init__(self) -> None:
        checked_name(self.fleet, "fleet name")

    @property
    def root(self) -> str:
        """Prefix of all topics of this fleet and protocol version."""
        return f"frostline/v1/{self.fleet}"

    @property
    def run(self) -> str:
        """Retained announcement of the current run."""
        return f"{self.root}/run"

    def index(self, sha256: str) -> str:
        """List of the chunks of a file that is larger than one chunk."""
        return f"{self.root}/index/{sha256[:HASH_DIGITS]}"

    def chunk(self, sha256: str) -> str:
        """One chunk, addressed by its own hash."""
        return f"{self.root}/chunk/{sha256[:HASH_DIGITS]}"

    def presence(self, device: str) -> str:
        """Retained: what a device is, or that it is gone (its last will)."""
        return f"{self.root}/from/{device}/presence"

    def answer(self, device: str) -> str:
        """A device's answer to a lease."""
        return f"{self.root}/from/{device}/answer"

    def request(self, device: str) -> str:
        """Content that a device asked for and did not get."""
        return f"{self.root}/from/{device}/request"

    def offer(self, device: str) -> str:
        """A finished update, announced."""
        return f"{self.root}/from/{device}/offer"

    def update_chunk(self, device: str, update: str, index: int) -> str:
        """One chunk of an offered update."""
        return f"{self.root}/from/{device}/chunk/{update[:HASH_DIGITS]}/{index}"

    def lease(self, device: str) -> str:
        """Work for a device."""
        return f"{self.root}/to/{device}/lease"

    def receipt(self, device: str) -> str:
        """The server's word on an offered update."""
        return f"{self.root}/to/{device}/receipt"

    @property
    def server_filters(self) -> tuple[str, ...]:
        """What a server subscribes to."""
        kinds = ("presence", "answer", "request", "offer", "chunk/+/+")
        return tuple(f"{self.root}/from/+/{kind}" for kind in kinds)

    def parse(self, topic: str) -> Received:
        """Take apart a topic below `from/`.

        Raises
        ------
        ProtocolViolation
            If it is not a topic a device may write to.
        """
        levels = topic.removeprefix(f"{self.root}/from/").split("/")
        if topic.startswith(f"{self.root}/from/") and NAME.fullmatch(levels[0]):
            match levels[1:]:
                case ["presence" | "answer" | "request" | "offer" as kind]:
                    return Received(levels[0], kind)
                case ["chunk", update, index] if _HEX.fullmatch(update) and _INDEX.fullmatch(index):
                    return Received(levels[0], "chunk", update, int(index))
        raise ProtocolViolation(f"unexpected topic {topic[:200]!r}")


_HEX = re.compile(rf"[0-9a-f]{{{HASH_DIGITS}}}")
_INDEX = re.compile(r"0|[1-9][0-9]{0,5}")


@dataclass(frozen=True)
class Received:
    """A topic below `from/`, taken apart; `update` and `index` belong to update chunks only."""

    device: str
    kind: str
    update: str = ""
    index: int = 0
