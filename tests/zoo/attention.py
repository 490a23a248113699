"""Vision transformers of one resolution, and convolutional networks that attend."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import CLASSES, architecture

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False) -> Tensor:
    """Drop whole samples, by the floor of a uniform deviate."""
    if drop_prob == 0.0 or not training:
        return x
    keep_prob = 1 - drop_prob
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    random_tensor = keep_prob + torch.rand(shape, dtype=x.dtype, device=x.device)
    random_tensor.floor_()
    return x.div(keep_prob) * random_tensor


class DropPath(nn.Module):
    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int = 2, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=True)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape  # noqa: N806
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn.softmax(dim=-1)
        attn = self.attn_drop(attn)
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))


class Block(nn.Module):
    def __init__(
        self, dim: int, drop: float = 0.0, path: float = 0.0, init_values: float | None = None
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, proj_drop=drop)
        self.drop_path = DropPath(path) if path > 0.0 else nn.Identity()
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim, drop)
        self.gamma1: nn.Parameter | float = 1.0
        self.gamma2: nn.Parameter | float = 1.0
        if init_values is not None:
            self.gamma1 = nn.Parameter(init_values * torch.ones(dim))
            self.gamma2 = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.gamma1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """A class token, and a second one that distils a teacher if asked."""

    def __init__(self, dim: int = 24, depth: int = 3, distilled: bool = False, path: float = 0.0) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(8, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if distilled else None
        self.pos_embed = nn.Parameter(torch.randn(1, 16 + (2 if distilled else 1), dim) * 0.02)
        self.pos_drop = nn.Dropout(p=0.1)
        self.blocks = nn.Sequential(*(Block(dim, 0.1, path * i / depth) for i in range(depth)))
        self.norm = LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)
        self.head_dist = nn.Linear(dim, CLASSES) if distilled else None
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)
        if self.dist_token is None:
            x = torch.cat((cls_token, x), dim=1)
        else:
            x = torch.cat((cls_token, self.dist_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.pos_drop(x + self.pos_embed)
        return self.norm(self.blocks(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        if self.head_dist is None:
            return self.head(x[:, 0])
        return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2


def vit_class_token() -> nn.Module:
    return VisionTransformer()


def deit_distilled() -> nn.Module:
    return VisionTransformer(distilled=True, path=0.2)


class TorchEncoderViT(nn.Module):
    """The position table and the encoder of torch.nn, batch first."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, dim, 8, 8)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.empty(1, 17, dim).normal_(std=0.02))
        self.layers = nn.ModuleList()
        for _ in range(2):
            self.layers.append(
                nn.ModuleDict(
                    {
                        "ln_1": LayerNorm(dim),
                        "self_attention": nn.MultiheadAttention(dim, 2, dropout=0.0, batch_first=True),
                        "ln_2": LayerNorm(dim),
                        "mlp": nn.Sequential(
                            nn.Linear(dim, 48), nn.GELU(), nn.Linear(48, dim), nn.Dropout(0.1)
                        ),
                    }
                )
            )
        self.ln = LayerNorm(dim)
        self.heads = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = self.conv_proj(x).reshape(n, -1, 16).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(n, -1, -1), x], dim=1) + self.pos_embedding
        for layer in self.layers:
            y = layer["ln_1"](x)
            y, _ = layer["self_attention"](y, y, y, need_weights=False)
            x = x + y
            x = x + layer["mlp"](layer["ln_2"](x))
        return self.heads(self.ln(x)[:, 0])


def vit_multihead_attention() -> nn.Module:
    return TorchEncoderViT()


class ClassAttentionBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.norm = LayerNorm(dim)
        self.gamma = nn.Parameter(1e-1 * torch.ones(dim))

    def forward(self, x: Tensor, x_cls: Tensor) -> Tensor:
        u = self.norm(torch.cat((x_cls, x), dim=1))
        b, n, c = u.shape
        q = self.q(u[:, 0]).unsqueeze(1).reshape(b, 1, 2, c // 2).permute(0, 2, 1, 3)
        k, v = self.kv(u).reshape(b, n, 2, 2, c // 2).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return x_cls + self.gamma * self.proj(out.transpose(1, 2).reshape(b, 1, c))


class CaiT(nn.Module):
    """Patches attend to each other, then the class token to them."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(8, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList([Block(dim, path=0.1, init_values=1e-5) for _ in range(2)])
        self.blocks_token_only = nn.ModuleList([ClassAttentionBlock(dim) for _ in range(2)])
        self.norm = LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = x + self.pos_embed
        for blk in self.blocks:
            x = blk(x)
        cls_tokens = self.cls_token.expand(x.shape[0], -1, -1)
        for blk in self.blocks_token_only:
            cls_tokens = blk(x, cls_tokens)
        x = self.norm(torch.cat((cls_tokens, x), dim=1))
        return self.head(x[:, 0])


def cait() -> nn.Module:
    return CaiT()


class CrossScaleFusion(nn.Module):
    """Each branch's class token attends to the patches of the other."""

    def __init__(self, small: int, large: int) -> None:
        super().__init__()
        self.to_large, self.to_small = nn.Linear(small, large), nn.Linear(large, small)
        self.attend_large = nn.MultiheadAttention(large, 2, batch_first=True)
        self.attend_small = nn.MultiheadAttention(small, 2, batch_first=True)

    def forward(self, xs: Tensor, xl: Tensor) -> tuple[Tensor, Tensor]:
        (small_cls, small_patch), (large_cls, large_patch) = ((x[:, :1], x[:, 1:]) for x in (xs, xl))
        keys = self.to_small(large_patch)
        small_cls = small_cls + self.attend_small(small_cls, keys, keys)[0]
        keys = self.to_large(small_patch)
        large_cls = large_cls + self.attend_large(large_cls, keys, keys)[0]
        return torch.cat((small_cls, small_patch), dim=1), torch.cat((large_cls, large_patch), dim=1)


class CrossViT(nn.Module):
    def __init__(self, small: int = 16, large: int = 24) -> None:
        super().__init__()
        self.embed = nn.ModuleList([PatchEmbed(8, small), PatchEmbed(16, large)])
        self.pos_embed = nn.ParameterList(
            [nn.Parameter(torch.zeros(1, 17, small)), nn.Parameter(torch.zeros(1, 5, large))]
        )
        self.cls_token = nn.ParameterList([nn.Parameter(torch.randn(1, 1, d) * 0.02) for d in (small, large)])
        self.small, self.large = Block(small), Block(large)
        self.fusion = CrossScaleFusion(small, large)
        self.norm = nn.ModuleList([LayerNorm(small), LayerNorm(large)])
        self.head = nn.ModuleList([nn.Linear(small, CLASSES), nn.Linear(large, CLASSES)])

    def forward(self, x: Tensor) -> Tensor:
        xs = []
        for embed, token, position in zip(self.embed, self.cls_token, self.pos_embed, strict=True):
            tmp = embed(x)
            xs.append(torch.cat((token.expand(x.shape[0], -1, -1), tmp), dim=1) + position)
        xs = self.fusion(self.small(xs[0]), self.large(xs[1]))
        outs = [head(norm(x)[:, 0]) for head, norm, x in zip(self.head, self.norm, xs, strict=True)]
        return torch.mean(torch.stack(outs, dim=0), dim=0)


def crossvit() -> nn.Module:
    return CrossViT()


class TNTBlock(nn.Module):
    """A transformer over pixels inside of each patch feeds the one over patches."""

    def __init__(self, pixel_dim: int, pixels: int, dim: int) -> None:
        super().__init__()
        self.inner, self.outer = Block(pixel_dim), Block(dim)
        self.norm = nn.LayerNorm(pixel_dim * pixels)
        self.proj = nn.Linear(pixel_dim * pixels, dim)

    def forward(self, pixel_embed: Tensor, patch_embed: Tensor) -> tuple[Tensor, Tensor]:
        pixel_embed = self.inner(pixel_embed)
        b, n, _ = patch_embed.size()
        patch_embed = patch_embed.clone()
        patch_embed[:, 1:] = patch_embed[:, 1:] + self.proj(self.norm(pixel_embed.reshape(b, n - 1, -1)))
        return pixel_embed, self.outer(patch_embed)


class TNT(nn.Module):
    def __init__(self, pixel_dim: int = 8, dim: int = 24) -> None:
        super().__init__()
        self.pixel_dim, self.dim = pixel_dim, dim
        self.pixel_proj = nn.Conv2d(3, pixel_dim, 4, stride=4)
        self.unfold = nn.Unfold(kernel_size=2, stride=2)
        self.patch_proj = nn.Linear(4 * pixel_dim, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList([TNTBlock(pixel_dim, 4, dim) for _ in range(2)])
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        pixels = self.unfold(self.pixel_proj(x)).transpose(1, 2)
        pixel_embed = pixels.reshape(b * 16, self.pixel_dim, 4).transpose(1, 2)
        patch_embed = self.patch_proj(pixel_embed.reshape(b, 16, -1))
        patch_embed = torch.cat((self.cls_token.expand(b, -1, -1), patch_embed), dim=1)
        for blk in self.blocks:
            pixel_embed, patch_embed = blk(pixel_embed, patch_embed)
        return self.head(patch_embed[:, 0])


def tnt() -> nn.Module:
    return TNT()


class AttentionPool2d(nn.Module):
    """The mean of the pixels asks what the pixels hold."""

    def __init__(self, spacial_dim: int, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(spacial_dim**2 + 1, embed_dim) / embed_dim**0.5)
        self.attn = nn.MultiheadAttention(embed_dim, num_heads)
        self.c_proj = nn.Linear(embed_dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(start_dim=2).permute(2, 0, 1)
        x = torch.cat([x.mean(dim=0, keepdim=True), x], dim=0)
        x = x + self.positional_embedding[:, None, :].to(x.dtype)
        x, _ = self.attn(query=x[:1], key=x, value=x)
        return self.c_proj(x.squeeze(0))


def attention_pool_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.AvgPool2d(2),
        nn.Conv2d(16, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(inplace=True),
        AttentionPool2d(4, 24, 2),
    )  # fmt: skip


class BottleneckAttention(nn.Module):
    """Attention over pixels with an embedding for each row and each column."""

    def __init__(self, dim: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1, bias=False)
        self.height = nn.Parameter(torch.randn(size, dim // heads) * self.scale)
        self.width = nn.Parameter(torch.randn(size, dim // heads) * self.scale)

    def forward(self, fmap: Tensor) -> Tensor:
        b, c, h, w = fmap.shape
        qkv = self.to_qkv(fmap).chunk(3, dim=1)
        q, k, v = (t.reshape(b, self.heads, c // self.heads, h * w).transpose(2, 3) for t in qkv)
        q = q * self.scale
        position = (self.height[:, None, :] + self.width[None, :, :]).reshape(h * w, -1)
        sim = torch.einsum("b h i d, b h j d -> b h i j", q, k)
        sim = sim + torch.einsum("b h i d, j d -> b h i j", q, position)
        out = torch.einsum("b h i j, b h j d -> b h i d", sim.softmax(dim=-1), v)
        return out.permute(0, 1, 3, 2).reshape(b, c, h, w)


class BotBlock(nn.Module):
    def __init__(self, dim: int, mid: int, size: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(dim, mid, 1, bias=False), nn.BatchNorm2d(mid), nn.ReLU(),
            BottleneckAttention(mid, 2, size), nn.BatchNorm2d(mid), nn.ReLU(),
            nn.Conv2d(mid, dim, 1, bias=False), nn.BatchNorm2d(dim),
        )  # fmt: skip
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.net(x) + x)


def botnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 4, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        BotBlock(32, 16, 4), BotBlock(32, 16, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


class PerceiverClassifier(nn.Module):
    """A few latents read the pixels; the positions are a fixed table of Fourier features."""

    def __init__(self, dim: int = 24, latents: int = 4) -> None:
        super().__init__()
        axis = torch.linspace(-1.0, 1.0, 16)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(-1, 2, 1)
        phases = grid * torch.tensor([1.0, 2.0, 4.0]) * math.pi
        self.register_buffer(
            "positions", torch.cat((phases.sin(), phases.cos()), -1).flatten(1), persistent=False
        )
        self.latents = nn.Parameter(torch.randn(latents, dim) * 0.02)
        self.read = nn.MultiheadAttention(dim, 1, kdim=15, vdim=15, batch_first=True)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(2))
        self.to_logits = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        x = F.avg_pool2d(x, 2).permute(0, 2, 3, 1).reshape(b, -1, 3)
        x = torch.cat((x, self.positions.unsqueeze(0).repeat(b, 1, 1)), dim=-1)
        latents = self.latents.unsqueeze(0).expand(b, -1, -1)
        latents = latents + self.read(latents, x, x)[0]
        for block in self.blocks:
            latents = block(latents)
        return self.to_logits(latents.mean(dim=-2))


def perceiver() -> nn.Module:
    return PerceiverClassifier()


ENTRIES = (
    architecture(vit_class_token, blocks=("blocks.0", "blocks.1", "blocks.2")),
    architecture(deit_distilled, blocks=3, notes="two tokens with a head each"),
    architecture(vit_multihead_attention),
    architecture(cait, notes="the second half of the blocks takes two tensors"),
    architecture(crossvit, blocks=1, notes="two branches that meet behind the blocks"),
    architecture(tnt, notes="two tensors cross; a slice is assigned"),
    architecture(attention_pool_cnn, notes="tokens come first"),
    architecture(botnet, blocks=3),
    architecture(perceiver, notes="a parameter is the first features; the table is not in the state"),
)
