"""Models of several widths over one set of weights, compiled for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from frostline.protocol.connection import BrokerAddress
from frostline.protocol.errors import UsageError
from frostline.server.assembly import assemble
from frostline.server.config import RunConfig
from frostline.server.coordinator import RunObserver
from frostline.server.schedule import Schedule

torch.set_num_threads(1)
ENGINE = "onnxruntime"


def build(folder: Path, **model: object) -> Schedule:
    table = {
        "name": "resnet10",
        "options": {"width": 8, "norm": "group"},
        "blocks": 1,
        "widths": [0.25, 1.0, 0.5],
        "input_shape": [1, 8, 8],
        "classes": 3,
    }
    training = {"batch": 4, "engines": [ENGINE]}
    config = RunConfig.model_validate({"model": table | model, "training": training})
    address = BrokerAddress.parse("mqtt://127.0.0.1:1")
    return assemble(config, "", folder / "run", address, RunObserver(), resume=False).schedule


@pytest.fixture(scope="module")
def schedule(tmp_path_factory: pytest.TempPathFactory) -> Schedule:
    return build(tmp_path_factory.mktemp("widths"))


def test_a_narrow_model_starts_as_the_leading_part_of_the_full_one(schedule: Schedule) -> None:
    full = schedule.prepare(0, ENGINE)
    narrow = schedule.smallest(0, ENGINE)
    assert (full.width, narrow.width) == (1.0, 0.25)
    assert narrow.weights.keys() == full.weights.keys()
    assert narrow.weights["block.conv1.weight"].shape == (2, 1, 3, 3)
    for spec in narrow.manifest.trained:
        part = narrow.weights[spec.name]
        assert part.shape == spec.shape
        assert part.flags.c_contiguous
        corner = tuple(slice(0, length) for length in spec.shape)
        np.testing.assert_array_equal(part, full.weights[spec.name][corner])
    (weight,) = [n for n in schedule.last_layer(0) if n.endswith("weight")]
    assert (full.weights[weight].shape, narrow.weights[weight].shape) == ((3, 64), (3, 16))


def test_the_widest_form_that_fits_is_prepared(schedule: Schedule) -> None:
    totals = {}
    for budget in (10**9, schedule.plan(0, ENGINE).total - 1):
        prepared = schedule.prepare_within(0, ENGINE, budget)
        assert prepared is not None
        totals[prepared.width] = prepared.manifest.planned.total
    smallest = schedule.smallest(0, ENGINE).manifest.planned.total
    totals[0.25] = smallest
    assert list(totals) == [1.0, 0.5, 0.25]
    assert totals[1.0] == schedule.plan(0, ENGINE).total > totals[0.5] > smallest
    for width, total in totals.items():
        exact = schedule.prepare_within(0, ENGINE, total)
        assert exact is not None
        assert exact.width == width
    between = schedule.prepare_within(0, ENGINE, totals[0.5] - 1)
    assert between is not None
    assert between.width == 0.25
    assert schedule.prepare_within(0, ENGINE, smallest - 1) is None


def test_it_is_the_full_width_that_is_kept(schedule: Schedule) -> None:
    weights = {n: np.full_like(w, 0.25) for n, w in schedule.prepare(0, ENGINE).weights.items()}
    schedule.freeze(0, weights)
    assert len(schedule) == 1
    model = schedule.trained_model()
    assert model(schedule.example(2)).shape == (2, 3)
    assert all(bool((p == 0.25).all()) for p in model.parameters())


class Inverted(nn.Sequential):
    """A model whose option makes tensors longer as it falls."""

    def __init__(self, width: int) -> None:
        channels = 16 - width
        super().__init__(nn.Conv2d(1, channels, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * channels, 3))


class Deeper(nn.Sequential):
    """A model whose option adds layers as it falls."""

    def __init__(self, width: int) -> None:
        layers = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(16 - width))
        super().__init__(nn.Conv2d(1, 2, 3), *layers, nn.Flatten(), nn.Linear(72, 3))


@pytest.mark.parametrize("name", ["Inverted", "Deeper"])
def test_a_model_whose_option_does_not_scale_is_refused(tmp_path: Path, name: str) -> None:
    factory = f"{__name__}:{name}"
    with pytest.raises(UsageError, match=r"at width 0.75 tensor .* is no part of the full model's") as caught:
        build(tmp_path, name=factory, options={"width": 12}, widths=[1.0, 0.75])
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"blocks": 2}, "needs blocks = 1"),
        ({"widths": [0.5, 0.25]}, "1.0 among the widths"),
        ({"options": {"norm": "group"}}, "give model 'resnet10' its full width"),
        ({"options": {"width": 2}, "widths": [1.0, 0.125]}, "0.125 of width 2 leaves no channel"),
    ],
)
def test_widths_that_cannot_be_are_refused(tmp_path: Path, model: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        build(tmp_path, **model)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()
