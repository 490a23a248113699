"""Reads Fashion-MNIST, and the IDX files that it is stored in."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from frostline.datasets.conversion import checked_labels, normalised
from frostline.datasets.files import MAX_FILE_BYTES, find_files, reading
from frostline.datasets.samples import Samples, Split
from frostline.protocol.errors import UsageError

IDX_UNSIGNED_BYTE = 0x08

# The values in common use, over images / 255 of the training split.
FASHION_MNIST_MEAN, FASHION_MNIST_STD = (0.2860,), (0.3530,)


def read_fashion_mnist(split: Split) -> Samples:
    """Read one split of Fashion-MNIST from its IDX files, plain or gzipped.

    Parameters
    ----------
    split : {"train", "test"}
        Which part to read.

    Returns
    -------
    Samples
        Normalised images of shape (samples, 1, 28, 28) in 10 classes.

    Raises
    ------
    UsageError
        The files are missing, corrupt or do not hold such images and labels.
    """
    stem = "train" if split == "train" else "t10k"
    images_path, labels_path = find_files(
        data_set="fashion-mnist",
        names=(f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"),
        folders=(Path("/usr/share/datasets/fashion-mnist"), Path("data/FashionMNIST/raw")),
        remedy="apt install dataset-fashion-mnist, or set FROSTLINE_DATA",
    )
    images = _read_idx(images_path, rank=3)
    labels = _read_idx(labels_path, rank=1)
    if images.shape[1:] != (28, 28):
        raise UsageError(
            f"{images_path}: images are {images.shape[1]} x {images.shape[2]}, not 28 x 28; replace the file"
        )
    if len(images) != len(labels):
        raise UsageError(
            f"{images_path}: {len(images)} images but {len(labels)} labels in {labels_path.name}; "
            "replace both files"
        )
    y = checked_labels(labels, classes=10, path=labels_path)
    return Samples(
        x=normalised(images[:, np.newaxis], FASHION_MNIST_MEAN, FASHION_MNIST_STD), y=y, classes=10
    )


def _read_idx(path: Path, rank: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes.

    The format is two zero bytes, the element type, the number of dimensions, each dimension as a big-endian 32-bit
    count, and then the elements.
    """
    with reading(path) as stream:
        header = stream.read(4 + 4 * rank)
        shape = _idx_shape(header, rank, path)
        size = math.prod(shape)
        # One byte more than announced tells a file that is too long, without reading all of it.
        payload = stream.read(size + 1)
    if len(payload) != size:
        relation = "more" if len(payload) > size else f"only {len(payload)}"
        raise UsageError(f"{path}: the header announces {size} bytes but {relation} follow; replace the file")
    return np.frombuffer(payload, dtype=np.uint8).reshape(shape)


def _idx_shape(header: bytes, rank: int, path: Path) -> tuple[int, ...]:
    expected = bytes((0, 0, IDX_UNSIGNED_BYTE, rank))
    if not expected.startswith(header[:4]):
        raise UsageError(
            f"{path}: starts with 0x{header[:4].hex()}, not 0x{expected.hex()} as an IDX file of unsigned bytes "
            f"in {rank} dimensions does; replace the file"
        )
    if len(header) != 4 + 4 * rank:
        raise UsageError(f"{path}: ends inside the IDX header; replace the file")
    shape = struct.unpack(f">{rank}I", header[4:])
    if not 0 < math.prod(shape) <= MAX_FILE_BYTES:
        raise UsageError(
            f"{path}: the header announces the shape {shape}, which is not 1 to {MAX_FILE_BYTES} bytes; "
            "replace the file"
        )
    return shape
