"""Nets of three layers around the layer that is looked at.

Each is a stem, the layer, a body and a head, so that two blocks can be cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tests.zoo.entry import Entry, Refusal

CLASSES = 5
WIDTH = 8
"""Channels of images, series and volumes in front of the layer."""
FEATURES = 16
"""Features of tokens and vectors in front of the layer."""
BY_NAME = ("layer", "body")
"""Where vectors are cut: no place stands out between layers that hand on (N, C)."""


class Lambda(nn.Module):
    """Calls a function of one tensor."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Frame(nn.Module):
    def __init__(self, stem: nn.Module, layer: nn.Module, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.stem, self.layer, self.body, self.head = stem, layer, body, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.layer(self.stem(x))))


Make = Callable[[], nn.Module]
"""Makes the layer."""


def _entry(name: str, build: Make, input_shape: tuple[int, ...], options: dict[str, Any]) -> Entry:
    defaults: dict[str, Any] = {"classes": CLASSES, "blocks": 2}
    return Entry(name=name, kind="layer", build=build, input_shape=input_shape, **{**defaults, **options})


def on_images(name: str, make: Make, out: int = WIDTH, **options: Any) -> Entry:
    """Return an entry whose layer takes (N, 8, 12, 12) and returns (N, out, any, any)."""

    def build() -> nn.Module:
        return Frame(
            nn.Conv2d(3, WIDTH, 3, padding=1),
            make(),
            nn.Sequential(nn.Conv2d(out, WIDTH, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, CLASSES)),
        )

    return _entry(name, build, (3, 12, 12), options)


def on_series(name: str, make: Make, out: int = WIDTH, **options: Any) -> Entry:
    """Return an entry whose layer takes (N, 8, 20) and returns (N, out, any)."""

    def build() -> nn.Module:
        return Frame(
            nn.Conv1d(3, WIDTH, 3, padding=1),
            make(),
            nn.Sequential(nn.Conv1d(out, WIDTH, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(WIDTH, CLASSES)),
        )

    return _entry(name, build, (3, 20), options)


def on_volumes(name: str, make: Make, out: int = WIDTH, **options: Any) -> Entry:
    """Return an entry whose layer takes (N, 8, 6, 6, 6) and returns (N, out, any, any, any)."""

    def build() -> nn.Module:
        return Frame(
            nn.Conv3d(2, WIDTH, 3, padding=1),
            make(),
            nn.Sequential(nn.Conv3d(out, WIDTH, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(WIDTH, CLASSES)),
        )

    return _entry(name, build, (2, 6, 6, 6), options)


def on_tokens(name: str, make: Make, out: int = FEATURES, **options: Any) -> Entry:
    """Return an entry whose layer takes (N, 10, 16) and returns (N, any, out)."""

    def build() -> nn.Module:
        return Frame(
            nn.Linear(6, FEATURES),
            make(),
            nn.Sequential(nn.Linear(out, FEATURES), nn.GELU()),
            nn.Sequential(Lambda(lambda x: x.mean(dim=1)), nn.Linear(FEATURES, CLASSES)),
        )

    return _entry(name, build, (10, 6), options)


def on_vectors(name: str, make: Make, out: int = FEATURES, **options: Any) -> Entry:
    """Return an entry whose layer takes (N, 16) and returns (N, out)."""

    def build() -> nn.Module:
        return Frame(
            nn.Linear(20, FEATURES),
            make(),
            nn.Sequential(nn.Linear(out, FEATURES), nn.ReLU()),
            nn.Linear(FEATURES, CLASSES),
        )

    return _entry(name, build, (20,), {"blocks": BY_NAME, **options})


def on_ids(name: str, make: Make, out: int = FEATURES, **options: Any) -> Entry:
    """Return an entry whose layer takes int64 ids (N, 10) below 40 and returns vectors (N, out)."""

    def build() -> nn.Module:
        body = nn.Sequential(nn.Linear(out, FEATURES), nn.ReLU())
        return Frame(nn.Identity(), make(), body, nn.Linear(FEATURES, CLASSES))

    return _entry(name, build, (10,), {"vocabulary": 40, "blocks": BY_NAME, **options})


def whole(name: str, build: Make, input_shape: tuple[int, ...], **options: Any) -> Entry:
    """Return an entry of a net without a frame, for habits of a whole model."""
    return _entry(name, build, input_shape, options)


def function_on(
    frame: Callable[..., Entry], name: str, function: Callable[[Tensor], Tensor], **options: Any
) -> Entry:
    """Return an entry whose layer is a function of one tensor."""
    return frame(name, lambda: Lambda(function), **options)


def refused(*causes: str) -> Refusal:
    """Return the refusal of a layer: its path and the causes that must be named."""
    return Refusal(("'layer", *causes))
