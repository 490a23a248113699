"""Every built-in model in a size that tests take little time with."""

from __future__ import annotations

from frostline.exporter.models.lookup import BUILTIN_NAMES, ModelSpec, build_model

OPTIONS: dict[str, dict[str, object]] = {
    "mobilenet_v2": {"width": 0.2, "input_size": 8},
    "vit": {"width": 8, "depth": 3, "heads": 2, "input_size": 8},
    "sensor_cnn": {"width": 4, "channels": 3, "length": 16},
    "text_transformer": {"width": 8, "depth": 3, "heads": 2, "length": 6, "vocabulary": 11},
}
IMAGE_CNNS = tuple(name for name in BUILTIN_NAMES if name not in ("vit", "sensor_cnn", "text_transformer"))


def small_model(name: str, **options: object) -> ModelSpec:
    """A built-in model, with options beside those that make it small."""
    return build_model(name, {**OPTIONS.get(name, {"width": 4, "input_size": 8}), **options})
