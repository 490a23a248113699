"""Finds what a model does beside its operators, which a compiled step would not do.

A compiled step is a function of its tensors, its batch and its seed, an evaluation of its tensors and its batch. A count in a
Python attribute, random numbers of Python's, and random numbers drawn in evaluation are neither. Its gradients are those of
its operators: a hook's, or those that an `autograd.Function` says, are not.
"""

from __future__ import annotations

import contextlib
from itertools import takewhile
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from frostline.exporter.capture import authors_mode, followed
from frostline.exporter.dropout import SeededDropout
from frostline.exporter.random_numbers import seeded
from frostline.exporter.semantics import Observation, close, copies_of, observe, observe_step

Returned = list[tuple[str, list[Tensor]]]
"""What each call returned, in the order they ended: the child's qualified name and the tensors."""


SAME = 1e-5
"""Largest difference between two runs of one model on one batch, relative to the norm: the order of sums may differ."""

RUNS = 64
"""So often a model is run again that may do something else now and then: 96 % of those that do so one time in twenty show."""


def unsteady(module: nn.Module, x: Tensor, seen: Observation, runs: int = 1) -> str | None:
    """Say where and why a model returns other values for the same batch; None where it does not.

    Parameters
    ----------
    module
        It is run again; its tensors stay as they are.
    seen
        What it did with the batch, with the random numbers of seed 0.
    runs
        So often it is run again; at least `RUNS` times if it drew random numbers of Python's or NumPy's.
    """
    for seed in range(1, 1 + max(runs, RUNS if seen.drawn else 1)):
        again = observe(module, x, seed)
        if not _same(seen.outputs, again.outputs):
            return _cause(module, x, seed, training=True)
        if not _same(seen.evaluated, again.evaluated):
            return _cause(module, x, seed, training=False)
    return None


def _same(one: Tensor, two: Tensor) -> bool:
    return close(one, two, tolerance=SAME)


def _cause(module: nn.Module, x: Tensor, seed: int, *, training: bool) -> str:
    """Where and why a model does with one seed what it did not with another."""
    before = _attributes(module)
    one, two = (_returned(module, x, each, training=training) for each in (0, seed))
    after = _attributes(module)
    changed = {name: key for name, key in before if after[name, key] != before[name, key]}
    path = _first_difference(one, two)
    where = f"module '{path}'" if path else "the model's own forward"
    if not training and _first_difference(two, _returned(module, x, seed, training=training)) is None:
        return (
            f"{where} draws random numbers in evaluation, too, where a model is a fixed function: draw them in training only, "
            "as F.dropout(x, p, self.training) does"
        )
    if path in changed:
        return (
            f"{where} counts in its attribute {changed[path]!r}, so that the same batch gives other values when it comes again: "
            "devices keep tensors only between steps; make it a float buffer"
        )
    return (
        f"{where} returns other values when the same batch comes again, as with random numbers of Python's or NumPy's: a "
        "compiled step knows those of PyTorch only, such as torch.rand"
    )


def carried(module: nn.Module, x: Tensor) -> str | None:
    """Say which tensor a model keeps in an attribute for the next batch; None where nothing depends on any.

    Parameters
    ----------
    module
        It is run up to three times; its tensors and attributes stay as they are.
    """
    first = _tensors_kept(module)
    try:
        observe_step(module, x)
        before = _tensors_kept(module)
        if not _changed(before, first):
            return None
        seen = observe_step(module, x)
        kept = _changed(_tensors_kept(module), before)
        for (child, attribute), value in kept.items():
            setattr(child, attribute, pytree.tree_map_only(Tensor, lambda each: each.detach() * 2 + 1, value))
        if not kept or _same(seen.outputs, observe_step(module, x).outputs):
            return None
    finally:
        for (child, attribute), value in first.items():
            setattr(child, attribute, value)
    names = {id(child): name for name, child in module.named_modules()}
    child, attribute = next(iter(kept))
    where = f"module '{names[id(child)]}'" if names[id(child)] else "the model"
    return (
        f"{where} keeps a tensor in its attribute {attribute!r} for the next batch, which "
        "devices would not: they keep parameters and float buffers between steps; begin each batch anew, or make it a buffer"
    )


Kept = dict[tuple[nn.Module, str], Any]
"""What modules hold in attributes, by module and attribute."""


def _changed(after: Kept, before: Kept) -> Kept:
    return {key: value for key, value in after.items() if value is not before.get(key)}


def _tensors_kept(module: nn.Module) -> Kept:
    """The attributes of modules that hold tensors which are no parameters and no buffers."""
    return {
        (child, key): value
        for child in module.modules()
        for key, value in vars(child).items()
        if key not in ("_parameters", "_buffers", "_modules")
        and (value is None or any(isinstance(each, Tensor) for each in pytree.tree_leaves(value)))
    }


def _attributes(module: nn.Module) -> dict[tuple[str, str], Any]:
    """The plain values that modules hold, by qualified name and attribute."""
    return {
        (name, key): value
        for name, child in module.named_modules()
        for key, value in vars(child).items()
        if isinstance(value, int | float | str) and key != "training"
    }


def _returned(module: nn.Module, x: Tensor, seed: int, *, training: bool) -> Returned:
    """What each call of a child returned, PyTorch's random numbers of training those of the step's seed."""
    found: Returned = []

    def hear(name: str, result: Any) -> None:
        tensors = [each for each in pytree.tree_leaves(result) if isinstance(each, Tensor)]
        found.append((name, [each.detach().clone() for each in tensors]))

    with contextlib.ExitStack() as stack:
        stack.enter_context(seeded(seed))
        stack.enter_context(torch.no_grad())
        stack.enter_context(authors_mode(module, training=training))
        stack.enter_context(followed(module, lambda name: None, hear))
        if training:
            stack.enter_context(SeededDropout(torch.tensor(1.0)))
        functional_call(module, copies_of(module), (x.clone(),), tie_weights=False)
    return found


def _first_difference(one: Returned, two: Returned) -> str | None:
    """The child whose call is the first to return other values, or to be made or not; None without any."""
    for (name, ours), (other, theirs) in zip(one, two, strict=False):
        if name != other:
            # Whoever calls both chose.
            both = takewhile(
                lambda pair: pair[0] == pair[1], zip(name.split("."), other.split("."), strict=False)
            )
            return ".".join(each for each, _ in both)
        if len(ours) != len(theirs) or not all(map(_same, ours, theirs)):
            return name
    return None if len(one) == len(two) else ""


def own_gradients(module: nn.Module, x: Tensor) -> str | None:
    """Say where a model has gradients that its operators do not say; None where no place is found.

    Parameters
    ----------
    module
        It is run once in training; its tensors stay as they are.
    """
    found = [
        f"module '{name}' has a backward hook"
        for name, child in module.named_modules()
        if child._backward_hooks or child._backward_pre_hooks
    ]
    found += _heard_in_forward(module, x)
    return found[0] if found else None


def _heard_in_forward(module: nn.Module, x: Tensor) -> list[str]:
    """Functions with gradients of their own, and hooks on tensors, by the child that calls them."""
    found: list[str] = []
    running: list[str] = []
    apply: Any = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]
    register_hook: Any = Tensor.register_hook

    def here() -> str:
        return f"module '{running[-1]}'" if running and running[-1] else "the model's own forward"

    def applied(function: Any, *arguments: Any, **options: Any) -> Any:
        if not function.__module__.startswith("torch."):
            found.append(f"{here()} has gradients of its own ({function.__name__}, an autograd.Function)")
        return apply(function, *arguments, **options)

    def hooked(tensor: Tensor, hook: Any) -> Any:
        found.append(f"{here()} has a hook on a tensor's gradient")
        return register_hook(tensor, hook)

    with contextlib.ExitStack() as stack:
        stack.enter_context(followed(module, running.append, lambda *_: running.pop()))
        stack.enter_context(seeded())
        stack.enter_context(authors_mode(module, training=True))
        stack.enter_context(mock.patch.object(torch.autograd.Function, "apply", classmethod(applied)))
        stack.enter_context(mock.patch.object(Tensor, "register_hook", hooked))
        functional_call(module, copies_of(module), (x.clone(),), tie_weights=False)
    return found
