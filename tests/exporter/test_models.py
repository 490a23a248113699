from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from frostline.exporter.models.lookup import BUILTIN_NAMES, build_model
from frostline.protocol.errors import UsageError


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module in the current directory; each test gets a name that no other test has imported."""
    name = f"model_{tmp_path.name}".replace("-", "_")
    source = """
from torch import nn

limit = 3

def linear(width=4, classes=2):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.Linear(width, classes))

def plain():
    return nn.Linear(3, 7)

def required(width):
    return nn.Linear(3, width)

def anything(**options):
    return nn.Linear(3, options["width"])

def text():
    return "model"

def failing(width=4):
    raise TypeError("width must be even")
"""
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def _message(name: str, options: dict[str, object], **given: object) -> str:
    with pytest.raises(UsageError) as caught:
        build_model(name, options, **given)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_builtin_returns_logits(name: str, size: int, norm: str) -> None:
    options = {"width": 4, "channels": 1, "input_size": size, "norm": norm, "classes": 5}
    spec = build_model(name, options)
    assert spec.input_shape == (1, size, size)
    assert spec.classes == 5
    assert spec.default_blocks is not None
    assert spec.module(torch.zeros(3, *spec.input_shape)).shape == (3, 5)
    assert all(dict(spec.module.named_children())[block] for block in spec.default_blocks)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_vgg_skips_pooling_below_one_pixel(size: int) -> None:
    spec = build_model("vgg11", {"width": 4, "input_size": size})
    assert spec.module(torch.zeros(2, 3, size, size)).shape == (2, 10)


def test_resnet_plan() -> None:
    module = build_model("resnet18", {}).module
    assert sum(each.numel() for each in module.parameters()) == 11_173_962
    state = module.state_dict()
    assert state["layer1.0.conv1.weight"].shape == (64, 64, 3, 3)
    assert state["layer4.1.conv2.weight"].shape == (512, 512, 3, 3)
    assert not any(isinstance(each, nn.MaxPool2d) for each in module.modules())


def test_vgg16_has_thirteen_convolutions() -> None:
    module = build_model("vgg16", {"width": 4}).module
    assert sum(isinstance(each, nn.Conv2d) for each in module.modules()) == 13


def test_group_count_divides_channels() -> None:
    module = build_model("resnet10", {"width": 12}).module
    groups = {
        each.num_channels: each.num_groups for each in module.modules() if isinstance(each, nn.GroupNorm)
    }
    assert groups == {12: 4, 24: 8, 48: 8, 96: 8}


def test_no_activation_is_in_place() -> None:
    for name in BUILTIN_NAMES:
        module = build_model(name, {"width": 4}).module
        assert not any(getattr(each, "inplace", False) for each in module.modules())


def test_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model("small_cnn", {"width": 4}, seed=3).module.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = build_model("small_cnn", {"width": 4}, seed=3).module.state_dict()
    other = build_model("small_cnn", {"width": 4}, seed=4).module.state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_the_data_sets_the_options() -> None:
    spec = build_model("small_cnn", {"width": 4}, input_shape=(1, 8, 8), classes=3)
    assert spec.input_shape == (1, 8, 8)
    assert spec.classes == 3
    assert spec.module(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "options", "given", "expected"),
    [
        ("resnet81", {}, {}, ["'resnet81'", "did you mean 'resnet18'", "vgg16"]),
        ("resnet18", {"widht": 4}, {}, ["'widht'", "did you mean 'width'", "input_size"]),
        ("resnet18", {"norm": "layer", "width": 4}, {}, ["'norm'", "'layer'", "group, batch"]),
        ("resnet18", {"width": "16"}, {}, ["'width'", "'16'", "whole number"]),
        ("vgg11", {"input_size": 0}, {}, ["'input_size'", "0"]),
        ("vgg11", {"channels": 3}, {"input_shape": (1, 8, 8)}, ["'channels'", "3", "1"]),
        ("vgg11", {}, {"input_shape": (8, 4)}, ["[8, 4]", "[channels, size, size]"]),
        ("vgg11", {"classes": 9}, {"classes": 8}, ["'classes'", "9", "8"]),
    ],
)
def test_wrong_builtin(
    name: str, options: dict[str, object], given: dict[str, object], expected: list[str]
) -> None:
    message = _message(name, options, **given)
    assert all(part in message for part in expected), message


def test_user_factory(user_module: str) -> None:
    spec = build_model(f"{user_module}:linear", {"width": 6}, input_shape=(3, 2, 2), classes=5)
    assert spec.module(torch.zeros(2, 3, 2, 2)).shape == (2, 5)
    assert (spec.input_shape, spec.classes, spec.default_blocks) == ((3, 2, 2), 5, None)


def test_user_factory_without_a_classes_option(user_module: str) -> None:
    assert build_model(f"{user_module}:plain", {}, input_shape=(3,), classes=7).classes == 7
    assert build_model(f"{user_module}:anything", {"width": 2}, input_shape=(3,), classes=2).classes == 2


@pytest.mark.parametrize(
    ("attribute", "options", "given", "expected"),
    [
        ("linaer", {}, {"input_shape": (3,)}, ["'linaer'", "did you mean 'linear'"]),
        ("limit", {}, {"input_shape": (3,)}, ["'limit' is int", "nn.Module"]),
        ("linear", {}, {"classes": 2}, ["input shape"]),
        ("plain", {}, {"input_shape": (3,)}, ["number of classes"]),
        ("linear", {"depth": 1}, {"input_shape": (3,), "classes": 2}, ["'depth'", "width, classes"]),
        ("required", {}, {"input_shape": (3,), "classes": 2}, ["needs the option 'width'"]),
        ("text", {}, {"input_shape": (3,), "classes": 2}, ["returned str", "nn.Module"]),
        ("failing", {"width": 3}, {"input_shape": (3,), "classes": 2}, ["width=3", "width must be even"]),
        ("", {}, {"input_shape": (3,), "classes": 2}, ["package.module:factory"]),
    ],
)
def test_wrong_user_factory(
    user_module: str,
    attribute: str,
    options: dict[str, object],
    given: dict[str, object],
    expected: list[str],
) -> None:
    message = _message(f"{user_module}:{attribute}", options, **given)
    assert all(part in message for part in expected), message


def test_user_module_that_cannot_be_imported(user_module: str, tmp_path: Path) -> None:
    assert "'missing_module'" in _message("missing_module:build", {}, input_shape=(3,), classes=2)
    (tmp_path / f"{user_module}_broken.py").write_text("1 / 0")
    message = _message(f"{user_module}_broken:build", {}, input_shape=(3,), classes=2)
    assert "ZeroDivisionError: division by zero" in message
