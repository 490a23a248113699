"""Reads CIFAR-10 and CIFAR-100 from the files of their binary versions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from frostline.datasets.conversion import checked_labels, normalised
from frostline.datasets.files import MAX_FILE_BYTES, find_files, reading
from frostline.datasets.samples import Samples, Split
from frostline.protocol.errors import UsageError

# The values in common use, over images / 255 of the training splits.
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


def read_cifar10(split: Split) -> Samples:
    """Read one split of CIFAR-10 from the files of its binary version.

    Parameters
    ----------
    split : {"train", "test"}
        Which part to read.

    Returns
    -------
    Samples
        Normalised images of shape (samples, 3, 32, 32) in 10 classes.

    Raises
    ------
    UsageError
        The files are missing or one of them is corrupt.
    """
    batches = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
    paths = find_files(
        data_set="cifar10",
        names=batches if split == "train" else ("test_batch.bin",),
        folders=(Path("data/cifar-10-batches-bin"),),
        remedy="unpack the binary version of CIFAR-10 there, or set FROSTLINE_DATA",
    )
    return _read_cifar(paths, label_bytes=1, classes=10, mean=CIFAR10_MEAN, std=CIFAR10_STD)


def read_cifar100(split: Split) -> Samples:
    """Read one split of CIFAR-100 from the files of its binary version.

    Parameters
    ----------
    split : {"train", "test"}
        Which part to read.

    Returns
    -------
    Samples
        Normalised images of shape (samples, 3, 32, 32) in 100 classes, the fine ones.

    Raises
    ------
    UsageError
        The files are missing or one of them is corrupt.
    """
    paths = find_files(
        data_set="cifar100",
        names=(f"{split}.bin",),
        folders=(Path("data/cifar-100-binary"),),
        remedy="unpack the binary version of CIFAR-100 there, or set FROSTLINE_DATA",
    )
    return _read_cifar(paths, label_bytes=2, classes=100, mean=CIFAR100_MEAN, std=CIFAR100_STD)


def _read_cifar(
    paths: Sequence[Path], label_bytes: int, classes: int, mean: Sequence[float], std: Sequence[float]
) -> Samples:
    parts = [_read_cifar_file(path, label_bytes, classes) for path in paths]
    images = np.concatenate([part_images for part_images, _ in parts])
    labels = np.concatenate([part_labels for _, part_labels in parts])
    return Samples(x=normalised(images, mean, std), y=labels, classes=classes)


def _read_cifar_file(
    path: Path, label_bytes: int, classes: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read one file of the binary version of CIFAR: records of labels and a (3, 32, 32) image of bytes.

    Where a record has two labels the first is the coarse one; the last is the class.
    """
    record = label_bytes + 3 * 32 * 32
    with reading(path) as stream:
        content = stream.read(MAX_FILE_BYTES + 1)
    if not content or len(content) % record or len(content) > MAX_FILE_BYTES:
        raise UsageError(
            f"{path}: is not a whole number of {record}-byte records up to {MAX_FILE_BYTES} bytes; replace the file"
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, record)
    labels = checked_labels(records[:, label_bytes - 1], classes, path)
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), labels
