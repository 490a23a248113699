"""Samples of token ids on a device: an embedding in the first block, then behind the frost line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from frostline.datasets.folder import save_samples
from frostline.datasets.samples import Samples
from frostline.device_runtime.training import TrainingTask, train
from frostline.protocol.blobs import BlobStore
from frostline.protocol.errors import RunError
from frostline.protocol.tensors import Array
from tests.byte_patterns import LENGTH, byte_patterns
from tests.device_runtime.leases import lease_of, leased

BATCH, VOCABULARY = 4, 128


@pytest.fixture(scope="module")
def text_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders stage-0 and stage-1 of a tiny text model, the second one with a prefix."""
    from frostline.exporter.artifact import ExportOptions, arrays, compile_prefix, compile_stage
    from frostline.exporter.cutting import cut
    from frostline.exporter.models.lookup import build_model
    from frostline.exporter.stage import build_stage, trainable_tensors
    from frostline.protocol.artifact import write_artifact

    options = {"vocabulary": VOCABULARY, "width": 8, "depth": 2, "heads": 2}
    spec = build_model("text_transformer", options, (LENGTH,), 3)
    parts = cut(spec.module, ["layer1", "layer2"], spec.example(2), spec.vocabulary)
    folder = tmp_path_factory.mktemp("text")
    stages = [build_stage(parts, index, seed=0) for index in (0, 1)]
    prefix, content = compile_prefix(stages[0], BATCH)
    for stage, programs in zip(stages, ([], [prefix]), strict=True):
        compiled = compile_stage(stage, ExportOptions(BATCH, 3), programs)
        files = {**compiled.files, **{program.file.sha256: content for program in programs}}
        weights = arrays(trainable_tensors(stage))
        write_artifact(folder / f"stage-{stage.index}", compiled.manifest, files, weights)
    return folder


def _task(artifact: Path, folder: Path, samples: Samples) -> TrainingTask:
    data = folder / "data"
    data.mkdir(parents=True)
    save_samples(samples, data / "samples.safetensors")
    store = BlobStore(folder / "state" / "blobs")
    for path in (artifact / "files").iterdir():
        if path.is_file():
            store.put(path.read_bytes())
    return TrainingTask(
        data=str(data),
        state_folder=folder / "state",
        update_path=folder / "update.safetensors",
        lease=lease_of(
            store.put((artifact / "manifest.json").read_bytes()),
            store.put((artifact / "weights.safetensors").read_bytes()),
            learning_rate=0.1,
        ),
    )


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_learns_from_token_ids(text_artifacts: Path, tmp_path: Path, stage: int) -> None:
    # Seven samples: the last batch of the prefix is filled up.
    task = _task(text_artifacts / f"stage-{stage}", tmp_path, byte_patterns(7, seed=0))
    first = train(leased(task, learning_rate=1e-6))
    longer = train(leased(task, epochs=30))
    assert longer.loss < 0.9 * first.loss
    cached = [np.load(path) for path in (tmp_path / "state" / "features").glob("*.npy")]
    assert [(each.shape, each.dtype) for each in cached] == [((7, LENGTH, 8), np.float32)] * stage


def _floats(x: Array) -> Array:
    return x.astype(np.float32)


def _beyond_the_vocabulary(x: Array) -> Array:
    return np.where(x == x.max(), 300, x)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_floats, "this device's samples are numbers (float32), the model takes token ids (int64)"),
        (
            _beyond_the_vocabulary,
            "this device's samples have token ids up to 300, the model a vocabulary of 128",
        ),
        (lambda x: x[:, 1:], "this device's samples have shape [15], the model takes [16]"),
    ],
)
def test_samples_that_do_not_fit(
    text_artifacts: Path, tmp_path: Path, stage: int, change: object, said: str
) -> None:
    samples = byte_patterns(6, seed=0)
    changed = Samples(np.ascontiguousarray(change(samples.x)), samples.y, 3)  # type: ignore[operator]
    task = _task(text_artifacts / f"stage-{stage}", tmp_path, changed)
    with pytest.raises(RunError, match=re.escape(said)) as raised:
        train(task)
    assert "\n" not in str(raised.value)
    assert not task.update_path.exists()


def test_token_ids_for_a_model_of_numbers(artifacts: Path, tmp_path: Path) -> None:
    ids = Samples(np.ones((4, 1, 8, 8), np.int64), np.zeros(4, np.int64), 3)
    task = _task(artifacts / "stage-0", tmp_path, ids)
    said = "this device's samples are token ids (int64), the model takes numbers (float32)"
    with pytest.raises(RunError, match=re.escape(said)):
        train(task)
