"""Loads labelled samples from a builtin data set or from a directory of safetensors files.

Nothing is downloaded and nothing is unpickled: a builtin data set is read from files that are already there.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from frostline.datasets.cifar import read_cifar10, read_cifar100
from frostline.datasets.digits import read_digits
from frostline.datasets.folder import read_folder
from frostline.datasets.idx import read_fashion_mnist
from frostline.datasets.samples import SPLITS, Samples, Split
from frostline.protocol.errors import UsageError

__all__ = ["BUILTIN_NAMES", "Split", "load_samples"]

_BUILTIN: dict[str, Callable[[Split], Samples]] = {
    "digits": read_digits,
    "fashion-mnist": read_fashion_mnist,
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
}
BUILTIN_NAMES: tuple[str, ...] = tuple(_BUILTIN)


def load_samples(source: str, split: Split) -> Samples:
    """Load one split of a builtin data set or of a directory.

    Parameters
    ----------
    source : str
        ``digits``, ``fashion-mnist``, ``cifar10`` or ``cifar100``, or else the path of a directory (write ``./digits``
        for a directory that is named like a builtin data set).

        The digits come with scikit-learn and are split 80/20 by class with a fixed seed. The files of the others are
        looked for in ``$FROSTLINE_DATA/<name>``, then where Debian's package puts Fashion-MNIST, then in the folders
        under ``data/`` of the working directory that the archives unpack to.

        The ``*.safetensors`` files of a directory hold ``x``, shape (samples, *features), as uint8 (pixels, scaled by
        1/255), floating point (kept) or an integer of 16 bits or more (token ids, kept), and ``y``, shape (samples,), of any integer dtype. They are concatenated in the
        order of their names. Files named ``train*`` or ``test*``, and the files in folders named so, select the
        split, and other files are then left out; without any such name every file belongs to both splits. The number
        of classes is the ``classes`` entry of the files' metadata, else the largest label of both splits plus one.
    split : {"train", "test"}
        Which part to load.

    Returns
    -------
    Samples
        The split, with `x` normalised for a builtin data set: shape (samples, 1, 8, 8) for digits,
        (samples, 1, 28, 28) for fashion-mnist and (samples, 3, 32, 32) for cifar10 and cifar100.

    Raises
    ------
    UsageError
        The source is unknown, its files are missing, or one of them is corrupt or has the wrong contents.
    """
    if split not in SPLITS:
        raise UsageError(f"split {split!r} is unknown; use train or test")
    if source in _BUILTIN:
        return _BUILTIN[source](split)
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        return read_folder(folder, split)
    raise UsageError(_describe_unknown(source, folder))


def _describe_unknown(source: str, folder: Path) -> str:
    if source and folder.exists():
        return f"data set {source!r} is a file; give the directory that holds it"
    names = ", ".join(BUILTIN_NAMES)
    close = difflib.get_close_matches(source.lower(), BUILTIN_NAMES, n=1)
    suggestion = f"did you mean {close[0]}? " if close else ""
    return f"data set {source!r} is unknown; {suggestion}use one of {names}, or the path of a directory"
