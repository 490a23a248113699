"""What reshapes, orders, selects, joins and repeats."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.frames import FEATURES, WIDTH, Lambda, function_on, on_images, on_tokens, on_vectors


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(memory_format=torch.channels_last)
        return self.conv(x).contiguous(memory_format=torch.contiguous_format)


def _channels_last_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU()).to(
        memory_format=torch.channels_last
    )  # type: ignore[call-overload]


class MultiHead(nn.Module):
    """Heads by einsum, one subscript of which is an ellipsis."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3, 2, FEATURES, 8) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.einsum("bti,shid->sbhtd", x, self.qkv)
        weights = torch.einsum("...id,...jd->...ij", q, k).softmax(-1)
        return torch.einsum("bhij,bhjd->bihd", weights, v).flatten(-2)


def _views(x: Tensor) -> Tensor:
    n, t, c = x.shape
    x = x.view(n, t, 2, c // 2).transpose(1, 2).contiguous().view(n * 2, -1)
    x = x.unflatten(0, (n, 2)).unflatten(-1, (t, c // 2))
    return x.permute(0, 2, 1, 3).reshape(n, t, -1)


def _sizes(x: Tensor) -> Tensor:
    return (
        x.reshape(len(x), -1)[:, : x.numel() // x.shape[0]].view_as(x) * (1.0 / x.dim()) + x.nelement() * 0.0
    )


def _swapped(x: Tensor) -> Tensor:
    y = x.swapaxes(1, 2).movedim(-1, 1)
    return torch.squeeze(torch.unsqueeze(y.mT.mT, 1), dim=1).ravel().unflatten(0, (x.size(0), 10, FEATURES))


def _pieces(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    c, d, e = torch.split(a, [2, 2, 4], dim=-1)
    first, *others = torch.unbind(b, dim=1)
    b = torch.stack([*others, first], dim=1)
    return torch.cat((e, b, d, c), dim=-1)


def _uneven(x: Tensor) -> Tensor:
    parts = torch.tensor_split(x, 3, dim=-1)
    return torch.hstack([p.flip(-1) for p in x.chunk(3, dim=1)]) + torch.cat(parts[::-1], dim=-1)


def _repeated(x: Tensor) -> Tensor:
    a = x[:, :1].expand(-1, 3, -1)
    b = x[:, 1:2].repeat(1, 2, 1)
    c = torch.tile(x[:, 2:3], (1, 2, 1))
    d = x[:, 3:5].repeat_interleave(2, dim=1)
    return torch.concat([a, b, c, d], dim=1)


def _picked(x: Tensor) -> Tensor:
    order = torch.tensor([4, 1, 1, 0])
    a = x[:, order]
    b = x.index_select(1, order)
    c = torch.take_along_dim(x, x[:, :4].argsort(dim=1), dim=1)
    d = x.gather(1, x[:, :4].abs().argmax(dim=1, keepdim=True))
    return torch.cat([a, b, c, d, x[:, [0, -1]], x[:, ::3], x[:, -2:]], dim=1)


def _batch_index(x: Tensor) -> Tensor:
    """The token that is largest in its first feature, by a pair of index tensors."""
    return x[torch.arange(x.shape[0]), x[:, :, 0].argmax(dim=1)].unsqueeze(1) + x


def _sorted(x: Tensor) -> Tensor:
    values, indices = torch.sort(x, dim=1, descending=True)
    top, where = x.topk(3, dim=1)
    return torch.cat([values * torch.cos(indices.float()), top + where.to(x.dtype)], dim=1)


def _token_merging(x: Tensor) -> Tensor:
    """Half of the tokens, those that look least like the rest."""
    score = torch.einsum("ntc,nsc->nts", x, x).mean(-1)
    kept = score.argsort(dim=1)[:, : x.size(1) // 2]
    return torch.gather(x, 1, kept.unsqueeze(-1).expand(-1, -1, x.size(-1)))


def _triangles(x: Tensor) -> Tensor:
    scores = torch.tril(x @ x.transpose(-1, -2)) - torch.triu(x @ x.transpose(-1, -2), diagonal=2)
    return scores @ x + torch.diag_embed(x.mean(-1)) @ x


def _grid(x: Tensor) -> Tensor:
    h, w = x.shape[-2:]
    yy, xx = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    ring = torch.sqrt((yy - h / 2) ** 2 + (xx - w / 2) ** 2)
    return x * torch.exp(-ring / 5).to(x)


def _where(x: Tensor) -> Tensor:
    mask = (x > 0) & (x < 1) | (x < -1)
    return torch.where(mask, x, 0.1 * x) + torch.where(~mask, x.new_tensor(0.5), x)


def _none_index(x: Tensor) -> Tensor:
    return (x[:, None, :, :] * x[:, :, None, :])[..., 0, :, :].squeeze(1) + x[:, 0, None]


class Windows(nn.Module):
    """Windows by as_strided, as those write it who came from NumPy."""

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.contiguous().shape
        return x.contiguous().as_strided((n, t - 2, 3, c), (t * c, c, c, 1)).amax(dim=2)


ENTRIES = (
    on_images("channels_last", ChannelsLast),
    on_images("channels_last_weights", _channels_last_model),
    function_on(on_tokens, "views_and_permutes", _views),
    function_on(on_tokens, "sizes_as_numbers", _sizes),
    function_on(on_tokens, "swapped_axes", _swapped),
    on_vectors(
        "unflatten_and_flatten", lambda: nn.Sequential(nn.Unflatten(1, (4, 4)), nn.Tanh(), nn.Flatten())
    ),
    on_tokens("einsum_heads", MultiHead),
    function_on(on_images, "roll", lambda x: x.roll(1, 2) - torch.roll(x, shifts=(-2, 3), dims=(2, 3))),
    function_on(on_vectors, "roll_flat", lambda x: torch.roll(x, -3)),
    function_on(on_tokens, "chunk_split_unbind_stack", _pieces),
    function_on(on_tokens, "uneven_chunks", _uneven),
    function_on(on_tokens, "expand_repeat_tile", _repeated),
    function_on(on_tokens, "index_gather_take", _picked),
    function_on(on_tokens, "index_by_sample", _batch_index),
    function_on(on_tokens, "sort_and_topk", _sorted),
    function_on(on_tokens, "token_merging", _token_merging),
    function_on(on_tokens, "triangles", _triangles),
    function_on(on_images, "flip", lambda x: torch.cat([x.flip(-1), x.flip(2, 3)], 1), out=2 * WIDTH),
    function_on(on_images, "rotate", lambda x: torch.rot90(x, 1, (2, 3)) + x.transpose(2, 3)),
    function_on(on_images, "meshgrid", _grid),
    function_on(on_vectors, "where", _where),
    function_on(on_tokens, "none_in_an_index", _none_index),
    on_tokens("as_strided", Windows),
    on_images(
        "flatten_to_tokens_and_back",
        lambda: nn.Sequential(
            Lambda(lambda x: x.flatten(2).transpose(1, 2)),
            nn.LayerNorm(WIDTH),
            Lambda(lambda x: x.transpose(1, 2).unflatten(2, (12, 12))),
        ),
    ),
)
