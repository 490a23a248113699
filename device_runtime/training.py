"""Training one lease: the part of the agent that runs in a worker process, away from the network."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

from frostline.datasets.load import load_samples
from frostline.datasets.samples import Samples
from frostline.device_runtime.checkpoint import CHECKPOINT, Checkpoint, Progress
from frostline.device_runtime.engine import TrainingSession, open_runtime
from frostline.device_runtime.error_feedback import ERROR_FEEDBACK, ErrorFeedback
from frostline.device_runtime.feature_cache import FeatureCache
from frostline.protocol.blobs import BlobStore, write_atomically
from frostline.protocol.errors import RunError
from frostline.protocol.manifest import StageManifest, decode_manifest
from frostline.protocol.messages import Lease, TrainingMetrics
from frostline.protocol.tensors import Array, decode_tensors
from frostline.protocol.update_encoding import decode_update, encode_update

_KINDS = {"float32": "numbers (float32)", "int64": "token ids (int64)"}

HELD_OUT_EVERY = 10
"""When a run evaluates on devices, every tenth sample is kept out of training."""


@dataclass(frozen=True)
class TrainingTask:
    """Everything a worker needs, in values that travel between processes.

    Attributes
    ----------
    data : str
        Name or folder of the device's samples.
    state_folder : Path
        The device's folder: downloaded content, cached features and the checkpoint.
    update_path : Path
        Where the update is written, whole or not at all.
    """

    data: str
    state_folder: Path
    update_path: Path
    lease: Lease


def train(task: TrainingTask) -> TrainingMetrics:
    """Train a stage for the task's epochs and write the update: new minus received values, encoded as the lease asks.

    Training that was interrupted goes on from its last checkpoint; see `frostline.device_runtime.checkpoint`. What
    encoding loses waits in the device's folder until the update is settled; see
    `frostline.device_runtime.error_feedback`.

    Raises
    ------
    FrostlineError
        If the artifact is corrupted, does not fit the samples, or cannot be executed; or if the loss is not finite.
    """
    started = time.perf_counter()
    store = BlobStore(task.state_folder / "blobs")
    manifest = decode_manifest(store.read(task.lease.manifest), "received manifest")
    samples = _samples(task.data)
    _check_fit(samples, manifest)
    runtime = open_runtime(manifest.engine)
    fingerprint = samples.fingerprint()
    # Before the features: it drops the checkpoint of another lease, whose room they may need.
    checkpoint = Checkpoint(task.state_folder / CHECKPOINT, task.lease, fingerprint)
    cache = FeatureCache(task.state_folder / "features")
    features = cache.features(samples.x, fingerprint, manifest, runtime, store)
    received = decode_tensors(store.read(task.lease.weights), manifest.trained, "received weights")
    session = runtime.open_stage(manifest, store)

    held_out = np.arange(len(samples)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    held_out &= task.lease.evaluate
    evaluated = np.flatnonzero(held_out)
    chosen = np.flatnonzero(~held_out)
    progress = checkpoint.resume(session)
    if progress is None:
        session.load(received, task.lease.seed)
        correct = _count_correct(session, features, samples.y, evaluated, manifest.micro_batch)
        progress = Progress(correct=correct)
    started -= progress.seconds
    batches = _batches(chosen, manifest.batch, task.lease.epochs, task.lease.seed)
    for batch in islice(batches, progress.steps, None):
        parts = _parts(features, samples.y, batch, manifest.micro_batches)
        loss, _ = session.step(parts, task.lease.learning_rate)
        progress.add(loss, time.perf_counter() - started)
        if not np.isfinite(loss):
            raise RunError(
                f"the loss is not finite after {progress.steps} steps; lower the run's learning rate"
            )
        checkpoint.keep(progress, session)
    update = {name: value - received[name] for name, value in session.trained().items()}
    # A loss is taken before its step: the last step shows in the values only.
    if not all(np.isfinite(value).all() for value in update.values()):
        raise RunError(
            f"the update is not finite after {progress.steps} steps; lower the run's learning rate"
        )
    try:
        _write(update, manifest, task)
    except OSError:
        # The checkpoint must not take the update's room.
        checkpoint.remove()
        _write(update, manifest, task)
    checkpoint.remove()
    return TrainingMetrics(
        samples=len(chosen),
        steps=progress.steps,
        loss=progress.loss / progress.steps,
        squared_loss=progress.squared_loss / progress.steps,
        seconds=time.perf_counter() - started,
        evaluated=len(evaluated),
        correct=progress.correct,
    )


def _write(update: dict[str, Array], manifest: StageManifest, task: TrainingTask) -> None:
    write_atomically(task.update_path, _encoded(update, manifest, task))


def _encoded(update: dict[str, Array], manifest: StageManifest, task: TrainingTask) -> bytes:
    if task.lease.encoding.is_exact:
        return encode_update(update, manifest, task.lease.encoding)
    feedback = ErrorFeedback(task.state_folder / ERROR_FEEDBACK)
    carried = feedback.carried(task.lease.run, manifest)
    wanted = {name: value + carried[name] for name, value in update.items()} if carried else update
    content = encode_update(wanted, manifest, task.lease.encoding)
    sent = decode_update(content, manifest, task.lease.encoding, "encoded update")
    lost = {name: value - sent[name] for name, value in wanted.items()}
    feedback.hold(task.lease.lease, task.lease.run, manifest, lost)
    return content


@lru_cache(maxsize=1)
def _samples(source: str) -> Samples:
    return load_samples(source, "train")


def _check_fit(samples: Samples, manifest: StageManifest) -> None:
    if samples.x.shape[1:] != manifest.sample_shape:
        raise RunError(
            f"this device's samples have shape {list(samples.x.shape[1:])}, "
            f"the model takes {list(manifest.sample_shape)}"
        )
    taken, vocabulary = manifest.samples.dtype, manifest.samples.vocabulary
    if samples.x.dtype != taken:
        raise RunError(
            f"this device's samples are {_KINDS[samples.x.dtype.name]}, the model takes {_KINDS[taken]}"
        )
    if vocabulary is not None and samples.x.size and int(samples.x.max()) >= vocabulary:
        raise RunError(
            f"this device's samples have token ids up to {samples.x.max()}, the model a vocabulary of {vocabulary}"
        )
    if samples.classes > manifest.classes:
        raise RunError(f"this device's samples have {samples.classes} classes, the model {manifest.classes}")


def _batches(chosen: Array, batch: int, epochs: int, seed: int) -> Iterator[Array]:
    """Shuffled batches of exactly `batch` indices.

    What is left over at the end of an epoch opens the next one; a device with fewer samples than a batch repeats
    some, since the program's batch is fixed.
    """
    random = np.random.default_rng(seed)
    order = np.concatenate([random.permutation(chosen) for _ in range(epochs)])
    if len(order) < batch:
        order = np.resize(order, batch)
    for start in range(0, len(order) - batch + 1, batch):
        yield order[start : start + batch]


def _parts(features: Array, y: Array, batch: Array, count: int) -> Iterator[tuple[Array, Array]]:
    """The micro-batches of a batch, each read from the cache when its turn comes."""
    for rows in np.split(batch, count):
        yield np.ascontiguousarray(features[rows]), y[rows]


def _count_correct(session: TrainingSession, features: Array, y: Array, chosen: Array, batch: int) -> int:
    correct = 0
    for start in range(0, len(chosen), batch):
        rows = chosen[start : start + batch]
        # The program's batch is fixed: the last one is filled up by repeating, and only its own rows are counted.
        logits = session.evaluate(np.ascontiguousarray(features[np.resize(rows, batch)]))
        correct += int((logits[: len(rows)].argmax(1) == y[rows]).sum())
    return correct
