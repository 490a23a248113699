"""A stage of each kind of built-in model in the real runtime; compiling compares it with eager PyTorch."""

from __future__ import annotations

import pytest
import torch

from frostline.device_runtime.executorch_engine import ExecuTorchProgram
from frostline.device_runtime.onnx_program import OnnxProgram
from frostline.exporter.artifact import ExportOptions, compile_prefix, compile_stage
from frostline.exporter.cutting import cut
from frostline.exporter.executorch_target import EXECUTORCH
from frostline.exporter.inputs import random_inputs
from frostline.exporter.onnxruntime_target import ONNXRUNTIME
from frostline.exporter.stage import build_stage
from frostline.exporter.target import Target
from tests.exporter.small_models import small_model

BATCH = 3


@pytest.mark.parametrize(
    ("name", "blocks", "stage"),
    [
        ("sensor_cnn", ["block3", "block4"], 1),
        ("vit", ["layer2", "layer3"], 1),
        ("text_transformer", ["layer1", "layer3"], 0),
        ("mobilenet_v2", ["block5.2", "block5"], 1),
    ],
)
@pytest.mark.parametrize("target", [EXECUTORCH, ONNXRUNTIME], ids=lambda target: target.engine)
def test_a_stage_trains_as_eager_pytorch_does(
    name: str, blocks: list[str], stage: int, target: Target
) -> None:
    spec = small_model(name, classes=5)
    parts = cut(spec.module, blocks, spec.example(2), spec.vocabulary)
    compiled = compile_stage(build_stage(parts, stage, seed=0), ExportOptions(BATCH, 5, target=target))
    assert compiled.manifest.engine == target.engine
    assert compiled.parity.tensor_error < 1e-3
    given = compiled.manifest.training.inputs
    (x,) = (each for each in given if each.name == "x")
    vocabulary = spec.vocabulary if stage == 0 else None
    assert (x.dtype, x.vocabulary) == ("float32" if vocabulary is None else "int64", vocabulary)
    assert compiled.manifest.samples == x


@pytest.mark.parametrize(
    ("name", "stage"),
    [*(("resnet10", stage) for stage in range(4)), ("sensor_cnn", 0), ("text_transformer", 1)],
)
@pytest.mark.parametrize("target", [EXECUTORCH, ONNXRUNTIME], ids=lambda target: target.engine)
def test_a_stage_with_a_linear_output_module_trains_as_eager_pytorch_does(
    name: str, stage: int, target: Target
) -> None:
    spec = small_model(name, classes=5)
    assert spec.default_blocks is not None
    parts = cut(spec.module, spec.default_blocks, spec.example(2), spec.vocabulary)
    built = build_stage(parts, stage, 0, "linear")
    compiled = compile_stage(built, ExportOptions(BATCH, 5, target=target))
    assert compiled.parity.tensor_error < 1e-3
    trained = {spec.name for spec in compiled.manifest.parameters}
    layer = "linear_" if stage + 1 < len(parts.blocks) else "head."
    assert any(name.startswith(f"output_module.{layer}") for name in trained)
    assert not any("stand_in" in name for name in trained)


def test_the_onnx_prefix_takes_token_ids() -> None:
    spec = small_model("text_transformer")
    stage = build_stage(cut(spec.module, 2, spec.example(2), spec.vocabulary), 0, seed=0)
    program, content = compile_prefix(stage, BATCH, ONNXRUNTIME)
    assert (program.inputs[0].dtype, program.inputs[0].vocabulary) == ("int64", spec.vocabulary)
    ids = random_inputs(BATCH, (6,), spec.vocabulary, torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = stage.model.block(ids)
    features = torch.zeros_like(want)
    OnnxProgram(content, "prefix").run({"x": ids.numpy()}, {"features": features.numpy()})
    torch.testing.assert_close(features, want, rtol=1e-4, atol=1e-4)


def test_the_frozen_prefix_takes_token_ids() -> None:
    spec = small_model("text_transformer")
    stage = build_stage(cut(spec.module, 2, spec.example(2), spec.vocabulary), 0, seed=0)
    program, content = compile_prefix(stage, BATCH)
    (x,) = program.inputs
    assert (x.dtype, x.shape, x.vocabulary) == ("int64", (BATCH, 6), spec.vocabulary)
    ids = random_inputs(BATCH, (6,), spec.vocabulary, torch.Generator().manual_seed(0))
    # Its results lie in its memory.
    loaded = ExecuTorchProgram(content, "prefix")
    (features,) = loaded.run([ids])
    with torch.no_grad():
        torch.testing.assert_close(features, stage.model.block(ids), rtol=1e-4, atol=1e-4)
