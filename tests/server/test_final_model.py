"""The two forms of the final model give the same answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from frostline.exporter.models.lookup import build_model
from frostline.protocol.errors import RunError
from frostline.server.final_model import write_final_model
from frostline.server.run_folder import RunFolder

BATCH = 4
SHAPE = (1, 8, 8)
OPTIONS = {"width": 4}


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_program_gives_the_logits_of_the_weights(tmp_path: Path, norm: str) -> None:
    engine = pytest.importorskip("frostline.device_runtime.executorch_engine")
    torch.set_num_threads(1)
    options = {**OPTIONS, "norm": norm}
    model = build_model("resnet10", options, SHAPE, 3, seed=1).module
    with torch.no_grad():
        # Statistics that differ from a fresh model's, so that losing them would show.
        model.train()(torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0)) * 3 + 1)
    with RunFolder.create(tmp_path / "run") as folder:
        write_final_model(folder, model, torch.zeros(BATCH, *SHAPE))

    loaded = build_model("resnet10", options, SHAPE, 3, seed=2).module
    loaded.load_state_dict(safetensors.torch.load_file(folder.model_path))
    x = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = loaded.eval()(x)
    program = engine.ExecuTorchProgram(folder.eval_program_path.read_bytes(), "final")
    (logits,) = program.run([x])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert logits.std() > 1e-3


class Unsayable(torch.nn.Module):
    """Sorts by a kernel that the runtime does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.erfinv(self.layer(x).tanh())


def test_a_model_that_executorch_cannot_express_leaves_its_weights(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    model = Unsayable()
    folder = RunFolder.create(tmp_path / "run")
    with pytest.raises(RunError, match=r"ExecuTorch cannot express the model.*erfinv"):
        write_final_model(folder, model, torch.zeros(2, 4))
    assert not folder.eval_program_path.exists()
    saved = safetensors.torch.load_file(folder.model_path)
    assert torch.equal(saved["layer.weight"], model.layer.weight)
