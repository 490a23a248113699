from __future__ import annotations

import pytest
import torch

from frostline.exporter.artifact import compile_prefix
from frostline.exporter.cutting import cut
from frostline.exporter.executorch_target import EXECUTORCH
from frostline.exporter.inputs import random_inputs
from frostline.exporter.onnxruntime_target import ONNXRUNTIME
from frostline.exporter.quantization import in_batches
from frostline.exporter.stage import Stage, build_stage
from frostline.exporter.target import LoweredProgram
from tests.exporter.small_models import small_model

BATCH = 4


def block_of(name: str, index: int, blocks: int = 2, **options: object) -> Stage:
    spec = small_model(name, **options)
    return build_stage(cut(spec.module, blocks, spec.example(2), spec.vocabulary), index, seed=0)


def features(stage: Stage, int8: bool, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    calibration = random_inputs(10, stage.input_shape, stage.vocabulary, torch.Generator().manual_seed(1))
    program, content = compile_prefix(stage, BATCH, EXECUTORCH, calibration if int8 else None)
    run = EXECUTORCH.load(LoweredProgram(content, ("x",), program.arena_bytes))
    return run({"x": x})[-1].clone(), len(content)


@pytest.mark.parametrize(
    ("name", "index", "tolerance"),
    [
        ("resnet10", 1, 0.05),
        pytest.param("mobilenet_v2", 1, 0.2, marks=pytest.mark.slow),
        pytest.param("vit", 1, 0.05, marks=pytest.mark.slow),
        ("text_transformer", 0, 0.05),
    ],
)
def test_blocks_in_int8_say_nearly_the_same(name: str, index: int, tolerance: float) -> None:
    stage = block_of(name, index)
    x = random_inputs(BATCH, stage.input_shape, stage.vocabulary, torch.Generator().manual_seed(2))
    (got, _), (want, _) = features(stage, True, x), features(stage, False, x)
    assert 0 < float((got - want).norm() / want.norm()) < tolerance


def test_a_program_in_int8_is_a_third_of_one_in_float32() -> None:
    spec = small_model("resnet10", width=32)
    stage = build_stage(cut(spec.module, 2, spec.example(2), spec.vocabulary), 1, seed=0)
    x = torch.zeros(BATCH, *stage.input_shape)
    assert features(stage, True, x)[1] < 0.4 * features(stage, False, x)[1]


def test_onnx_runtime_stays_in_float32() -> None:
    stage = block_of("resnet10", 0)
    calibration = torch.zeros(3, *stage.input_shape)
    assert (
        compile_prefix(stage, BATCH, ONNXRUNTIME, calibration)[1]
        == compile_prefix(stage, BATCH, ONNXRUNTIME)[1]
    )


def test_batches_are_filled_up_with_the_first_samples() -> None:
    assert [batch.tolist() for batch in in_batches(torch.arange(5), 3)] == [[0, 1, 2], [3, 4, 0]]
    assert [batch.tolist() for batch in in_batches(torch.arange(1), 3)] == [[0, 0, 0]]
