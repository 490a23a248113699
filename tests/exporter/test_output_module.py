from __future__ import annotations

import pytest
import torch
from torch import nn

from frostline.exporter.cutting import CutModel, cut
from frostline.exporter.models.lookup import BUILTIN_NAMES, build_model
from frostline.exporter.output_module import build_output_module
from frostline.protocol.errors import UsageError


def _cut(name: str, size: int) -> CutModel:
    spec = build_model(name, {"width": 4, "input_size": size})
    assert spec.default_blocks is not None
    return cut(spec.module, spec.default_blocks, torch.zeros(2, 3, size, size))


@pytest.mark.parametrize("size", [8, 28, 32, 36])
@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_every_stage_ends_in_logits(name: str, size: int) -> None:
    parts = _cut(name, size)
    for stage, block in enumerate(parts.blocks):
        module = build_output_module(parts, stage, seed=0)
        features = torch.zeros(3, *block.output_shape)
        for later in range(stage + 1, len(parts.blocks)):
            features = module.get_submodule(f"stand_in_{later}")(features)
            assert features.shape[1:] == parts.blocks[later].output_shape
        assert module(torch.zeros(3, *block.output_shape)).shape == (3, 10)


def test_names_and_layers() -> None:
    parts = _cut("resnet10", 32)
    module = build_output_module(parts, 1, seed=0)
    assert list(module.state_dict()) == [
        "stand_in_2.weight",
        "stand_in_3.weight",
        "head.fc.weight",
        "head.fc.bias",
    ]
    layer = module.get_submodule("stand_in_2")
    assert isinstance(layer, nn.Conv2d)
    assert (layer.stride, layer.padding, layer.kernel_size) == ((2, 2), (1, 1), (3, 3))
    assert list(build_output_module(parts, 3, seed=0).state_dict()) == ["head.fc.weight", "head.fc.bias"]


def test_head_is_a_copy() -> None:
    parts = _cut("small_cnn", 8)
    module = build_output_module(parts, 2, seed=0)
    ours, theirs = module.state_dict()["head.fc.weight"], parts.head.state_dict()["fc.weight"]
    assert torch.equal(ours, theirs)
    assert ours.data_ptr() != theirs.data_ptr()


def test_weights_depend_on_the_seed_only() -> None:
    parts = _cut("small_cnn", 8)
    before = torch.get_rng_state()
    first = build_output_module(parts, 0, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    later = build_output_module(parts, 1, seed=1).state_dict()
    other = build_output_module(parts, 1, seed=2).state_dict()
    assert torch.equal(first["stand_in_2.weight"], later["stand_in_2.weight"])
    assert not torch.equal(later["stand_in_2.weight"], other["stand_in_2.weight"])


def test_one_dimensional_features_and_dtype() -> None:
    module = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1),
        nn.Conv1d(4, 6, 3, stride=4, padding=1),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    ).double()
    parts = cut(module, ["0", "1"], torch.zeros(2, 2, 16).double())
    output_module = build_output_module(parts, 0, seed=0)
    layer = output_module.get_submodule("stand_in_1")
    assert isinstance(layer, nn.Conv1d)
    assert layer.stride == (4,)
    assert output_module(torch.zeros(5, 4, 16).double()).shape == (5, 3)


def test_axes_are_strided_apart() -> None:
    module = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 3, (1, 2), 1), nn.Flatten(), nn.Linear(3 * 4 * 4, 2)
    )
    parts = cut(module, ["0", "1"], torch.zeros(2, 1, 4, 8))
    layer = build_output_module(parts, 0, seed=0).get_submodule("stand_in_1")
    assert isinstance(layer, nn.Conv2d)
    assert layer.stride == (1, 2)


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (nn.ConvTranspose2d(2, 2, 2, 2), ["'1'", "[2, 4, 4]", "[2, 8, 8]", "no stride"]),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(32, 4)),
            ["'1'", "[2, 4, 4]", "[4]", "(channels, height, width)"],
        ),
    ],
)
def test_features_that_cannot_be_imitated(second: nn.Module, expected: list[str]) -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 1), second)
    parts = cut(module, ["0", "1"], torch.zeros(2, 1, 4, 4))
    with pytest.raises(UsageError) as caught:
        build_output_module(parts, 0, seed=0)
    assert all(part in str(caught.value) for part in expected)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", [-1, 3])
def test_stage_that_does_not_exist(stage: int) -> None:
    with pytest.raises(UsageError, match="stages 0 to 2"):
        build_output_module(_cut("small_cnn", 8), stage, seed=0)
