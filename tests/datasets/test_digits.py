from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest

from frostline.datasets.load import load_samples


def test_digits_are_split_stratified_and_normalised() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn (frostline[emulate]) is not installed")
    train, test = load_samples("digits", "train"), load_samples("digits", "test")
    assert train.x.shape == (1437, 1, 8, 8)
    assert test.x.shape == (360, 1, 8, 8)
    assert train.classes == test.classes == 10
    for train_count, test_count in zip(train.class_counts(), test.class_counts(), strict=True):
        assert abs(train_count - 4 * test_count) <= 4
    assert train.fingerprint() == load_samples("digits", "train").fingerprint()


def test_digits_constants_are_those_of_the_training_split() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn (frostline[emulate]) is not installed")
    pixels = load_samples("digits", "train").x.astype(np.float64)
    assert pixels.mean() == pytest.approx(0, abs=1e-6)
    assert pixels.std() == pytest.approx(1, abs=1e-6)


def test_digits_without_scikit_learn_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "install frostline[emulate]" in refusal("digits")
