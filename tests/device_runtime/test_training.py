from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from frostline.datasets.folder import save_samples
from frostline.datasets.samples import Samples
from frostline.device_runtime.engine import open_runtime
from frostline.device_runtime.error_feedback import ERROR_FEEDBACK, ErrorFeedback
from frostline.device_runtime.feature_cache import FeatureCache
from frostline.device_runtime.training import TrainingTask, train
from frostline.protocol.blobs import BlobStore
from frostline.protocol.errors import CorruptContent, FrostlineError, RunError, UsageError
from frostline.protocol.manifest import StageManifest, decode_manifest
from frostline.protocol.messages import UpdateEncoding
from frostline.protocol.tensors import Array, decode_tensors, encode_tensors
from frostline.protocol.update_encoding import decode_update
from tests.device_runtime.leases import lease_of, leased

BATCH = 4


def make_samples(count: int, shape: tuple[int, ...] = (1, 8, 8), classes: int = 3) -> Samples:
    random = np.random.default_rng(7)
    x = random.normal(size=(count, *shape)).astype(np.float32)
    return Samples(x=x, y=np.arange(count, dtype=np.int64) % classes, classes=classes)


@dataclass
class Device:
    """A device's folder after fetching, and the task that trains what it fetched."""

    task: TrainingTask
    manifest: StageManifest
    weights: dict[str, Array]

    @property
    def store(self) -> BlobStore:
        return BlobStore(self.task.state_folder / "blobs")

    def update(self) -> dict[str, Array]:
        return decode_tensors(self.task.update_path.read_bytes(), self.manifest.trained, "update")

    def written(self) -> list[Path]:
        folder = self.task.update_path.parent
        return sorted(folder.iterdir()) if folder.exists() else []


def prepare(artifact: Path, folder: Path, samples: Samples) -> Device:
    data = folder / "data"
    data.mkdir(parents=True)
    save_samples(samples, data / "samples.safetensors")
    store = BlobStore(folder / "state" / "blobs")
    for path in (artifact / "files").iterdir():
        if path.is_file():
            store.put(path.read_bytes())
    manifest_content = (artifact / "manifest.json").read_bytes()
    weights_content = (artifact / "weights.safetensors").read_bytes()
    manifest = decode_manifest(manifest_content, "manifest")
    task = TrainingTask(
        data=str(data),
        state_folder=folder / "state",
        update_path=folder / "outbox" / "update.safetensors",
        lease=lease_of(store.put(manifest_content), store.put(weights_content), epochs=2, seed=3),
    )
    return Device(task, manifest, decode_tensors(weights_content, manifest.trained, "weights"))


@pytest.fixture(params=[0, 1], ids=["first stage", "second stage"])
def artifact(request: pytest.FixtureRequest, artifacts: Path) -> Path:
    return artifacts / f"stage-{request.param}"


def test_the_update_is_the_new_minus_the_received_values(artifact: Path, tmp_path: Path) -> None:
    samples = make_samples(8)
    device = prepare(artifact, tmp_path, samples)
    metrics = train(leased(device.task, epochs=1))
    assert (metrics.samples, metrics.steps, metrics.evaluated, metrics.correct) == (8, 2, 0, 0)

    # The same two steps by hand, over features the prefix gives batch by batch.
    runtime = open_runtime("executorch")
    order = np.random.default_rng(device.task.lease.seed).permutation(8)
    features: list[Array] = []
    for start in (0, BATCH):
        rows = samples.x[start : start + BATCH]
        for program in device.manifest.prefix:
            rows = runtime.open_prefix(program, device.store).run(rows)
        features.append(rows)
    inputs = np.concatenate(features)
    session = runtime.open_stage(device.manifest, device.store)
    session.load(device.weights)
    losses = [
        session.step([(inputs[rows], samples.y[rows])], 0.05)[0] for rows in (order[:BATCH], order[BATCH:])
    ]
    update = device.update()
    for name, value in session.trained().items():
        assert update[name].dtype == np.float32
        np.testing.assert_array_equal(update[name], value - device.weights[name])
    assert metrics.loss == pytest.approx(np.mean(losses))
    assert metrics.squared_loss == pytest.approx(np.mean(np.square(losses)))
    assert metrics.squared_loss is not None and metrics.squared_loss > metrics.loss**2
    assert any(np.abs(update[spec.name]).max() > 0 for spec in device.manifest.parameters)
    assert bool(device.manifest.prefix) == artifact.name.endswith("1")


def test_what_encoding_loses_is_in_the_next_update(artifact: Path, tmp_path: Path) -> None:
    device = prepare(artifact, tmp_path, make_samples(8))
    train(device.task)
    exact = device.update()
    encoding = UpdateEncoding(values="int8", share=0.3)
    feedback = ErrorFeedback(device.task.state_folder / ERROR_FEEDBACK)

    def sent(task: TrainingTask) -> dict[str, Array]:
        train(task)
        return decode_update(task.update_path.read_bytes(), device.manifest, encoding, "update")

    first = sent(leased(device.task, encoding=encoding))
    feedback.settle(device.task.lease.lease, counted=True)
    second = sent(leased(device.task, encoding=encoding))
    feedback.settle(device.task.lease.lease, counted=True)
    left = feedback.carried(device.task.lease.run, device.manifest)
    assert left is not None
    for spec in device.manifest.parameters:
        name = spec.name
        assert np.abs(first[name] - exact[name]).max() > 0
        np.testing.assert_allclose(first[name] + second[name] + left[name], 2 * exact[name], atol=1e-6)
    for spec in device.manifest.statistics:
        np.testing.assert_array_equal(first[spec.name], exact[spec.name])


def test_micro_batches_give_the_update_of_the_whole_batch(variants: Path, tmp_path: Path) -> None:
    samples, updates, metrics = make_samples(20), {}, {}
    for variant in ("whole", "micro2"):
        device = prepare(variants / "executorch" / variant, tmp_path / variant, samples)
        assert device.manifest.variant == variant
        found = train(leased(device.task, evaluate=True))
        updates[variant] = device.update()
        metrics[variant] = (
            found.samples,
            found.steps,
            found.evaluated,
            found.correct,
            pytest.approx(found.loss),
        )
    assert metrics["micro2"] == metrics["whole"]
    for name, value in updates["whole"].items():
        np.testing.assert_allclose(updates["micro2"][name], value, rtol=1e-4, atol=1e-6)


def test_training_learns(artifact: Path, tmp_path: Path) -> None:
    device = prepare(artifact, tmp_path, make_samples(12))
    first = train(leased(device.task, epochs=1, learning_rate=1e-6))
    longer = train(leased(device.task, epochs=25))
    assert longer.loss < first.loss
    assert longer.steps == 25 * first.steps == 75


def test_the_update_depends_on_the_seed_alone(artifact: Path, tmp_path: Path) -> None:
    device = prepare(artifact, tmp_path, make_samples(10))
    contents = []
    for seed in (3, 3, 4):
        train(leased(device.task, seed=seed))
        contents.append(device.task.update_path.read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_dropout_starts_from_the_seed_of_the_lease(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from frostline.device_runtime.executorch_engine import ExecuTorchTrainingSession

    device, load, seeds = prepare(artifact, tmp_path, make_samples(4)), ExecuTorchTrainingSession.load, []

    def seen(session: ExecuTorchTrainingSession, tensors: Mapping[str, Array], seed: int = 0) -> None:
        seeds.append(seed)
        load(session, tensors, seed)

    monkeypatch.setattr(ExecuTorchTrainingSession, "load", seen)
    train(leased(device.task, epochs=1, seed=7))
    assert seeds == [7]


@pytest.mark.parametrize(("count", "held_out"), [(9, 0), (10, 1), (47, 4)])
def test_every_tenth_sample_is_held_out_where_devices_evaluate(
    artifacts: Path, tmp_path: Path, count: int, held_out: int
) -> None:
    samples = make_samples(count)
    device = prepare(artifacts / "stage-0", tmp_path / "held out", samples)
    metrics = train(leased(device.task, evaluate=True, epochs=1))
    assert (metrics.samples, metrics.evaluated) == (count - held_out, held_out)
    assert 0 <= metrics.correct <= held_out
    kept = samples.take([row for row in range(count) if row % 10 != 9])
    without = prepare(artifacts / "stage-0", tmp_path / "without", kept)
    train(leased(without.task, epochs=1))
    assert without.task.update_path.read_bytes() == device.task.update_path.read_bytes()


def test_evaluation_counts_what_the_received_weights_get_right(artifacts: Path, tmp_path: Path) -> None:
    samples = make_samples(70)
    device = prepare(artifacts / "stage-0", tmp_path, samples)
    metrics = train(leased(device.task, evaluate=True, epochs=1))
    session = open_runtime("executorch").open_stage(device.manifest, device.store)
    session.load(device.weights)
    rows = np.arange(9, 70, 10)
    padded = np.resize(rows, 2 * BATCH)
    logits = np.concatenate([session.evaluate(samples.x[padded[s : s + BATCH]]) for s in (0, BATCH)])
    assert metrics.correct == (logits[: len(rows)].argmax(1) == samples.y[rows]).sum()


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (4, 3)])
def test_a_device_with_fewer_samples_than_a_batch_repeats_some(
    artifact: Path, tmp_path: Path, epochs: int, steps: int
) -> None:
    device = prepare(artifact, tmp_path, make_samples(3))
    metrics = train(leased(device.task, epochs=epochs))
    assert (metrics.samples, metrics.steps) == (3, steps)
    assert np.isfinite(metrics.loss)
    assert device.update().keys() == device.weights.keys()


@pytest.mark.parametrize(
    ("samples", "complaint"),
    [
        (make_samples(8, (8, 8)), r"samples have shape \[8, 8\], the model takes \[1, 8, 8\]"),
        (make_samples(8, (1, 8, 9)), r"samples have shape \[1, 8, 9\], the model takes \[1, 8, 8\]"),
        (make_samples(8, classes=4), "samples have 4 classes, the model 3"),
    ],
    ids=["dimensions", "size", "classes"],
)
def test_samples_that_do_not_fit_are_refused(
    artifact: Path, tmp_path: Path, samples: Samples, complaint: str
) -> None:
    device = prepare(artifact, tmp_path, samples)
    with pytest.raises(RunError, match=complaint):
        train(device.task)
    assert device.written() == []


def test_a_device_with_fewer_classes_takes_part(artifacts: Path, tmp_path: Path) -> None:
    device = prepare(artifacts / "stage-0", tmp_path, make_samples(8, classes=2))
    assert train(device.task).samples == 8


@pytest.mark.parametrize(
    ("samples", "learning_rate", "complaint"),
    [
        (12, 1e30, "the loss is not finite after 2 steps; lower the run's learning rate"),
        (4, 1e39, "the update is not finite after 1 steps; lower the run's learning rate"),
    ],
    ids=["loss", "values of the last step"],
)
def test_training_that_diverges_fails_and_writes_nothing(
    artifact: Path, tmp_path: Path, samples: int, learning_rate: float, complaint: str
) -> None:
    device = prepare(artifact, tmp_path, make_samples(samples))
    with pytest.raises(RunError, match=complaint):
        train(leased(device.task, epochs=1, learning_rate=learning_rate))
    assert device.written() == []


def test_samples_that_are_not_finite_fail_and_write_nothing(artifact: Path, tmp_path: Path) -> None:
    samples = make_samples(8)
    samples.x[:] = np.nan
    device = prepare(artifact, tmp_path, samples)
    with pytest.raises(RunError, match="the loss is not finite after 1 steps"):
        train(device.task)
    assert device.written() == []


@pytest.mark.parametrize("content", ["manifest", "weights", "program"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_damaged_content_is_named_and_made_ready_to_be_fetched_again(
    artifacts: Path, tmp_path: Path, content: str, damage: str
) -> None:
    device = prepare(artifacts / "stage-1", tmp_path, make_samples(8))
    reference = {
        "manifest": device.task.lease.manifest,
        "weights": device.task.lease.weights,
        "program": device.manifest.training.file,
    }[content]
    path = device.store.path(reference)
    whole = path.read_bytes()
    path.unlink()
    if damage == "flipped":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptContent, match=reference.sha256):
        train(device.task)
    assert not device.store.has(reference)
    assert device.written() == []
    device.store.put(whole)
    train(device.task)
    assert len(device.written()) == 1


def test_weights_of_another_stage_are_refused(artifacts: Path, tmp_path: Path) -> None:
    device = prepare(artifacts / "stage-1", tmp_path, make_samples(8))
    other = device.store.put((artifacts / "stage-0" / "weights.safetensors").read_bytes())
    with pytest.raises(CorruptContent, match="received weights"):
        train(leased(device.task, weights=other))
    not_finite = {name: np.full_like(value, np.nan) for name, value in device.weights.items()}
    with pytest.raises(CorruptContent, match=r"received weights.*not finite"):
        train(leased(device.task, weights=device.store.put(encode_tensors(not_finite))))
    assert device.written() == []


def test_a_program_that_is_none_is_a_plain_error(artifacts: Path, tmp_path: Path) -> None:
    device = prepare(artifacts / "stage-0", tmp_path, make_samples(8))
    broken = device.store.put(b"not a program" * 100)
    training_program = device.manifest.training.model_copy(update={"file": broken})
    manifest = device.manifest.model_copy(update={"training": training_program})
    with pytest.raises(RunError, match="training program: ExecuTorch"):
        train(leased(device.task, manifest=device.store.put(manifest.encode())))
    assert device.written() == []


def test_samples_that_are_gone_are_named(artifacts: Path, tmp_path: Path) -> None:
    device = prepare(artifacts / "stage-0", tmp_path, make_samples(8))
    with pytest.raises(UsageError, match="nowhere"):
        train(replace(device.task, data=str(tmp_path / "nowhere")))


def test_an_engine_that_is_not_installed_is_named_with_what_brings_it(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = prepare(artifacts / "stage-0", tmp_path, make_samples(8))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FrostlineError, match=r"pip install 'frostline\[executorch\]'"):
        train(device.task)


def test_features_are_kept_between_leases(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = prepare(artifacts / "stage-1", tmp_path, make_samples(8))
    train(device.task)
    (features,) = (device.task.state_folder / "features").iterdir()
    before = features.stat().st_mtime_ns
    monkeypatch.setattr(
        FeatureCache, "_extend", lambda *arguments: pytest.fail("features were computed again")
    )
    train(device.task)
    assert features.stat().st_mtime_ns == before
