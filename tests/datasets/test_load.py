from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("source", "suggested"),
    [("cifar-10", "cifar10"), ("Fashion_MNIST", "fashion-mnist"), ("digit", "digits")],
)
def test_a_close_name_is_suggested(
    data_root: Path, source: str, suggested: str, refusal: Callable[..., str]
) -> None:
    message = refusal(source)
    assert f"did you mean {suggested}?" in message
    assert "digits, fashion-mnist, cifar10, cifar100" in message


@pytest.mark.parametrize("source", ["", "no/such/place"])
def test_an_unknown_name_is_refused_without_suggestion(
    data_root: Path, source: str, refusal: Callable[..., str]
) -> None:
    message = refusal(source)
    assert "did you mean" not in message
    assert "or the path of a directory" in message


def test_a_file_is_not_a_source(tmp_path: Path, refusal: Callable[..., str]) -> None:
    (tmp_path / "a.safetensors").touch()
    assert "give the directory that holds it" in refusal(str(tmp_path / "a.safetensors"))


def test_an_unknown_split_is_refused(refusal: Callable[..., str]) -> None:
    assert "use train or test" in refusal("digits", "validation")
