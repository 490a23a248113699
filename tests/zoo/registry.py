"""Every model of the zoo: what people bring, written the way they write it."""

from __future__ import annotations

from tests.zoo import (
    attention,
    compact,
    convolutional,
    decoders,
    efficient,
    layers_activations,
    layers_convolutions,
    layers_corners,
    layers_embeddings,
    layers_frozen,
    layers_norms,
    layers_operators,
    layers_pooling,
    layers_random,
    layers_resampling,
    layers_shapes,
    layers_state,
    layers_structure,
    mixers,
    multiscale,
    other_targets,
    residual,
    sensors,
    speech,
    tables,
    text,
    windows,
)
from tests.zoo.entry import Entry, Refusal, to_training

__all__ = ["ENTRIES", "Entry", "Refusal", "to_training"]

_ARCHITECTURES = (
    residual,
    convolutional,
    efficient,
    compact,
    multiscale,
    attention,
    windows,
    mixers,
    speech,
    sensors,
    text,
    decoders,
    tables,
    other_targets,
)
_LAYERS = (
    layers_norms,
    layers_activations,
    layers_pooling,
    layers_convolutions,
    layers_corners,
    layers_resampling,
    layers_random,
    layers_frozen,
    layers_state,
    layers_shapes,
    layers_operators,
    layers_structure,
    layers_embeddings,
)

ENTRIES: tuple[Entry, ...] = tuple(
    entry for module in (*_ARCHITECTURES, *_LAYERS) for entry in module.ENTRIES
)
