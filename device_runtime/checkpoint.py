"""Where a device stands in a lease, so that one that was interrupted goes on from there.

An uncompressed NumPy archive: it is written one tensor at a time, without a copy of the whole, and holds a checksum of each.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from frostline.device_runtime.engine import TrainingSession
from frostline.protocol.messages import Lease
from frostline.protocol.tensors import Array

CHECKPOINT = "checkpoint"
"""The folder's name below a device's."""
CHECKPOINT_SECONDS = 10.0
"""Training between two checkpoints: flash wears, and short leases need none."""
_PROGRESS, _STATE = "progress", "state/"


@dataclass
class Progress:
    """What training a lease has shown so far.

    Attributes
    ----------
    correct : int
        Held-out samples classified correctly before the first step.
    steps : int
        Steps done.
    loss, squared_loss : float
        Sums over the steps.
    seconds : float
        Time it took, without the pauses.
    """

    correct: int = 0
    steps: int = 0
    loss: float = 0.0
    squared_loss: float = 0.0
    seconds: float = 0.0

    def add(self, loss: float, seconds: float) -> None:
        """Count a step with this loss; `seconds` is the time it took up to here."""
        self.steps += 1
        self.loss += loss
        self.squared_loss += loss**2
        self.seconds = seconds


class Checkpoint:
    """The checkpoint of one lease; those of other leases are dropped.

    Parameters
    ----------
    folder : Path
        Its folder.
    lease : Lease
        The lease; after a restart of the server the same one may offer another form of the stage.
    fingerprint : str
        That of the samples it is trained with.
    """

    def __init__(self, folder: Path, lease: Lease, fingerprint: str) -> None:
        identity = f"{lease.model_dump_json()} {fingerprint}"
        self._path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
        self._written = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path != self._path:
                path.unlink(missing_ok=True)

    def resume(self, session: TrainingSession) -> Progress | None:
        """Bring a session to where the lease stands.

        Returns
        -------
        Progress or None
            None if there is no checkpoint or it is damaged; the session is to be loaded then.
        """
        try:
            with np.load(self._path, allow_pickle=False) as archive:
                correct, steps, *sums = archive[_PROGRESS].tolist()
                progress = Progress(int(correct), int(steps), *sums)
                session.restore(_State(archive))
        except FileNotFoundError:
            return None
        except Exception:  # A damaged archive raises almost anything, and training anew is always right.
            self.remove()
            return None
        return progress

    def keep(self, progress: Progress, session: TrainingSession) -> None:
        """Write where the lease stands, if it is time to; without the room for it, training goes on all the same."""
        if time.monotonic() - self._written < CHECKPOINT_SECONDS:
            return
        arrays = {_STATE + name: value for name, value in session.state().items()}
        arrays[_PROGRESS] = np.array(astuple(progress), np.float64)
        unfinished = self._path.with_suffix(".writing")
        with contextlib.suppress(OSError):
            with unfinished.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self._path)
        unfinished.unlink(missing_ok=True)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Drop it: the lease is done, or it is damaged."""
        self._path.unlink(missing_ok=True)


class _State(Mapping[str, Array]):
    """The tensors of an archive, each read when it is asked for."""

    def __init__(self, archive: Mapping[str, Array]) -> None:
        self._archive = archive

    def __getitem__(self, name: str) -> Array:
        return self._archive[_STATE + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(_STATE) for name in self._archive if name != _PROGRESS)

    def __len__(self) -> int:
        return len(self._archive) - 1
