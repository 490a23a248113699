from __future__ import annotations

import gzip
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from frostline.datasets.load import Split, load_samples

SYSTEM_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def idx_bytes(elements: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, elements.ndim)) + struct.pack(f">{elements.ndim}I", *elements.shape)
    return header + elements.astype(np.uint8).tobytes()


def write_fashion_mnist(folder: Path, images: np.ndarray, labels: np.ndarray, zipped: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stem in ("train", "t10k"):
        for name, elements in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            content = idx_bytes(elements)
            path = folder / f"{stem}-{name}{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.skipif(
    not SYSTEM_FASHION_MNIST.is_dir(), reason=f"{SYSTEM_FASHION_MNIST} is absent (dataset-fashion-mnist)"
)
def test_system_fashion_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FROSTLINE_DATA", raising=False)
    test = load_samples("fashion-mnist", "test")
    assert test.x.shape == (10_000, 1, 28, 28)
    assert test.class_counts() == [1000] * 10
    assert abs(float(test.x.mean(dtype=np.float64))) < 0.02
    train = load_samples("fashion-mnist", "train")
    assert train.x.shape == (60_000, 1, 28, 28)
    assert abs(float(train.x.mean(dtype=np.float64))) < 0.001


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_fashion_mnist_files(data_root: Path, zipped: bool, split: Split) -> None:
    images = np.zeros((3, 28, 28))
    images[1, 2, 3] = 255
    write_fashion_mnist(data_root / "fashion-mnist", images, np.array([9, 0, 4]), zipped)
    samples = load_samples("fashion-mnist", split)
    assert samples.x.shape == (3, 1, 28, 28)
    assert samples.x.dtype == np.float32
    assert samples.y.tolist() == [9, 0, 4]
    assert samples.x[0, 0, 0, 0] == pytest.approx(-0.2860 / 0.3530)
    assert samples.x[1, 0, 2, 3] == pytest.approx((1 - 0.2860) / 0.3530)


def test_fashion_mnist_in_the_torchvision_folder(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The system's own copy, where there is one, would be found first.
    monkeypatch.setattr(
        Path, "is_file", lambda path: path.exists() and not path.is_relative_to(SYSTEM_FASHION_MNIST)
    )
    write_fashion_mnist(Path("data/FashionMNIST/raw"), np.zeros((1, 28, 28)), np.array([1]))
    assert len(load_samples("fashion-mnist", "test")) == 1


def test_missing_files_list_the_searched_places(
    data_root: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    message = refusal("fashion-mnist", "test")
    for expected in (
        "t10k-images-idx3-ubyte",
        str(data_root / "fashion-mnist"),
        "/usr/share/datasets/fashion-mnist",
        "data/FashionMNIST/raw",
        "apt install dataset-fashion-mnist",
    ):
        assert expected in message
    monkeypatch.delenv("FROSTLINE_DATA")
    assert "FROSTLINE_DATA is not set" in refusal("fashion-mnist")


GOOD_LABELS = idx_bytes(np.array([0, 1]))
GOOD_IMAGES = idx_bytes(np.zeros((2, 28, 28)))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (b"", GOOD_LABELS, "ends inside the IDX header"),
        (b"\x00\x00\x0d\x03" + GOOD_IMAGES[4:], GOOD_LABELS, "starts with 0x00000d03"),
        (GOOD_LABELS, GOOD_LABELS, "starts with 0x00000801"),
        (GOOD_IMAGES[:9], GOOD_LABELS, "ends inside the IDX header"),
        (GOOD_IMAGES[:-1], GOOD_LABELS, "announces 1568 bytes but only 1567 follow"),
        (GOOD_IMAGES + b"\x00", GOOD_LABELS, "announces 1568 bytes but more follow"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, GOOD_LABELS, "announces the shape"),
        (idx_bytes(np.zeros((0, 28, 28))), GOOD_LABELS, "announces the shape"),
        (idx_bytes(np.zeros((2, 14, 56))), GOOD_LABELS, "images are 14 x 56, not 28 x 28"),
        (GOOD_IMAGES, idx_bytes(np.array([0, 1, 2])), "2 images but 3 labels"),
        (GOOD_IMAGES, idx_bytes(np.array([0, 10])), "labels span 0..10 but there are 10 classes"),
    ],
    ids=[
        "empty",
        "wrong element type",
        "wrong rank",
        "cut header",
        "short",
        "long",
        "huge shape",
        "no images",
        "wrong image size",
        "counts differ",
        "label out of range",
    ],
)
def test_bad_idx_files_are_refused(
    data_root: Path, images: bytes, labels: bytes, message: str, refusal: Callable[..., str]
) -> None:
    folder = data_root / "fashion-mnist"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte").write_bytes(images)
    (folder / "train-labels-idx1-ubyte").write_bytes(labels)
    text = refusal("fashion-mnist")
    assert message in text
    assert str(folder) in text


GZIPPED_IMAGES = gzip.compress(GOOD_IMAGES, mtime=0)
INVALID_DEFLATE_BLOCK = b"\x07"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"not gzip", id="no gzip header"),
        pytest.param(GZIPPED_IMAGES[:-12], id="truncated"),
        pytest.param(GZIPPED_IMAGES[:-8] + bytes(8), id="wrong checksum"),
        pytest.param(GZIPPED_IMAGES[:10] + INVALID_DEFLATE_BLOCK + bytes(20), id="invalid block"),
    ],
)
def test_bad_gzip_files_are_refused(data_root: Path, content: bytes, refusal: Callable[..., str]) -> None:
    folder = data_root / "fashion-mnist"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(content)
    (folder / "train-labels-idx1-ubyte").write_bytes(GOOD_LABELS)
    assert re.search(
        r"train-images-idx3-ubyte\.gz: cannot be read \(.+\); replace the file", refusal("fashion-mnist")
    )
