"""Every norm of PyTorch, those that people write themselves, and norms of weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.zoo.frames import FEATURES, WIDTH, on_images, on_series, on_tokens, on_vectors, on_volumes, refused


class BatchNormAct2d(nn.BatchNorm2d):
    """A batch norm with its activation, by calling the function itself."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return self.act(x)


class SubclassedBatchNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x), 0.01)


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2's, over images whose channels are last."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, 1, 1, dim) * 0.1)
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        gx = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
        return (self.gamma * (x * nx) + self.beta + x).permute(0, 3, 1, 2)


class FilterResponseNorm(nn.Module):
    """Singh & Krishnan: no mean, and a threshold that is learnt."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta, self.tau = (
            nn.Parameter(v * torch.ones(1, channels, 1, 1)) for v in (1.0, 0.0, -1.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(torch.mean(x**2, dim=[2, 3], keepdim=True) + 1e-6)
        return torch.max(self.gamma * x + self.beta, self.tau)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of images, written out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class PooledNorm(nn.Module):
    """Batch norm behind global pooling: one value for each channel and sample."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.conv, self.bn = (
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(WIDTH, WIDTH, 1),
            nn.BatchNorm2d(WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.bn(self.conv(self.pool(x))))


class StandardizedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        v, m = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        w = (self.weight - m) / torch.sqrt(v + 1e-10)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


def _conv() -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1)


def _tracking() -> nn.Module:
    return nn.InstanceNorm2d(WIDTH, affine=True, track_running_stats=True)


ENTRIES = (
    on_vectors("batch_norm_1d", lambda: nn.BatchNorm1d(FEATURES)),
    on_series("batch_norm_1d_series", lambda: nn.BatchNorm1d(WIDTH)),
    on_images("batch_norm_2d", lambda: nn.BatchNorm2d(WIDTH)),
    on_volumes("batch_norm_3d", lambda: nn.BatchNorm3d(WIDTH)),
    on_images(
        "batch_norm_momentum_none",
        lambda: nn.BatchNorm2d(WIDTH, momentum=None),
        expected=refused("momentum"),
        notes="the mean of all batches: an int64 count that a step reads",
    ),
    on_images(
        "batch_norm_momentum_zero", lambda: nn.BatchNorm2d(WIDTH, momentum=0.0), frozen=("layer.running",)
    ),
    on_images("batch_norm_untracked", lambda: nn.BatchNorm2d(WIDTH, track_running_stats=False)),
    on_images("batch_norm_no_affine", lambda: nn.BatchNorm2d(WIDTH, affine=False, eps=1e-3, momentum=0.01)),
    on_images("batch_norm_with_activation", lambda: BatchNormAct2d(WIDTH)),
    on_images("batch_norm_subclass", lambda: SubclassedBatchNorm(WIDTH)),
    on_images("batch_norm_behind_pooling", PooledNorm, notes="no variant with micro-batches of one"),
    on_images("instance_norm", lambda: nn.InstanceNorm2d(WIDTH)),
    on_images("instance_norm_tracking", _tracking),
    on_series("instance_norm_1d", lambda: nn.InstanceNorm1d(WIDTH, affine=True)),
    on_volumes("instance_norm_3d", lambda: nn.InstanceNorm3d(WIDTH)),
    on_images("group_norm", lambda: nn.GroupNorm(2, WIDTH)),
    on_images("group_norm_each_channel", lambda: nn.GroupNorm(WIDTH, WIDTH, affine=False)),
    on_vectors("group_norm_vectors", lambda: nn.GroupNorm(4, FEATURES)),
    on_tokens("layer_norm", lambda: nn.LayerNorm(FEATURES)),
    on_tokens("layer_norm_two_axes", lambda: nn.LayerNorm((10, FEATURES))),
    on_images("layer_norm_three_axes", lambda: nn.LayerNorm([WIDTH, 12, 12])),
    on_tokens("layer_norm_no_affine", lambda: nn.LayerNorm(FEATURES, elementwise_affine=False)),
    on_tokens("layer_norm_no_bias", lambda: nn.LayerNorm(FEATURES, bias=False)),
    on_images("layer_norm_of_channels", lambda: ChannelNorm(WIDTH)),
    on_images("local_response_norm", lambda: nn.LocalResponseNorm(3, alpha=0.1)),
    on_tokens("rms_norm", lambda: nn.RMSNorm(FEATURES)),
    on_images("global_response_norm", lambda: GlobalResponseNorm(WIDTH)),
    on_images("filter_response_norm", lambda: FilterResponseNorm(WIDTH)),
    on_images("weight_norm", lambda: parametrizations.weight_norm(_conv())),
    on_images(
        "weight_norm_hook", lambda: nn.utils.weight_norm(_conv()), notes="the older API, a forward pre-hook"
    ),
    on_vectors(
        "weight_norm_all", lambda: parametrizations.weight_norm(nn.Linear(FEATURES, FEATURES), dim=None)
    ),
    on_images(
        "spectral_norm", lambda: parametrizations.spectral_norm(_conv()), notes="one power iteration a step"
    ),
    on_images("spectral_norm_hook", lambda: nn.utils.spectral_norm(_conv()), notes="the older API"),
    on_vectors(
        "orthogonal",
        lambda: parametrizations.orthogonal(nn.Linear(FEATURES, FEATURES, bias=False)),
        expected=refused("linalg_matrix_exp"),
        notes="exp of a matrix",
    ),
    on_images("weight_standardization", lambda: StandardizedConv2d(WIDTH, WIDTH, 3, padding=1)),
)
