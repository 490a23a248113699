from __future__ import annotations

from pathlib import Path

import numpy as np

from frostline.device_runtime.engine import open_runtime
from frostline.protocol.blobs import BlobStore, reference_to
from frostline.protocol.manifest import PlannedMemory, Program, StageManifest, TensorSpec

RATE = 0.1


def test_tiles_of_a_tensor_are_passed_and_written_in_place(tmp_path: Path) -> None:
    import torch
    from torch import Tensor, nn

    from frostline.exporter.executorch_lowering import lower_portable

    class Training(nn.Module):
        """Takes the second row of a weight first, and only the first half of a statistic."""

        def forward(self, second: Tensor, first: Tensor, half: Tensor, x: Tensor, y: Tensor) -> object:
            second.copy_(second * 10)
            first.copy_(first + x.sum(0))
            half.copy_(half - 1)
            return x.sum(), y.sum()

    class Evaluation(nn.Module):
        def forward(self, weight: Tensor, x: Tensor) -> Tensor:
            return torch.mm(x, weight.t())

    store = BlobStore(tmp_path)
    row, x, y = torch.zeros(3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    specs = {
        "x": TensorSpec(name="x", shape=(2, 3)),
        "y": TensorSpec(name="y", dtype="int64", shape=(2,)),
        "weight": TensorSpec(name="weight", shape=(2, 3)),
        "statistic": TensorSpec(name="statistic", shape=(2, 2)),
    }

    def program(module: nn.Module, arguments: list[Tensor], inputs: list[TensorSpec]) -> Program:
        lowered = lower_portable(module, arguments)
        store.put(lowered.content)
        file = reference_to(lowered.content)
        return Program(file=file, inputs=inputs, outputs=[], arena_bytes=lowered.arena_bytes)

    second, first = (TensorSpec(name="weight", shape=(3,), tile=tile) for tile in (1, 0))
    half = TensorSpec(name="statistic", shape=(1, 2), tile=0)
    training = program(
        Training(), [row, row.clone(), torch.zeros(1, 2), x, y], [second, first, half, specs["x"], specs["y"]]
    )
    evaluation = program(Evaluation(), [torch.zeros(2, 3), x], [specs["weight"], specs["x"]])
    manifest = StageManifest(
        stage=0,
        stages=1,
        name="tiled",
        engine="executorch",
        variant="whole",
        batch=2,
        micro_batches=1,
        classes=2,
        parameters=[specs["weight"]],
        statistics=[specs["statistic"]],
        optimizer_state=[],
        received=[],
        training=training,
        update=None,
        evaluation=evaluation,
        prefix=[],
        planned=PlannedMemory(
            arena=0, parameters=0, statistics=0, optimizer_state=0, received=0, batch=0, program=0
        ),
    )
    session = open_runtime("executorch").open_stage(manifest, store)
    weight = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    session.load({"weight": weight, "statistic": np.full((2, 2), 7, np.float32)})
    addresses = {name: value.ctypes.data for name, value in session.trained().items()}
    given = np.array([[1, 0, 2], [0, 1, 2]], np.float32)
    for _ in range(2):
        assert session.step([(given, np.array([1, 2]))], RATE) == (6.0, 3)
    trained = session.trained()
    assert trained["weight"].tolist() == [[3, 4, 11], [400, 500, 600]]
    assert trained["statistic"].tolist() == [[5, 5], [7, 7]]
    assert {name: value.ctypes.data for name, value in trained.items()} == addresses
    np.testing.assert_array_equal(session.evaluate(given), given @ trained["weight"].T)
