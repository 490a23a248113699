"""Reads and writes directories of samples in safetensors files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from frostline.datasets.conversion import checked_labels, checked_token_ids
from frostline.datasets.files import one_line
from frostline.datasets.samples import SPLITS, Samples, Split
from frostline.protocol.errors import UsageError

SUFFIX = ".safetensors"

# A stray label would otherwise size the last layer of a model, and every per-class table, by itself.
MAX_CLASSES = 1_000_000

PIXEL_DTYPE = "U8"
FLOAT_DTYPES = ("F16", "F32", "F64")
# No text has ids beyond 32 bits without sign; uint64 would not fit int64. Bytes of text are not uint8: those are pixels.
TOKEN_DTYPES = ("I16", "I32", "I64", "U16", "U32")
INPUT_DTYPES = (PIXEL_DTYPE, *FLOAT_DTYPES, *TOKEN_DTYPES)
LABEL_DTYPES = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")


@dataclass(frozen=True)
class _FileLabels:
    """The labels of one file, and the number of classes that its metadata declares."""

    path: Path
    labels: NDArray[np.integer[Any]]
    declared_classes: int | None


def save_samples(samples: Samples, path: Path) -> None:
    """Write samples to a file that `frostline.datasets.load.load_samples` reads from its directory.

    Parameters
    ----------
    samples : Samples
        Written as ``x`` (float32 or int64), ``y`` (int64) and the metadata entry ``classes``.
    path : Path
        File to write, named ``*.safetensors``, in a directory that exists; an existing file is replaced.

    Raises
    ------
    UsageError
        The name has another suffix or the file cannot be written.
    """
    if path.suffix != SUFFIX:
        raise UsageError(f"{path}: samples are stored in {SUFFIX} files; give a name that ends so")
    tensors = {"x": np.ascontiguousarray(samples.x), "y": np.ascontiguousarray(samples.y)}
    try:
        save_file(tensors, path, metadata={"classes": str(samples.classes)})
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: cannot be written ({one_line(error)}); check the directory") from error


def read_folder(folder: Path, split: Split) -> Samples:
    """Read one split of a directory; `frostline.datasets.load.load_samples` says what its files hold.

    Parameters
    ----------
    folder : Path
        Directory that exists.
    split : {"train", "test"}
        Which part to read.

    Returns
    -------
    Samples
        The samples of the split, with the number of classes of both splits.

    Raises
    ------
    UsageError
        No file belongs to the split, or a file is corrupt or disagrees with the others.
    """
    files = _directory_files(folder)
    if not files[split]:
        raise UsageError(
            f"data set {folder}: no {SUFFIX} files for the {split} split; add files that hold x and y"
        )
    # Both splits count: a test split that lacks the last class must not shrink the model's output.
    every_file = sorted({*files["train"], *files["test"]})
    contents = {path: _read_labels(path) for path in every_file}
    classes = _count_classes(list(contents.values()))
    labels = {path: checked_labels(found.labels, classes, path) for path, found in contents.items()}
    return Samples(
        x=_read_inputs(files[split], labels),
        y=np.concatenate([labels[path] for path in files[split]]),
        classes=classes,
    )


def _directory_files(folder: Path) -> dict[Split, list[Path]]:
    entries = {split: _split_entries(folder, split) for split in SPLITS}
    if not any(entries.values()):
        unsplit = sorted(folder.glob(f"*{SUFFIX}"))
        return {"train": unsplit, "test": unsplit}
    return {split: _expanded(entries[split]) for split in SPLITS}


def _split_entries(folder: Path, split: Split) -> list[Path]:
    return sorted(path for path in folder.glob(f"{split}*") if path.is_dir() or path.suffix == SUFFIX)


def _expanded(entries: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for entry in entries:
        files.extend(sorted(entry.glob(f"*{SUFFIX}")) if entry.is_dir() else [entry])
    return files


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{path}: is not a readable safetensors file ({one_line(error)}); write it again"
        ) from error


def _read_tensor(handle: Any, name: str, dtypes: Sequence[str], path: Path) -> NDArray[Any]:
    if name not in set(handle.keys()):
        raise UsageError(f"{path}: holds no tensor {name!r}; store the inputs as x and the labels as y")
    dtype = handle.get_slice(name).get_dtype()
    if dtype not in dtypes:
        raise UsageError(f"{path}: tensor {name!r} is {dtype}; store it as one of {', '.join(dtypes)}")
    return cast("NDArray[Any]", handle.get_tensor(name))


def _read_labels(path: Path) -> _FileLabels:
    with _opened(path) as handle:
        labels = _read_tensor(handle, "y", LABEL_DTYPES, path)
        declared = (handle.metadata() or {}).get("classes")
    if labels.ndim != 1 or len(labels) == 0:
        raise UsageError(f"{path}: tensor 'y' has shape {labels.shape}; store one label per sample")
    return _FileLabels(path, labels, None if declared is None else _parse_classes(declared, path))


def _parse_classes(declared: str, path: Path) -> int:
    # The length is checked first because int() refuses very long digit strings with an error of its own.
    is_number = declared.isascii() and declared.isdigit() and len(declared) <= len(str(MAX_CLASSES))
    if not is_number or not 1 <= int(declared) <= MAX_CLASSES:
        raise UsageError(
            f"{path}: metadata entry classes is {declared[:40]!r}; store a number from 1 to {MAX_CLASSES}"
        )
    return int(declared)


def _count_classes(contents: Sequence[_FileLabels]) -> int:
    declaring = [found for found in contents if found.declared_classes is not None]
    for found in declaring:
        if found.declared_classes != declaring[0].declared_classes:
            raise UsageError(
                f"{found.path}: declares {found.declared_classes} classes but {declaring[0].path} declares "
                f"{declaring[0].declared_classes}; store the same number in both"
            )
    if declaring and declaring[0].declared_classes is not None:
        return declaring[0].declared_classes
    largest = max(contents, key=lambda found: int(found.labels.max()))
    classes = int(largest.labels.max()) + 1
    if classes > MAX_CLASSES:
        raise UsageError(
            f"{largest.path}: label {classes - 1} would mean {classes} classes, more than {MAX_CLASSES}; "
            "number the classes from 0"
        )
    # All labels negative gives a count below 1; the range check then names the file and the labels.
    return max(classes, 1)


Inputs = NDArray[np.float32] | NDArray[np.int64]


def _read_inputs(files: Sequence[Path], labels: dict[Path, NDArray[np.int64]]) -> Inputs:
    parts: list[Inputs] = []
    for path in files:
        part = _read_file_inputs(path, samples=len(labels[path]))
        if parts and part.dtype != parts[0].dtype:
            raise UsageError(
                f"{path}: tensor 'x' holds {_kind(part)} but that of {files[0]} holds {_kind(parts[0])}; "
                "store the same in every file"
            )
        if parts and part.shape[1:] != parts[0].shape[1:]:
            raise UsageError(
                f"{path}: samples have shape {part.shape[1:]} but those of {files[0]} have {parts[0].shape[1:]}; "
                "store the same shape in every file"
            )
        parts.append(part)
    return cast("Inputs", np.concatenate(parts))


def _kind(inputs: Inputs) -> str:
    return "token ids" if inputs.dtype == np.int64 else "pixels or floating-point numbers"


def _read_file_inputs(path: Path, samples: int) -> Inputs:
    with _opened(path) as handle:
        inputs = _read_tensor(handle, "x", INPUT_DTYPES, path)
    if inputs.ndim < 1 or len(inputs) != samples:
        raise UsageError(
            f"{path}: tensor 'x' has shape {inputs.shape} but 'y' holds {samples} labels; "
            "store one label per sample"
        )
    if inputs.dtype == np.uint8:
        return inputs.astype(np.float32) / np.float32(255)
    if inputs.dtype.kind == "f":
        return inputs.astype(np.float32, copy=False)
    return checked_token_ids(inputs, path)
