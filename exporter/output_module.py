"""Builds what stands in for the rest of the model while one block is trained.

There are two kinds. **Convolutions**: each block that follows is imitated by a single convolution, after which comes the model's own head. This is the output
module of ProFL (Wu et al., "Breaking the Memory Wall for Heterogeneous Federated Learning via Progressive Training",
KDD 2025, arXiv 2404.13349) and NeuLite (Wu et al., "NeuLite: Memory-Efficient Federated Learning via Elastic
Progressive Training", arXiv 2408.10826): one 3×3 stride-2 convolution, without normalisation or activation, takes a
block's place. Here the stride is the one that gives the block's own output shape.

That is a layer for images. For tokens, and for single vectors, the stand-in is one linear layer over the features of each
token: an extension of our own. Like the convolution it is linear, mixes all features and maps the block's input shape to
its output shape; and since attention treats near and far tokens alike, a kernel over neighbouring ones would imitate
nothing.

**Linear**: the block's features, averaged over all their places, and one linear layer to the classes. This is the head that
each stage but the last has in ProgFed (Wang et al., "ProgFed: Effective, Communication, and Computation Efficient Federated
Learning by Progressive Training", ICML 2022). It takes less memory and work, and asks less of a block's shapes, but imitates
nothing of what follows. The last stage has the model's own head in either kind.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from frostline.exporter.cutting import Block, CutModel
from frostline.exporter.inputs import zero_inputs
from frostline.exporter.tracing import mode
from frostline.protocol.errors import UsageError

OutputModuleKind = Literal["convolutions", "linear"]
"""What stands in for the rest of the model."""

KERNEL = 3

CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}
"""The convolution for each number of spatial dimensions."""

FEATURES_SECOND = {
    *("conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d"),
    *("batch_norm", "group_norm", "instance_norm"),
    *("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d"),
}
"""Functions whose input is (batch, features, ...)."""

FEATURES_LAST = {"linear", "layer_norm", "rms_norm", "multi_head_attention_forward"}
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

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return what the model's head makes of ``features``, the trained block's output with the batch first."""
        for name in self.stand_in_names:
            features = self.get_submodule(name)(features)
        outputs: torch.Tensor = self.head(features)
        return outputs


class LinearOutput(OutputModule):
    """The mean over the places of the features, and one linear layer to the classes.

    Parameters
    ----------
    stage
        Index of the trained block; the layer is registered as ``linear_<stage>``, so that no other stage takes its values
        for those of a layer of its own.
    places
        Axes of the trained block's output (N, ...) that are averaged over: all but the batch and the features.
    layer
        Features to classes.
    """

    def __init__(self, stage: int, places: tuple[int, ...], layer: nn.Linear) -> None:
        super().__init__({}, nn.Identity())
        self.layer_name = f"linear_{stage}"
        self.places = places
        self.add_module(self.layer_name, layer)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes) of ``features``, the trained block's output with the batch first."""
        pooled = features.mean(self.places) if self.places else features
        logits: torch.Tensor = self.get_submodule(self.layer_name)(pooled)
        return logits


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
        There is no such stage, or neither one convolution nor one linear layer can turn a later block's input into its
        output, where each is to be imitated.
    """
    if not 0 <= stage < len(cut.blocks):
        raise UsageError(
            f"stage {stage} does not exist: the model has {len(cut.blocks)} blocks, so stages 0 to {len(cut.blocks) - 1}"
        )
    if kind == "linear" and stage + 1 < len(cut.blocks):
        return _linear_output(cut, stage, seed + stage).train()
    stand_ins: dict[int, nn.Module] = {
        index: _stand_in(cut.blocks[index], seed + index) for index in range(stage + 1, len(cut.blocks))
    }
    module = OutputModule(stand_ins, copy.deepcopy(cut.head))
    return module.train()


def _linear_output(cut: CutModel, stage: int, seed: int) -> LinearOutput:
    block = cut.blocks[stage]
    features = len(block.output_shape) if _features_last(block) else 1
    places = tuple(axis for axis in range(1, len(block.output_shape) + 1) if axis != features)
    like = next(block.module.parameters())
    with torch.no_grad(), mode(cut.head, training=False):
        classes = cut.head(like.new_zeros(1, *cut.blocks[-1].output_shape)).shape[-1]
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(block.output_shape[features - 1], classes)
    _initialise(layer, seed)
    nn.init.zeros_(layer.bias)
    return LinearOutput(stage, places, layer.to(like))


@dataclass(frozen=True)
class _Reach:
    """How one axis of the features is strided and padded."""

    stride: int
    padding: int


def _stand_in(block: Block, seed: int) -> nn.Module:
    incoming, outgoing = block.input_shape, block.output_shape
    convolution = CONVOLUTIONS.get(len(incoming) - 1)
    if len(incoming) != len(outgoing) or (convolution is None and len(incoming) != 1):
        raise _cannot_imitate(
            block,
            "they need to be (features), (tokens, features), (channels, length) or (channels, height, width) on both "
            "sides",
        )
    # Constructing a layer draws weights from the global generator, which belongs to the caller.
    with torch.random.fork_rng(devices=[]):
        layer: nn.Conv1d | nn.Conv2d | nn.Linear
        if convolution is None or _features_last(block):
            layer = _linear(block)
        else:
            layer = _convolution(block, convolution)
    _initialise(layer, seed)
    return layer.to(next(block.module.parameters()))


def _initialise(layer: nn.Conv1d | nn.Conv2d | nn.Linear, seed: int) -> None:
    # Fan-in scaling with gain 1 keeps the features' variance through a chain of layers without activations.
    generator = torch.Generator().manual_seed(seed)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="linear", generator=generator)


def _linear(block: Block) -> nn.Linear:
    if block.input_shape[:-1] != block.output_shape[:-1]:
        raise _cannot_imitate(block, "a linear layer keeps the number of tokens")
    return nn.Linear(block.input_shape[-1], block.output_shape[-1], bias=False)


def _convolution(block: Block, convolution: type[nn.Conv1d | nn.Conv2d]) -> nn.Conv1d | nn.Conv2d:
    incoming, outgoing = block.input_shape, block.output_shape
    axes = [_reach(*lengths) for lengths in zip(incoming[1:], outgoing[1:], strict=True)]
    reached = [axis for axis in axes if axis is not None]
    if len(reached) != len(axes):
        raise _cannot_imitate(block, "no stride gives that height and width")
    strides: Any = tuple(axis.stride for axis in reached)
    paddings: Any = tuple(axis.padding for axis in reached)
    return convolution(incoming[0], outgoing[0], KERNEL, strides, paddings, bias=False)


def _features_last(block: Block) -> bool:
    """Tell whether a block's output keeps its features on the last axis, as tokens do, or on the first, as images do.

    The shape does not say: 64 tokens of 128 features look like 64 channels of 128 readings. So the block is run once,
    and the last layer whose kind shows where its features are decides, followed through the permutations behind it.
    """
    first = next(block.module.parameters())
    x = zero_inputs(1, block.input_shape, block.vocabulary)
    x = x.to(first) if block.vocabulary is None else x.to(first.device)
    watch = _FeatureAxis(len(block.output_shape) + 1)
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
        name = getattr(func, "__name__", "")
        if name == "embedding" and result.dim() == self._dimensions:
            self.axis = self._dimensions - 1
        # Layers on fewer axes, such as those of squeeze-and-excitation, see features without their places.
        if isinstance(x, torch.Tensor) and x.dim() >= min(self._dimensions, 3):
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


def _cannot_imitate(block: Block, reason: str) -> UsageError:
    return UsageError(
        f"block {block.name!r} turns features of shape {list(block.input_shape)} into {list(block.output_shape)}, which "
        f"no single convolution imitates: {reason}; cut the model elsewhere"
    )
