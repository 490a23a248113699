"""Reads the handwritten digits that come with scikit-learn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from frostline.datasets.samples import SPLITS, Samples, Split
from frostline.protocol.errors import UsageError

# Mean and population standard deviation of images / 16 over the 1437 images of the training split, in float64.
# Held here so that every device scales alike, whichever part of the data set it holds; a test recomputes them.
DIGITS_MEAN = 0.30538339422407795
DIGITS_STD = 0.3761191680900195


def read_digits(split: Split) -> Samples:
    """Read one part of the digits, which are split 80/20 by class with a fixed seed.

    Parameters
    ----------
    split : {"train", "test"}
        Which part to read.

    Returns
    -------
    Samples
        Normalised images of shape (samples, 1, 8, 8) in 10 classes.

    Raises
    ------
    UsageError
        scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UsageError(
            "data set digits: scikit-learn is not installed; install frostline[emulate]"
        ) from error
    digits = load_digits()
    labels: NDArray[np.int64] = np.asarray(digits.target, dtype=np.int64)
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    chosen = parts[SPLITS.index(split)]
    x = ((digits.images[chosen, np.newaxis] / 16 - DIGITS_MEAN) / DIGITS_STD).astype(np.float32)
    return Samples(x=x, y=labels[chosen], classes=10)
