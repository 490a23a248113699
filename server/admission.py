"""Which devices can train a stage, and in which of the forms it is offered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from frostline.protocol.manifest import StageManifest
from frostline.protocol.messages import BlobReference, Engine, Presence
from frostline.protocol.sizes import format_size


@dataclass(frozen=True)
class OfferedStage:
    """One form of the stage that is being trained, as devices can fetch it.

    Attributes
    ----------
    width : float
        The share of the channels it trains; 1 unless the run scales widths.
    """

    manifest: StageManifest
    reference: BlobReference
    width: float = 1.0


def fastest_admitted(presence: Presence, offers: Sequence[OfferedStage]) -> OfferedStage | None:
    """The first of `offers`, fastest first, that a device can train; None if there is none.

    A device with several engines gets what is compiled for the one it names first.
    """
    admitted = [offer for offer in offers if admits(presence, offer.manifest)]
    return min(admitted, key=lambda offer: presence.engines.index(offer.manifest.engine), default=None)


def admits(presence: Presence, manifest: StageManifest) -> bool:
    """Whether a device can train a stage: its engine is there and the planned bytes fit its budget."""
    return not refusal(presence, [manifest])


def refusal(
    presence: Presence, manifests: Sequence[StageManifest], refused: Mapping[Engine, str] | None = None
) -> str:
    """Why a device can train none of `manifests`; empty if it can train one.

    Parameters
    ----------
    refused : mapping of Engine to str, optional
        Why the stage cannot be compiled for an engine.
    """
    if presence.state != "online":
        return "offline"
    if not presence.samples:
        return "it has no samples"
    served = [manifest for manifest in manifests if manifest.engine in presence.engines]
    if not served:
        for engine in presence.engines:
            if refused and engine in refused:
                return f"the stage cannot be compiled for {engine}: {refused[engine]}"
        engines = ", ".join(sorted({manifest.engine for manifest in manifests}))
        return f"it has none of the engines {engines}"
    least = min(manifest.planned.total for manifest in served)
    if least > presence.memory_bytes:
        return f"{format_size(least)} are needed, its budget is {format_size(presence.memory_bytes)}"
    return ""
