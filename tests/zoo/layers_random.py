"""What is random in a step: dropout of every kind, dropped paths, and noise."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.attention import DropPath
from tests.zoo.efficient import StochasticDepth
from tests.zoo.frames import (
    FEATURES,
    WIDTH,
    function_on,
    on_images,
    on_series,
    on_tokens,
    on_vectors,
    on_volumes,
    refused,
)


class FunctionalDropout(nn.Module):
    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)


class Branch(nn.Module):
    """A residual branch that is dropped."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), drop

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.conv(x))


class ScaleByKeep(nn.Module):
    """Dropped paths by new_empty and bernoulli_."""

    def __init__(self, drop_prob: float = 0.2) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        if keep > 0.0:
            mask.div_(keep)
        return x * mask


class LayerDrop(nn.Module):
    """The whole batch skips the layer or does not: a branch on a random number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        dropout_probability = torch.rand([])
        if self.training and dropout_probability < 1e-4:
            return x
        return x + self.conv(x)


class PythonRandomScale(nn.Module):
    """A random number that PyTorch knows nothing of."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * random.random()) if self.training else x


class GaussianNoise(nn.Module):
    def __init__(self, std: float = 0.1) -> None:
        super().__init__()
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + torch.randn_like(x) * self.std
        return x


class UniformNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + (torch.rand(x.shape, device=x.device) - 0.5) * 0.1 if self.training else x


class InPlaceNoise(nn.Module):
    """A buffer of zeros that is filled anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("noise", torch.tensor(0.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        scale = 0.1 * x.detach()
        return x + self.noise.repeat(*x.size()).normal_() * scale


class ExponentialNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.empty_like(x).exponential_(5.0).add(0.8) if self.training else x


class GumbelGate(nn.Module):
    def __init__(self, hard: bool) -> None:
        super().__init__()
        self.hard = hard

    def forward(self, x: Tensor) -> Tensor:
        return x * F.gumbel_softmax(x, tau=1.0, hard=self.hard, dim=-1)


class Reparameterized(nn.Module):
    """A variational bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.mu, self.logvar = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = self.mu(x), self.logvar(x)
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std) if self.training else torch.zeros_like(std)
        return mu + eps * std


class DropBlock(nn.Module):
    """Whole neighbourhoods are dropped: the maximum of a random mask."""

    def __init__(self, p: float = 0.05, size: int = 3) -> None:
        super().__init__()
        self.p, self.size = p, size

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        mask = torch.rand(x.shape[0], 1, *x.shape[2:]).lt(self.p / self.size**2).to(x.dtype)
        mask = 1 - F.max_pool2d(mask, self.size, stride=1, padding=self.size // 2)
        return x * mask * (mask.numel() / (mask.sum() + 1e-7))


class LockedDropout(nn.Module):
    """One mask for all steps of a sequence, as AWD-LSTM has it."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.dropout:
            return x
        m = x.data.new(x.size(0), 1, x.size(2)).bernoulli_(1 - self.dropout)
        return m.div(1 - self.dropout).expand_as(x) * x


ENTRIES = (
    on_vectors("dropout", lambda: nn.Dropout(0.3)),
    on_images("dropout_in_place", lambda: nn.Dropout(0.2, inplace=True)),
    on_vectors("dropout_never", lambda: nn.Dropout(0.0)),
    on_series("dropout_1d", lambda: nn.Dropout1d(0.2)),
    on_images("dropout_2d", lambda: nn.Dropout2d(0.2)),
    on_volumes("dropout_3d", lambda: nn.Dropout3d(0.2)),
    on_vectors("alpha_dropout", lambda: nn.AlphaDropout(0.2)),
    on_images("feature_alpha_dropout", lambda: nn.FeatureAlphaDropout(0.2)),
    on_vectors("functional_dropout", FunctionalDropout),
    function_on(
        on_vectors,
        "functional_dropout_always",
        lambda x: F.dropout(x, 0.1),
        expected=refused("dropout", "training"),
        notes="drops in evaluation too, which is never meant",
    ),
    on_images("drop_path_bernoulli", lambda: Branch(StochasticDepth(0.2))),
    on_images("drop_path_floor", lambda: Branch(DropPath(0.2))),
    on_images("drop_path_new_empty", lambda: Branch(ScaleByKeep())),
    on_images("drop_block", DropBlock),
    on_tokens("locked_dropout", LockedDropout, notes="x.data.new"),
    on_images("layer_drop", LayerDrop, expected=refused("torch.where"), notes="a branch on a random tensor"),
    on_vectors("python_random_scale", PythonRandomScale, expected=refused("random")),
    on_vectors("noise_randn_like", GaussianNoise),
    on_images("noise_rand", UniformNoise),
    on_vectors("noise_normal_in_place", InPlaceNoise),
    on_vectors("noise_exponential", ExponentialNoise),
    on_vectors(
        "gumbel_softmax",
        lambda: GumbelGate(hard=False),
        expected=refused("evaluation"),
        notes="random in evaluation too",
    ),
    on_vectors(
        "gumbel_softmax_hard",
        lambda: GumbelGate(hard=True),
        expected=refused("evaluation"),
        notes="random in evaluation too",
    ),
    on_vectors("reparameterized", Reparameterized),
)
