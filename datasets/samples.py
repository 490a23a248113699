"""Labelled samples in memory: what a device trains on and what the server evaluates with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from frostline.protocol.errors import UsageError

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


# Generated equality would compare the arrays element by element and fail; `fingerprint` compares contents.
@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs with one class label each.

    Parameters
    ----------
    x : ndarray of float32, shape (samples, *features), or of int64, shape (samples, tokens, ...)
        Inputs, already scaled the way the model expects them, NaN and infinity let through; or token ids from zero on.
    y : ndarray of int64, shape (samples,)
        Labels, each in ``0 .. classes - 1``.
    classes : int
        Number of classes of the task, which may exceed the number of labels that occur here.

    Raises
    ------
    UsageError
        A dtype or shape differs from the above, there are no samples, a token id is negative, or a label is out of
        range.
    """

    x: NDArray[np.float32] | NDArray[np.int64]
    y: NDArray[np.int64]
    classes: int

    def __post_init__(self) -> None:
        self._check_arrays()
        self._check_labels()

    def _check_arrays(self) -> None:
        if self.x.dtype not in (np.float32, np.int64):
            raise UsageError(f"samples: x is {self.x.dtype}; convert it to float32, or token ids to int64")
        if self.y.dtype != np.int64:
            raise UsageError(f"samples: y is {self.y.dtype}; convert it to int64")
        if self.x.ndim < 1 or self.y.ndim != 1:
            raise UsageError(
                f"samples: x has shape {self.x.shape} and y has shape {self.y.shape}; "
                "give x as (samples, *features) and y as (samples,)"
            )
        if len(self.x) != len(self.y):
            raise UsageError(
                f"samples: x holds {len(self.x)} samples but y holds {len(self.y)} labels; "
                "give one label per sample"
            )
        if len(self.y) == 0:
            raise UsageError("samples: x and y are empty; give at least one sample")
        if self.x.dtype == np.int64:
            self._check_token_ids()

    def _check_token_ids(self) -> None:
        if self.x.ndim < 2:
            raise UsageError(
                f"samples: x holds token ids of shape {self.x.shape}; give them as (samples, tokens)"
            )
        if self.x.size and int(self.x.min()) < 0:
            raise UsageError(f"samples: x holds the token id {self.x.min()}; number the ids from 0")

    def _check_labels(self) -> None:
        if self.classes < 1:
            raise UsageError(f"samples: classes is {self.classes}; give at least 1")
        lowest, highest = int(self.y.min()), int(self.y.max())
        if lowest < 0 or highest >= self.classes:
            raise UsageError(
                f"samples: y has labels {lowest}..{highest} but there are {self.classes} classes; "
                f"use labels 0..{self.classes - 1} or raise classes"
            )

    def __len__(self) -> int:
        return len(self.y)

    def class_counts(self) -> list[int]:
        """Count the samples of each class.

        Returns
        -------
        list of int, length `classes`
            Entry ``c`` is the number of samples labelled ``c``.
        """
        return [int(count) for count in np.bincount(self.y, minlength=self.classes)]

    def some(self, count: int | None, seed: int) -> Samples:
        """Samples drawn without replacement, in their order; all of them for None or where there are no more.

        Parameters
        ----------
        count : int or None
            How many, at least 1.
        seed : int
            The same seed draws the same.
        """
        if count is None or count >= len(self):
            return self
        return self.take(np.sort(np.random.default_rng(seed).permutation(len(self))[:count]))

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Samples:
        """Copy the samples at the given positions, in that order; a position may be repeated.

        Parameters
        ----------
        indices : sequence of int or ndarray of int64, shape (taken,)
            Positions in ``0 .. len(self) - 1``.

        Returns
        -------
        Samples
            The taken samples, with the same `classes`.

        Raises
        ------
        UsageError
            No position is given, or one is out of range.
        """
        positions = np.asarray(indices, dtype=np.int64)
        if positions.ndim != 1 or len(positions) == 0:
            raise UsageError(
                f"samples: indices have shape {positions.shape}; give a list of at least one position"
            )
        if int(positions.min()) < 0 or int(positions.max()) >= len(self):
            raise UsageError(
                f"samples: indices span {positions.min()}..{positions.max()} but there are {len(self)} samples; "
                f"use 0..{len(self) - 1}"
            )
        return Samples(x=self.x[positions], y=self.y[positions], classes=self.classes)

    def fingerprint(self) -> str:
        """Digest the contents, so that two runs can show that they used the same samples.

        Returns
        -------
        str
            SHA-256 in hexadecimal over `classes`, the dtype of `x`, the shapes and the little-endian bytes of `x` and
            `y`.
        """
        header = f"classes={self.classes} x={self.x.dtype.name}{self.x.shape} y={self.y.shape}\n"
        digest = hashlib.sha256(header.encode())
        little_endian = self.x.dtype.newbyteorder("<")
        digest.update(np.ascontiguousarray(self.x, dtype=little_endian).reshape(-1).data)
        digest.update(np.ascontiguousarray(self.y, dtype="<i8").data)
        return digest.hexdigest()
