"""Converts stored images, token ids and labels to the arrays that `Samples` takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from frostline.protocol.errors import UsageError


def normalised(images: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """Scale images to [0, 1], then by mean and deviation per channel.

    Parameters
    ----------
    images : ndarray of uint8, shape (samples, channels, height, width)
        Pixels.
    mean, std : sequence of float, length channels
        Mean and standard deviation of each channel, over pixels in [0, 1].

    Returns
    -------
    ndarray of float32, shape (samples, channels, height, width)
        A scaled copy.
    """
    x = images.astype(np.float32)
    x /= 255
    x -= np.asarray(mean, dtype=np.float32)[:, np.newaxis, np.newaxis]
    x /= np.asarray(std, dtype=np.float32)[:, np.newaxis, np.newaxis]
    return x


def checked_labels(labels: NDArray[np.integer[Any]], classes: int, path: Path) -> NDArray[np.int64]:
    """Convert the labels of a file to int64 once they are known to be in range.

    Parameters
    ----------
    labels : ndarray of any integer dtype, shape (samples,)
        At least one label.
    classes : int
        Number of classes of the data set.
    path : Path
        File that the labels come from, for the error.

    Returns
    -------
    ndarray of int64, shape (samples,)
        A copy.

    Raises
    ------
    UsageError
        A label is outside ``0 .. classes - 1``.
    """
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= classes:
        raise UsageError(
            f"{path}: labels span {lowest}..{highest} but there are {classes} classes; use 0..{classes - 1}"
        )
    return labels.astype(np.int64)


def checked_token_ids(ids: NDArray[np.integer[Any]], path: Path) -> NDArray[np.int64]:
    """Convert the token ids of a file to int64 once they are known to be in order.

    Parameters
    ----------
    ids : ndarray of an integer dtype that int64 holds, shape (samples, tokens, ...)
        Token ids.
    path : Path
        File that they come from, for the error.

    Returns
    -------
    ndarray of int64, same shape
        The ids; not copied where they are int64 already.

    Raises
    ------
    UsageError
        There is no axis of tokens, or an id is negative.
    """
    if ids.ndim < 2:
        raise UsageError(
            f"{path}: tensor 'x' holds integers of shape {ids.shape}; store token ids as (samples, tokens), and numbers "
            "as floating point"
        )
    if ids.size and int(ids.min()) < 0:
        raise UsageError(f"{path}: tensor 'x' holds the token id {ids.min()}; number the ids from 0")
    return ids.astype(np.int64, copy=False)
