"""The proof that a cut model is the model: one step of both on the same batch, in training and in evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from frostline.exporter.capture import authors_mode
from frostline.exporter.dropout import SeededDropout
from frostline.exporter.named_tensors import tensors_of
from frostline.exporter.random_numbers import seeded

TOLERANCE = 1e-3
"""Largest difference let through, relative to the norm of what is compared: the same operators in float32 are within 1e-5."""

FLOOR = 1e-6
"""Gradients this much smaller than the largest are all rounding."""


@dataclass(frozen=True)
class Observation:
    """What a model did with one batch.

    Attributes
    ----------
    outputs, evaluated : Tensor
        What it returned in training and in evaluation mode.
    gradients : dict
        Of a fixed function of the outputs, for the parameters that it reaches.
    written : dict
        The buffers, and in odd models parameters, that the step wrote, with their new values.
    drawn : bool
        Whether random numbers of Python's or NumPy's were drawn, which no compiled step has.
    """

    outputs: Tensor
    evaluated: Tensor
    gradients: dict[str, Tensor]
    written: dict[str, Tensor]
    drawn: bool


def observe(module: nn.Module, x: Tensor, seed: int = 0) -> Observation:
    """Run a model on a batch in both modes; its tensors stay as they are.

    PyTorch's random numbers are those of the step's seed in training, whatever `seed` is; all others, and those of evaluation,
    are those of `seed`. Raises whatever the model's own code raises.
    """
    step = observe_step(module, x, seed)
    with _plain(), seeded(seed) as drawn, authors_mode(module, training=False), torch.no_grad():
        evaluated = functional_call(module, copies_of(module), (x.clone(),), tie_weights=False)
        return replace(step, evaluated=evaluated, drawn=step.drawn or drawn())


def observe_step(module: nn.Module, x: Tensor, seed: int = 0) -> Observation:
    """The same in training mode only: `evaluated` is empty."""
    tensors, given = tensors_of(module), copies_of(module)
    versions = {name: each._version for name, each in given.items()}
    with (
        _plain(),
        seeded(seed) as drawn,
        authors_mode(module, training=True),
        SeededDropout(torch.tensor(1.0)),
    ):
        outputs = functional_call(module, given, (x.clone(),), tie_weights=False)
        drew = drawn()
        gradients = _gradients(outputs, {name: each for name, each in given.items() if each.requires_grad})
    written = {
        name: each.detach()
        for name, each in given.items()
        if each._version != versions[name] or not torch.equal(each, tensors[name])
    }
    return Observation(outputs.detach(), outputs.new_empty(0), gradients, written, drew)


def gradients_in_place(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients of `observe` when the model runs with its own tensors, none in their place.

    What its code reaches by another reference than their names, as in a list, has a gradient only then. Its tensors stay as
    they are. Raises whatever the model's own code raises.
    """
    tensors = tensors_of(module)
    values = {name: each.detach().clone() for name, each in tensors.items()}
    buffers = {child: dict(child._buffers) for child in module.modules()}
    try:
        with _plain(), seeded(), authors_mode(module, training=True), SeededDropout(torch.tensor(1.0)):
            outputs = module(x.clone())
            return _gradients(outputs, {name: each for name, each in tensors.items() if each.requires_grad})
    finally:
        for child, own in buffers.items():
            child._buffers.update(own)
        with torch.no_grad():
            for name, each in tensors.items():
                if not torch.equal(each, values[name]):
                    each.copy_(values[name])


def copies_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's parameters and buffers by name; what is shared stays shared, so that nothing need be tied.

    Where a child has two names, tying them would leave the copies in the module.
    """
    tensors = tensors_of(module)
    copies = {id(each): each.detach().clone().requires_grad_(each.requires_grad) for each in tensors.values()}
    return {name: copies[id(each)] for name, each in tensors.items()}


def _gradients(outputs: Tensor, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a weighted sum of the outputs, of those that it reaches."""
    if not outputs.requires_grad or not wanted:
        return {}
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).reshape(outputs.shape)
    found = torch.autograd.grad((outputs * weights).sum(), list(wanted.values()), allow_unused=True)
    # Those of sparse tables are sparse; devices hold them dense.
    return {
        name: each.to_dense() if each.is_sparse else each
        for name, each in zip(wanted, found, strict=True)
        if each is not None
    }


@contextmanager
def _plain() -> Iterator[None]:
    """PyTorch's transformer layers as they train, with gradients."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Differs(Exception):
    """What a model's parts do otherwise than it does, in words."""


def check_same(whole: Observation, parts: nn.Module, x: Tensor) -> None:
    """Check that a model's parts, one after another, do with a batch what the model did.

    Raises
    ------
    Differs
        Naming what differs: the outputs, a parameter's gradient or a buffer.
    """
    found = observe(parts, x)
    for mode, ours, theirs in (
        ("training", found.outputs, whole.outputs),
        ("evaluation", found.evaluated, whole.evaluated),
    ):
        if not close(ours, theirs):
            raise Differs(f"in {mode} its parts return other values than it does")
    norms = [float(each.norm()) for each in whole.gradients.values()]
    largest = max((norm for norm in norms if math.isfinite(norm)), default=0.0)
    for name in sorted({*whole.gradients, *found.gradients}):
        our_gradient, gradient = found.gradients.get(name), whole.gradients.get(name)
        if our_gradient is None or gradient is None:
            trains, does_not = (
                ("the model", "its parts do not")
                if our_gradient is None
                else ("its parts", "the model does not")
            )
            raise Differs(f"{trains} train {name!r}, {does_not}")
        if not close(our_gradient, gradient, FLOOR * largest):
            raise Differs(f"the gradient of {name!r} is another one in its parts")
    for name in sorted({*whole.written, *found.written}):
        our_value, value = found.written.get(name), whole.written.get(name)
        if our_value is None or value is None or not close(our_value.float(), value.float()):
            raise Differs(f"buffer {name!r} takes other values in its parts")


def close(ours: Tensor, theirs: Tensor, floor: float = FLOOR, tolerance: float = TOLERANCE) -> bool:
    """Whether two tensors are the same but for rounding; not a number is the same as itself."""
    if ours.shape != theirs.shape:
        return False
    both = torch.isfinite(ours) & torch.isfinite(theirs)
    if not bool((both | (ours == theirs) | (ours.isnan() & theirs.isnan())).all()):
        return False
    ours, theirs = ours[both].double(), theirs[both].double()
    return float((ours - theirs).norm()) <= tolerance * float(theirs.norm()) + floor
