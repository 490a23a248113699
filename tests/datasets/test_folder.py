from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from frostline.datasets.folder import save_samples
from frostline.datasets.load import load_samples
from frostline.datasets.samples import SPLITS, Samples
from frostline.protocol.errors import UsageError


def small_samples(count: int = 3, classes: int = 5) -> Samples:
    x = np.random.default_rng(count).normal(size=(count, 1, 2, 2)).astype(np.float32)
    return Samples(x=x, y=np.arange(count, dtype=np.int64) % classes, classes=classes)


def write(path: Path, **tensors: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def test_saved_samples_load_unchanged(tmp_path: Path) -> None:
    save_samples(small_samples(), tmp_path / "mine.safetensors")
    for split in SPLITS:
        assert load_samples(str(tmp_path), split).fingerprint() == small_samples().fingerprint()


def test_saving_a_strided_view_keeps_the_values(tmp_path: Path) -> None:
    reversed_samples = Samples(small_samples().x[::-1], small_samples().y[::-1], 5)
    save_samples(reversed_samples, tmp_path / "mine.safetensors")
    assert load_samples(str(tmp_path), "train").fingerprint() == reversed_samples.fingerprint()


def test_saving_reports_a_bad_path(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give a name that ends so"):
        save_samples(small_samples(), tmp_path / "mine.bin")
    with pytest.raises(UsageError, match="cannot be written"):
        save_samples(small_samples(), tmp_path / "absent" / "mine.safetensors")


def test_files_are_concatenated_by_name(tmp_path: Path) -> None:
    write(tmp_path / "b.safetensors", x=np.array([[2.5]], np.float64), y=np.array([4], np.uint8))
    write(tmp_path / "a.safetensors", x=np.array([[0], [255]], np.uint8), y=np.array([1, 0], np.int16))
    samples = load_samples(str(tmp_path), "train")
    assert samples.x.tolist() == [[0.0], [1.0], [2.5]]
    assert samples.x.dtype == np.float32
    assert samples.y.tolist() == [1, 0, 4]
    assert samples.classes == 5


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint16, np.uint32])
def test_token_ids_are_kept(tmp_path: Path, dtype: type[np.integer]) -> None:
    write(tmp_path / "text.safetensors", x=np.array([[3, 255], [256, 0]], dtype), y=np.array([1, 0]))
    samples = load_samples(str(tmp_path), "train")
    assert samples.x.dtype == np.int64
    assert samples.x.tolist() == [[3, 255], [256, 0]]


def test_saved_token_ids_load_unchanged(tmp_path: Path) -> None:
    samples = Samples(np.arange(6).reshape(3, 2), np.array([0, 1, 0]), 2)
    save_samples(samples, tmp_path / "mine.safetensors")
    assert load_samples(str(tmp_path), "test").fingerprint() == samples.fingerprint()


def test_token_ids_and_numbers_are_not_mixed(tmp_path: Path, refusal: Callable[..., str]) -> None:
    write(tmp_path / "a.safetensors", x=X, y=Y)
    write(tmp_path / "b.safetensors", x=X.astype(np.int64), y=Y)
    message = refusal(str(tmp_path))
    assert "b.safetensors: tensor 'x' holds token ids but that of" in message
    assert "a.safetensors holds pixels or floating-point numbers" in message


def test_named_files_and_folders_select_the_split(tmp_path: Path) -> None:
    one = np.ones((1, 1), np.float32)
    write(tmp_path / "train-0.safetensors", x=one, y=np.array([0]))
    write(tmp_path / "train-more" / "part.safetensors", x=one, y=np.array([1]))
    write(tmp_path / "test" / "part.safetensors", x=one, y=np.array([6]))
    write(tmp_path / "other.safetensors", x=one, y=np.array([8]))
    train, test = load_samples(str(tmp_path), "train"), load_samples(str(tmp_path), "test")
    assert train.y.tolist() == [0, 1]
    assert test.y.tolist() == [6]
    assert train.classes == test.classes == 7


def test_a_directory_without_the_split_is_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    save_samples(small_samples(), tmp_path / "train.safetensors")
    assert "for the test split" in refusal(str(tmp_path), "test")


def test_an_empty_directory_is_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    message = refusal(str(tmp_path))
    assert "no .safetensors files" in message
    assert str(tmp_path) in message


X = np.zeros((2, 1), np.float32)
Y = np.array([0, 1])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"y": Y}, "holds no tensor 'x'"),
        ({"x": X}, "holds no tensor 'y'"),
        (
            {"x": X.astype(np.int8), "y": Y},
            "tensor 'x' is I8; store it as one of U8, F16, F32, F64, I16, I32",
        ),
        ({"x": X.astype(np.uint64), "y": Y}, "tensor 'x' is U64"),
        ({"x": Y, "y": Y}, "tensor 'x' holds integers of shape (2,)"),
        ({"x": X.astype(np.int16) - 3, "y": Y}, "tensor 'x' holds the token id -3"),
        ({"x": X, "y": Y.astype(np.float32)}, "tensor 'y' is F32"),
        ({"x": X, "y": np.array([0, 1, 2])}, r"tensor 'x' has shape (2, 1) but 'y' holds 3 labels"),
        ({"x": X, "y": Y.reshape(2, 1)}, "tensor 'y' has shape (2, 1)"),
        ({"x": X[:0], "y": Y[:0]}, "tensor 'y' has shape (0,)"),
        ({"x": X, "y": np.array([-1, 1])}, "labels span -1..1 but there are 2 classes"),
        ({"x": X, "y": np.array([-2, -1])}, "labels span -2..-1 but there are 1 classes"),
        ({"x": X, "y": np.array([0, 2**63], np.uint64)}, "more than 1000000"),
    ],
)
def test_bad_tensors_are_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], message: str, refusal: Callable[..., str]
) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    text = refusal(str(tmp_path))
    assert message in text
    assert str(path) in text


def test_a_dtype_numpy_lacks_is_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    header = b'{"x":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]},"y":{"dtype":"I8","shape":[1],"data_offsets":[2,3]}}'
    (tmp_path / "bad.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(3))
    assert "tensor 'x' is BF16" in refusal(str(tmp_path))


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_truncated_files_are_refused(tmp_path: Path, kept: int, refusal: Callable[..., str]) -> None:
    path = tmp_path / "bad.safetensors"
    save_samples(small_samples(), path)
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path}: is not a readable safetensors file" in refusal(str(tmp_path))


def test_sample_shapes_must_agree(tmp_path: Path, refusal: Callable[..., str]) -> None:
    write(tmp_path / "a.safetensors", x=X, y=Y)
    write(tmp_path / "b.safetensors", x=np.zeros((2, 3), np.float32), y=Y)
    assert "b.safetensors: samples have shape (3,) but those of" in refusal(str(tmp_path))


@pytest.mark.parametrize("declared", ["", "0", "-3", "1e3", "ten", "1000001", "9" * 5000, "²"])
def test_a_bad_number_of_classes_is_refused(
    tmp_path: Path, declared: str, refusal: Callable[..., str]
) -> None:
    save_file({"x": X, "y": Y}, tmp_path / "a.safetensors", metadata={"classes": declared})
    assert "store a number from 1 to 1000000" in refusal(str(tmp_path))


def test_declared_classes_must_agree_and_bound_the_labels(
    tmp_path: Path, refusal: Callable[..., str]
) -> None:
    save_file({"x": X, "y": Y}, tmp_path / "a.safetensors", metadata={"classes": "4"})
    assert load_samples(str(tmp_path), "train").classes == 4
    save_file({"x": X, "y": Y + 3}, tmp_path / "b.safetensors")
    assert "b.safetensors: labels span 3..4 but there are 4 classes" in refusal(str(tmp_path))
    save_file({"x": X, "y": Y}, tmp_path / "b.safetensors", metadata={"classes": "5"})
    assert "b.safetensors: declares 5 classes" in refusal(str(tmp_path))
