"""Every target there is."""

from __future__ import annotations

from frostline.exporter.executorch_target import EXECUTORCH
from frostline.exporter.onnxruntime_target import ONNXRUNTIME
from frostline.exporter.onnxruntime_training_target import ONNXRUNTIME_TRAINING
from frostline.exporter.target import Target
from frostline.protocol.errors import UsageError
from frostline.protocol.messages import Engine

_TARGETS: tuple[Target, ...] = (EXECUTORCH, ONNXRUNTIME, ONNXRUNTIME_TRAINING)


def find_target(name: str) -> Target:
    """The target of an engine that a person named.

    Raises
    ------
    UsageError
        If there is none.
    """
    for target in _TARGETS:
        if target.engine == name:
            return target
    known = ", ".join(target.engine for target in _TARGETS)
    raise UsageError(f"there is no engine {name!r}; use one of {known}")


def target_of(engine: Engine) -> Target:
    """What compiles for an engine."""
    return next(target for target in _TARGETS if target.engine == engine)
