"""Networks for images that mix tokens by pools, convolutions, perceptrons or attention at falling resolution."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.attention import Block, DropPath, Mlp
from tests.zoo.entry import CLASSES, architecture


class LayerNorm2d(nn.LayerNorm):
    """Norms the channels of images, by turning them last."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int, path: float, layer_scale: float = 1e-6) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(layer_scale * torch.ones(dim))
        self.drop_path = DropPath(path) if path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.dwconv(x)
        x = x.permute(0, 2, 3, 1)
        x = self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        x = self.gamma * x
        x = x.permute(0, 3, 1, 2)
        return shortcut + self.drop_path(x)


class ConvNeXt(nn.Module):
    def __init__(self, dims: tuple[int, ...] = (8, 16, 24)) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), LayerNorm2d(dims[0]))]
        )
        for i, o in itertools.pairwise(dims):
            self.downsample_layers.append(
                nn.Sequential(LayerNorm2d(i), nn.Conv2d(i, o, kernel_size=2, stride=2))
            )
        self.stages = nn.ModuleList(ConvNeXtBlock(dim, 0.1 * i) for i, dim in enumerate(dims))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        x = self.norm(x.mean([-2, -1]))
        return self.head(x)


def convnext() -> nn.Module:
    return ConvNeXt()


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


def convmixer(dim: int = 16, kernel_size: int = 5) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, dim, kernel_size=4, stride=4), nn.GELU(), nn.BatchNorm2d(dim),
        *[
            nn.Sequential(
                Residual(
                    nn.Sequential(
                        nn.Conv2d(dim, dim, kernel_size, groups=dim, padding="same"), nn.GELU(), nn.BatchNorm2d(dim)
                    )
                ),
                nn.Conv2d(dim, dim, kernel_size=1), nn.GELU(), nn.BatchNorm2d(dim),
            )
            for _ in range(2)
        ],
        nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(dim, CLASSES),
    )  # fmt: skip


class MixerLayer(nn.Module):
    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp_tokens, self.mlp_channels = Mlp(tokens, 8, 0.1), Mlp(dim, 48, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


def mlp_mixer(dim: int = 24) -> nn.Module:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, dim, 8, 8)
            self.blocks = nn.Sequential(*[MixerLayer(dim, 16) for _ in range(3)])
            self.norm = nn.LayerNorm(dim)
            self.head = nn.Linear(dim, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).flatten(2).transpose(1, 2)
            return self.head(self.norm(self.blocks(x)).mean(dim=1))

    return Mixer()


class PoolFormerBlock(nn.Module):
    """The mixing of tokens is what pooling adds to the identity."""

    def __init__(self, dim: int, path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, dim), nn.GroupNorm(1, dim)
        self.pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        self.mlp = nn.Sequential(nn.Conv2d(dim, 2 * dim, 1), nn.GELU(), nn.Conv2d(2 * dim, dim, 1))
        self.layer_scale_1 = nn.Parameter(1e-5 * torch.ones(dim), requires_grad=True)
        self.layer_scale_2 = nn.Parameter(1e-5 * torch.ones(dim), requires_grad=True)
        self.drop_path = DropPath(path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.drop_path(self.layer_scale_1.unsqueeze(-1).unsqueeze(-1) * (self.pool(y) - y))
        return x + self.drop_path(self.layer_scale_2.unsqueeze(-1).unsqueeze(-1) * self.mlp(self.norm2(x)))


def poolformer() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 7, stride=4, padding=2), PoolFormerBlock(16, 0.0), PoolFormerBlock(16, 0.1),
        nn.Conv2d(16, 24, 3, stride=2, padding=1), PoolFormerBlock(24, 0.1), nn.GroupNorm(1, 24),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES),
    )  # fmt: skip


class LinearNorm(nn.Sequential):
    """A linear layer over tokens (N, T, C) and a batch norm over both N and T."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.add_module("c", nn.Linear(i, o, bias=False))
        self.add_module("bn", nn.BatchNorm1d(o))

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class LeViTAttention(nn.Module):
    def __init__(self, dim: int, key_dim: int, num_heads: int, resolution: int) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.scale = num_heads, key_dim, key_dim**-0.5
        self.qkv = LinearNorm(dim, 4 * key_dim * num_heads)
        self.proj = nn.Sequential(nn.Hardswish(), LinearNorm(2 * key_dim * num_heads, dim))
        points = list(itertools.product(range(resolution), range(resolution)))
        offsets: dict[tuple[int, int], int] = {}
        indices = [
            offsets.setdefault((abs(p[0] - q[0]), abs(p[1] - q[1])), len(offsets))
            for p in points
            for q in points
        ]
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, len(offsets)))
        self.register_buffer("attention_bias_idxs", torch.LongTensor(indices).view(len(points), len(points)))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            self.qkv(x)
            .view(b, n, self.num_heads, -1)
            .split([self.key_dim, self.key_dim, 2 * self.key_dim], dim=3)
        )
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        attn = (q @ k * self.scale + self.attention_biases[:, self.attention_bias_idxs]).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, -1))


class LeViT(nn.Module):
    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(),
            nn.Conv2d(8, dim, 3, 4, 1, bias=False), nn.BatchNorm2d(dim),
        )  # fmt: skip
        self.blocks = nn.Sequential(
            *[
                nn.Sequential(
                    Residual(LeViTAttention(dim, 8, 2, 4)),
                    Residual(nn.Sequential(LinearNorm(dim, 48), nn.Hardswish(), LinearNorm(48, dim))),
                )
                for _ in range(2)
            ]
        )
        self.head = nn.Sequential(OrderedDict(bn=nn.BatchNorm1d(dim), l=nn.Linear(dim, CLASSES)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = self.blocks(x).mean(1)
        return self.head(x)


def levit() -> nn.Module:
    return LeViT()


class ConvolutionalAttention(nn.Module):
    """Queries, keys and values are projected by depthwise convolutions; keys and values at half the resolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.Sequential(nn.Conv2d(dim, dim, 3, s, 1, groups=dim, bias=False), nn.BatchNorm2d(dim))
            for s in (1, 2, 2)
        )
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.proj_q, self.proj_k, self.proj_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.norm1(x.flatten(2).transpose(1, 2)).transpose(1, 2).view(b, c, h, w)
        q, k, v = (conv(y).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        score = torch.einsum("blk,btk->blt", self.proj_q(q), self.proj_k(k)) * c**-0.5
        tokens = x.flatten(2).transpose(1, 2) + torch.einsum(
            "blt,btv->blv", score.softmax(-1), self.proj_v(v)
        )
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens.transpose(1, 2).reshape(b, c, h, w)


def cvt() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 7, 4, 2), ConvolutionalAttention(16), nn.Conv2d(16, 24, 3, 2, 1), ConvolutionalAttention(24),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES),
    )  # fmt: skip


class MobileViTBlock(nn.Module):
    """A transformer over the same place of every patch."""

    def __init__(self, channels: int, dim: int, patch: int = 2) -> None:
        super().__init__()
        self.ph = self.pw = patch
        self.local = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.SiLU(),
            nn.Conv2d(channels, dim, 1, bias=False),
        )  # fmt: skip
        self.transformer = nn.Sequential(Block(dim), nn.LayerNorm(dim))
        self.project = nn.Conv2d(dim, channels, 1, bias=False)
        self.fusion = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.SiLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.local(x)
        b, d, h, w = y.shape
        nh, nw = h // self.ph, w // self.pw
        y = y.reshape(b * d * nh, self.ph, nw, self.pw).transpose(1, 2)
        y = (
            y.reshape(b, d, nh * nw, self.ph * self.pw)
            .transpose(1, 3)
            .reshape(b * self.ph * self.pw, nh * nw, d)
        )
        y = self.transformer(y)
        y = y.contiguous().view(b, self.ph * self.pw, nh * nw, d).transpose(1, 3)
        y = y.reshape(b * d * nh, nw, self.ph, self.pw).transpose(1, 2).reshape(b, d, h, w)
        return self.fusion(torch.cat((x, self.project(y)), dim=1))


def mobilevit() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU(), MobileViTBlock(8, 16),
        nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU(), MobileViTBlock(16, 24),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


class SpatialReductionBlock(nn.Module):
    def __init__(self, dim: int, sr_ratio: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio)
        self.norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:  # noqa: N803
        y = self.norm1(x)
        b, n, c = y.shape
        q = self.q(y).reshape(b, n, 2, c // 2).permute(0, 2, 1, 3)
        reduced = self.norm(
            self.sr(y.permute(0, 2, 1).reshape(b, c, H, W)).reshape(b, c, -1).permute(0, 2, 1)
        )
        k, v = self.kv(reduced).reshape(b, -1, 2, 2, c // 2).permute(2, 0, 3, 1, 4)
        attn = ((q @ k.transpose(-2, -1)) * (c // 2) ** -0.5).softmax(dim=-1)
        x = x + self.proj((attn @ v).transpose(1, 2).reshape(b, n, c))
        return x + self.mlp(self.norm2(x))


class PyramidVisionTransformer(nn.Module):
    def __init__(self, dims: tuple[int, int] = (16, 24)) -> None:
        super().__init__()
        for i, (of, to, patch, size) in enumerate(((3, dims[0], 4, 8), (dims[0], dims[1], 2, 4))):
            setattr(self, f"patch_embed{i + 1}", nn.Conv2d(of, to, patch, patch))
            setattr(self, f"pos_embed{i + 1}", nn.Parameter(torch.zeros(1, size * size, to)))
            setattr(self, f"block{i + 1}", nn.ModuleList([SpatialReductionBlock(to, 2)]))
        self.head = nn.Linear(dims[1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        for i in (1, 2):
            x = getattr(self, f"patch_embed{i}")(x)
            h, w = x.shape[2:]
            x = x.flatten(2).transpose(1, 2) + getattr(self, f"pos_embed{i}")
            for block in getattr(self, f"block{i}"):
                x = block(x, h, w)
            if i == 1:
                x = x.reshape(b, h, w, -1).permute(0, 3, 1, 2).contiguous()
        return self.head(x.mean(dim=1))


def pvt() -> nn.Module:
    return PyramidVisionTransformer()


ENTRIES = (
    architecture(convnext, blocks=3, notes="layer scale starts at 1e-6"),
    architecture(convmixer),
    architecture(mlp_mixer, blocks=3),
    architecture(poolformer, blocks=3),
    architecture(levit, notes="batch norm over tokens"),
    architecture(cvt),
    architecture(mobilevit),
    architecture(pvt),
)
