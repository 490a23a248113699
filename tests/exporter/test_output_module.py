from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from frostline.exporter.cutting import CutModel, cut
from frostline.exporter.models.lookup import BUILTIN_NAMES
from frostline.exporter.output_module import LinearOutput, OutputModuleKind, build_output_module, stand_in
from frostline.exporter.stage import build_stage, load_tensors, trainable_tensors
from frostline.protocol.errors import UsageError
from tests.exporter.padded_tokens import PaddedTokens
from tests.exporter.small_models import IMAGE_CNNS, small_model


def _cut(name: str, **options: object) -> CutModel:
    spec = small_model(name, **options)
    assert spec.default_blocks is not None
    return cut(spec.module, spec.default_blocks, spec.example(2), spec.vocabulary)


@pytest.mark.parametrize("size", [8, 28, 32, 36])
@pytest.mark.parametrize("name", IMAGE_CNNS)
def test_images_of_every_size(name: str, size: int) -> None:
    _assert_stages_end_in_logits(_cut(name, input_size=size, classes=10))


@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_every_stage_ends_in_logits(name: str) -> None:
    _assert_stages_end_in_logits(_cut(name, classes=10))


def _assert_stages_end_in_logits(parts: CutModel) -> None:
    for stage, block in enumerate(parts.blocks):
        module = build_output_module(parts, stage, seed=0)
        features = torch.zeros(3, *block.output_shape)
        for later in range(stage + 1, len(parts.blocks)):
            features = module.get_submodule(f"stand_in_{later}")(features)
            assert features.shape[1:] == parts.blocks[later].output_shape
        assert module(torch.zeros(3, *block.output_shape)).shape == (3, 10)


def test_names_and_layers() -> None:
    parts = _cut("resnet10", input_size=32)
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
    parts = _cut("small_cnn")
    module = build_output_module(parts, 2, seed=0)
    ours, theirs = module.state_dict()["head.fc.weight"], parts.head.state_dict()["fc.weight"]
    assert torch.equal(ours, theirs)
    assert ours.data_ptr() != theirs.data_ptr()


def test_weights_depend_on_the_seed_only() -> None:
    parts = _cut("small_cnn")
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
    )
    parts = cut(module, ["0", "1"], torch.zeros(2, 2, 16))
    for block in parts.blocks:
        block.module.double()
    parts.head.double()
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


class _Turned(nn.Module):
    """Runs a layer with the first two axes of a sample exchanged."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        turned: torch.Tensor = self.layer(features.transpose(1, 2)).transpose(1, 2)
        return turned


class _Transposed(nn.Module):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.transpose(1, 2)


class _ConvNeXtUnit(nn.Module):
    """Images as (channels, height, width), but the norm and the linear layers see the channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = self.linear(self.norm(self.depthwise(images).permute(0, 2, 3, 1)))
        return images + pixels.permute(0, 3, 1, 2)


class _SqueezeExcitation(nn.Module):
    """The linear layers see channels without their places."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(4, 4, 1)
        self.linear = nn.Linear(4, 4)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        series = self.convolution(series)
        return series * torch.sigmoid(self.linear(series.mean(2)))[:, :, None]


@pytest.mark.parametrize(
    ("block", "shape", "kind"),
    [
        (nn.Linear(4, 4), (6, 4), nn.Linear),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU()), (4, 4), nn.Linear),
        (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (6, 4), nn.Linear),
        (nn.Sequential(_Turned(nn.Conv1d(4, 4, 3, padding=1)), nn.Linear(4, 4)), (6, 4), nn.Linear),
        (_Turned(nn.Conv1d(4, 4, 3, padding=1)), (6, 4), nn.Linear),
        (_Turned(nn.Linear(4, 4)), (4, 6), nn.Conv1d),
        (nn.Sequential(nn.Conv1d(4, 4, 1), nn.GroupNorm(2, 4), nn.ReLU()), (4, 6), nn.Conv1d),
        (_SqueezeExcitation(), (4, 6), nn.Conv1d),
        (_ConvNeXtUnit(), (4, 5, 5), nn.Conv2d),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (5, 5, 4), nn.Linear),
        (nn.Linear(4, 4), (4,), nn.Linear),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_the_block_tells_which_axis_holds_its_features(
    block: nn.Module, shape: tuple[int, ...], kind: type[nn.Module]
) -> None:
    wide = nn.Linear(shape[-1], shape[-1])
    module = nn.Sequential(wide, block, nn.Flatten(), nn.LazyLinear(3))
    module(torch.zeros(2, *shape))
    parts = cut(module.train(), ["0", "1"], torch.zeros(2, *shape))
    output_module = build_output_module(parts, 0, seed=0)
    stand_in_1 = output_module.get_submodule("stand_in_1")
    # Blocks of few parameters get a separable one.
    assert type(stand_in_1[0] if isinstance(stand_in_1, nn.Sequential) else stand_in_1) is kind
    assert output_module(torch.zeros(5, *shape)).shape == (5, 3)
    assert all(each.training for each in parts.blocks[1].module.modules())


def test_stand_in_of_tokens_changes_their_width() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 6), nn.Flatten(), nn.Linear(30, 2))
    parts = cut(module, ["0", "1"], torch.zeros(2, 5, 3))
    parts.blocks[1].module.double()
    parts.head.double()
    layer = build_output_module(parts, 0, seed=0)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "stand_in_1.weight": (6, 4),
        "head.3.weight": (2, 30),
        "head.3.bias": (2,),
    }
    assert all(value.dtype == torch.float64 for value in layer.state_dict().values())


@pytest.mark.parametrize(
    ("second", "outgoing"),
    [
        (nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (2, 8)), nn.Linear(8, 3)), (2, 2, 3)),
        (nn.ConvTranspose2d(2, 2, 2, 2), (2, 8, 8)),
        (nn.Sequential(nn.Flatten(), nn.Linear(32, 4)), (4,)),
        (nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(2), _Transposed(), nn.Linear(4, 6)), (16, 6)),
        (nn.Upsample(scale_factor=1.5), (2, 6, 6)),
        (nn.Conv2d(2, 3, 1, (3, 1)), (3, 2, 4)),
    ],
)
def test_features_of_any_shape_are_imitated(second: nn.Module, outgoing: tuple[int, ...]) -> None:
    second = second if any(True for _ in second.parameters()) else nn.Sequential(second, nn.Conv2d(2, 2, 1))
    module = nn.Sequential(nn.Conv2d(1, 2, 1), second, nn.Flatten(), nn.Linear(math.prod(outgoing), 2))
    parts = cut(module, ["0", "1"], torch.zeros(2, 1, 4, 4))
    assert parts.blocks[1].output_shape == outgoing
    output_module = build_output_module(parts, 0, seed=0)
    given = torch.randn(3, 2, 4, 4)
    assert output_module.get_submodule("stand_in_1")(given).shape == (3, *outgoing)
    assert torch.count_nonzero(output_module(given)) > 0


def test_what_a_block_only_passes_on_is_passed_on() -> None:
    module = PaddedTokens().train()
    ids = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    parts = cut(module, ["encoder.layers.0", "encoder.layers.1", "encoder.layers.2"], ids, 11)
    for kind in ("convolutions", "linear"):
        output_module = build_output_module(parts, 0, 0, kind)  # type: ignore[arg-type]
        handed = parts.blocks[0].module(ids)
        logits = output_module(handed)
        assert logits.shape == (2, 3)
        logits.sum().backward()
    stand_in = build_output_module(parts, 0, 0).get_submodule("stand_in_1")
    size = parts.blocks[0].outputs[0].size
    mask = [index for index, value in enumerate(parts.blocks[0].outputs) if value.shape == (5,)]
    assert mask
    where = slice(0, 5) if mask == [0] else slice(size, None)
    assert torch.equal(stand_in(handed)[:, where], handed[:, where])


def test_dense_stand_ins_are_full_convolutions() -> None:
    separable = [
        nn.Sequential(nn.Conv2d(a, a, 3, padding=1, groups=a), nn.Conv2d(a, b, 1), nn.ReLU())
        for a, b in pairwise((16, 24, 32))
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3))
    module = nn.Sequential(nn.Conv2d(3, 16, 1), *separable, head)
    parts = cut(module, ["1", "2"], torch.zeros(2, 3, 6, 6))
    lighter = build_output_module(parts, 0, 0).get_submodule("stand_in_1")
    dense = build_output_module(parts, 0, 0, "dense").get_submodule("stand_in_1")
    assert isinstance(dense, nn.Conv2d) and dense.weight.shape == (32, 24, 3, 3)
    sizes = [sum(each.numel() for each in part.parameters()) for part in (lighter, parts.blocks[1].module)]
    assert sizes[0] <= sizes[1] < dense.weight.numel()


@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_no_stand_in_outweighs_its_block(name: str) -> None:
    parts = _cut(name)
    for index in range(1, len(parts.blocks)):
        ours = sum(each.numel() for each in stand_in(parts, index, 0).parameters())
        assert ours <= sum(each.numel() for each in parts.blocks[index].module.parameters())


def test_stand_ins_grow_lighter_as_blocks_do() -> None:
    def stand_in_of(block: nn.Module) -> nn.Module:
        module = nn.Sequential(
            nn.Conv2d(1, 8, 1), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
        )
        return stand_in(cut(module, ["0", "1"], torch.zeros(2, 1, 4, 4)), 1, 0)

    assert type(stand_in_of(nn.Conv2d(8, 8, 3, padding=1))) is nn.Conv2d
    separable = stand_in_of(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)))
    assert [type(each) for each in separable] == [nn.Conv2d, nn.Conv2d]  # type: ignore[attr-defined]
    low_rank = stand_in_of(nn.Conv2d(8, 8, 3, padding=1, groups=8))
    assert isinstance(low_rank[1], nn.Sequential)  # type: ignore[index]


@pytest.mark.parametrize("stage", [-1, 3])
def test_stage_that_does_not_exist(stage: int) -> None:
    with pytest.raises(UsageError, match="stages 0 to 2"):
        build_output_module(_cut("small_cnn"), stage, seed=0)


@pytest.mark.parametrize(
    ("name", "features", "places"),
    [
        ("resnet10", [4, 8, 16], (2, 3)),
        ("vit", [8, 8], (1,)),
        ("sensor_cnn", [4, 8, 16], (2,)),
        ("text_transformer", [8, 8], (1,)),
    ],
)
def test_one_linear_layer_over_the_mean_of_the_features(
    name: str, features: list[int], places: tuple[int, ...]
) -> None:
    parts = _cut(name, classes=5)
    assert len(features) == len(parts.blocks) - 1
    for stage, width in enumerate(features):
        module = build_output_module(parts, stage, seed=0, kind="linear")
        state = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        assert state == {f"linear_{stage}.weight": (5, width), f"linear_{stage}.bias": (5,)}
        x = torch.randn(3, *parts.blocks[stage].output_shape, generator=torch.Generator().manual_seed(0))
        mean = x.mean(places)
        assert mean.shape == (3, width)
        torch.testing.assert_close(module(x), mean @ module.state_dict()[f"linear_{stage}.weight"].T)
        assert module.training


@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_the_last_stage_has_the_models_own_head_in_either_kind(name: str) -> None:
    parts = _cut(name)
    last = len(parts.blocks) - 1
    either = [build_output_module(parts, last, 0, kind).state_dict() for kind in ("convolutions", "linear")]
    assert either[0].keys() == either[1].keys() == {f"head.{key}" for key in parts.head.state_dict()}
    assert all(torch.equal(value, either[1][key]) for key, value in either[0].items())


@pytest.mark.parametrize("name", ["resnet10", "vit"])
def test_a_linear_layer_is_not_carried_over(name: str) -> None:
    """Even where the blocks are of one shape: it tells other features apart."""
    parts = _cut(name)
    stages = [build_stage(parts, index, 0, "linear") for index in range(len(parts.blocks))]
    for stage, following in pairwise(stages):
        before = trainable_tensors(following)
        load_tensors(following, {key: value + 1 for key, value in trainable_tensors(stage).items()})
        assert all(torch.equal(value, before[key]) for key, value in trainable_tensors(following).items())


def test_linear_weights_depend_on_the_seed_only() -> None:
    parts = _cut("vit")
    before = torch.get_rng_state()
    first, again, other = (
        build_output_module(parts, 0, seed, "linear").state_dict()["linear_0.weight"] for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_linear_layer_needs_no_block_that_can_be_imitated() -> None:
    module = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.ConvTranspose2d(2, 2, 2, 2), nn.Flatten(), nn.Linear(128, 3)
    )
    parts = cut(module, ["0", "1"], torch.zeros(2, 1, 4, 4))
    output_module = build_output_module(parts, 0, seed=0, kind="linear")
    assert output_module(torch.zeros(5, 2, 4, 4)).shape == (5, 3)


@pytest.mark.parametrize(
    ("block", "example", "vocabulary", "places"),
    [
        (nn.Embedding(7, 4), torch.zeros(2, 6, dtype=torch.int64), 7, (1,)),
        (nn.Linear(4, 4), torch.zeros(2, 4), None, ()),
        (nn.Linear(4, 4), torch.zeros(2, 5, 5, 4), None, (1, 2)),
        (_ConvNeXtUnit(), torch.zeros(2, 4, 5, 5), None, (2, 3)),
    ],
    ids=["token ids", "vectors", "channels last", "ConvNeXt"],
)
def test_all_but_the_features_are_averaged_over(
    block: nn.Module, example: torch.Tensor, vocabulary: int | None, places: tuple[int, ...]
) -> None:
    module = nn.Sequential(block, nn.Linear(example.shape[-1] if vocabulary is None else 4, 4))
    module.append(nn.Flatten()).append(nn.LazyLinear(3))
    module(example)
    parts = cut(module, ["0", "1"], example, vocabulary)
    output_module = build_output_module(parts, 0, seed=0, kind="linear")
    assert isinstance(output_module, LinearOutput)
    assert output_module.places == places
    assert output_module(torch.zeros(2, *parts.blocks[0].output_shape)).shape == (2, 3)


class MaskedTokens(nn.Module):
    """Attention whose mask has more axes than the tokens, and the lowest float32 where there is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids == 0)[:, None, None, :].to(torch.float32) * torch.finfo(torch.float32).min
        x = self.embedding(ids)
        for layer in self.layers:
            scores = x @ x.transpose(1, 2) + mask.squeeze(1)
            x = x + layer(scores.softmax(-1) @ x)
        return self.head(x[:, 0])


@pytest.mark.parametrize("kind", ["convolutions", "linear"])
def test_nothing_is_imitated_from_a_mask(kind: OutputModuleKind) -> None:
    ids = torch.randint(1, 20, (4, 6))
    ids[:, 4:] = 0
    parts = cut(MaskedTokens(), ["layers.0+add", "layers.1+add", "layers.2+add"], ids, 20)
    logits = build_stage(parts, 0, 0, kind).model(ids).detach()
    assert bool(logits.isfinite().all()) and float(logits.abs().max()) < 100
