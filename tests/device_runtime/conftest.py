from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders stage-0 and stage-1: artifacts of a tiny model, the second one with a prefix."""
    import torch

    from frostline.exporter.artifact import (
        ExportOptions,
        arrays,
        compile_prefix,
        compile_stage,
    )
    from frostline.exporter.cutting import cut
    from frostline.exporter.models.lookup import build_model
    from frostline.exporter.stage import build_stage, statistics_tensors, trainable_tensors
    from frostline.protocol.artifact import write_artifact

    torch.set_num_threads(1)
    spec = build_model("resnet10", {"width": 4}, (1, 8, 8), 3)
    assert spec.default_blocks is not None
    parts = cut(spec.module, spec.default_blocks, torch.zeros(2, 1, 8, 8))
    folder = tmp_path_factory.mktemp("artifacts")
    stages = [build_stage(parts, index, seed=0) for index in (0, 1)]
    prefix, prefix_content = compile_prefix(stages[0], batch=4)
    for stage, programs in zip(stages, ([], [prefix]), strict=True):
        # The exporter's own tests compare the programs with eager PyTorch.
        compiled = compile_stage(stage, ExportOptions(batch=4, classes=3), programs)
        files = {**compiled.files, **{program.file.sha256: prefix_content for program in programs}}
        stage.model.train()
        weights = arrays({**trainable_tensors(stage), **statistics_tensors(stage)})
        write_artifact(folder / f"stage-{stage.index}", compiled.manifest, files, weights)
    return folder


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each engine the folders whole and micro2: one tiny stage, trained in steps of four samples near what came."""
    import torch
    from torch import nn

    from frostline.exporter.artifact import ExportOptions, arrays, compile_stage
    from frostline.exporter.executorch_target import EXECUTORCH
    from frostline.exporter.onnxruntime_target import ONNXRUNTIME
    from frostline.exporter.optimizer import SGD
    from frostline.exporter.output_module import OutputModule
    from frostline.exporter.stage import Stage, StageModel, trainable_tensors
    from frostline.exporter.variant import Variant
    from frostline.protocol.artifact import write_artifact

    torch.set_num_threads(1)
    torch.manual_seed(3)
    block = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, bias=False), nn.GroupNorm(2, 4), nn.ReLU())
    model = StageModel(block, OutputModule({}, nn.Sequential(nn.Flatten(), nn.Linear(36, 3))))
    stage = Stage(0, 1, "small", model, (1, 8, 8))
    optimizer = SGD(momentum=0.9, weight_decay=0.01, proximal=0.5)
    folder = tmp_path_factory.mktemp("variants")
    for target in (EXECUTORCH, ONNXRUNTIME):
        for variant in (Variant(), Variant(2)):
            compiled = compile_stage(stage, ExportOptions(4, 3, optimizer, target), variant=variant)
            weights = arrays(trainable_tensors(stage))
            write_artifact(folder / target.engine / variant.name, compiled.manifest, compiled.files, weights)
    return folder
