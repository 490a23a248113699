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
    "cnn_1d",
    "dlrm",
    "newcomer_cnn",
    "tcn",
)


@pytest.mark.parametrize("engine", ["executorch", "onnxruntime"])
@pytest.mark.parametrize("name", MOST_USED)
def test_it_compiles_and_trains_as_eager_pytorch_does(name: str, engine: str) -> None:
    entry = next(each for each in ENTRIES if each.name == name)
    result = compile_entry(entry, engine, timed=False)
    assert result.verdict == "compiled", result.message


HABITS = {
    "onnxruntime": (
        *("slice_set_to_zero", "index_fill_and_add", "arithmetic_in_place", "running_mean_in_place"),
        *(
            "running_mean_reassigned",
            "running_mean_copied",
            "codebook_by_running_means",
            "module_called_twice",
        ),
        *("module_under_two_names", "noise_randn_like", "drop_block", "adaptive_max_pool_odd", "lp_pool"),
        *("embedding_sparse", "embedding_one_hot", "lstm_last_by_length", "tied_head_in_one_block"),
    ),
    "executorch": (
        *("slice_set_to_zero", "softplus", "batch_norm_3d", "interpolate_scale_kept", "embedding_bag_max"),
        *("channels_last_weights", "conv_valid", "cumulative_extremes", "padded_encoder"),
    ),
}
"""What models are written with, and what went wrong with each kind of it; the others are as slow as they are alike."""


@pytest.mark.parametrize(
    ("name", "engine"), [(name, engine) for engine, names in HABITS.items() for name in names]
)
def test_habits_compile_and_train_as_eager_pytorch_does(name: str, engine: str) -> None:
    test_it_compiles_and_trains_as_eager_pytorch_does(name, engine)


REFUSED = [entry for entry in ENTRIES if entry.expected != "compiles"]


@pytest.mark.parametrize("entry", REFUSED, ids=lambda entry: entry.name)
def test_what_cannot_be_trained_is_refused_with_its_cause(entry) -> None:  # type: ignore[no-untyped-def]
    result = compile_entry(entry, "onnxruntime", timed=False)
    assert result.verdict == "refused", result.message
    assert result.as_expected, result.message
