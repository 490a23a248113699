from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from frostline.datasets.load import Split, load_samples


def cifar_record(labels: tuple[int, ...], red: int, green: int, blue: int) -> bytes:
    return bytes(labels) + bytes([red]) * 1024 + bytes([green]) * 1024 + bytes([blue]) * 1024


def test_cifar10_concatenates_its_batches(data_root: Path) -> None:
    folder = data_root / "cifar10"
    folder.mkdir()
    for number in range(1, 6):
        (folder / f"data_batch_{number}.bin").write_bytes(cifar_record((number,), 255, 0, 0))
    (folder / "test_batch.bin").write_bytes(cifar_record((9,), 0, 0, 255) + cifar_record((8,), 0, 0, 0))
    train, test = load_samples("cifar10", "train"), load_samples("cifar10", "test")
    assert train.x.shape == (5, 3, 32, 32)
    assert train.y.tolist() == [1, 2, 3, 4, 5]
    assert train.x[0, :, 31, 0] == pytest.approx(
        [(1 - 0.4914) / 0.2470, -0.4822 / 0.2435, -0.4465 / 0.2616], rel=1e-5
    )
    assert test.y.tolist() == [9, 8]
    assert test.x[0, 2, 0, 0] == pytest.approx((1 - 0.4465) / 0.2616, rel=1e-5)


def test_cifar10_needs_every_training_batch(data_root: Path, refusal: Callable[..., str]) -> None:
    folder = Path("data/cifar-10-batches-bin")
    folder.mkdir(parents=True)
    for number in range(1, 5):
        (folder / f"data_batch_{number}.bin").write_bytes(cifar_record((0,), 0, 0, 0))
    message = refusal("cifar10")
    assert "data_batch_5.bin not found in any of" in message
    assert str(folder) in message
    assert "binary version of CIFAR-10" in message


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar100_takes_the_fine_label(data_root: Path, split: Split) -> None:
    folder = Path("data/cifar-100-binary")
    folder.mkdir(parents=True)
    (folder / f"{split}.bin").write_bytes(cifar_record((19, 99), 0, 0, 0) + cifar_record((3, 42), 0, 255, 0))
    samples = load_samples("cifar100", split)
    assert samples.y.tolist() == [99, 42]
    assert samples.classes == 100
    assert samples.x[1, 1, 5, 5] == pytest.approx((1 - 0.4865) / 0.2564, rel=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole number of 3073-byte records"),
        (cifar_record((1,), 0, 0, 0)[:-1], "not a whole number of 3073-byte records"),
        (cifar_record((10,), 0, 0, 0), "labels span 10..10 but there are 10 classes"),
    ],
    ids=["empty", "cut record", "label out of range"],
)
def test_bad_cifar_files_are_refused(
    data_root: Path, content: bytes, message: str, refusal: Callable[..., str]
) -> None:
    path = data_root / "cifar10" / "test_batch.bin"
    path.parent.mkdir()
    path.write_bytes(content)
    text = refusal("cifar10", "test")
    assert message in text
    assert str(path) in text
