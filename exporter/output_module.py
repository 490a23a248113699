"""Builds what stands in for the rest of the model while one block is trained.

There are three kinds. **Convolutions**: each block that follows is imitated by a small linear layer, after which comes the model's
own head. This is the output module of ProFL (Wu et al., "Breaking the Memory Wall for Heterogeneous Federated Learning via
Progressive Training", KDD 2025, arXiv 2404.13349) and NeuLite (Wu et al., "NeuLite: Memory-Efficient Federated Learning via
Elastic Progressive Training", arXiv 2408.10826): one 3×3 stride-2 convolution, without normalisation or activation, takes a
block's place. Here the stride is the one that gives the block's own output shape.

A stand-in has no more parameters than the block it imitates. Where a dense convolution would, as for bottlenecks, inverted
residuals and separable convolutions, it is a depthwise convolution and a pointwise one, whose matrix is of low rank if need
be; the least of these, of rank one, may be larger than a block of a few dozen parameters. **Dense** ones are full convolutions as those papers have them, however large: to compare with.

For tokens, and for single vectors, the stand-in is one linear layer over the features of each token: an extension of our own.
Like the convolution it is linear, mixes all features and maps the block's input shape to its output shape; and since
attention treats near and far tokens alike, a kernel over neighbouring ones would imitate nothing. Blocks that change how many
places there are otherwise than a stride does are resampled: places are averaged or repeated, then features mixed.

Where a boundary hands on several values, what the block only passes on is passed on, and the others are imitated from the
largest that anything trains.

**Linear**: the block's features, averaged over all their places, and one linear layer to the classes. This is the head that
each stage but the last has in ProgFed (Wang et al., "ProgFed: Effective, Communication, and Computation Efficient Federated
Learning by Progressive Training", ICML 2022). It takes less memory and work, and asks less of a block's shapes, but imitates
nothing of what follows. The last stage has the model's own head in either kind.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from frostline.exporter.cutting import Block, CutModel
from frostline.exporter.inputs import zero_inputs
from frostline.exporter.modes import mode
from frostline.exporter.part import Feature, is_packed
from frostline.protocol.errors import UsageError

OutputModuleKind = Literal["convolutions", "dense", "linear"]
"""What stands in for the rest of the model."""

KERNEL = 3

CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
"""The convolution for each number of spatial dimensions."""

_AVERAGES: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}

FEATURES_SECOND = {
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "convolution"),
    *("batch_norm", "group_norm", "instance_norm"),
    *("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d"),
}
"""Functions whose input is (batch, features, ...)."""

FEATURES_LAST = {
    *(
        "linear",
        "layer_norm",
        "rms_norm",
        "multi_head_attention_forward",
        "lstm",
        "gru",
        "rnn_tanh",
        "rnn_relu",
    ),
}
"""Functions whose input is (batch, ..., features)."""

PERMUTATIONS = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"}


class OutputModule(nn.Module):
    """The stand-ins of the blocks after the trained one, in order, and a copy of the head.

    Parameters
    ----------
    stand_ins
        One layer for each block left, by the block's index; registered as ``stand_in_<index>``.
    head
        Registered as ``head``, so its tensors keep the model's names behind ``head.``.
    """

    def __init__(self, stand_ins: dict[int, nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stand_in_names = tuple(f"stand_in_{index}" for index in sorted(stand_ins))
        for index, stand_in in stand_ins.items():
            self.add_module(f"stand_in_{index}", stand_in)
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        """Return what the model's head makes of ``features``, the trained block's output with the batch first."""
        for name in self.stand_in_names:
            features = self.get_submodule(name)(features)
        outputs: Tensor = self.head(features)
        return outputs


class LinearOutput(OutputModule):
    """The mean over the places of the features, and one linear layer to the classes.

    Parameters
    ----------
    stage
        Index of the trained block; the layer is registered as ``linear_<stage>``, so that no other stage takes its values
        for those of a layer of its own.
    handed
        What the trained block hands on.
    places
        Axes of the largest value (N, ...) that are averaged over: all but the batch and the features.
    layer
        Features to classes.
    """

    def __init__(
        self, stage: int, handed: Sequence[Feature], places: tuple[int, ...], layer: nn.Linear
    ) -> None:
        super().__init__({}, nn.Identity())
        self.layer_name = f"linear_{stage}"
        self.handed = tuple(handed)
        self.places = places
        self.add_module(self.layer_name, layer)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (N, classes) of ``features``, the trained block's output with the batch first."""
        largest = _unpacked(features, self.handed)[_largest(self.handed)]
        pooled = largest.mean(self.places) if self.places else largest
        logits: Tensor = self.get_submodule(self.layer_name)(pooled)
        return logits


class Resampled(nn.Module):
    """Features of any places to features of any others: places averaged or repeated, then features mixed.

    Parameters
    ----------
    incoming, outgoing
        Shapes of one sample.
    last
        Whether the features are the last axis of what comes in, and of what goes out, or the first.
    mix
        A pointwise convolution for as many axes of places as there are in between.
    """

    def __init__(
        self, incoming: tuple[int, ...], outgoing: tuple[int, ...], last: tuple[bool, bool], mix: nn.Module
    ) -> None:
        super().__init__()
        self.outgoing, self.last, self.mix = outgoing, last, mix
        self.places = outgoing[:-1] if last[1] else outgoing[1:]
        self.aligned = len(incoming) == len(outgoing) and 1 <= len(self.places) <= len(_AVERAGES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, *incoming) to (N, *outgoing)."""
        channels = x.movedim(-1, 1) if self.last[0] else x
        if not self.aligned:
            channels = channels.reshape(x.shape[0], channels.shape[1], -1)
        places = list(self.places) if self.aligned else [math.prod(self.places)]
        if list(channels.shape[2:]) != places:
            fewer = all(new <= old for new, old in zip(places, channels.shape[2:], strict=True))
            resized = _AVERAGES[len(places)] if fewer else F.interpolate
            channels = resized(channels, places)
        mixed: Tensor = self.mix(channels)
        mixed = mixed.reshape(x.shape[0], mixed.shape[1], *self.places)
        return mixed.movedim(1, -1) if self.last[1] else mixed


class Packed(nn.Module):
    """Several values to several others, each side by side in one tensor (N, numbers).

    Parameters
    ----------
    inputs, outputs
        What they are.
    layers
        For each output that is not passed on, by its index, what makes it of the largest input.
    """

    def __init__(
        self, inputs: Sequence[Feature], outputs: Sequence[Feature], layers: dict[int, nn.Module]
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        for index, layer in layers.items():
            self.add_module(f"value_{index}", layer)

    def forward(self, x: Tensor) -> Tensor:
        """What is handed on to the block to what it hands on."""
        values = _unpacked(x, self.inputs)
        made = []
        for index, feature in enumerate(self.outputs):
            if feature in self.inputs:
                made.append(values[self.inputs.index(feature)])
            else:
                made.append(self.get_submodule(f"value_{index}")(values[_largest(self.inputs)]))
        if not is_packed(self.outputs):
            return made[0]
        return torch.cat([each.reshape(x.shape[0], -1) for each in made], 1)


def _unpacked(x: Tensor, features: Sequence[Feature]) -> list[Tensor]:
    """The values of a boundary, each (N, *shape); what is no float stays the float it is handed on as."""
    if not is_packed(features):
        return [x]
    parts = torch.split(x, [each.size for each in features], 1)
    return [part.reshape(x.shape[0], *each.shape) for part, each in zip(parts, features, strict=True)]


def _largest(features: Sequence[Feature]) -> int:
    """The float value that the others are imitated from: of those with most axes the largest, and the last of equals.

    Masks are none, whatever their axes: they hold minus infinity, or nearly.
    """
    floats = [index for index, each in enumerate(features) if each.dtype.is_floating_point]

    def preference(index: int) -> tuple[bool, int, int, int]:
        feature = features[index]
        return feature.trained, len(feature.shape), feature.size, index

    return max(floats, key=preference)


def build_output_module(
    cut: CutModel, stage: int, seed: int, kind: OutputModuleKind = "convolutions"
) -> OutputModule:
    """Build the output module for the stage that trains block ``stage``.

    Parameters
    ----------
    cut
        The model.
    stage
        Index of the trained block, from 0; at the last one the module is the head alone.
    seed
        Seed of the stand-ins' weights. The stand-in of one block starts with the same weights at every stage; torch's
        global generator is left as it is.
    kind
        What stands in for the blocks that follow.

    Returns
    -------
    OutputModule
        In training mode, on the device and in the dtype of the blocks; it shares no tensor with the model.

    Raises
    ------
    UsageError
        There is no such stage, or a later block hands on whole numbers of its own making.
    """
    if not 0 <= stage < len(cut.blocks):
        raise UsageError(
            f"stage {stage} does not exist: the model has {len(cut.blocks)} blocks, so stages 0 to {len(cut.blocks) - 1}"
        )
    if kind == "linear" and stage + 1 < len(cut.blocks):
        return _linear_output(cut, stage, seed + stage).train()
    stand_ins = {
        index: stand_in(cut, index, seed + index, dense=kind == "dense")
        for index in range(stage + 1, len(cut.blocks))
    }
    module = OutputModule(stand_ins, copy.deepcopy(cut.head))
    return module.train()


def _linear_output(cut: CutModel, stage: int, seed: int) -> LinearOutput:
    block = cut.blocks[stage]
    shape = block.outputs[_largest(block.outputs)].shape
    features = len(shape) if _features_last(block) else 1
    places = tuple(axis for axis in range(1, len(shape) + 1) if axis != features)
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(shape[features - 1], cut.classes)
    _initialise(layer, torch.Generator().manual_seed(seed))
    nn.init.zeros_(layer.bias)
    return LinearOutput(stage, block.outputs, places, layer.to(next(block.module.parameters())))


def stand_in(cut: CutModel, index: int, seed: int, *, dense: bool = False) -> nn.Module:
    """What imitates a block after the first, however large if it is to be dense."""
    block = cut.blocks[index]
    largest = block.inputs[_largest(block.inputs)]
    own = _features_last(block)
    # A block that keeps the number of axes keeps the features where it has them.
    same = len(largest.shape) == len(block.outputs[_largest(block.outputs)].shape)
    last = own if same else _features_last(cut.blocks[index - 1]), own
    generator = torch.Generator().manual_seed(seed)
    new = [place for place, each in enumerate(block.outputs) if each not in block.inputs]
    layers: dict[int, nn.Module] = {}
    # Constructing a layer draws weights from the global generator, which belongs to the caller.
    with torch.random.fork_rng(devices=[]):
        for place in new:
            feature = block.outputs[place]
            if not feature.dtype.is_floating_point:
                raise UsageError(
                    f"block {block.name!r} makes {feature.name!r} of type {str(feature.dtype).removeprefix('torch.')}, which "
                    "nothing can stand in for: cut the model elsewhere, or use one linear layer as the output module"
                )
            most = sum(each.numel() for each in block.module.parameters()) // len(new)
            allowed = math.inf if dense else most
            layers[place] = _layer(largest.shape, feature.shape, last, allowed, generator)
    first = next(block.module.parameters())
    if not is_packed(block.inputs) and not is_packed(block.outputs):
        return layers[0].to(first)
    return Packed(block.inputs, block.outputs, layers).to(first)


def _layer(
    incoming: tuple[int, ...],
    outgoing: tuple[int, ...],
    last: tuple[bool, bool],
    most: float,
    generator: torch.Generator,
) -> nn.Module:
    """A linear map between two shapes, of at most so many parameters."""
    layer: nn.Module | None = None
    if last == (True, True) or len(incoming) == len(outgoing) == 1:
        if incoming[:-1] == outgoing[:-1]:
            layer = _mixing(nn.Linear, incoming[-1], outgoing[-1], most)
    elif last == (False, False) and len(incoming) == len(outgoing) and len(incoming) - 1 in CONVOLUTIONS:
        layer = _convolution(incoming, outgoing, most)
    if layer is None:
        into = incoming[-1] if last[0] else incoming[0]
        out = outgoing[-1] if last[1] else outgoing[0]
        aligned = len(incoming) == len(outgoing) and len(outgoing) > 1
        mix = _mixing(CONVOLUTIONS[len(outgoing) - 1 if aligned else 1], into, out, most)
        layer = Resampled(incoming, outgoing, last, mix)
    for each in layer.modules():
        if isinstance(each, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            _initialise(each, generator)
    return layer


def _initialise(layer: Any, generator: torch.Generator) -> None:
    # Fan-in scaling with gain 1 keeps the features' variance through a chain of layers without activations.
    nn.init.kaiming_normal_(layer.weight, nonlinearity="linear", generator=generator)


def _mixing(kind: Any, into: int, out: int, most: float) -> nn.Module:
    """All features into all others, by a matrix of at most so many parameters."""
    kernel = () if kind is nn.Linear else (1,)
    if into * out <= most:
        layer: nn.Module = kind(into, out, *kernel, bias=False)
        return layer
    rank = max(int(most) // (into + out), 1)
    return nn.Sequential(kind(into, rank, *kernel, bias=False), kind(rank, out, *kernel, bias=False))


@dataclass(frozen=True)
class _Reach:
    """How one axis of the features is strided and padded."""

    stride: int
    padding: int


def _convolution(incoming: tuple[int, ...], outgoing: tuple[int, ...], most: float) -> nn.Module | None:
    """A convolution of some stride, in one or in separable form; None where no stride gives the places."""
    kind = CONVOLUTIONS[len(incoming) - 1]
    reached = [_reach(*lengths) for lengths in zip(incoming[1:], outgoing[1:], strict=True)]
    axes = [axis for axis in reached if axis is not None]
    if len(axes) != len(reached):
        return None
    strides: Any = tuple(axis.stride for axis in axes)
    paddings: Any = tuple(axis.padding for axis in axes)
    into, out = incoming[0], outgoing[0]
    taps = KERNEL ** len(axes)
    if taps * into * out <= most:
        return kind(into, out, KERNEL, strides, paddings, bias=False)
    depthwise = kind(into, into, KERNEL, strides, paddings, groups=into, bias=False)
    return nn.Sequential(depthwise, _mixing(kind, into, out, most - taps * into))


def _features_last(block: Block) -> bool:
    """Tell whether a block's output keeps its features on the last axis, as tokens do, or on the first, as images do.

    The shape does not say: 64 tokens of 128 features look like 64 channels of 128 readings. So the block is run once,
    and the last layer whose kind shows where its features are decides, followed through the permutations behind it.
    """
    shape = block.outputs[_largest(block.outputs)].shape
    if len(shape) == 1:
        return False
    first = next(block.module.parameters())
    x = zero_inputs(2, block.input_shape, block.vocabulary)
    x = x.to(first) if block.vocabulary is None else x.to(first.device)
    watch = _FeatureAxis(len(shape) + 1)
    with torch.no_grad(), mode(block.module, training=False), watch:
        block.module(x)
    return watch.axis not in (None, 1)


class _FeatureAxis(TorchFunctionMode):
    """Follows on which axis of the tensors with `dimensions` axes the features are, in `axis`; `None` until known."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.axis: int | None = None
        self._dimensions = dimensions

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        x = args[0] if args else None
        # Parts of a cut model call operators where PyTorch's layers call functions.
        operator = isinstance(func, OpOverload)
        name = func._schema.name.partition("::")[2] if operator else getattr(func, "__name__", "")
        if name == "embedding" and result.dim() == self._dimensions:
            self.axis = self._dimensions - 1
        # Layers on fewer axes, such as those of squeeze-and-excitation, see features without their places.
        if isinstance(x, Tensor) and x.dim() >= min(self._dimensions, 3):
            if name in FEATURES_SECOND:
                self.axis = 1
            elif name in FEATURES_LAST:
                self.axis = self._dimensions - 1
            elif name in PERMUTATIONS and self.axis is not None and x.dim() == self._dimensions:
                # Lengths that differ tell the axes apart, however the permutation was asked for.
                marked = torch.empty(tuple(range(x.dim())), device="meta")
                turned = func(marked, *args[1:], **(kwargs or {}))
                self.axis = tuple(turned.shape).index(self.axis)
        return result


def _reach(incoming: int, outgoing: int) -> _Reach | None:
    """Find the smallest stride that takes an axis of ``incoming`` elements to exactly ``outgoing``, if one does.

    The output length of a convolution is floor((incoming + 2 padding - kernel) / stride) + 1. Padding 1 is tried
    first; without padding the lengths that unpadded pooling leaves of odd sizes, such as 4 of 9, come out too.
    """
    for padding in (1, 0):
        span = incoming + 2 * padding - KERNEL
        for stride in range(1, incoming + 1):
            if span >= 0 and span // stride + 1 == outgoing:
                return _Reach(stride, padding)
    return None
