"""Cuts a model into a chain of blocks and a head, by the names of its children or into a number of blocks.

A cut is a place where exactly one tensor passes from what ran before to what runs after. What runs between two cuts
is a block, so a stem joins the first block; what runs after the last cut is the head. The parts are built over the
model's own children and keep its qualified tensor names.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd

from frostline.exporter.support import check_values
from frostline.exporter.tracing import TracedModel, describe, find_attribute, shape_read, trace
from frostline.protocol.errors import UsageError

STATE_PER_PARAMETER = 3
"""Bytes a parameter costs in training over its own: the value, its gradient and one momentum."""

FEATURE_DIMENSIONS = 3
"""Fewest dimensions of a tensor that is cut without being told to: batch, channels and at least one more."""

FIXED_TENSORS = "fixed_tensors"
"""Child of a part that holds the tensors its steps use but its state does not include."""


@dataclass(frozen=True)
class Block:
    r"""One link of the chain.

    Attributes
    ----------
    name
        Qualified name of the child whose output ends the block, or of the operator where no child ends there.
    module
        One tensor (batch, \*input_shape) in, one (batch, \*output_shape) out, for any batch size; float, but for the
        first block of a model that takes token ids.
    input_shape, output_shape
        Shape of one sample.
    vocabulary
        Where the input is token ids, int64, how many there are; ``None`` where it is float.
    """

    name: str
    module: fx.GraphModule
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    vocabulary: int | None = None


@dataclass(frozen=True)
class CutModel:
    r"""A model as a chain: each block's output is the next one's input, the last one's is the head's.

    Attributes
    ----------
    blocks
        At least one.
    head
        Takes (batch, \*blocks[-1].output_shape), returns what the model returns.
    """

    blocks: tuple[Block, ...]
    head: fx.GraphModule


def cut(
    module: nn.Module, blocks: int | Sequence[str], example: torch.Tensor, vocabulary: int | None = None
) -> CutModel:
    """Cut ``module`` into blocks and a head that share its parameters and buffers.

    Parameters
    ----------
    module
        A model of one tensor in, one tensor out. It is run once on ``example`` and not changed.
    blocks
        The qualified names of the children whose outputs end the blocks, in the order they run; or how many blocks
        to make, in which case the head is what follows the last features and the largest block is made as cheap as
        possible. A block costs its layers' and functions' output bytes at ``example``, which training keeps for the
        backward pass, and three times its parameter bytes.
    example
        One batch of input on the model's device, the batch as the first dimension.
    vocabulary
        Number of token ids; needed where ``example`` is int64.

    Returns
    -------
    CutModel
        Parts whose ``state_dict`` names are the model's own and together make up its whole ``state_dict``.

    Raises
    ------
    UsageError
        A name is unknown, repeated or out of order; a cut is crossed by anything but one tensor; there are fewer
        places to cut than asked for; a parameter is used by two parts or by none; a block has nothing to train; or
        the model cannot be traced or holds what no stage can train, see `frostline.exporter.support`.
    """
    names = () if isinstance(blocks, int) else tuple(blocks)
    _check_request(module, blocks, names)
    _check_vocabulary(module, example, vocabulary)
    check_values(module, example)
    traced = trace(module, example, whole=names)
    layout = _Layout(traced)
    if isinstance(blocks, int):
        ends = _balanced_ends(layout, blocks)
        names = tuple(_name_of(traced, traced.steps[end]) for end in ends)
    else:
        ends = [_end_of(layout, name) for name in names]
        _check_order(names, ends)
    for name, end in zip(names, ends, strict=True):
        _check_crossing(layout, name, end)
    return _assemble(layout, names, ends, vocabulary)


def _check_vocabulary(module: nn.Module, example: torch.Tensor, vocabulary: int | None) -> None:
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
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3) or [key for key, _ in module.named_children()]
            raise UsageError(
                f"model {title} has no block {name!r}: name one of its children, e.g. {', '.join(close)}"
            )
        if name in names[:index]:
            raise UsageError(f"block {name!r} of model {title} is named twice: name each block once")


class _Layout:
    """Where each value of a traced model is made and last used, and which tensors each step needs.

    Parameters
    ----------
    traced
        The model.
    """

    def __init__(self, traced: TracedModel) -> None:
        self.traced = traced
        self.position = {node: index for index, node in enumerate(traced.steps)}
        self.position[traced.source] = -1
        # Reading a shape ties a step to no place: every part can read the batch size off its own input.
        self.values = [node for node in self.position if not traced.is_shape(node)]
        self.last_use = {node: self._last_use(node) for node in self.values}
        self.tensors = [self._tensors_of(node) for node in traced.steps]

    def _last_use(self, node: fx.Node) -> int:
        if node is self.traced.result:
            return len(self.traced.steps)
        return max((self.position[user] for user in self.readers(node)), default=-1)

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Return the steps that use a node's value, leaving out those that only read its shape."""
        return [user for user in node.users if user in self.position and not self.traced.is_shape(user)]

    def crossing(self, end: int) -> list[fx.Node]:
        """Return the values made at or before step ``end`` that a later step uses."""
        return [node for node in self.values if self.position[node] <= end < self.last_use[node]]

    def child(self, node: fx.Node) -> nn.Module | None:
        """Return the child a step calls, or ``None`` for a function."""
        return self.traced.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def trainable(self, index: int) -> bool:
        """Tell whether step ``index`` uses a parameter that is trained."""
        return any(tensor.requires_grad for _, tensor in self.tensors[index])

    def cost(self, index: int) -> int:
        """Return what step ``index`` adds to its block in training, in bytes."""
        kept = self.traced.sizes.get(self.traced.steps[index])
        parameters = (tensor for _, tensor in self.tensors[index] if isinstance(tensor, nn.Parameter))
        state = sum(each.numel() * each.element_size() for each in parameters)
        return (kept.nbytes if kept else 0) + STATE_PER_PARAMETER * state

    def _tensors_of(self, node: fx.Node) -> list[tuple[str, torch.Tensor]]:
        child = self.child(node)
        if child is not None:
            prefix = f"{node.target}."
            state = child.state_dict(keep_vars=True).items()
            return [(prefix + name, each) for name, each in state if isinstance(each, torch.Tensor)]
        used = [each for each in node.all_input_nodes if each.op == "get_attr"]
        found = [(str(each.target), self.attribute(each)) for each in used]
        return [(name, tensor) for name, tensor in found if isinstance(tensor, nn.Parameter)]

    def attribute(self, node: fx.Node) -> Any:
        """Return the object a ``call_module`` or ``get_attr`` node refers to."""
        return find_attribute(self.traced.module, self.traced.constants, str(node.target))


def _end_of(layout: _Layout, name: str) -> int:
    title = type(layout.traced.module).__name__
    outputs = layout.traced.calls.get(name, ())
    if not outputs:
        raise UsageError(
            f"block {name!r} of model {title} is never called by its forward: name a child that is, "
            f"e.g. {', '.join(list(layout.traced.calls)[:3])}"
        )
    if len(outputs) > 1:
        raise UsageError(
            f"block {name!r} of model {title} is called {len(outputs)} times: name a child that is called once"
        )
    (node,) = outputs
    if node is None or node not in layout.traced.sizes:
        raise UsageError(
            f"block {name!r} of model {title} does not return one tensor: cut where a single tensor is handed on"
        )
    return layout.position[node]


def _check_order(names: Sequence[str], ends: Sequence[int]) -> None:
    for (name, end), (later, later_end) in pairwise(zip(names, ends, strict=True)):
        if later_end < end:
            in_order = [each for _, each in sorted(zip(ends, names, strict=True))]
            raise UsageError(
                f"block {later!r} runs before block {name!r}: name the blocks in the order they run, "
                f"{', '.join(in_order)}"
            )


def _check_crossing(layout: _Layout, name: str, end: int) -> None:
    node = layout.traced.steps[end]
    crossing = layout.crossing(end)
    if len(crossing) > 1:
        listed = " and ".join(describe(each) for each in crossing)
        raise UsageError(
            f"the end of block {name!r} is crossed by {len(crossing)} values, {listed}, because later steps use them "
            "all: a block hands on one tensor, so end it where the branches have joined"
        )
    if crossing != [node]:
        listed = describe(crossing[0]) if crossing else "nothing"
        raise UsageError(
            f"the output of block {name!r} is not what the rest of the model uses, which is {listed}: "
            "end the block where a single tensor is handed on"
        )
    shape = layout.traced.sizes[node].shape
    if shape[:1] != (layout.traced.batch,):
        raise UsageError(
            f"block {name!r} returns shape {list(shape)} for a batch of {layout.traced.batch}: "
            "end it where the batch is the first dimension"
        )
    if not layout.traced.sizes[node].dtype.is_floating_point:
        raise UsageError(
            f"block {name!r} returns {str(layout.traced.sizes[node].dtype).removeprefix('torch.')}, which carries no "
            "gradient: end it where floating-point features are handed on"
        )


def _name_of(traced: TracedModel, node: fx.Node) -> str:
    # Outer children come last, so that the end of layer2.1.relu is named layer2.
    names = [name for name, outputs in traced.calls.items() if outputs == (node,)]
    return names[-1] if names else node.name


def _balanced_ends(layout: _Layout, count: int) -> list[int]:
    """Choose where ``count`` blocks end so that the most expensive one is as cheap as possible."""
    last = _features_end(layout)
    inner = [end for end in _inner_candidates(layout, last) if not _splits_operator(layout, end)]
    ends = [*inner, last]
    possible = _most_blocks(layout, ends)
    if count > possible:
        raise UsageError(
            f"model {type(layout.traced.module).__name__} cannot be cut into {count} blocks: {possible} is the most "
            "its single-tensor boundaries allow, each block with something to train; ask for fewer"
        )
    return _cheapest_partition(layout, ends, count)


def _features_end(layout: _Layout) -> int:
    """Return the step that ends the last block: the last features before the classifier's pooling."""
    steps = layout.traced.steps
    candidates: list[int] = []
    for end in range(len(steps)):
        if _is_candidate(layout, end):
            if _is_global_pool(layout, steps[end]):
                break
            candidates.append(end)
    while candidates and _only_rearranges(layout, steps[candidates[-1]]):
        candidates.pop()
    if not candidates or not any(layout.trainable(index) for index in range(candidates[-1] + 1)):
        raise UsageError(
            f"model {type(layout.traced.module).__name__} has no place where a single tensor of at least "
            f"{FEATURE_DIMENSIONS} dimensions passes: name the children to cut after instead"
        )
    return candidates[-1]


def _is_candidate(layout: _Layout, end: int) -> bool:
    node = layout.traced.steps[end]
    size = layout.traced.sizes.get(node)
    if size is None or len(size.shape) < FEATURE_DIMENSIONS or size.shape[0] != layout.traced.batch:
        return False
    if not size.dtype.is_floating_point:
        return False
    return layout.crossing(end) == [node]


def _is_global_pool(layout: _Layout, node: fx.Node) -> bool:
    child = layout.child(node)
    name = "" if child is not None else getattr(node.target, "__name__", str(node.target))
    if isinstance(child, (_AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd)) or name.startswith("adaptive_"):
        return True
    averages = isinstance(child, _AvgPoolNd) or name == "mean" or name.startswith("avg_pool")
    lengths = layout.traced.sizes[node].shape[1:]
    # The mean over tokens leaves the last axis, where poolings and the mean over pixels leave the first.
    over_tokens = name == "mean" and all(length == 1 for length in lengths[:-1])
    return averages and (over_tokens or all(length == 1 for length in lengths[1:]))


def _only_rearranges(layout: _Layout, node: fx.Node) -> bool:
    shapes = [layout.traced.sizes[each].shape for each in node.all_input_nodes if each in layout.traced.sizes]
    changes_rank = any(len(shape) != len(layout.traced.sizes[node].shape) for shape in shapes)
    return changes_rank and not layout.tensors[layout.position[node]]


def _inner_candidates(layout: _Layout, last: int) -> list[int]:
    """Return the places before ``last`` to cut at, without those that would divide the uses of a parameter."""
    uses: dict[int, list[int]] = {}
    for index, tensors in enumerate(layout.tensors):
        for _, tensor in tensors:
            uses.setdefault(id(tensor), []).append(index)
    spans = [(found[0], found[-1]) for found in uses.values() if found[0] < found[-1]]
    return [
        end
        for end in range(last)
        if _is_candidate(layout, end) and not any(first <= end < final for first, final in spans)
    ]


def _splits_operator(layout: _Layout, end: int) -> bool:
    """Tell whether a cut would part an activation, a pooling or a normalisation from the layer it follows."""
    node = layout.traced.steps[end]
    readers = layout.readers(node)
    if len(readers) != 1:
        return False
    follower = layout.child(readers[0])
    if not layout.tensors[layout.position[readers[0]]]:
        return True
    normalises = isinstance(follower, (_NormBase, nn.GroupNorm, nn.LayerNorm))
    return normalises and isinstance(layout.child(node), (_ConvNd, nn.Linear))


def _most_blocks(layout: _Layout, ends: Sequence[int]) -> int:
    trained = list(accumulate(layout.trainable(index) for index in range(ends[-1] + 1)))
    closed, blocks = 0, 0
    for end in ends:
        if trained[end] > closed:
            closed, blocks = trained[end], blocks + 1
    return blocks


def _cheapest_partition(layout: _Layout, ends: Sequence[int], count: int) -> list[int]:
    """Solve the linear partition problem exactly, by dynamic programming over the last block's start.

    The recurrence is best[k][i] = min over j < i of max(best[k - 1][j], cost of steps after ``ends[j]`` to
    ``ends[i]``), as under "The Partition Problem" in
    Skiena, "The Algorithm Design Manual"; a block without anything to train costs
    infinity.
    """
    steps = range(ends[-1] + 1)
    cost = [0, *accumulate(layout.cost(index) for index in steps)]
    trained = [0, *accumulate(layout.trainable(index) for index in steps)]
    bounds = [0, *(end + 1 for end in ends)]

    def block_cost(start: int, stop: int) -> float:
        low, high = bounds[start], bounds[stop]
        return cost[high] - cost[low] if trained[high] > trained[low] else math.inf

    best = [0.0] + [math.inf] * len(ends)
    choices: list[list[int]] = []
    for _ in range(count):
        options = [
            min(((max(best[j], block_cost(j, i)), j) for j in range(i)), default=(math.inf, 0))
            for i in range(len(bounds))
        ]
        best = [value for value, _ in options]
        choices.append([start for _, start in options])
    chosen, stop = [], len(ends)
    for choice in reversed(choices):
        chosen.append(ends[stop - 1])
        stop = choice[stop]
    return chosen[::-1]


def _assemble(layout: _Layout, names: Sequence[str], ends: Sequence[int], vocabulary: int | None) -> CutModel:
    traced = layout.traced
    starts = [0, *(end + 1 for end in ends)]
    stops = [*starts[1:], len(traced.steps)]
    inputs = [traced.source, *(traced.steps[end] for end in ends)]
    outputs = [*inputs[1:], traced.result]
    titles = [*(f"block {name!r}" for name in names), "the head"]
    for title, start, stop in list(zip(titles, starts, stops, strict=True))[:-1]:
        if not any(layout.trainable(index) for index in range(start, stop)):
            raise UsageError(
                f"{title} has no parameter to train: join it with its neighbour by leaving out its name, "
                "or unfreeze its parameters"
            )
    _check_tensors(layout, titles, starts, stops)
    parts = [
        _PartBuilder(layout, source).build(traced.steps[start:stop], output)
        for source, output, start, stop in zip(inputs, outputs, starts, stops, strict=True)
    ]
    shapes = [traced.sizes[node].shape[1:] for node in inputs]
    vocabularies = [vocabulary, *[None] * len(names)]
    chain = zip(names, parts, pairwise(shapes), vocabularies, strict=False)
    linked = tuple(Block(name, part, *ends_of, taken) for name, part, ends_of, taken in chain)
    return CutModel(linked, parts[-1])


def _check_tensors(
    layout: _Layout, titles: Sequence[str], starts: Sequence[int], stops: Sequence[int]
) -> None:
    """Check that every tensor of the model's state is used, and by one part only."""
    owners: dict[int, tuple[str, str]] = {}
    unused = dict(layout.traced.module.state_dict(keep_vars=True))
    for title, start, stop in zip(titles, starts, stops, strict=True):
        for name, tensor in _state_of(layout, layout.traced.steps[start:stop]):
            unused.pop(name, None)
            owner, owned = owners.setdefault(id(tensor), (title, name))
            if owner != title:
                known_as = "" if owned == name else f" (there named {name!r})"
                raise UsageError(
                    f"tensor {owned!r} is used by {owner} and by {title}{known_as}: blocks are trained apart and "
                    "cannot share it; untie it, or cut so that one block holds both uses"
                )
    if unused:
        raise UsageError(
            f"tensor {next(iter(unused))!r} of model {type(layout.traced.module).__name__} is in its state but not "
            "used by its forward under that name: remove it from the model"
        )


def _state_of(layout: _Layout, steps: Iterable[fx.Node]) -> list[tuple[str, torch.Tensor]]:
    found: list[tuple[str, torch.Tensor]] = []
    state = layout.traced.module.state_dict(keep_vars=True)
    for node in steps:
        found += layout.tensors[layout.position[node]]
        direct = (str(each.target) for each in node.all_input_nodes if each.op == "get_attr")
        found += [(name, state[name]) for name in direct if name in state]
    return found


class _FixedTensor(nn.Module):
    """Holds a tensor that is not part of the model's state.

    fx would register such a tensor as a buffer that is saved, each time it copies a graph module.
    """

    value: torch.Tensor

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self) -> torch.Tensor:
        return self.value


class _PartBuilder:
    """Copies the steps between two cuts into a graph module of their own.

    Parameters
    ----------
    layout
        The whole model.
    source
        The node of the whole model that becomes the part's input.
    """

    def __init__(self, layout: _Layout, source: fx.Node) -> None:
        self.layout = layout
        self.graph = fx.Graph()
        self.input = self.graph.placeholder("features")
        self.copies: dict[fx.Node, Any] = {source: self.input}
        self.attributes: dict[str, Any] = {}
        self.state_names = set(layout.traced.module.state_dict())

    def build(self, steps: Iterable[fx.Node], output: fx.Node) -> fx.GraphModule:
        """Return a graph module that runs ``steps`` and returns the value of ``output``."""
        for node in steps:
            if not self.layout.traced.is_shape(node):
                if node.op == "call_module":
                    self.attributes[str(node.target)] = self.layout.attribute(node)
                self.copies[node] = self.graph.node_copy(node, self._resolve)
        self.graph.output(self._resolve(output))
        self.graph.lint()
        part = fx.GraphModule(self.attributes, self.graph)
        part.training = self.layout.traced.module.training
        return part

    def _resolve(self, node: fx.Node) -> Any:
        if node not in self.copies:
            if node.op == "get_attr":
                self.copies[node] = self._copy_attribute(node)
            else:
                self.copies[node] = self._copy_shape(node)
        return self.copies[node]

    def _copy_attribute(self, node: fx.Node) -> fx.Node:
        target, value = str(node.target), self.layout.attribute(node)
        if not isinstance(value, torch.Tensor) or target in self.state_names:
            self.attributes[target] = value
            return self.graph.get_attr(target)
        held = f"{FIXED_TENSORS}.{target.replace('.', '_')}"
        self.attributes[held] = _FixedTensor(value)
        return self.graph.call_module(held)

    def _copy_shape(self, node: fx.Node) -> Any:
        tensor, dimension = shape_read(node)
        if tensor in self.copies:
            return self.graph.node_copy(node, self._resolve)
        # The tensor stayed in an earlier part; only its batch size can vary, and the part's input has the same.
        fixed = self.layout.traced.sizes[tensor].shape
        shape = (self.graph.call_method("size", (self.input, 0)), *fixed[1:])
        return shape if dimension is None else shape[dimension]
