"""Cuts a model into a chain of blocks and a head, by the names of its children or into a number of blocks.

What runs between two boundaries is a block, so a stem joins the first block; what runs after the last boundary is the head.
The parts are sliced out of what the model was captured to compute, in training and in evaluation, keep its qualified tensor
names, and are shown to do together what the model does.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx, nn

from frostline.exporter.boundaries import Layout, automatic_ends, most_blocks
from frostline.exporter.capture import Call, Capture, calls_of, is_in_place, place_of, raised_at, sizes_of
from frostline.exporter.executorch_lowering import UnsupportedOperators
from frostline.exporter.inputs import random_inputs
from frostline.exporter.named_tensors import register, tensors_of
from frostline.exporter.part import BEFORE, Boundary, Captures, Feature, Part, Span, handed_on
from frostline.exporter.semantics import (
    FLOOR,
    Differs,
    Observation,
    check_same,
    close,
    gradients_in_place,
    observe,
)
from frostline.exporter.steadiness import RUNS, carried, own_gradients, unsteady
from frostline.exporter.support import check_model
from frostline.protocol.errors import UsageError, first_line

WHOLE_MODEL = "model"
"""The name of a block that is all of the model."""

CAPTURED_BATCH = 3
"""Samples in the batch a model is captured on: its code may not tell them from channels, or from one."""


@dataclass(frozen=True)
class Block:
    r"""One link of the chain.

    Attributes
    ----------
    name
        Qualified name of the child whose output ends the block, and the operators that follow it, such as ``conv2+add``.
    module
        One tensor (batch, \*input_shape) in, one (batch, \*output_shape) out, for any batch size; float, but for the
        first block of a model that takes token ids.
    input_shape, output_shape
        Shape of one sample.
    inputs, outputs
        The values that cross the boundaries. A single float one is handed on as it is, others side by side in one tensor.
    vocabulary
        Where the input is token ids, int64, how many there are; ``None`` where it is float.
    """

    name: str
    module: Part
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    vocabulary: int | None = None


@dataclass(frozen=True)
class CutModel:
    r"""A model as a chain: each block's output is the next one's input, the last one's is the head's.

    Attributes
    ----------
    blocks
        At least one.
    head
        Takes (batch, \*blocks[-1].output_shape), returns what the model returns. Empty where a single block is all of the
        model.
    classes
        Width of the logits.
    """

    blocks: tuple[Block, ...]
    head: nn.Module
    classes: int


def cut(
    module: nn.Module,
    blocks: int | Sequence[str],
    example: Tensor,
    vocabulary: int | None = None,
    classes: int | None = None,
) -> CutModel:
    """Cut ``module`` into blocks and a head that share its parameters and buffers.

    Parameters
    ----------
    module
        A model of one tensor in, one tensor out. It is run on batches like ``example`` and not changed.
    blocks
        The qualified names of the children whose outputs end the blocks, in the order they run, each with the operators
        behind it that still belong to the block, as in ``conv1+relu``; or how many blocks to make, see
        `frostline.exporter.boundaries`.
    example
        One batch of input on the model's device, the batch as the first dimension.
    vocabulary
        Number of token ids; needed where ``example`` is int64.
    classes
        How many classes there are, if that is known: the logits have to be as wide.

    Raises
    ------
    UsageError
        A name is unknown, repeated or out of order; a boundary cannot be handed on; there are fewer places to cut than
        asked for; a parameter is used by two parts; a block has nothing to train; the parts do not do what the model
        does; or the model cannot be captured or holds what no stage can train, see `frostline.exporter.support`.
    """
    return Cutter(module, example, vocabulary, classes).cut(blocks)


class Cutter:
    """Cuts one model in any number of ways; it is captured once. The parameters are those of `cut`."""

    def __init__(
        self, module: nn.Module, example: Tensor, vocabulary: int | None = None, classes: int | None = None
    ) -> None:
        _check_vocabulary(module, example, vocabulary)
        self._module, self._vocabulary = module, vocabulary
        self._x = _batch_like(example, vocabulary)
        check_model(module, self._x)
        _check_runs(module, self._x)
        self._captures = Captures(module, self._x, vocabulary)
        evaluated = self._captures.of(training=False)
        made = self._captures.of(training=True)
        self._whole = _observed(module, self._x)
        _check_logits(module, self._whole.outputs, len(self._x), classes)
        _check_counters(made, self._whole)
        self.layout = Layout(made, tensors_of(module), self._whole.gradients.keys(), evaluated)

    @property
    def most_blocks(self) -> int:
        """Into how many blocks the model can be cut without naming them."""
        return max(most_blocks(self.layout), 1)

    def cut(self, blocks: int | Sequence[str]) -> CutModel:
        """The model in blocks, as `cut` takes them."""
        module, layout = self._module, self.layout
        names = () if isinstance(blocks, int) else tuple(blocks)
        _check_request(module, blocks, names)
        if isinstance(blocks, int):
            ends = _automatic(layout, module, blocks, self._whole)
            boundaries = [layout.boundary(end) for end in ends]
        else:
            boundaries = [_named(layout, module, name) for name in names]
            ends = [_end(layout, boundary) for boundary in boundaries]
            _check_order(boundaries, ends)
        parts = _assemble(self._captures, layout, boundaries, ends, self._vocabulary, self._whole)
        try:
            check_same(self._whole, _Chain(module, parts), self._x)
        except Differs as difference:
            raise _hidden(module, self._x, self._whole, str(difference)) from difference
        finally:
            for part in _modules(parts):
                part.train(module.training)
        return parts


def _hidden(module: nn.Module, x: Tensor, seen: Observation, difference: str) -> UsageError:
    """The refusal of a model that does something that the export does not see."""
    why = unsteady(module, x, seen, RUNS)
    if why is not None:
        return UsageError(why)
    title = type(module).__name__
    where = own_gradients(module, x)
    if where is not None:
        return UsageError(
            f"model {title} cannot be cut: {where}, which a compiled step would not do ({difference}). Write it in plain "
            "operators: x + (f(x) - x).detach() has the value of f and the gradient of x"
        )
    return UsageError(
        f"model {title} cannot be cut: {difference}. What it does there is hidden from the export, such as state outside of its "
        "tensors; write it in plain operators"
    )


def _batch_like(example: Tensor, vocabulary: int | None) -> Tensor:
    """A batch of random input: zeros would hide what depends on it."""
    random = torch.Generator().manual_seed(0)
    return random_inputs(CAPTURED_BATCH, tuple(example.shape[1:]), vocabulary, random).to(example.device)


def _check_runs(module: nn.Module, x: Tensor) -> None:
    """Refuse random numbers that no step can draw, and state that no device keeps; other errors are met again."""
    try:
        kept = carried(module, x)
    except UnsupportedOperators as error:
        where = raised_at(error, module)
        raise UsageError(
            f"model {type(module).__name__} cannot be trained{where}: {first_line(error)}"
        ) from error
    except Exception:  # it runs the model's code, which may raise anything
        return
    if kept is not None:
        raise UsageError(kept)


def _observed(module: nn.Module, x: Tensor) -> Observation:
    title = type(module).__name__
    try:
        seen = observe(module, x)
        why = unsteady(module, x, seen)
        in_place = gradients_in_place(module, x)
    except Exception as error:  # it runs the model's code, which may raise anything
        where = raised_at(error, module)
        raise UsageError(f"model {title} cannot be trained{where}: {first_line(error)}") from error
    changed = [name for name, tensor in module.named_parameters() if name in seen.written]
    if changed:
        raise UsageError(
            f"the forward of model {title} changes parameter {changed[0]!r} in place, as an nn.Embedding with max_norm does: only the optimizer may, after the step"
        )
    if why is not None:
        raise UsageError(why)
    norms = [float(each.norm()) for each in in_place.values()]
    largest = max((norm for norm in norms if math.isfinite(norm)), default=0.0)
    for name, gradient in in_place.items():
        found = seen.gradients.get(name)
        if found is None or not close(found, gradient, FLOOR * largest):
            why = unsteady(module, x, seen, RUNS)
            if why is not None:
                raise UsageError(why)
            raise UsageError(
                f"model {title} uses its parameter {name!r} by another reference, as a list or functools.partial holds one, so "
                f"that devices would not train it: use it by its name, self.{name}, or keep the list as nn.ParameterList"
            )
    if not seen.gradients:
        asked = any(each.requires_grad for each in module.parameters())
        why = (
            "its logits depend on none of its parameters" if asked else "no parameter has requires_grad=True"
        )
        raise UsageError(f"model {title} has nothing to train: {why}")
    return seen


def _check_logits(module: nn.Module, outputs: Tensor, batch: int, classes: int | None) -> None:
    title, shape = type(module).__name__, list(outputs.shape)
    if len(shape) != 2 or shape[0] != batch:
        raise UsageError(
            f"model {title} returns shape {shape} for a batch of {batch}: it has to return logits (batch, classes), one row "
            "a sample"
        )
    if not outputs.is_floating_point():
        raise UsageError(
            f"model {title} returns {str(outputs.dtype).removeprefix('torch.')}: return the logits"
        )
    if shape[1] < 2:
        raise UsageError(
            f"model {title} returns {shape[1]} logit a sample, whose cross-entropy is always 0: return one for each of at "
            "least 2 classes"
        )
    if classes is not None and shape[1] != classes:
        raise UsageError(
            f"model {title} returns {shape[1]} logits a sample, but there are {classes} classes: correct the last layer or "
            "the number of classes"
        )


def _check_counters(made: Capture, whole: Observation) -> None:
    """Refuse whole numbers that a step counts and reads: devices hold and hand back float32 only."""
    for node, name in made.tensors.items():
        if name not in whole.written or whole.written[name].is_floating_point():
            continue
        reads = [user for user in node.users if not _only_counts(user, node, node)]
        if reads:
            raise UsageError(
                f"{place_of(reads[0])} reads buffer {name!r}, a {str(whole.written[name].dtype).removeprefix('torch.')} "
                "that each step changes: devices keep float32 between steps; make it a float buffer"
            )


def _only_counts(user: fx.Node, source: fx.Node, buffer: fx.Node) -> bool:
    """Whether what a step makes of a value goes nowhere but back into the buffer that it comes from."""
    if user.op == "output" or (is_in_place(user) and user.args[0] not in (source, buffer)):
        return False
    return all(_only_counts(each, user, buffer) for each in user.users)


def _check_vocabulary(module: nn.Module, example: Tensor, vocabulary: int | None) -> None:
    if (example.dtype == torch.int64) != (vocabulary is not None):
        needed = (
            "needs a vocabulary" if vocabulary is None else f"has no use for a vocabulary of {vocabulary}"
        )
        raise UsageError(
            f"model {type(module).__name__} is given {str(example.dtype).removeprefix('torch.')} input, which {needed}: "
            "give one with int64 token ids only"
        )


def _check_request(module: nn.Module, blocks: int | Sequence[str], names: tuple[str, ...]) -> None:
    title = type(module).__name__
    if isinstance(blocks, int) and blocks < 1:
        raise UsageError(f"model {title} cannot be cut into {blocks} blocks: ask for at least 1")
    if isinstance(blocks, str):
        raise UsageError(f"blocks of model {title} are {blocks!r}: give a list of names, or a number")
    if not isinstance(blocks, int) and not names:
        raise UsageError(f"no blocks are named for model {title}: name at least one of its children")
    known = [name for name, _ in module.named_modules(remove_duplicate=False) if name]
    for index, name in enumerate(names):
        path = _path(name)
        if path and path not in known:
            close = difflib.get_close_matches(path, known, n=3) or [key for key, _ in module.named_children()]
            raise UsageError(
                f"model {title} has no block {path!r}: name one of its children, e.g. {', '.join(close)}"
            )
        if name in names[:index]:
            raise UsageError(f"block {name!r} of model {title} is named twice: name each block once")


def _path(name: str) -> str:
    return name.removeprefix(BEFORE).partition("+")[0].partition("@")[0]


def _named(layout: Layout, module: nn.Module, name: str) -> Boundary:
    """The boundary of a name such as ``layer1``, ``conv1+relu``, ``before:layer2`` or, for a second call, ``conv1@1``."""
    before = name.startswith(BEFORE)
    place, *operators = name.removeprefix(BEFORE).split("+")
    path, _, count = place.partition("@")
    if not path:
        return layout.named(None, tuple(operators), before=False)
    calls = {call: None for step in layout.steps for call in calls_of(step.node)[1:]}
    counts = [call.count for call in calls if call.path == path]
    title = type(module).__name__
    if not counts:
        others = ", ".join([call.path for call in calls][:3])
        raise UsageError(
            f"block {path!r} of model {title} is never called by its forward, or computes nothing: name a child that does, "
            f"e.g. {others}"
        )
    if len(counts) > 1 and not count:
        raise UsageError(
            f"block {path!r} of model {title} is called {len(counts)} times: name a child that is called once, or one call, "
            f"as in {path}@0"
        )
    call = Call(path, int(count) if count.isdigit() else 0)
    return layout.named(call, tuple(operators), before=before)


def _end(layout: Layout, boundary: Boundary) -> int:
    """The last step of a block, checked: what crosses behind it can be handed on."""
    name = boundary.name
    end = boundary.position([step.node for step in layout.steps])
    if layout.in_region[end]:
        raise UsageError(f"block {name!r} ends within torch.no_grad(): end it behind that")
    crossing = layout.crossings[end]
    if not crossing:
        raise UsageError(
            f"nothing behind block {name!r} uses what it returns: end the block where features are handed on"
        )
    features = layout.features(end)
    if features is None:
        shapes = [sizes_of(node) for node in crossing]
        raise UsageError(
            f"block {name!r} hands on shapes {shapes} for a batch of {layout.made.batch}: end it where the batch is an axis "
            "of every value"
        )
    if not any(feature.dtype.is_floating_point for feature in features):
        raise UsageError(
            f"block {name!r} returns {str(features[0].dtype).removeprefix('torch.')}, which carries no gradient: end it "
            "where floating-point features are handed on"
        )
    return end


def _check_order(boundaries: Sequence[Boundary], ends: Sequence[int]) -> None:
    for (first, end), (second, later_end) in pairwise(zip(boundaries, ends, strict=True)):
        if later_end < end:
            in_order = [
                name for _, name in sorted(zip(ends, (each.name for each in boundaries), strict=True))
            ]
            raise UsageError(
                f"block {second.name!r} runs before block {first.name!r}: name the blocks in the order they run, "
                f"{', '.join(in_order)}"
            )
        if later_end == end:
            raise UsageError(
                f"blocks {first.name!r} and {second.name!r} end at the same place: leave one out"
            )


def _automatic(layout: Layout, module: nn.Module, count: int, whole: Observation) -> list[int]:
    possible = most_blocks(layout)
    if count == 1 and not possible:
        return []
    if count > possible and bool((whole.outputs.isnan() | (whole.outputs == math.inf)).any()):
        raise UsageError(
            f"model {type(module).__name__} returns logits that are not finite for random samples: look for a division by zero, "
            "a logarithm or a root of what may be negative, or weights that are too large"
        )
    if count > possible:
        raise UsageError(
            f"model {type(module).__name__} cannot be cut into {count} blocks: {possible or 1} is the most its boundaries "
            "allow, each block with something to train; ask for fewer, or name the children to cut after"
            + (_ties(layout) or _without_gradient(layout))
        )
    return automatic_ends(layout, count)


def _ties(layout: Layout) -> str:
    """What keeps the most of a model in one block, where a tensor does."""
    apart = {
        name: (first, last)
        for name, (first, last) in layout.shared.items()
        if calls_of(layout.steps[first].node) != calls_of(layout.steps[last].node)
    }
    if not apart:
        return ""
    name, (first, last) = max(apart.items(), key=lambda each: each[1][1] - each[1][0])
    names = [each for each, tensor in layout.tensors.items() if tensor is layout.tensors[name]]
    return (
        f". Tensor {' or '.join(map(repr, names))} is used by {place_of(layout.steps[first].node)} and again by {place_of(layout.steps[last].node)}: "
        "blocks cannot share it; untie it, or train all in one with blocks = 1"
    )


def _without_gradient(layout: Layout) -> str:
    """The parameters that nothing trains, which may be meant to be."""
    names = [
        name for name, each in layout.tensors.items() if each.requires_grad and name not in layout.trained
    ]
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f". No gradient reaches {', '.join(map(repr, names[:3]))}{more}"


class _Chain(nn.Module):
    """A cut model as one module over the model's own tensors, by the model's own names."""

    def __init__(self, module: nn.Module, parts: CutModel) -> None:
        super().__init__()
        self._parts = [each for each in _modules(parts) if isinstance(each, Part)]
        for name, tensor in tensors_of(module).items():
            register(self, name, tensor)

    def train(self, mode: bool = True) -> _Chain:
        """Put the parts, which are no children, in a mode."""
        super().train(mode)
        for part in self._parts:
            part.train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The parts one after another, over the tensors that the chain has now."""
        for part in self._parts:
            x = part.over(self, x)
        return x


def _modules(parts: CutModel) -> list[nn.Module]:
    return [*(block.module for block in parts.blocks), parts.head]


def _assemble(
    captures: Captures,
    layout: Layout,
    boundaries: Sequence[Boundary],
    ends: Sequence[int],
    vocabulary: int | None,
    whole: Observation,
) -> CutModel:
    tensors = tensors_of(captures.module)
    titles = [*(f"block {each.name!r}" for each in boundaries), "the head"]
    source = layout.made.source
    raw = Feature(
        "input", tuple(int(each) for each in source.meta["val"].shape[1:]), source.meta["val"].dtype
    )
    features = [(raw,), *(tuple(layout.features(end) or ()) for end in ends)]
    spans = [
        Span(captures, start, end, inputs, outputs)
        for (start, inputs), (end, outputs) in pairwise(
            [*zip([None, *boundaries], features, strict=True), (None, ())]
        )
    ]
    parts = [_part(span, tensors) for span in spans]
    shared = _shared(parts, titles)
    if shared and len(boundaries) == 1:
        # A head that shares tensors with the only block becomes part of it.
        return _assemble(captures, layout, [], [], vocabulary, whole)
    if shared:
        raise UsageError(shared)
    classes = int(whole.outputs.shape[1])
    if not boundaries:
        block = Block(WHOLE_MODEL, parts[0], raw.shape, (classes,), (raw,), (), vocabulary)
        return CutModel((block,), nn.Identity(), classes)
    for title, part in list(zip(titles, parts, strict=True))[:-1]:
        if not any(name in whole.gradients for name in part.names):
            raise UsageError(
                f"{title} has no parameter to train: join it with its neighbour by leaving out its name, "
                "or unfreeze its parameters"
            )
    vocabularies = [vocabulary, *[None] * len(boundaries)]
    blocks = tuple(
        Block(
            boundary.name,
            part,
            handed_on(inputs) if index else raw.shape,
            handed_on(outputs),
            inputs,
            outputs,
            taken,
        )
        for index, (boundary, part, (inputs, outputs), taken) in enumerate(
            zip(boundaries, parts, pairwise(features), vocabularies, strict=False)
        )
    )
    return CutModel(blocks, parts[-1], classes)


def _part(span: Span, tensors: Mapping[str, Tensor]) -> Part:
    """A part with the tensors that it takes in either mode."""
    module = span.captures.module
    taken = {name: None for training in (True, False) for name in span.graph(training=training).names}
    saved = module.state_dict(keep_vars=True)
    used = {id(tensors[name]) for name in taken}
    part = Part(span, {name: each for name, each in tensors.items() if id(each) in used}, saved.keys())
    return part.train(module.training)


def _shared(parts: Sequence[Part], titles: Sequence[str]) -> str | None:
    """What is wrong with a tensor that two parts use; None without any."""
    owners: dict[int, str] = {}
    for title, part in zip(titles, parts, strict=True):
        tensors = tensors_of(part)
        for name, tensor in tensors.items():
            owner = owners.setdefault(id(tensor), title)
            if owner != title and (tensor.requires_grad or name in part.span.written):
                names = [repr(each) for each, other in tensors.items() if other is tensor]
                known_as = f" (also named {', '.join(names[1:])})" if names[1:] else ""
                return (
                    f"tensor {names[0]}{known_as} is used by {owner} and by {title}: blocks are trained apart and cannot "
                    "share it; untie it, cut so that one block holds both uses, or train all in one with blocks = 1"
                )
    return None
