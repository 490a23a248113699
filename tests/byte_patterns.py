"""A text task that needs no data: which of three byte grammars wrote a line?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from frostline.datasets.folder import save_samples
from frostline.datasets.samples import SPLITS, Samples

LENGTH = 16
Draw = Callable[[int], int]
"""A whole number below the one given."""


def _numbers(draw: Draw) -> str:
    return ",".join(f"{draw(100)}.{draw(100)}" for _ in range(8))


def _words(draw: Draw) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return "_".join("".join(letters[draw(26)] for _ in range(1 + draw(6))) for _ in range(8))


def _brackets(draw: Draw) -> str:
    text, depth = "", 0
    while len(text) < LENGTH:
        opens = depth == 0 or draw(2) == 0
        depth += 1 if opens else -1
        text += "(" if opens else ")"
    return text


GRAMMARS = (_numbers, _words, _brackets)


def byte_patterns(count: int, seed: int) -> Samples:
    """Lines of `LENGTH` bytes as token ids, each grammar as often as the others."""
    random = np.random.default_rng(seed)
    y = np.arange(count, dtype=np.int64) % len(GRAMMARS)
    lines = [GRAMMARS[kind](lambda below: int(random.integers(below)))[:LENGTH] for kind in y]
    x = np.array([list(line.encode()) for line in lines], dtype=np.int64)
    return Samples(x, y, len(GRAMMARS))


def write_byte_patterns(folder: Path, train: int = 240, test: int = 90) -> Path:
    """Write both splits as a folder data set."""
    folder.mkdir(parents=True)
    for split, count, seed in zip(SPLITS, (train, test), (1, 2), strict=True):
        save_samples(byte_patterns(count, seed), folder / f"{split}.safetensors")
    return folder
