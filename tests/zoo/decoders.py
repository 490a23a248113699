"""Causal models over token ids that say one thing for the whole sequence: its class, read at the last token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import CLASSES, architecture

VOCABULARY = 60
LENGTH = 12


class CausalSelfAttention(nn.Module):
    """The mask is a buffer of ones below the diagonal, as long as the longest sequence."""

    def __init__(self, dim: int, heads: int, block_size: int, dropout: float) -> None:
        super().__init__()
        self.n_head, self.n_embd = heads, dim
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.register_buffer(
            "bias", torch.tril(torch.ones(block_size, block_size)).view(1, 1, block_size, block_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()  # noqa: N806
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class AdditiveMaskAttention(nn.Module):
    """The mask is a buffer of minus infinity above the diagonal, and is added."""

    def __init__(self, dim: int, heads: int, block_size: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        mask = torch.full((block_size, block_size), float("-inf"))
        self.register_buffer("mask", torch.triu(mask, diagonal=1))

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-1, -2) / math.sqrt(c // self.heads)
        weights = torch.softmax(scores + self.mask[:t, :t], dim=-1)
        weights = F.dropout(weights, self.dropout, self.training)
        return self.out((weights @ v).transpose(1, 2).reshape(n, t, c))


class FlashAttention(nn.Module):
    def __init__(self, dim: int, heads: int, block_size: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _c = x.shape
        q, k, v = (part.view(n, t, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        return self.out(y.transpose(1, 2).flatten(2))


class GPTBlock(nn.Module):
    def __init__(self, dim: int, attention: nn.Module, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = attention
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(dim, 4 * dim),
                "act": nn.GELU(approximate="tanh"),
                "c_proj": nn.Linear(4 * dim, dim),
                "dropout": nn.Dropout(dropout),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        m = self.mlp
        return x + m.dropout(m.c_proj(m.act(m.c_fc(self.ln_2(x)))))


class GPT(nn.Module):
    def __init__(
        self,
        attention: type[nn.Module],
        dim: int = 16,
        layers: int = 3,
        block_size: int = 16,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, dim),
                "wpe": nn.Embedding(block_size, dim),
                "drop": nn.Dropout(dropout),
                "h": nn.ModuleList(
                    [GPTBlock(dim, attention(dim, 2, block_size, dropout), dropout) for _ in range(layers)]
                ),
                "ln_f": nn.LayerNorm(dim),
            }
        )
        self.lm_head = nn.Linear(dim, CLASSES, bias=False)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def forward(self, idx: Tensor) -> Tensor:
        _, t = idx.size()
        assert t <= self.block_size, (
            f"Cannot forward sequence of length {t}, block size is only {self.block_size}"
        )
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        return self.lm_head(x[:, [-1], :])[:, 0]


def gpt_tril_mask() -> nn.Module:
    return GPT(CausalSelfAttention)


def gpt_infinite_mask() -> nn.Module:
    return GPT(AdditiveMaskAttention)


def gpt_flash() -> nn.Module:
    return GPT(FlashAttention)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps)).type_as(x)


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


class LlamaBlock(nn.Module):
    """Rotary positions, two heads of queries for one of keys and values, and a SwiGLU."""

    def __init__(self, dim: int, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.gate_proj, self.up_proj = (
            nn.Linear(dim, 2 * dim, bias=False),
            nn.Linear(dim, 2 * dim, bias=False),
        )
        self.down_proj = nn.Linear(2 * dim, dim, bias=False)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(dim), RMSNorm(dim)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n, t, c = x.shape
        q = self.q_proj(x).view(n, t, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(n, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(n, t, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
        v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        mask = torch.full((t, t), float("-inf")).triu(1)
        scores = q @ k.transpose(2, 3) * self.head_dim**-0.5 + mask
        return self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, c))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attend(self.input_layernorm(x), cos, sin)
        y = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Llama(nn.Module):
    def __init__(self, dim: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, dim)
        self.layers = nn.ModuleList(LlamaBlock(dim) for _ in range(layers))
        self.norm = RMSNorm(dim)
        self.score = nn.Linear(dim, CLASSES, bias=False)
        inv_freq = 1.0 / (10000.0 ** (torch.arange(0, dim // 4, 2).float() / (dim // 4)))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        position = torch.arange(input_ids.shape[1], device=input_ids.device).float()
        freqs = torch.outer(position, self.inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1)
        cos, sin = emb.cos()[None, None], emb.sin()[None, None]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.score(self.norm(x)[:, -1])


def llama() -> nn.Module:
    return Llama()


class MambaLike(nn.Module):
    """A selective state space: a gate for each step decides what the state keeps; the scan is a Python loop."""

    def __init__(self, dim: int, state: int = 4) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.conv1d = nn.Conv1d(dim, dim, 3, groups=dim, padding=2)
        self.x_proj = nn.Linear(dim, 1 + 2 * state, bias=False)
        self.dt_proj = nn.Linear(1, dim)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, state + 1).float()).repeat(dim, 1))
        self.D = nn.Parameter(torch.ones(dim))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.state = state

    def forward(self, u: Tensor) -> Tensor:
        n, t, c = u.shape
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., :t]).transpose(1, 2)
        dt, b_in, c_out = self.x_proj(x).split([1, self.state, self.state], dim=-1)
        dt = F.softplus(self.dt_proj(dt))
        decay = torch.exp(dt.unsqueeze(-1) * -torch.exp(self.A_log))
        drive = (dt * x).unsqueeze(-1) * b_in.unsqueeze(2)
        h = u.new_zeros(n, c, self.state)
        ys = []
        for i in range(t):
            h = decay[:, i] * h + drive[:, i]
            ys.append(torch.einsum("ncs,ns->nc", h, c_out[:, i]))
        y = torch.stack(ys, dim=1) + x * self.D
        return u + self.out_proj(y * F.silu(z))


def state_space() -> nn.Module:
    class Net(nn.Module):
        def __init__(self, dim: int = 12) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, dim)
            self.layers = nn.ModuleList([MambaLike(dim), MambaLike(dim)])
            self.norm_f = nn.LayerNorm(dim)
            self.head = nn.Linear(dim, CLASSES)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            for layer in self.layers:
                x = layer(x)
            return self.head(self.norm_f(x[:, -1]))

    return Net()


ENTRIES = (
    architecture(gpt_tril_mask, (LENGTH,), vocabulary=VOCABULARY, blocks=3),
    architecture(gpt_infinite_mask, (LENGTH,), vocabulary=VOCABULARY, blocks=3, notes="a buffer holds -inf"),
    architecture(gpt_flash, (LENGTH,), vocabulary=VOCABULARY, blocks=3),
    architecture(llama, (LENGTH,), vocabulary=VOCABULARY, notes="sines and cosines cross every boundary"),
    architecture(state_space, (8,), vocabulary=VOCABULARY),
)
