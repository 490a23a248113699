"""Which devices train a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from frostline.protocol.manifest import StageManifest
from frostline.protocol.messages import BlobReference, Presence


@dataclass(frozen=True)
class OfferedStage:
    """One variant of the stage that is being trained, as devices can fetch it."""

    manifest: StageManifest
    reference: BlobReference


def fastest_admitted(presence: Presence, offers: Sequence[OfferedStage]) -> OfferedStage | None:
    """The first of `offers`, fastest first, that a device can train; None if there is none.

    A device with several engines gets what is compiled for the one it names first.
    """
    admitted = [offer for offer in offers if admits(presence, offer.manifest)]
    return min(admitted, key=lambda offer: presence.engines.index(offer.manifest.engine), default=None)


def admits(presence: Presence, manifest: StageManifest) -> bool:
    """Whether a device can train a stage: its engine is there and the planned bytes fit its budget."""
    return (
        presence.state == "online"
        and presence.samples > 0
        and manifest.engine in presence.engines
        and manifest.planned.total <= presence.memory_bytes
    )


@dataclass(frozen=True)
class UniformSelector:
    """Draws devices uniformly, without replacement, reproducibly from `seed` and the round's number."""

    seed: int

    def order(self, eligible: Sequence[str], round_number: int) -> list[str]:
        """All eligible devices in the order in which they are to be asked."""
        names = sorted(eligible)
        random = np.random.default_rng([self.seed, round_number])
        return [names[i] for i in random.permutation(len(names))]
