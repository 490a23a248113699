"""The models that people bring most, on both engines; `make zoo` tries all of them."""

from __future__ import annotations

import pytest

from tests.zoo.compiling import compile_entry
from tests.zoo.registry import ENTRIES

MOST_USED = (
    "resnet18",
    "mobilenet_v2",
    "efficientnet_b0",
    "vgg11_bn",
    "ds_cnn",
    "lstm_classifier",
    "bert_tiny",
    "gpt_infinite_mask",
    "swin",
    "lora_transformer",
    "newcomer_cnn",
    "tcn",
)


@pytest.mark.parametrize("engine", ["executorch", "onnxruntime"])
@pytest.mark.parametrize("name", MOST_USED)
def test_it_compiles_and_trains_as_eager_pytorch_does(name: str, engine: str) -> None:
    entry = next(each for each in ENTRIES if each.name == name)
    result = compile_entry(entry, engine, timed=False)
    assert result.verdict == "compiled", result.message


REFUSED = [entry for entry in ENTRIES if entry.expected != "compiles"]


@pytest.mark.parametrize("entry", REFUSED, ids=lambda entry: entry.name)
def test_what_cannot_be_trained_is_refused_with_its_cause(entry) -> None:  # type: ignore[no-untyped-def]
    result = compile_entry(entry, "onnxruntime", timed=False)
    assert result.verdict == "refused", result.message
    assert result.as_expected, result.message
