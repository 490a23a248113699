from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from frostline.exporter.models.lookup import BUILTIN_NAMES, build_model
from frostline.exporter.models.transformer import TransformerLayer
from frostline.protocol.errors import UsageError
from tests.exporter.small_models import IMAGE_CNNS, small_model


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

def embedding(vocabulary=4, classes=2):
    return nn.Sequential(nn.Embedding(vocabulary, 4), nn.Flatten(), nn.Linear(12, classes))

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
@pytest.mark.parametrize("name", IMAGE_CNNS)
def test_images_to_logits(name: str, size: int, norm: str) -> None:
    spec = small_model(name, channels=1, input_size=size, norm=norm, classes=5)
    assert spec.input_shape == (1, size, size)
    assert spec.module(torch.zeros(3, 1, size, size)).shape == (3, 5)
    kind = nn.GroupNorm if norm == "group" else nn.BatchNorm2d
    assert any(isinstance(each, kind) for each in spec.module.modules())


@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_every_builtin_takes_its_example(name: str) -> None:
    spec = small_model(name, classes=5)
    assert spec.classes == 5
    example = spec.example(3)
    assert example.dtype == (torch.float32 if spec.vocabulary is None else torch.int64)
    assert spec.module(example).shape == (3, 5)
    assert spec.module(example).dtype == torch.float32
    assert spec.default_blocks is not None
    assert all(dict(spec.module.named_children())[block] for block in spec.default_blocks)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "vocabulary"),
    [
        ("mobilenet_v2", (3, 32, 32), 10, None),
        ("vit", (3, 32, 32), 10, None),
        ("sensor_cnn", (9, 128), 6, None),
        ("text_transformer", (64,), 4, 256),
    ],
)
def test_default_inputs(name: str, shape: tuple[int, ...], classes: int, vocabulary: int | None) -> None:
    spec = build_model(name, {})
    assert (spec.input_shape, spec.classes, spec.vocabulary) == (shape, classes, vocabulary)


def test_mobilenet_plan() -> None:
    module = build_model("mobilenet_v2", {"norm": "batch", "classes": 1000}).module
    # torchvision's mobilenet_v2 has as many.
    assert sum(each.numel() for each in module.parameters()) == 3_504_872
    depthwise = [each for each in module.modules() if isinstance(each, nn.Conv2d) and each.groups > 1]
    assert len(depthwise) == 17
    assert all(each.groups == each.in_channels == each.out_channels for each in depthwise)
    halved = build_model("mobilenet_v2", {"width": 0.5}).module.state_dict()
    assert halved["block5.3.project.weight"].shape[0] == 160
    assert halved["last.0.weight"].shape[0] == 1280


def test_one_block_a_transformer_layer() -> None:
    spec = build_model("vit", {"width": 8, "depth": 2, "heads": 1})
    assert spec.default_blocks == ("layer1", "layer2")
    assert spec.module.state_dict()["position"].shape == (1, 64, 8)


def test_attention_is_pytorchs() -> None:
    torch.manual_seed(0)
    ours = TransformerLayer(8, 2).eval()
    theirs = nn.TransformerEncoderLayer(8, 2, 32, 0.0, F.gelu, batch_first=True, norm_first=True).eval()
    names = {
        "self_attn.in_proj_": "attention.query_key_value.",
        "self_attn.out_proj.": "attention.output.",
        "linear1.": "perceptron.0.",
        "linear2.": "perceptron.2.",
    }
    state = ours.state_dict()
    for name, value in theirs.state_dict().items():
        prefix = next((each for each in names if name.startswith(each)), "")
        value.copy_(state[names.get(prefix, "") + name.removeprefix(prefix)])
    tokens = torch.randn(3, 5, 8)
    torch.testing.assert_close(ours(tokens), theirs(tokens))


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
        module = small_model(name).module
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
        ("vgg11", {}, {"input_shape": (8, 4)}, ["[8, 4]", "[channels, input_size, input_size]"]),
        ("vgg11", {}, {"input_shape": (1, 8, 4)}, ["square images", "[1, 8, 4]"]),
        ("vit", {}, {"input_shape": (3, 32, 32, 1)}, ["square images", "[3, 32, 32, 1]"]),
        ("vit", {"patch": 5}, {}, ["'patch' is 5", "32 pixels"]),
        ("vit", {"heads": 3}, {}, ["'heads' is 3", "128"]),
        ("vit", {"depth": 0}, {}, ["'depth'", "0"]),
        ("vit", {}, {"vocabulary": 9}, ["square images", "no vocabulary"]),
        ("mobilenet_v2", {"width": 0}, {}, ["'width' is 0", "above 0"]),
        ("mobilenet_v2", {"width": "half"}, {}, ["'width' is 'half'"]),
        ("mobilenet_v2", {"norm": "layer"}, {}, ["'norm'", "'layer'"]),
        ("sensor_cnn", {}, {"input_shape": (3, 8, 8)}, ["takes series", "[3, 8, 8]", "[channels, length]"]),
        ("sensor_cnn", {"norm": "layer"}, {}, ["'norm'", "'layer'"]),
        ("text_transformer", {}, {"input_shape": (1, 8)}, ["takes token ids", "[1, 8]", "[length]"]),
        ("text_transformer", {}, {"input_shape": ()}, ["takes token ids", "[]"]),
        ("text_transformer", {"vocabulary": 0}, {}, ["'vocabulary'", "0"]),
        ("text_transformer", {"vocabulary": 9}, {"vocabulary": 8}, ["'vocabulary'", "9", "8"]),
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


def test_user_factory_of_token_ids(user_module: str) -> None:
    given = {"input_shape": (3,), "classes": 2}
    by_option = build_model(f"{user_module}:embedding", {"vocabulary": 5}, **given)  # type: ignore[arg-type]
    by_argument = build_model(f"{user_module}:embedding", {}, vocabulary=6, **given)  # type: ignore[arg-type]
    assert (by_option.vocabulary, by_argument.vocabulary) == (5, 6)
    assert by_argument.module.state_dict()["0.weight"].shape[0] == 6
    assert by_argument.module(by_argument.example(4)).shape == (4, 2)
    without_option = build_model(f"{user_module}:plain", {}, vocabulary=7, **given)  # type: ignore[arg-type]
    assert without_option.vocabulary == 7
    assert without_option.example(2).dtype == torch.int64


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
        ("embedding", {"vocabulary": "a"}, {"input_shape": (3,), "classes": 2}, ["vocabulary of 'a'"]),
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
