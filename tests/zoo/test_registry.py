from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tests.zoo.registry import ENTRIES, Entry, Refusal, to_training

BATCH = 4
STATISTICS = ("running_mean", "running_var")

# Authors meet these warnings too: older APIs, convolutions of even kernels padded to the same size.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def _gives(entry: Entry) -> str:
    return entry.expected.gives if isinstance(entry.expected, Refusal) else "logits"


def _each(entries: Iterable[Entry]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)


RUNNING = [entry for entry in ENTRIES if _gives(entry) != "error"]
# Where everything is frozen, there is no backward pass.
TRAINING = [entry for entry in ENTRIES if _gives(entry) == "logits" and entry.name != "nothing_to_train"]


def _run(entry: Entry, model: nn.Module, seed: int = 1) -> Any:
    """Run a model on a batch of its own, so that it may change that in place."""
    random.seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model(entry.example(BATCH, seed))


def _is_logits(output: Any, classes: int) -> bool:
    return (
        isinstance(output, Tensor)
        and output.shape == (BATCH, classes)
        and output.dtype == torch.float32
        and bool(output.isfinite().all())
    )


def test_the_zoo_is_large_and_every_name_is_used_once() -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)
    kinds = [entry.kind for entry in ENTRIES]
    assert kinds.count("architecture") >= 60
    assert kinds.count("layer") >= 100


def test_most_architectures_should_compile() -> None:
    expected = [entry.expected == "compiles" for entry in ENTRIES if entry.kind == "architecture"]
    assert sum(expected) >= 0.9 * len(expected)


@_each(ENTRIES)
def test_what_it_says_of_its_blocks_and_its_refusal(entry: Entry) -> None:
    if isinstance(entry.blocks, tuple):
        modules = dict(entry.model().named_modules())
        assert set(entry.blocks) <= set(modules)
    else:
        assert 1 <= entry.blocks <= 4
    if isinstance(entry.expected, Refusal):
        assert entry.expected.mentions
        assert all(entry.expected.mentions)


@_each(entry for entry in ENTRIES if entry not in RUNNING)
def test_its_author_cannot_run_it_either(entry: Entry) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        _run(entry, entry.model())


@_each(RUNNING)
def test_a_seed_tells_all(entry: Entry) -> None:
    outputs = [_run(entry, entry.model()) for _ in range(2)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0, equal_nan=True)


@_each(RUNNING)
def test_it_gives_logits_in_both_modes(entry: Entry) -> None:
    model = entry.model()
    to_training(model)
    logits = [_is_logits(_run(entry, model), entry.classes)]
    model.eval()
    with torch.no_grad():
        logits.append(_is_logits(_run(entry, model), entry.classes))
    assert all(logits) == (_gives(entry) == "logits")


@_each(TRAINING)
def test_a_step_reaches_what_trains_and_nothing_else(entry: Entry) -> None:
    model = entry.model()
    to_training(model)
    if any(is_lazy(each) for each in model.parameters()):
        _run(entry, model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(STATISTICS)}
    F.cross_entropy(_run(entry, model), torch.arange(BATCH) % entry.classes).backward()
    gradients = {name: each.grad for name, each in model.named_parameters()}
    reached = {name for name, gradient in gradients.items() if gradient is not None}
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert reached == {name for name in trained if not name.startswith(entry.frozen)}
    dense = [gradient.to_dense() for gradient in gradients.values() if gradient is not None]
    assert all(gradient.isfinite().all() for gradient in dense)
    # With one class the loss is zero whatever the model says.
    assert any(gradient.any() for gradient in dense) == (entry.classes > 1)
    after = dict(model.named_buffers())
    moved = {name for name, buffer in before.items() if not torch.equal(buffer, after[name])}
    assert moved == {name for name in before if not name.startswith(entry.frozen)}


def test_training_mode_is_what_the_author_means() -> None:
    frozen = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    frozen[0].eval()
    to_training(frozen)
    assert [child.training for child in frozen] == [False, True]
    whole = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()).eval()
    to_training(whole)
    assert whole.training
    assert all(child.training for child in whole)
