"""Finds and opens the files of data sets, and words what goes wrong with them."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from frostline.protocol.errors import UsageError

# A header may claim any size, and a gzip stream may expand without end; the largest genuine file has 154 MB.
MAX_FILE_BYTES = 256 * 2**20


def find_files(data_set: str, names: Sequence[str], folders: Sequence[Path], remedy: str) -> list[Path]:
    """Find the files of a builtin data set, plain or gzipped, in the first folder that holds all of them.

    Parameters
    ----------
    data_set : str
        Name of the data set; ``$FROSTLINE_DATA/<data_set>`` is searched first where the variable is set.
    names : sequence of str
        Names of the files, without ``.gz``.
    folders : sequence of Path
        Folders to search after that, in order.
    remedy : str
        What the reader of the error can do where the files are missing.

    Returns
    -------
    list of Path
        One existing file per name, in the order of `names`.

    Raises
    ------
    UsageError
        No folder holds all of the files.
    """
    configured = os.environ.get("FROSTLINE_DATA")
    searched = [Path(configured).expanduser() / data_set, *folders] if configured else list(folders)
    for folder in searched:
        found = [_plain_or_gzipped(folder / name) for name in names]
        present = [path for path in found if path is not None]
        if len(present) == len(names):
            return present
    places = ", ".join(str(folder) for folder in searched)
    unset = "" if configured else " (FROSTLINE_DATA is not set)"
    raise UsageError(f"data set {data_set}: {', '.join(names)} not found in any of {places}{unset}; {remedy}")


def _plain_or_gzipped(path: Path) -> Path | None:
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    return None


@contextmanager
def reading(path: Path) -> Iterator[io.BufferedIOBase]:
    """Open a file, unpacked where it is gzipped, and report failures to read it inside the block as `UsageError`.

    Parameters
    ----------
    path : Path
        File to read; a name that ends in ``.gz`` is unpacked. Read no more than is needed, `MAX_FILE_BYTES` at most:
        the stream itself has no bound.

    Yields
    ------
    BufferedIOBase
        The stream of (unpacked) bytes.

    Raises
    ------
    UsageError
        The file cannot be opened, read or unpacked.
    """
    try:
        with _open_binary(path) as stream:
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read ({one_line(error)}); replace the file") from error


def _open_binary(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    return path.open("rb")


def one_line(error: Exception) -> str:
    """Return the message of an error on a single line, for use inside another message."""
    return " ".join(str(error).split())
