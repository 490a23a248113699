"""Habits whose faults hide: on random batches of one size, without padding and ties, all of them once exported wrong or not at all."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.frames import (
    FEATURES,
    WIDTH,
    function_on,
    on_images,
    on_series,
    on_tokens,
    on_vectors,
    refused,
)


class GhostBatchNorm(nn.Module):
    """Each of as many chunks as the batch has fours is normalised by itself, as in TabNet."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.size, self.norm = size, nn.BatchNorm1d(FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        chunks = x.chunk(int(np.ceil(x.shape[0] / self.size)), 0)
        return torch.cat([self.norm(each) for each in chunks])


def _centred_if_many(x: Tensor) -> Tensor:
    return x - x.mean(0) if x.size(0) > 4 else x


def _largest_of_batch(x: Tensor) -> Tensor:
    count = max(1, math.floor(0.3 * x.size(0)))
    return x - x.topk(count, dim=0).values.mean(0)


class ListedWeights(nn.Module):
    """Parameters by name and in a list; the list is what the forward runs over."""

    def __init__(self) -> None:
        super().__init__()
        self.listed: list[nn.Parameter] = []
        for index in range(2):
            weight = nn.Parameter(torch.eye(FEATURES) + 0.1 * torch.randn(FEATURES, FEATURES))
            self.register_parameter(f"weight_{index}", weight)
            self.listed.append(weight)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.listed:
            x = torch.tanh(x @ weight)
        return x


class BoundWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(FEATURES))
        self.apply_weight = functools.partial(F.linear, weight=self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_weight(x)


class NoisyResidual(nn.Module):
    """Noise between a convolution and the addition behind it, by a function and in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            y = F.relu(conv(x))
            if self.training:
                y = y + 0.05 * torch.randn_like(y)
            x = x + y
        return x


class UnusedNorm(nn.Module):
    """The last batch norm of a loop is computed and dropped, as in Graph WaveNet; its statistics move all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv1d(WIDTH, WIDTH, 1) for _ in range(2)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(WIDTH) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        skip = x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            skip = skip + conv(x)
            x = norm(conv(x))
        return skip


class CentredByPast(nn.Module):
    """A running mean that is viewed, then assigned, then read through the view."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH, 1, 1))
        self.register_buffer("running_mean", torch.zeros(WIDTH))
        self.running_mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        mean = self.running_mean.view(1, -1, 1, 1)
        if self.training:
            self.running_mean = 0.9 * self.running_mean + 0.1 * x.detach().mean((0, 2, 3))
        return (x - mean) * self.scale


class FrozenNorm(nn.Module):
    """Batch norm that its own ``train`` keeps in evaluation, behind one that was left there by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.kept = nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)
        self.left.running_mean = torch.full((WIDTH,), 0.5)

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        self.kept.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.kept(self.left(x))


def _left_in_evaluation() -> nn.Module:
    layer = FrozenNorm()
    layer.left.eval()
    return layer


class MaskedMaximum(nn.Module):
    """The largest of each feature over the windows that are no padding."""

    def __init__(self, lowest: float, kernel: int = 0) -> None:
        super().__init__()
        self.lowest, self.kernel = lowest, kernel

    def forward(self, x: Tensor) -> Tensor:
        padding = (x.abs().sum(1, keepdim=True) < 1e-3) | (torch.arange(x.shape[-1]) % 5 == 0)
        x = x.masked_fill(padding, self.lowest)
        return F.max_pool1d(x, self.kernel or x.shape[-1])


def _compacted(x: Tensor) -> Tensor:
    """What is no padding moves to the front, in its order."""
    padding = (x[..., 0] < 0).int()
    order = padding.argsort(dim=1, stable=True)
    return torch.gather(x, 1, order.unsqueeze(-1).expand_as(x)) * torch.linspace(1, 2, x.shape[1])[:, None]


class Stateful(nn.Module):
    """An LSTM that goes on from where the last batch ended."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, FEATURES, batch_first=True)
        self.state: Any = None

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.lstm(x, self.state)
        self.state = tuple(each.detach() for each in state)
        return out


class OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, generator=self.generator) if self.training else x


class MixedInTraining(nn.Module):
    """Every sample is mixed with another by a share that is drawn, as in MixStyle."""

    def __init__(self) -> None:
        super().__init__()
        self.shares = torch.distributions.Beta(0.4, 0.4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        share = self.shares.sample((x.shape[0], 1))
        return x * share + x.flip(0) * (1 - share)


def _scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU()))


def _pooled_then_layers() -> nn.Module:
    """Three layers behind the pooling: more of the model than in front of it."""
    return nn.Sequential(
        nn.Conv2d(WIDTH, WIDTH, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(WIDTH, FEATURES),
        nn.ReLU(),
        nn.Linear(FEATURES, FEATURES),
        nn.ReLU(),
        nn.Unflatten(1, (FEATURES, 1, 1)),
    )


def _root_of_relu(x: Tensor) -> Tensor:
    return F.relu(x).sqrt()


ENTRIES = (
    on_vectors("ghost_batch_norm", GhostBatchNorm),
    function_on(on_images, "branch_on_batch_size", _centred_if_many),
    function_on(on_vectors, "share_of_the_batch", _largest_of_batch),
    on_vectors("weights_in_a_list", ListedWeights, expected=refused("weight_0", "another reference")),
    on_vectors("weight_in_a_partial", BoundWeight, expected=refused("weight", "another reference")),
    on_images("noisy_residual", NoisyResidual, notes="cut where nothing but a function runs"),
    on_series("batch_norm_unused", UnusedNorm, frozen=("layer.norms.1.weight", "layer.norms.1.bias")),
    on_images("running_mean_viewed", CentredByPast),
    on_images("left_in_evaluation", _left_in_evaluation, frozen=("layer.left.running", "layer.kept.running")),
    on_series("masked_maximum", lambda: MaskedMaximum(-1e9)),
    on_series("masked_maximum_infinite", lambda: MaskedMaximum(-math.inf, 3)),
    function_on(on_tokens, "compacted_in_order", _compacted),
    on_tokens("stateful_lstm", Stateful, expected=refused("'layer", "next batch")),
    on_vectors("own_generator", OwnGenerator, expected=refused("'layer", "Generator")),
    on_vectors("mixed_by_beta", MixedInTraining, expected=refused("'layer", "_sample_dirichlet")),
    on_vectors("scripted", _scripted, expected=refused("'layer'", "torch.jit.script")),
    on_images("layers_behind_pooling", _pooled_then_layers, out=FEATURES),
    function_on(on_vectors, "root_of_relu", _root_of_relu),
)
