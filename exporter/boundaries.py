"""Where a captured model can be cut, what its parts would cost, and where an engineer would cut it.

A boundary is a place between two steps that few values cross. Asked for a number of blocks, the ends of modules at one depth
are taken: the repeated blocks of a list, or the stages that hold them. Deeper ones are tried only where those are too few or
too uneven. Among the ends of a depth the largest block is made as cheap as possible.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor, fx

from frostline.exporter.capture import (
    Call,
    Capture,
    calls_of,
    enter_grad_mode,
    is_size,
    is_tensor,
    is_view,
    leave_grad_mode,
    name_of,
    shape_of,
)
from frostline.exporter.part import Boundary, Feature, base_of, last_uses, readers, sample_shape, writes_of
from frostline.protocol.errors import UsageError

STATE_PER_PARAMETER = 3
"""Bytes a parameter costs in training over its own: the value, its gradient and one momentum."""

FEATURE_DIMENSIONS = 3
"""Dimensions of the tensors that models are cut at where they have any: batch, channels and at least one more."""

MOST_VALUES = 3
"""Values that may cross a boundary that nobody asked for."""

MOST_LEFT = 0.5
"""Share of a model that its head may be, for the sake of handing on one value only."""

UNEVEN = 2.0
"""How much dearer the largest block may be at a depth than at a deeper one."""

_NORMS = {"batch_norm", "group_norm", "layer_norm", "instance_norm", "rms_norm"}
_POOLS = {"mean", "amax", "max", "sum", "select", "logsumexp"}
"""Operators that pool all places, beside those of average and adaptive pooling."""


@dataclass(frozen=True)
class Step:
    """One operator of a model in training.

    Attributes
    ----------
    tensors : tuple of str
        The parameters and buffers it takes.
    trains : bool
        Whether any of them is trained.
    kept : int
        Bytes of its result that the backward pass may need, for the captured batch.
    state : int
        Bytes of its parameters.
    """

    node: fx.Node
    tensors: tuple[str, ...]
    trains: bool
    kept: int
    state: int


class Layout:
    """Where each value of a captured model is made and last used.

    Parameters
    ----------
    made : Capture
        In training mode.
    tensors : mapping
        The model's parameters and buffers by name.
    trained : collection of str
        Those that a gradient reaches.
    evaluated : Capture
        The same model in evaluation mode: what runs in training only names no place.
    """

    def __init__(
        self, made: Capture, tensors: Mapping[str, Tensor], trained: Collection[str], evaluated: Capture
    ) -> None:
        self.made = made
        self._evaluated = evaluated
        self._steps_evaluated = evaluated.steps
        self._lasting = {call for node in evaluated.steps for call in calls_of(node)}
        self.tensors, self.trained = tensors, frozenset(trained)
        nodes = made.steps
        self.position = {node: index for index, node in enumerate(nodes)} | {made.source: -1}
        self.steps = [self._step(node, tensors, trained) for node in nodes]
        self._of_trained: set[fx.Node] = set()
        for step in self.steps:
            if step.trains or not self._of_trained.isdisjoint(step.node.all_input_nodes):
                self._of_trained.add(step.node)
        self.in_region = _regions(nodes)
        self.crossings = _crossings(made)
        self._crossings_evaluated = _crossings(evaluated)
        self.last_write = {
            base: index for index, step in enumerate(self.steps) for base in writes_of(step.node)
        }
        self._uses, self._uses_evaluated = (_uses(each, trained) for each in (made, evaluated))
        self._boundaries: dict[int, tuple[Boundary, bool]] = {}

    def _step(self, node: fx.Node, tensors: Mapping[str, Tensor], trained: Collection[str]) -> Step:
        names = tuple(self.made.tensors[each] for each in node.all_input_nodes if each in self.made.tensors)
        kept = _bytes(node) if is_tensor(node) and not is_view(node) else 0
        parameters = [tensors[name] for name in names if tensors[name].requires_grad]
        state = sum(each.numel() * each.element_size() for each in parameters)
        return Step(node, names, any(name in trained for name in names), kept, state)

    def features(self, last: int) -> list[Feature] | None:
        """What crosses the place behind a step; None where a value is not there for each sample, or is no number."""
        features = []
        for node in self.crossings[last]:
            shape, axis = sample_shape(self.made, node), None
            if shape is not None:
                axis = self.made.batch_axis(node)
            if shape is None or axis is None:
                return None
            features.append(
                Feature(
                    value_name(node),
                    shape,
                    node.meta["val"].dtype,
                    axis,
                    self.position[node],
                    node in self._of_trained,
                )
            )
        return features

    def boundary(self, last: int) -> Boundary:
        """The place behind a step, as it is found again in other captures."""
        return self._found(last)[0]

    def lasts(self, last: int) -> bool:
        """Whether the place behind a step is there in evaluation, too."""
        return self._found(last)[1]

    def _found(self, last: int) -> tuple[Boundary, bool]:
        if last not in self._boundaries:
            # What runs in training only names a place where nothing else does.
            names = [self._after(last, self._lasting), self._after(last, None), *self._before(last)]
            found = next((each for each in names if self._is_in_evaluation(each, last)), None)
            self._boundaries[last] = found or names[1], found is not None
        return self._boundaries[last]

    def _after(self, last: int, known: Collection[Call] | None) -> Boundary:
        """The place behind a step, by the last of the known calls that ended by then."""
        name, times = name_of(self.steps[last].node), 0
        within: set[Call] = set()
        for index in range(last, -1, -1):
            ended = self._ended(index, known)
            if ended is not None:
                return replace(self.behind(ended), operators=(name,) * times, within=frozenset(within))
            times += name_of(self.steps[index].node) == name
            within.update(calls_of(self.steps[index].node))
        return Boundary(None, (name,) * times, within=frozenset(within))

    def _is_in_evaluation(self, boundary: Boundary, last: int) -> bool:
        """Whether a name of the place behind a step names the same place in evaluation."""
        try:
            place = boundary.position(self._steps_evaluated)
        except UsageError:
            return False
        if place < 0:
            return False
        ours, theirs = (
            [sample_shape(made, node) for node in crossing]
            for made, crossing in (
                (self.made, self.crossings[last]),
                (self._evaluated, self._crossings_evaluated[place]),
            )
        )
        return ours == theirs and not any(
            (before := self._uses.get(name)) is not None
            and ((before[1] <= last and after > place) or (before[0] > last and first <= place))
            for name, (first, after) in self._uses_evaluated.items()
        )

    def _before(self, last: int) -> list[Boundary]:
        """The place behind a step, by a call that begins there."""
        here = calls_of(self.steps[last].node)
        following = calls_of(self.steps[last + 1].node) if last + 1 < len(self.steps) else []
        begun = [call for call in following if call not in here]
        inside = [index for index, step in enumerate(self.steps) if begun and begun[0] in calls_of(step.node)]
        return [Boundary(begun[0], before=True)] if inside[:1] == [last + 1] else []

    def named(self, call: Call | None, operators: tuple[str, ...], *, before: bool) -> Boundary:
        """The place that a person names, by what runs in training."""
        if before:
            return Boundary(call, before=True)
        boundary = replace(self.behind(call), operators=operators) if call else Boundary(None, operators)
        nodes = [step.node for step in self.steps]
        start = replace(boundary, operators=()).position(nodes)
        found = list(operators)
        within: set[Call] = set()
        for node in nodes[start + 1 :]:
            if not found:
                break
            within.update(calls_of(node))
            if name_of(node) == found[0]:
                found.pop(0)
        return replace(boundary, within=frozenset(within))

    def behind(self, call: Call) -> Boundary:
        """The place behind a call of the model in training."""
        if call in self._lasting:
            return Boundary(call)
        first = next(index for index, step in enumerate(self.steps) if call in calls_of(step.node))
        return Boundary(call, otherwise=self.boundary(first - 1) if first else Boundary(None))

    def _ended(self, index: int, known: Collection[Call] | None) -> Call | None:
        """The outermost call, but for the model's own, that ends with a step."""
        here = calls_of(self.steps[index].node)[1:]
        following = self.steps[index + 1].node if index + 1 < len(self.steps) else None
        after = calls_of(following) if following is not None else []
        ended = (call for call in here if call not in after)
        return next((call for call in ended if known is None or call in known), None)

    @cached_property
    def shared(self) -> dict[str, tuple[int, int]]:
        """First and last use of each trained parameter that is used more than once, by one name or by two."""
        uses: dict[int, dict[int, str]] = {}
        for index, step in enumerate(self.steps):
            for name in step.tensors:
                if self.tensors[name].requires_grad:
                    uses.setdefault(id(self.tensors[name]), {})[index] = name
        return {found[min(found)]: (min(found), max(found)) for found in uses.values() if len(found) > 1}

    def cost(self, index: int) -> int:
        """What a step adds to its block in training, in bytes."""
        return self.steps[index].kept + STATE_PER_PARAMETER * self.steps[index].state


def _crossings(made: Capture) -> list[list[fx.Node]]:
    """For each step of a capture the values that cross the place behind it."""
    until = last_uses(made)
    alive, found = [made.source], []
    for index, step in enumerate(made.steps):
        alive = [node for node in (*alive, step) if until[node] > index]
        found.append(alive)
    return found


def _uses(made: Capture, trained: Collection[str]) -> dict[str, tuple[int, int]]:
    """The first and the last step that takes each trained parameter."""
    found: dict[str, tuple[int, int]] = {}
    for index, step in enumerate(made.steps):
        for name in (made.tensors[each] for each in step.all_input_nodes if each in made.tensors):
            if name in trained:
                found[name] = found.get(name, (index, index))[0], index
    return found


def value_name(node: fx.Node) -> str:
    """What a person calls a value: the child that returned it, or the operator."""
    calls = calls_of(node)
    path = calls[-1].path if calls else ""
    return f"{path or 'forward'}.{name_of(node)}" if node.op == "call_function" else "input"


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    lengths = (each.node.hint if isinstance(each, torch.SymInt) else each for each in value.shape)
    return int(math.prod(lengths)) * int(value.element_size())


def _regions(nodes: Sequence[fx.Node]) -> list[bool]:
    """For each step whether gradients are off behind it."""
    depth, found = 0, []
    for node in nodes:
        depth += (node.target is enter_grad_mode) - (node.target is leave_grad_mode)
        found.append(depth > 0)
    return found


def automatic_ends(layout: Layout, count: int) -> list[int]:
    """Choose the last steps of ``count`` blocks; fewer if there are fewer places to cut.

    The last block ends with the last features before what the model makes of all of them.
    """
    # Vectors are cut at where there are too few places of more dimensions.
    for dimensions in (FEATURE_DIMENSIONS, 2):
        candidates = [_candidates(layout, values, dimensions) for values in range(1, MOST_VALUES + 1)]
        enough = [ends for ends in candidates if _most_blocks(layout, ends) >= count]
        if enough:
            break
    found = [_of_one_depth(layout, ends, count) for ends in enough]
    if found:
        # Fewer values are better, unless nearly all of the model lies between the places that they cross.
        limit = _limit(layout, min(_dearest(layout, ends) for ends in found))
        return next(ends for ends in found if _dearest(layout, ends) <= limit)
    best = max(_all_candidates(layout), key=lambda e: _most_blocks(layout, e))
    return _cheapest_partition(layout, best, _most_blocks(layout, best)) if best else []


def most_blocks(layout: Layout) -> int:
    """Into how many blocks a model can be cut without naming them."""
    return max(_most_blocks(layout, ends) for ends in _all_candidates(layout))


def _of_one_depth(layout: Layout, ends: list[int], count: int) -> list[int]:
    """The cheapest partition at the least depth at which it is not much dearer than at any."""
    *inner, last = ends
    depth = {end: _depth(layout, end) for end in inner}
    best = _cheapest_partition(layout, ends, count)
    limit = _limit(layout, _dearest(layout, best))
    for deepest in sorted(set(depth.values())):
        at_depth = [*(end for end in inner if depth[end] <= deepest), last]
        if _most_blocks(layout, at_depth) >= count:
            found = _cheapest_partition(layout, at_depth, count)
            if _dearest(layout, found) <= limit:
                return found
    return best


def _limit(layout: Layout, cheapest: int) -> float:
    """How dear the largest block may be where it could be as cheap as that."""
    whole = sum(layout.cost(index) for index in range(len(layout.steps)))
    # Of two blocks, one that holds nearly everything is not twice as dear as half of it.
    return min(UNEVEN * cheapest, (cheapest + whole) / 2)


def _depth(layout: Layout, end: int) -> tuple[bool, int]:
    boundary = layout.boundary(end)
    depth = 0 if boundary.call is None else boundary.call.path.count(".")
    # A place within a module is as deep as what the module has inside.
    within = [calls_of(layout.steps[index].node)[1:] for index in (end, min(end + 1, len(layout.steps) - 1))]
    around = sum(call in within[1] for call in within[0]) if boundary.operators else 0
    # Where an operator follows, the place has no module of its own; it comes after the ends of modules beside it.
    return bool(boundary.operators) and boundary.call is None, max(depth, around)


def _dearest(layout: Layout, ends: Sequence[int]) -> int:
    """What the dearest block costs, the last one with the head that is trained behind it."""
    bounds = [0, *(end + 1 for end in ends[:-1]), len(layout.steps)]
    return max(sum(layout.cost(index) for index in range(start, stop)) for start, stop in pairwise(bounds))


def _all_candidates(layout: Layout) -> list[list[int]]:
    return [
        _candidates(layout, values, dimensions)
        for dimensions in (FEATURE_DIMENSIONS, 2)
        for values in range(1, MOST_VALUES + 1)
    ]


def _candidates(layout: Layout, values: int, dimensions: int) -> list[int]:
    """The places to cut at, the last of them the end of the last block; empty without any."""
    # The last features are a single value where the model has any; more may cross within its blocks.
    last = _features_end(layout, 1, dimensions)
    if last is None or _left(layout, last) > MOST_LEFT:
        last = _features_end(layout, values, dimensions)
    if last is None:
        return []
    inner = [end for end in range(last) if _is_candidate(layout, end, values, dimensions)]
    return [*(end for end in inner if not _splits_operator(layout, end)), last]


def _left(layout: Layout, last: int) -> float:
    """The share of a model, by cost, that comes after a step."""
    costs = [layout.cost(index) for index in range(len(layout.steps))]
    return sum(costs[last + 1 :]) / max(sum(costs), 1)


def _features_end(layout: Layout, values: int, dimensions: int) -> int | None:
    """The step that ends the last block."""
    trained = [index for index, step in enumerate(layout.steps) if step.trains]
    candidates: list[int] = []
    for end, step in enumerate(layout.steps):
        if _is_candidate(layout, end, values, dimensions):
            if dimensions >= FEATURE_DIMENSIONS and _pools_all(layout, step.node):
                break
            candidates.append(end)
    if dimensions < FEATURE_DIMENSIONS:
        candidates = [end for end in candidates if trained and end < trained[-1]]
    while candidates and _only_rearranges(layout.steps[candidates[-1]]):
        candidates.pop()
    if len(candidates) > 1 and _only_normalises(layout, candidates[-2], candidates[-1]):
        # The last norm of a transformer belongs to what reads it.
        candidates.pop()
    if not candidates or not trained or candidates[-1] < trained[0]:
        return None
    return candidates[-1]


def _is_candidate(layout: Layout, end: int, values: int, dimensions: int) -> bool:
    crossing = layout.crossings[end]
    if not 1 <= len(crossing) <= values or layout.in_region[end] or layout.made.source in crossing:
        return False
    node = layout.steps[end].node
    # What is made of nothing, such as a first hidden state, belongs to what reads it.
    if node not in crossing or all(map(is_size, node.all_input_nodes)):
        return False
    features = layout.features(end)
    if any(layout.last_write.get(base_of(each), -1) > end for each in crossing):
        # It is not finished: a tensor whose columns are filled one after another.
        return False
    if features is None or any(first <= end < last for first, last in layout.shared.values()):
        return False
    floats = [each for each in features if each.dtype.is_floating_point]
    return bool(floats) and max(len(each.shape) + 1 for each in floats) >= dimensions and layout.lasts(end)


def _pools_all(layout: Layout, node: fx.Node) -> bool:
    """Whether a step pools all places of the features, as classifiers do."""
    # Maxima come with their places: the step is what takes them from the pooling.
    pooling = node.args[0] if node.target is operator.getitem else node
    assert isinstance(pooling, fx.Node)
    name = name_of(pooling)
    if name.startswith("adaptive_"):
        return math.prod(node.meta["val"].shape[2:]) == 1 or _flattened_behind(layout, node)
    if name not in _POOLS and not name.startswith("avg_pool"):
        return False
    before = next((shape_of(each) for each in pooling.all_input_nodes if is_tensor(each)), ())
    lengths = [length for length in shape_of(node)[1:] if length != 1]
    return len(lengths) <= 1 < len([length for length in before[1:] if length != 1])


def _flattened_behind(layout: Layout, node: fx.Node) -> bool:
    """Whether the next layer that trains takes vectors."""
    following = layout.steps[layout.position[node] + 1 :]
    nearest = next((step for step in following if step.trains), None)
    if nearest is None:
        return True
    taken = [shape_of(each) for each in nearest.node.all_input_nodes if each in layout.position]
    return max(map(len, taken), default=0) < FEATURE_DIMENSIONS


def _only_normalises(layout: Layout, first: int, last: int) -> bool:
    """Whether there is nothing but a norm between two places, and it ends no layer that begins before it."""
    between = [step for step in layout.steps[first + 1 : last + 1] if step.tensors]
    call = layout.boundary(last).call
    belongs = call is not None and call in calls_of(layout.steps[first].node)
    return bool(between) and not belongs and all(name_of(step.node) in _NORMS for step in between)


def _only_rearranges(step: Step) -> bool:
    """Whether a step only hands on what it is given, or in another number of axes: it belongs to what reads it."""
    before = [shape_of(each) for each in step.node.all_input_nodes if is_tensor(each)]
    changes = any(len(shape) != len(shape_of(step.node)) for shape in before)
    picks = step.node.target is operator.getitem
    return not step.tensors and not picks and (changes or is_view(step.node))


def _splits_operator(layout: Layout, end: int) -> bool:
    """Tell whether a cut would part an activation, a pooling or a normalisation from the layer it follows."""
    node = layout.steps[end].node
    found = readers(node)
    if len(layout.crossings[end]) > 1 or len(found) != 1:
        return False
    follower = layout.position.get(found[0])
    if follower is None:
        return False
    while not layout.steps[follower].tensors and is_view(found[0]) and len(readers(found[0])) == 1:
        # A view belongs to what reads it.
        found = readers(found[0])
        if found[0] not in layout.position:
            return False
        follower = layout.position[found[0]]
    if not layout.steps[follower].tensors:
        return True
    normalises = name_of(found[0]) in _NORMS
    return normalises and bool(layout.steps[end].tensors) and name_of(node) not in _NORMS


def _most_blocks(layout: Layout, ends: Sequence[int], first: int = 0) -> int:
    if not ends:
        return 0
    trained = list(accumulate(layout.steps[index].trains for index in range(ends[-1] + 1)))
    closed, blocks = trained[first - 1] if first else 0, 0
    for end in ends:
        if trained[end] > closed:
            closed, blocks = trained[end], blocks + 1
    return blocks


def segment_ends(layout: Layout, first: int, last: int, most: int) -> list[int]:
    """The last steps of at most ``most`` segments of the steps from ``first`` to before ``last``: what follows is left."""
    ends = [
        end
        for end in range(first, last - 1)
        if _is_candidate(layout, end, 1, 2) and not _splits_operator(layout, end)
    ]
    count = min(most, _most_blocks(layout, ends, first))
    return _cheapest_partition(layout, ends, count, first) if count else []


def _cheapest_partition(layout: Layout, ends: Sequence[int], count: int, first: int = 0) -> list[int]:
    """Solve the linear partition problem exactly, by dynamic programming over the last block's start.

    The recurrence is best[k][i] = min over j < i of max(best[k - 1][j], cost of steps after ``ends[j]`` to
    ``ends[i]``), as under "The Partition Problem" in Skiena, "The Algorithm Design Manual"; a block without anything to
    train costs infinity. Of equally dear partitions the one whose boundaries hand on less is taken.
    """
    cost = [0, *accumulate(layout.cost(index) for index in range(ends[-1] + 1))]
    trained = [0, *accumulate(layout.steps[index].trains for index in range(ends[-1] + 1))]
    bounds = [first, *(end + 1 for end in ends)]
    handed = [0, *(sum(_bytes(node) for node in layout.crossings[end]) for end in ends)]

    def block_cost(start: int, stop: int) -> float:
        low, high = bounds[start], bounds[stop]
        # The features a block trains on are a batch in memory, and all samples on flash.
        return cost[high] - cost[low] + handed[start] if trained[high] > trained[low] else math.inf

    best: list[tuple[float, float]] = [(0.0, 0.0)] + [(math.inf, math.inf)] * len(ends)
    choices: list[list[int]] = []
    for _ in range(count):
        options = [
            min(
                ((max(best[j][0], block_cost(j, i)), best[j][1] + handed[i], j) for j in range(i)),
                default=(math.inf, math.inf, 0),
            )
            for i in range(len(bounds))
        ]
        best = [(value, total) for value, total, _ in options]
        choices.append([start for _, _, start in options])
    chosen, stop = [], len(ends)
    for choice in reversed(choices):
        chosen.append(ends[stop - 1])
        stop = choice[stop]
    return chosen[::-1]
