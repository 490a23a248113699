"""Floating-point operations of a step, against counts made by hand."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from frostline.exporter.artifact import ExportOptions, compile_prefix, compile_stage
from frostline.exporter.cutting import cut
from frostline.exporter.flops import forward_flops, step_flops
from frostline.exporter.onnxruntime_target import ONNXRUNTIME
from frostline.exporter.output_module import OutputModule
from frostline.exporter.stage import Stage, StageModel, build_stage
from frostline.exporter.variant import Variant
from tests.exporter.small_models import small_model
from tests.exporter.small_stages import LENGTH, WIDTH, Perceptron, token_stage

BATCH, CLASSES = 4, 3
SIZE = 6


def image_stage(*layers: nn.Module, features: int, channels: int = 2) -> Stage:
    head = nn.Sequential(nn.Flatten(), nn.Linear(features, CLASSES))
    model = StageModel(nn.Sequential(*layers), OutputModule({}, head))
    return Stage(0, 1, "images", model, (channels, SIZE, SIZE))


def products(*sizes: int) -> int:
    """A multiply and an add for each of a product's terms."""
    return 2 * math.prod(sizes)


def test_linear_layers() -> None:
    stage = token_stage(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, WIDTH), classes=CLASSES)
    first = second = products(BATCH * LENGTH, WIDTH, 16)
    head = products(BATCH, LENGTH * WIDTH, CLASSES)
    # The samples need no gradient: two products for the first layer, three for the others.
    assert step_flops(stage, BATCH) == 2 * first + 3 * (second + head)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions_in_groups(groups: int) -> None:
    stage = image_stage(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups),
        features=8 * 3 * 3,
    )
    first = products(BATCH * SIZE * SIZE, 2 * 9, 4)
    second = products(BATCH * 3 * 3, 4 // groups * 9, 8)
    head = products(BATCH, 8 * 3 * 3, CLASSES)
    assert step_flops(stage, BATCH) == 2 * first + 3 * (second + head)
    assert forward_flops(stage.model, torch.zeros(BATCH, 2, SIZE, SIZE)) == first + second + head


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(groups: int) -> None:
    layer = nn.ConvTranspose2d(2, 4, 2, stride=2, groups=groups)
    stage = image_stage(layer, features=4 * 4 * SIZE * SIZE)
    every = products(BATCH * SIZE * SIZE, 2, 4 // groups * 4)
    assert step_flops(stage, BATCH) == 2 * every + 3 * products(BATCH, 4 * 4 * SIZE * SIZE, CLASSES)


class _Attention(nn.Module):
    """Each token's features attend to those of all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(2, (2, WIDTH // 2)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


def test_attention() -> None:
    stage = token_stage(nn.Linear(WIDTH, WIDTH), _Attention(), classes=CLASSES)
    linear, head = products(BATCH * LENGTH, WIDTH, WIDTH), products(BATCH, LENGTH * WIDTH, CLASSES)
    product = products(BATCH * LENGTH, LENGTH, WIDTH)
    # Scores and values; backwards the scores once more, then a product for weights, values, queries and keys.
    assert step_flops(stage, BATCH) == 2 * linear + 7 * product + 3 * head


def test_a_fused_layer_is_counted_as_its_products() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
    projections = products(BATCH * LENGTH, WIDTH, 4 * WIDTH + 2 * 16)
    attention = 2 * products(BATCH * LENGTH, LENGTH, WIDTH)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    assert forward_flops(layer, torch.zeros(BATCH, LENGTH, WIDTH)) == projections + attention


def test_what_is_computed_again_counts_again() -> None:
    stage = token_stage(Perceptron(), Perceptron(), Perceptron(), classes=CLASSES)
    block = 2 * products(BATCH * LENGTH, WIDTH, 8 * WIDTH)
    more = step_flops(stage, BATCH, recompute=True) - step_flops(stage, BATCH)
    # The last segment is not computed again, and of the others no more than the backward pass asks for.
    narrowing = block // 2
    assert more == 2 * (block - narrowing)


def test_frozen_parameters_need_no_gradient() -> None:
    stage = token_stage(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), classes=CLASSES)
    stage.model.block[0].weight.requires_grad_(False)
    stage.model.block[0].bias.requires_grad_(False)
    stage = dataclasses.replace(stage)
    linear, head = products(BATCH * LENGTH, WIDTH, WIDTH), products(BATCH, LENGTH * WIDTH, CLASSES)
    assert step_flops(stage, BATCH) == linear + 2 * linear + 3 * head


def test_it_grows_with_the_batch() -> None:
    spec = small_model("mobilenet_v2", norm="batch")
    stage = build_stage(cut(spec.module, 2, spec.example(2)), 0, seed=0)
    assert step_flops(stage, 3 * BATCH) == 3 * step_flops(stage, BATCH) > 0


@pytest.mark.parametrize("name", ["resnet10", "text_transformer"])
def test_counting_leaves_the_stage_and_the_random_numbers_alone(name: str) -> None:
    spec = small_model(name, **({"norm": "batch"} if name == "resnet10" else {}))
    stage = build_stage(cut(spec.module, 2, spec.example(2), spec.vocabulary), 0, seed=0)
    stage.model.eval()
    stage.model.block.train()
    modes = [module.training for module in stage.model.modules()]
    state, random = copy.deepcopy(stage.model.state_dict()), torch.get_rng_state()
    step_flops(stage, BATCH)
    step_flops(stage, BATCH, recompute=True)
    forward_flops(stage.model, spec.example(BATCH))
    assert [module.training for module in stage.model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in stage.model.state_dict().items())
    assert all(parameter.grad is None for parameter in stage.model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_manifests_tell_it() -> None:
    torch.manual_seed(0)
    stage = token_stage(Perceptron(), Perceptron(), Perceptron(), classes=CLASSES)
    step = step_flops(stage, BATCH)
    for variant in (Variant(), Variant(2)):
        assert compile_stage(stage, ExportOptions(BATCH, CLASSES), variant=variant).manifest.flops == step
    options = ExportOptions(BATCH, CLASSES, target=ONNXRUNTIME)
    recomputed = compile_stage(stage, options, variant=Variant(recompute=True)).manifest
    assert recomputed.flops == step_flops(stage, BATCH, recompute=True) > step
    assert compile_prefix(stage, BATCH)[0].flops == 3 * 2 * products(BATCH * LENGTH, WIDTH, 8 * WIDTH)
