from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from frostline.exporter.cutting import CutModel, cut
from frostline.exporter.models.lookup import BUILTIN_NAMES, ModelSpec, build_model
from frostline.protocol.errors import UsageError
from tests.exporter.padded_tokens import PaddedTokens
from tests.exporter.small_models import IMAGE_CNNS, small_model


def _chain(parts: CutModel, value: torch.Tensor) -> torch.Tensor:
    for block in parts.blocks:
        assert value.shape[1:] == block.input_shape
        value = block.module(value)
        assert value.shape[1:] == block.output_shape
    output: torch.Tensor = parts.head(value)
    return output


def _modules(parts: CutModel) -> list[nn.Module]:
    return [*(block.module for block in parts.blocks), parts.head]


def _assert_faithful(module: nn.Module, parts: CutModel, example: torch.Tensor) -> None:
    keys = [key for part in _modules(parts) for key in part.state_dict()]
    assert sorted(keys) == sorted(module.state_dict())
    assert all(any(each.requires_grad for each in block.module.parameters()) for block in parts.blocks)
    for batch in (example, torch.cat([example, example, example])):
        for part in (module, *_modules(parts)):
            part.eval()
        # In evaluation PyTorch's transformer layers round differently in their fused form.
        torch.testing.assert_close(_chain(parts, batch), module(batch), rtol=1e-5, atol=1e-6)
        for part in (module, *_modules(parts)):
            part.train()
        expected = copy.deepcopy(module)(batch)
        torch.testing.assert_close(_chain(copy.deepcopy(parts), batch), expected, rtol=1e-5, atol=1e-6)


def _message(module: nn.Module, blocks: object, example: torch.Tensor) -> str:
    with pytest.raises(UsageError) as caught:
        cut(module, blocks, example)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


HEADS = {"mobilenet_v2": {"last", "fc"}, "vit": {"norm", "fc"}, "text_transformer": {"norm", "fc"}}


def _specs() -> list[ModelSpec]:
    with_batch_norm = [small_model(name, norm="batch") for name in (*IMAGE_CNNS, "sensor_cnn")]
    return [*(small_model(name) for name in BUILTIN_NAMES), *with_batch_norm]


def _inputs(spec: ModelSpec) -> torch.Tensor:
    example = spec.example(2)
    values = torch.linspace(-1, 1, example.numel()).reshape(example.shape)
    return values if spec.vocabulary is None else ((values + 1) * (spec.vocabulary - 1) / 2).long()


@pytest.mark.parametrize("spec", _specs(), ids=lambda spec: spec.name)
def test_builtin_cut_by_names(spec: ModelSpec) -> None:
    assert spec.default_blocks is not None
    parts = cut(spec.module, spec.default_blocks, _inputs(spec), spec.vocabulary)
    assert tuple(block.name for block in parts.blocks) == spec.default_blocks
    assert {name.split(".")[0] for name in parts.head.state_dict()} == HEADS.get(spec.name, {"fc"})
    assert [block.vocabulary for block in parts.blocks] == [
        spec.vocabulary,
        *[None] * (len(parts.blocks) - 1),
    ]
    _assert_faithful(spec.module, parts, _inputs(spec))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("spec", _specs(), ids=lambda spec: spec.name)
def test_builtin_cut_by_number(spec: ModelSpec, count: int) -> None:
    parts = cut(spec.module, count, _inputs(spec), spec.vocabulary)
    assert len(parts.blocks) == count
    transformer = spec.name in ("vit", "text_transformer")
    assert {name.split(".")[0] for name in parts.head.state_dict()} == (
        {"norm", "fc"} if transformer else {"fc"}
    )
    assert parts.blocks[-1].name != "norm"
    _assert_faithful(spec.module, parts, _inputs(spec))


def test_names_may_be_nested() -> None:
    spec = build_model("resnet18", {"width": 4})
    parts = cut(spec.module, ["layer1.0", "layer1.1", "layer3", "layer4.0"], IMAGES)
    assert "layer1.0.conv1.weight" in parts.blocks[0].module.state_dict()
    assert "conv1.weight" in parts.blocks[0].module.state_dict()
    assert {key.split(".")[0] for key in parts.head.state_dict()} == {"layer4", "fc"}
    _assert_faithful(spec.module, parts, IMAGES)


def test_numbered_blocks_end_with_an_activation_and_take_a_childs_name() -> None:
    spec = build_model("resnet18", {"width": 4})
    parts = cut(spec.module, 4, IMAGES)
    assert parts.blocks[-1].name == "layer4"
    names = dict(spec.module.named_modules())
    assert all(block.name in names for block in parts.blocks)
    assert all(float(_output(parts, index).detach().min()) >= 0 for index in range(4))


def _output(parts: CutModel, index: int) -> torch.Tensor:
    value = IMAGES
    for block in parts.blocks[: index + 1]:
        value = block.module(value)
    return value


def test_numbered_cut_minimises_the_largest_block() -> None:
    module = nn.Sequential(
        *(nn.Conv2d(channels, channels, 1, bias=False) for channels in (8, 8, 8, 8, 8, 8)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    parts = cut(module, 3, torch.zeros(2, 8, 4, 4))
    assert [len(block.module.state_dict()) for block in parts.blocks] == [2, 2, 2]
    assert list(parts.head.state_dict()) == ["8.weight", "8.bias"]


def test_parts_work_functionally_and_share_nothing_when_copied() -> None:
    spec = build_model("small_cnn", {"width": 4})
    parts = cut(spec.module, ["block1", "block2"], IMAGES)
    part = parts.blocks[0].module
    zeros = {name: torch.zeros_like(value) for name, value in part.named_parameters()}
    assert torch.count_nonzero(torch.func.functional_call(part, zeros, (IMAGES,))) == 0
    assert next(part.parameters()) is next(spec.module.parameters())
    assert next(copy.deepcopy(part).parameters()) is not next(spec.module.parameters())


def test_cutting_leaves_the_model_as_it_was() -> None:
    module = build_model("resnet10", {"width": 4, "norm": "batch"}).module
    module.layer1.eval()
    modes = [child.training for child in module.modules()]
    before = copy.deepcopy(module.state_dict())
    attributes = set(vars(module))
    cut(module, 3, IMAGES)
    assert [child.training for child in module.modules()] == modes
    assert set(vars(module)) == attributes
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


class Functional(nn.Module):
    """Functions, skip connections, direct parameters, constants, buffers and sizes read before the cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4, 1, 1), 1.5))
        self.register_buffer("mean", torch.full((3, 1, 1), 0.1))
        self.register_buffer("mask", torch.ones(4, 1, 1), persistent=False)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout(0.0)
        self.last = nn.Linear(4 * 64, 5)

    def forward(
        self,
        images: torch.Tensor,
        gain: float = 2.0,
        extra: torch.Tensor | None = None,
        size: tuple[int, int] = (8, 8),
    ) -> torch.Tensor:
        shape = images.shape
        batch, height = shape[0], images.size(2)
        value = F.relu(self.first(images - self.mean)) * self.mask
        value = value + torch.relu(self.second(value)) * torch.arange(4.0).reshape(4, 1, 1)
        if extra is not None:
            value = value + extra
        value = self.drop(value * self.scale * gain)
        value = value + self.third(value).view(batch, 4, height, shape[3]) * self.mask
        return self.last(value.reshape(batch, 4 * height * height))  # type: ignore[no-any-return]


@pytest.mark.parametrize("blocks", [1, 2, 3, ["drop"], ["first", "drop"]])
def test_functional_model(blocks: int | list[str]) -> None:
    module = Functional()
    parts = cut(module, blocks, IMAGES)
    _assert_faithful(module, parts, IMAGES)
    assert not [name for name in vars(module) if name.startswith("_tensor_constant")]
    copied = copy.deepcopy(copy.deepcopy(parts))
    assert all(
        list(one.state_dict()) == list(two.state_dict())
        for one, two in zip(_modules(parts), _modules(copied), strict=True)
    )


def test_sequences_of_vectors_can_be_cut_by_number() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 4, 4)
            self.one = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.two = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = self.embed(images).flatten(2).transpose(1, 2)
            return self.head(self.two(self.one(tokens)).mean(1))  # type: ignore[no-any-return]

    module = Attending().train()
    parts = cut(module, 2, IMAGES)
    assert parts.blocks[-1].name == "two"
    assert parts.blocks[-1].output_shape == (4, 8)
    assert torch.equal(_chain(parts, IMAGES), module(IMAGES))


class SqueezeExcitation(nn.Module):
    """Scales its channels by what it makes of their means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(channels, 2, 1)
        self.excite = nn.Conv2d(2, channels, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.convolution(images)
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(self.pool(features)))))
        scaled: torch.Tensor = images + features * scale
        return scaled


class Separable(nn.Sequential):
    """A depthwise and a pointwise convolution."""

    def __init__(self, channels: int) -> None:
        depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        super().__init__(depthwise, nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 1), nn.ReLU6())


class Attention(nn.Module):
    """Single-head attention written out, with the scores as a tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layer = nn.Linear(width, 3 * width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query, key, value = self.layer(self.norm(tokens)).chunk(3, dim=-1)
        attended: torch.Tensor = tokens + query.matmul(key.transpose(1, 2)).softmax(-1).matmul(value)
        return attended


class MeanOverTokens(nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.mean(1, keepdim=True)


POOLED = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
OF_EACH_KIND = {
    "squeeze and excitation": (nn.Conv2d(3, 4, 1), *(SqueezeExcitation(4) for _ in range(3)), *POOLED),
    "depthwise": (nn.Conv2d(3, 4, 1), *(Separable(4) for _ in range(3)), *POOLED),
    "attention": (
        *(nn.Flatten(2), nn.Linear(64, 4)),
        *(Attention(4) for _ in range(3)),
        *(MeanOverTokens(), nn.Flatten(), nn.Linear(4, 2)),
    ),
    "PyTorch's attention": (
        *(nn.Flatten(2), nn.Linear(64, 4)),
        *(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True) for _ in range(3)),
        *(MeanOverTokens(), nn.Flatten(), nn.Linear(4, 2)),
    ),
    "one dimension": (
        *(nn.Flatten(2), nn.Conv1d(3, 4, 3), nn.ReLU(), nn.MaxPool1d(2)),
        *(nn.Conv1d(4, 4, 3, groups=2), nn.BatchNorm1d(4), nn.ReLU(), nn.AvgPool1d(2)),
        *(nn.Conv1d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2)),
    ),
}


@pytest.mark.parametrize("kind", OF_EACH_KIND)
def test_layers_of_each_kind_are_cut_by_number(kind: str) -> None:
    module = copy.deepcopy(nn.Sequential(*OF_EACH_KIND[kind]))
    for count in (1, 2, 3):
        parts = cut(module, count, IMAGES)
        assert len(parts.blocks) == count
        assert {name.rpartition(".")[0] for name in parts.head.state_dict()} == {str(len(module) - 1)}
        _assert_faithful(module, parts, IMAGES)


def test_a_pooling_of_one_channel_is_not_the_classifiers() -> None:
    module = nn.Sequential(
        *(nn.AvgPool1d(2), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3)),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2)),
    )
    parts = cut(module, 2, torch.zeros(2, 1, 16))
    assert [block.output_shape for block in parts.blocks] == [(4, 6), (4, 4)]


def test_cost_counts_what_methods_return_but_no_views() -> None:
    class Viewing(nn.Linear):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            for _ in range(20):
                tokens = torch.transpose(torch.transpose(tokens, 1, 2), 1, 2)
            return super().forward(tokens)

    class Mean(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens.mean(1)

    def ends(first: nn.Module) -> list[str]:
        module = nn.Sequential(first, *(nn.Linear(4, 4) for _ in range(9)), Mean())
        return [block.name for block in cut(module, 2, torch.zeros(2, 40, 4)).blocks]

    # The scores of 40 tokens take more than nine layers of four features; the views take nothing.
    assert ends(Attention(4)) == ["0", "9"]
    assert ends(Viewing(4, 4)) == ends(nn.Linear(4, 4)) == ["4", "9"]


def _named(children: dict[str, nn.Module]) -> nn.Sequential:
    module = nn.Sequential()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def _plain() -> nn.Sequential:
    return _named(
        {
            "one": nn.Conv2d(3, 4, 1),
            "act": nn.ReLU(),
            "two": nn.Conv2d(4, 4, 1),
            "pool": nn.AdaptiveAvgPool2d(1),
            "flat": nn.Flatten(),
            "fc": nn.Linear(4, 2),
        }
    )


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (["onee"], ["'onee'", "one"]),
        (["two", "one"], ["'one' runs before block 'two'", "one, two"]),
        (["one", "one"], ["'one'", "twice"]),
        (["one", "act"], ["'act'", "no parameter to train"]),
        ([], ["name at least one"]),
        ("one", ["list of names"]),
        (0, ["at least 1"]),
        (3, ["3 blocks", "2 is the most"]),
    ],
)
def test_wrong_request(blocks: object, expected: list[str]) -> None:
    message = _message(_plain(), blocks, IMAGES)
    assert all(part in message for part in expected), message


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Conv2d(3, 4, 1)
        self.main = nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = self.side(images)
        value = self.last(self.main(images) + side)
        return self.fc(value.mean((2, 3)))  # type: ignore[no-any-return]


def test_a_boundary_may_hand_on_several_values() -> None:
    module = Branching()
    parts = cut(module, ["main", "last"], IMAGES)
    first, second = parts.blocks
    assert [(value.name, value.shape) for value in first.outputs] == [
        ("side.conv2d", (4, 8, 8)),
        ("main.conv2d", (4, 8, 8)),
    ]
    assert first.output_shape == second.input_shape == (2 * 4 * 8 * 8,)
    _assert_faithful(module, parts, IMAGES)


def test_a_padding_mask_crosses_every_boundary() -> None:
    module = PaddedTokens()
    ids = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    parts = cut(module, ["encoder.layers.0", "encoder.layers.1", "encoder.layers.2"], ids, 11)
    assert any(value.dtype == torch.bool or value.shape == (5,) for value in parts.blocks[0].outputs)
    assert len(parts.blocks[2].outputs) == 1
    _assert_faithful(module, parts, ids)
    names = [block.name for block in cut(module, 3, ids, 11).blocks]
    assert names == ["encoder.layers.0", "encoder.layers.1", "encoder"]


def test_values_without_the_batch_in_front_are_handed_on_sample_by_sample() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3, 8)
            self.one = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
            self.two = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
            self.fc = nn.Linear(8, 3)

        def forward(self, windows: torch.Tensor) -> torch.Tensor:
            value = self.embed(windows).transpose(0, 1)
            return self.fc(self.two(self.one(value)).mean(0))  # type: ignore[no-any-return]

    module, windows = TimeFirst(), torch.randn(2, 6, 3)
    parts = cut(module, ["one", "two"], windows)
    assert parts.blocks[0].outputs[0].batch_axis == 1
    _assert_faithful(module, parts, windows)


def test_frozen_block_has_nothing_to_train() -> None:
    module = _plain()
    module.get_submodule("one").requires_grad_(False)
    assert "block 'one' has no parameter to train" in _message(module, ["one", "two"], IMAGES)


def test_tied_weights() -> None:
    module = _plain()
    module.add_module("one", nn.Conv2d(3, 3, 1))
    module.add_module("two", nn.Conv2d(3, 3, 1))
    module.add_module("fc", nn.Linear(3, 2))
    module.two.weight = module.one.weight  # type: ignore[assignment, union-attr]
    message = _message(module, ["one", "two"], IMAGES)
    assert "'one.weight' (also named 'two.weight') is used by block 'one' and by block 'two'" in message
    parts = cut(module, ["two"], IMAGES)
    _assert_faithful(module, parts, IMAGES)


def test_module_called_in_two_blocks() -> None:
    class Twice(Branching):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            value = self.side(images)
            value = self.last(value)
            value = self.last(value) + 1
            return self.fc(value.mean((2, 3)))  # type: ignore[no-any-return]

    module = Twice()
    del module.main
    assert "called 2 times" in _message(module, ["side", "last"], IMAGES)
    parts = cut(module, 2, IMAGES)
    assert [block.name for block in parts.blocks] == ["side", "last@1+add"]
    again = cut(module, ["side", "last@1+add"], IMAGES)
    assert again.blocks[1].output_shape == parts.blocks[1].output_shape


def test_a_tensor_that_is_never_used_stays_with_the_model() -> None:
    class Spare(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(2, 2)

    parts = cut(Spare(), ["last"], IMAGES)
    assert not any("spare" in name for part in _modules(parts) for name in part.state_dict())
    assert "'spare' of model Spare is never called" in _message(Spare(), ["spare"], IMAGES)


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[2] > images.shape[3]:
            return self.layer(images)  # type: ignore[no-any-return]
        return images + self.layer(images)  # type: ignore[no-any-return]


def test_control_flow_on_shapes_is_followed() -> None:
    module = _named(
        {
            "inner": nn.Sequential(Deciding()),
            "two": nn.Conv2d(3, 3, 1),
            "pool": nn.AdaptiveAvgPool2d(1),
            "flat": nn.Flatten(),
            "fc": nn.Linear(3, 2),
        }
    )
    parts = cut(module, 2, IMAGES)
    assert set(parts.blocks[0].module.state_dict()) == {"inner.0.layer.weight", "inner.0.layer.bias"}
    _assert_faithful(module, parts, IMAGES)


class DropPath(nn.Module):
    """Leaves out whole samples, as timm writes it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(0.8)
        return x * kept / 0.8


def test_a_model_may_ask_for_its_mode() -> None:
    class Dropping(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.drop = DropPath()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            side = F.dropout(self.side(images), 0.5, self.training)
            value = side + self.drop(self.main(images))
            return self.fc((value + self.drop(self.last(value))).mean((2, 3)))  # type: ignore[no-any-return]

    parts = cut(Dropping(), ["main+add", "last+add"], IMAGES)
    assert [block.output_shape for block in parts.blocks] == [(4, 8, 8), (4, 8, 8)]
    assert [block.name for block in cut(Dropping(), 2, IMAGES).blocks] == ["main+add", "last+add"]


def test_what_the_author_keeps_in_evaluation_stays_there() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.two, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.fc(self.two(F.relu(self.norm(self.one(images)))).mean((2, 3)))  # type: ignore[no-any-return]

    module = Frozen()
    part = cut(module, ["norm", "two"], IMAGES).blocks[0].module.train()
    before = module.norm.running_mean.clone()  # type: ignore[operator, union-attr]
    part(IMAGES)
    assert torch.equal(module.norm.running_mean, before)  # type: ignore[arg-type]
    left = _plain()
    left.add_module("act", nn.BatchNorm2d(4).eval())
    assert not cut(left, ["act", "two"], IMAGES).blocks[0].module.span.written


def test_a_backbone_without_gradients_is_not_trained() -> None:
    class Tuned(Branching):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                value = self.main(images)
            return self.fc(self.last(value).mean((2, 3)))  # type: ignore[no-any-return]

    assert "block 'main' has no parameter to train" in _message(Tuned(), ["main", "last"], IMAGES)
    parts = cut(Tuned(), ["last"], IMAGES)
    value = parts.blocks[0].module(IMAGES)
    value.sum().backward()
    assert parts.blocks[0].module.get_parameter("main.weight").grad is None
    assert parts.blocks[0].module.get_parameter("last.weight").grad is not None


def test_what_the_export_cannot_see_is_refused_by_name() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(context: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(context: object, grad: torch.Tensor) -> torch.Tensor:
            return grad * 2

    class Custom(Branching):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            value = Doubled.apply(self.side(images))
            return self.fc(self.last(value).mean((2, 3)))  # type: ignore[no-any-return]

    message = _message(Custom(), ["last"], IMAGES)
    assert "the gradient of 'side.bias' is another one in its parts" in message
    assert "autograd.Function" in message


def test_autocast_is_refused_with_its_module() -> None:
    class Casting(Branching):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                value = self.side(images)
            return self.fc(self.last(value.float()).mean((2, 3)))  # type: ignore[no-any-return]

    assert "module 'side'" in _message(Casting(), ["last"], IMAGES)
    assert "bfloat16 by autocast" in _message(Casting(), ["last"], IMAGES)


def test_in_place_operators_leave_what_a_part_is_given() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    parts = cut(module, ["0", "2"], IMAGES)
    given = parts.blocks[0].module(IMAGES)
    before = given.clone()
    parts.blocks[1].module(given)
    assert torch.equal(given, before)
    _assert_faithful(module, parts, IMAGES)


def test_tied_embedding_and_head_train_in_one_block() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.one = nn.Embedding(7, 8), nn.Linear(8, 8)
            self.fc = nn.Linear(8, 7, bias=False)
            self.fc.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.relu(self.one(self.embed(ids)))[:, -1])  # type: ignore[no-any-return]

    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(
        UsageError,
        match=r"'embed.weight' \(also named 'fc.weight'\) is used by block 'embed' and by the head: .*blocks = 1",
    ):
        cut(Tied(), ["embed", "one"], ids, 7)
    parts = cut(Tied(), 1, ids, 7)
    assert parts.blocks[0].output_shape == (7,)
    assert not parts.head.state_dict()


def test_logits_have_to_be_those_of_the_classes() -> None:
    def refused(module: nn.Module, classes: int) -> str:
        with pytest.raises(UsageError) as caught:
            cut(module, 1, IMAGES, classes=classes)
        return str(caught.value)

    assert "returns 2 logits a sample, but there are 10 classes" in refused(_plain(), 10)
    single = _plain()
    single.add_module("fc", nn.Linear(4, 1))
    assert "1 logit a sample, whose cross-entropy is always 0" in refused(single, 1)
    dense = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    assert "returns shape [3, 2, 8, 8] for a batch of 3" in refused(dense, 2)


def test_weights_of_another_precision_are_named() -> None:
    assert "tensor 'one.weight' is float16: devices train float32" in _message(
        _plain().half(), ["one"], IMAGES
    )


def test_a_counter_that_is_read_is_named() -> None:
    class Counting(Branching):
        def __init__(self, reads: bool) -> None:
            super().__init__()
            self.reads = reads
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.steps += 1
            return super().forward(images / self.steps if self.reads else images)

    class Assigned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.steps = self.steps + 1
            return images.relu()

    assert cut(Counting(reads=False), ["last"], IMAGES)
    assert cut(nn.Sequential(Assigned(), *_plain()), ["1"], IMAGES)
    message = _message(Counting(reads=True), ["last"], IMAGES)
    assert "reads buffer 'steps', a int64 that each step changes" in message


def test_batch_norm_over_all_batches_is_named() -> None:
    module = _plain()
    module.add_module("act", nn.BatchNorm2d(4, momentum=None))
    assert "module 'act' averages its statistics over all batches" in _message(module, ["one"], IMAGES)


def test_inputs_and_outputs_other_than_one_tensor() -> None:
    class Paired(Branching):
        def forward(self, images: torch.Tensor, other: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(images + other)

    class Returning(Branching):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            return super().forward(images), images

    assert "takes 2 inputs (images, other)" in _message(Paired(), ["last"], IMAGES)
    assert "returns a tuple" in _message(Returning(), ["last"], IMAGES)


def test_example_of_the_wrong_shape() -> None:
    message = _message(_plain(), ["one"], torch.zeros(2, 5, 8, 8))
    assert "does not run on an input of shape [3, 5, 8, 8]" in message


def test_token_ids_and_vocabulary_go_together() -> None:
    spec = small_model("text_transformer")
    message = _message(spec.module, 2, spec.example(2))
    assert "int64 input, which needs a vocabulary" in message
    with pytest.raises(UsageError, match="float32 input, which has no use for a vocabulary of 9"):
        cut(_plain(), 1, IMAGES, 9)
    assert "give its vocabulary, if it takes token ids" in _message(spec.module, 2, torch.zeros(2, 6))


def test_a_block_hands_on_floats() -> None:
    class Long(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.long()

    class Rounding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 4, 1)
            self.rounded = Long()
            self.fc = nn.Linear(4, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            ids = self.rounded(self.one(images))
            return self.fc(ids.float().mean((2, 3)))  # type: ignore[no-any-return]

    assert "block 'rounded' returns int64, which carries no gradient" in _message(
        Rounding(), ["rounded"], IMAGES
    )
    assert cut(Rounding(), 1, IMAGES).blocks[0].name != "rounded"


def test_a_model_of_vectors() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    parts = cut(module, 2, torch.zeros(2, 4))
    assert [block.name for block in parts.blocks] == ["1", "3"]
    assert "2 is the most" in _message(module, 3, torch.zeros(2, 4))
    _assert_faithful(module, cut(module, ["1"], torch.zeros(2, 4)), torch.ones(2, 4))
