"""What PyTorch's models are made of, operator by operator: ONNX Runtime in float32 against PyTorch in float64.

Each function is run forward and backward. Where ONNX has no words for an operator it is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from frostline.exporter.executorch_lowering import UnsupportedOperators
from tests.exporter.onnx_programs import Function, check, draw, in_onnx

A, B = draw(4, 6), draw(4, 6).roll(1, 0) + 0.1
POSITIVE, SHARE = A.abs() + 0.1, torch.sigmoid(A) * 0.9 + 0.05
TOKENS = torch.tensor([[1, 4, 2, 1], [0, 3, 3, 2]])
COLUMN = torch.tensor([[1], [0], [2], [1]])
SIGNAL, IMAGE, VOLUME = draw(2, 3, 9), draw(2, 3, 6, 7), draw(2, 2, 4, 5, 6)
HEADS = [draw(2, 2, 5, 4) * scale for scale in (1, 2, 3)]

Case = tuple[Function, *tuple[Tensor, ...]]
"""A function and its arguments."""


def named(module: object, names: str, *arguments: Tensor) -> dict[str, Case]:
    """Functions of a module, of the same arguments."""
    return {name: (getattr(module, name), *arguments) for name in names.split()}


def scaled(module: object, names: str, x: Tensor) -> dict[str, Case]:
    """The same with gradients where the functions' own are zero."""

    def times(function: Function) -> Function:
        return lambda x: function(x) * x

    return {name: (times(getattr(module, name)), x) for name in names.split()}


ELEMENTWISE: dict[str, Case] = {
    **scaled(
        torch, "abs ceil deg2rad erf erfc exp2 floor frac neg positive round sgn sign sinc square trunc", A
    ),
    **scaled(torch, "asinh atan cosh sinh tan", A),
    **named(torch, "asin acos atanh erfinv logit", SHARE),
    **named(torch, "log log10 log1p log2 reciprocal rsqrt sqrt", POSITIVE),
    **named(
        torch, "atan2 copysign fmax fmin fmod hypot logaddexp logaddexp2 maximum minimum remainder", A, B
    ),
    "acosh": (lambda x: torch.acosh(x + 1), POSITIVE),
    "addcmul": (lambda x, y: torch.addcmul(x, x, y, value=0.5) + torch.addcdiv(x, y, y * y + 1), A, B),
    "clamp by numbers": (lambda x, y: torch.clamp_min(x, 0.1) + torch.clamp_max(x, y), A, B),
    "clamp by tensors": (lambda x, y: torch.clamp(x, y - 0.5, y + 0.3) + x.clamp(min=y), A, B),
    "division rounded": (lambda x, y: torch.div(x, y, rounding_mode="floor") * x, A, B),
    "division truncated": (lambda x, y: torch.div(x, y, rounding_mode="trunc") * x, A, B),
    "double constants": (lambda x: x * torch.arange(6, dtype=torch.float64).sin().to(x.dtype), A),
    "double precision": (lambda x: (x.double() / x.double().norm(dim=1, keepdim=True)).to(x.dtype), A),
    "float power": (lambda x: torch.float_power(x, 2.5).to(x.dtype), POSITIVE),
    "fmod by a number": (lambda x: torch.fmod(x * 3, 0.7) + torch.remainder(x, 0.3), A),
    "heaviside": (lambda x: torch.heaviside(x.detach(), x.new_tensor(0.5)) * x, A),
    "inverse normal": (torch.special.ndtri, SHARE),
    "lerp": (lambda x, y: torch.lerp(x, y, 0.3) + torch.lerp(x, y, x), A, B),
    "logit in bounds": (lambda x: torch.logit(x, 0.2), SHARE),
    "masked by -inf": (lambda x: (x @ x.t() + torch.full((4, 4), -math.inf).triu(1)).softmax(-1), A),
    "masked by a number": (lambda x, y: x.masked_fill(y > 0, -1e9).softmax(1), A, B),
    "masked by a tensor": (lambda x, y: x.masked_fill(y > 0, x.new_tensor(2.0)), A, B),
    "normal distribution": (lambda x: torch.special.ndtr(x) + torch.special.entr(x.abs()), A),
    "polar table": (lambda x: x * torch.polar(torch.ones(6), torch.arange(6.0)).real.to(x.dtype), A),
    "powers": (lambda x, y: x**y + 2.5**y, POSITIVE, B),
    "rounded to decimals": (lambda x: torch.round(x * 10, decimals=1) * x, A),
    "where with numbers": (lambda x: torch.where(x > 0, x, 0.0) + torch.where(x > 1, 1.0, x), A),
    "xlogy": (torch.xlogy, A, POSITIVE),
}

ACTIVATIONS: dict[str, Case] = {
    **named(
        F, "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6", A
    ),
    **named(F, "selu silu softplus softshrink softsign tanhshrink", A),
    "celu of other shapes": (lambda x: F.celu(x, 0.5) + F.elu(x, 0.3), A),
    "glu": (lambda x: F.glu(x, 1), A),
    "prelu": (F.prelu, IMAGE, draw(3)),
    "prelu of one slope": (F.prelu, IMAGE, draw(1)),
    "rrelu while evaluating": (lambda x: F.rrelu(x, training=False), A),
    "softmaxes": (lambda x: F.softmax(x, 0) + F.log_softmax(x, 1) + F.softmin(x, 1), A),
    "softmax in double": (lambda x: x.softmax(1, dtype=torch.float64).to(x.dtype), A),
    "softplus of another slope": (lambda x: F.softplus(x, 2.0, 0.5), A),
    "threshold": (lambda x: F.threshold(x, 0.1, 0.5), A),
}


def written(x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x[torch.tensor([1, 2]), torch.tensor([3, -1])] = y[0, :2]
    x[0], x[:, 1] = 0, y[:, 2]
    x[1:3, ::2] += 1
    x[x > 1] = 0.5
    return x * 2


def written_through_views(x: Tensor) -> Tensor:
    z = torch.zeros(4, 6, dtype=x.dtype)
    z[:, 0], z[1] = x[:, 1], 2
    z.view(-1)[3:9] = x.reshape(-1)[:6]
    z[:, 2:4].mul_(2).add_(x[:, :2])
    z.t()[5].copy_(x[:, 0])
    z.diagonal().add_(1)
    return z * x


def read_after_writing(x: Tensor) -> Tensor:
    base = x * 1
    view = base.t().reshape(6, 4).t()
    base.add_(1)
    return view * base


def without_values(x: Tensor) -> Tensor:
    return (
        torch.empty(4, 6, dtype=x.dtype).copy_(x)
        + torch.empty_like(x).fill_(1) * x
        + x.new_empty(4, 6).zero_()
    )


WRITING: dict[str, Case] = {
    "in place": (lambda x: (x * 1).mul_(2).add_(1).clamp_(max=2).t(), A),
    "over empty tensors": (without_values, A),
    "read after writing": (read_after_writing, A),
    "scatters": (
        lambda x, y: (
            x.select_scatter(y[0], 0, 1)
            + x.slice_scatter(y[:, :2], 1, 1, 3)
            + x.slice_scatter(y[:, :3], 1, 0, 6, 2)
        ),
        A,
        B,
    ),
    "through views": (written_through_views, A),
    "to indices": (written, A, B),
}


def relative_bias(table: Tensor) -> Tensor:
    places = torch.arange(4)[:, None] - torch.arange(4) + 3
    return table[places.reshape(-1)].reshape(4, 4, 2).permute(2, 0, 1)


INDEXING: dict[str, Case] = {
    "added at indices": (lambda x, y: x.index_put((torch.tensor([1, 1]),), y[:2], accumulate=True), A, B),
    "bias by position": (relative_bias, draw(7, 2)),
    "bucketed": (lambda x: x * torch.bucketize(x.detach(), torch.tensor([-1.0, 0.0], dtype=x.dtype)), A),
    "diagonals": (lambda x: torch.diagonal(x, 1).sum() + x.diagonal(-1) + torch.diag(x[0])[:3, 1], A),
    "diagonals of a batch": (lambda x: x.diagonal(0, 2, 3) * 2 + x.diagonal(1, 1, 3)[:, :1, :1], IMAGE),
    "embedded diagonal": (lambda x: torch.diag_embed(x, 1) * 2 + torch.trace(x), A),
    "gather": (lambda x: x.gather(1, COLUMN) * 2 + torch.take_along_dim(x, COLUMN, 1), A),
    "index": (lambda x: x[torch.tensor([2, 0, -1])], A),
    "index from an input": (lambda x, rows: x[rows % 4], A, TOKENS),
    "indices and new axes": (lambda x: x[None, torch.tensor([1, 2]), ..., None, 0], A),
    "indices apart": (lambda x: x[:, torch.tensor([2, 0]), :, torch.tensor([1, 5])], IMAGE),
    "indices in the middle": (
        lambda x: x[:, torch.tensor([[2, 0], [1, 1]]), torch.tensor([1, 5])],
        IMAGE,
    ),
    "indices that broadcast": (lambda x: x[torch.tensor([2, 0, -1]), torch.tensor([[1], [-2]])], A),
    "index of the last axis": (lambda x: x[..., torch.tensor([2, 0, 0])], IMAGE),
    "index copy": (lambda x, y: x.index_copy(0, torch.tensor([2, 0]), y[:2]), A, B),
    "index fill": (lambda x: x.index_fill(1, torch.tensor([1]), 3.0), A),
    "index add scaled": (lambda x, y: x.index_add(1, torch.tensor([0, 0]), y[:, :2], alpha=2), A, B),
    "masked scatter": (lambda x, y: x.detach().masked_scatter(x.detach() > 0, y.detach()) * y, A, B),
    "one hot": (lambda x, tokens: F.one_hot(tokens, 6).to(x.dtype).sum(1)[:, None] * x[:2], A, TOKENS),
    "put": (lambda x: x.put(torch.tensor([3, 5]), x.new_tensor([1.0, 2.0])), A),
    "scatter": (lambda x: x.scatter(1, COLUMN, 2.0) + x.scatter_add(1, COLUMN, x[:, :1]), A),
    "take": (lambda x: torch.take(x, torch.tensor([3, 0, 23])), A),
    "triangle": (lambda x: torch.tril(x) + torch.triu(x, -1) * x, A),
    "triangle's indices": (lambda x: x[:4, :4][tuple(torch.triu_indices(4, 4, 1))], A),
    **{
        f"scatter reduce {how}, {'with' if own else 'without'} the old": (
            lambda x, y, how=how, own=own: x.scatter_reduce(
                0, torch.tensor([[0, 1, 2, 0, 0, 1], [1, 1, 2, 3, 0, 0]]), y[:2], reduce=how, include_self=own
            ),
            A,
            B,
        )
        for how in ("sum", "prod", "mean", "amax", "amin")
        for own in (True, False)
    },
}


def mixed_channels_last(x: Tensor) -> Tensor:
    kernel = x[:2, :, :3, :3].contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x.to(memory_format=torch.channels_last), kernel).relu()
    return F.adaptive_avg_pool2d(y, 1) + x.permute(0, 2, 3, 1).contiguous().view(2, -1)[:, :2, None, None]


def rotated(x: Tensor) -> Tensor:
    angles = torch.arange(4)[:, None] * 10000 ** (-torch.arange(6) / 6)
    turned = torch.cat([-x[:, 3:], x[:, :3]], 1)
    return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)


ARRANGING: dict[str, Case] = {
    "by strides": (lambda x: x.as_strided((3, 2), (2, 1), 1) * 2 + x.as_strided((3, 2), (1, 6)), A),
    "channels last": (mixed_channels_last, IMAGE),
    "channel shuffle": (lambda x: F.channel_shuffle(x, 2) * 2, draw(1, 4, 3, 3)),
    "chunks": (lambda x: torch.cat(x.chunk(4, 1)[::-1], 1) + torch.hstack(x.tensor_split(3, 1)[::-1]), A),
    "differences": (lambda x: torch.diff(x) + torch.trapezoid(x).sum() + torch.gradient(x)[0][:, :5], A),
    "flips": (lambda x: x.rot90(1, (2, 3))[:, :, :6, :6] + x.flip(-1)[..., :6], IMAGE),
    "mesh": (lambda x: torch.stack(torch.meshgrid(x[0], x[1], indexing="ij")) * 2, A),
    "moved axes": (lambda x: x.movedim(1, -1).swapaxes(0, 1).contiguous().view(6, -1) * 2, IMAGE),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2) * 2, draw(1, 8, 3, 3)),
    "pixel unshuffle": (lambda x: F.pixel_unshuffle(x, 2) * 2, draw(1, 2, 4, 4)),
    "repeated": (lambda x: x.repeat_interleave(2, 1) + x.tile(1, 2), A),
    "repeated unequally": (
        lambda x: x.repeat_interleave(torch.tensor([1, 2, 0, 1]), 0, output_size=4),
        A,
    ),
    "rolled": (lambda x: torch.roll(x, (-2, 1), (2, 3)) + x.roll(-3, 3) + x.roll(2), IMAGE),
    "rotary positions": (rotated, A),
    "windows": (lambda x: x.unfold(1, 3, 2) * 2, SIGNAL),
    "windows of the last axis": (lambda x: x.unfold(-1, 4, 1), SIGNAL),
}


def norms(x: Tensor) -> Tensor:
    by_order = [x.norm(), *(x.norm(order, 1).sum() for order in (1, 3, math.inf)), torch.linalg.norm(x)]
    return torch.stack(by_order)


REDUCING: dict[str, Case] = {
    "cosine similarity": (lambda x, y: F.cosine_similarity(x, y) + F.pairwise_distance(x, y), A, B),
    "distances": (lambda x, y: torch.cdist(x, y) + torch.cdist(x, y, 1.0) + torch.cdist(x, y, 3.0), A, B + 2),
    "distances of many": (torch.cdist, draw(30, 4) * 2, draw(28, 4) + 9),
    "distances of pairs": (F.pdist, A),
    "extremes": (lambda x: x.amax((0, 1)) + x.amin(0) + x.amax(1).sum() + x.max() * x.min(), A),
    "extremes of an axis": (lambda x: [*x.max(1), *x.min(0, keepdim=True), *x.aminmax(dim=1)], A),
    "highest": (lambda x: torch.topk(x, 3, 1), A),
    "lowest": (lambda x: x.topk(2, largest=False), A),
    "log sum exp": (lambda x: x.logsumexp(1) + torch.logsumexp(x, (0, 1)), A),
    "matrix products": (
        lambda x, y: torch.addmm(x[:, :4], x, y.t(), beta=0.5, alpha=2.0) + torch.einsum("ij,kj->ik", x, y),
        A,
        B,
    ),
    "bilinear form": (F.bilinear, A, B, draw(3, 6, 6)),
    "chained products": (lambda x, y: torch.linalg.multi_dot([x, y.t(), x]), A, B),
    "cross product": (lambda x, y: torch.linalg.cross(x[:, :3], y[:, :3]), A, B),
    "kronecker product": (lambda x: torch.kron(x[:2, :2], x[:2, :3]), A),
    "sum of images": (lambda x, y: torch.einsum("bchw,bdhw->bcd", x, y), IMAGE, IMAGE * 2),
    "vector products": (
        lambda x, y: torch.addmv(x[:, 0], x, y[1]) + torch.dot(x[0], y[0]) + torch.mv(x, y[0]),
        A,
        B,
    ),
    "outer products": (
        lambda x, y: torch.addr(x[:, :4], x[:, 0], y[:, 1]) + torch.outer(x[:, 0], y[:, 1]),
        A,
        B,
    ),
    "median": (lambda x: [*x.median(1), x.median(), *x.kthvalue(2, 1)], A),
    "normalised": (lambda x: F.normalize(x, dim=1) + F.normalize(x, 1.0, 0) + x.renorm(2, 0, 1.0), A),
    "norms": (norms, A),
    "product": (lambda x: x.prod(1) + x.prod(), A),
    "quantile": (lambda x: torch.quantile(x, 0.3, 1), A),
    "running extremes": (lambda x: [*x.cummax(1), *x.cummin(0)], A),
    "running log sum exp": (lambda x: x.logcumsumexp(1), A),
    "running product": (lambda x: x.cumprod(1), A),
    "running sum": (lambda x: x.cumsum(1) + x.cumsum(0) + x.flip(1).cumsum(1), A),
    "sorted": (lambda x: torch.sort(x, 1), A),
    "sorted downwards": (lambda x: torch.sort(x, 0, descending=True), A),
    "spread": (lambda x: x.std(1) + x.var() + torch.std_mean(x, 1)[1] + x.var(1, unbiased=False), A),
    "without NaN": (lambda x: torch.nansum(x, 1) + torch.nanmean(x), A),
}


def pooled(axes: int, x: Tensor) -> dict[str, Case]:
    """Everything that slides or spans over images of so many axes."""

    def of(name: str) -> Callable[..., Tensor]:
        return getattr(F, name.replace("nd", f"{axes}d"))

    def unpooled(x: Tensor) -> Tensor:
        return of("max_unpoolnd")(*of("max_poolnd")(x, 2, return_indices=True), 2, output_size=x.shape)

    channels, kernel = x.shape[1], [2] * axes
    cases: dict[str, Case] = {
        "convolution": (
            lambda x, w: of("convnd")(x, w, padding=1, stride=2),
            x,
            draw(4, channels, *kernel),
        ),
        "transposed convolution": (
            lambda x, w: of("conv_transposend")(x, w, padding=1, stride=2, output_padding=1),
            x,
            draw(channels, 4, *kernel),
        ),
        "maximum": (lambda x: of("max_poolnd")(x, 3, 2, 1) * 2, x),
        "maximum beyond the end": (lambda x: of("max_poolnd")(x, 2, 2, ceil_mode=True), x),
        "maximum and its place": (lambda x: of("max_poolnd")(x, 2, return_indices=True), x),
        "put back": (unpooled, x),
        "mean": (lambda x: of("avg_poolnd")(x, 3, 2, 1), x),
        "mean of tiles": (lambda x: of("avg_poolnd")(x[..., :4, :4] if axes > 1 else x[..., :8], 2), x),
        "mean beyond the end": (lambda x: of("avg_poolnd")(x, 2, 2, 0, True), x),
        "mean beyond the padding": (lambda x: of("avg_poolnd")(x, 3, 2, 1, True, True), x),
        "mean without the padding": (lambda x: of("avg_poolnd")(x, 3, 2, 1, False, False), x),
        "adaptive mean": (lambda x: of("adaptive_avg_poolnd")(x, 3), x),
        "global mean": (lambda x: of("adaptive_avg_poolnd")(x, 1), x),
        "adaptive mean of more": (lambda x: of("adaptive_avg_poolnd")(x, 8), x),
        "adaptive maximum": (lambda x: of("adaptive_max_poolnd")(x, 3, return_indices=True), x),
        "adaptive maximum of tiles": (lambda x: of("adaptive_max_poolnd")(x, 1), x),
        "batch norm": (lambda x: F.batch_norm(x, None, None, training=True), x),
        "group norm": (lambda x: F.group_norm(x, 1), x),
        "instance norm": (F.instance_norm, x),
        "local response norm": (lambda x: F.local_response_norm(x, 2, alpha=0.1), x),
    }
    widths = (1, 2, 0, 1, 2, 1)[: 2 * axes]
    for mode in ("reflect", "replicate", "circular"):
        cases[f"padded: {mode}"] = (lambda x, mode=mode: F.pad(x, widths, mode=mode) * 2, x)
    smooth = {1: ["linear"], 2: ["bilinear", "bicubic"], 3: ["trilinear"]}[axes]
    for mode in ("nearest", "nearest-exact", *smooth):
        cases[f"enlarged: {mode}"] = (lambda x, mode=mode: F.interpolate(x, scale_factor=2, mode=mode), x)
        cases[f"resized: {mode}"] = (lambda x, mode=mode: F.interpolate(x, [7, 5, 4][:axes], mode=mode), x)
    for mode in smooth:
        cases[f"aligned: {mode}"] = (
            lambda x, mode=mode: F.interpolate(x, scale_factor=1.7, mode=mode, align_corners=True),
            x,
        )
    if axes > 1:
        cases["mean by a divisor"] = (lambda x: of("avg_poolnd")(x, 3, 2, 1, False, True, 5), x)
    return {f"{name}, {axes}d": case for name, case in cases.items()}


IMAGES: dict[str, Case] = {
    **pooled(1, SIGNAL),
    **pooled(2, IMAGE),
    **pooled(3, VOLUME),
    "affine grid": (lambda x: F.affine_grid(x.reshape(4, 2, 3), (4, 3, 4, 5), align_corners=False), A),
    "area": (lambda x: F.interpolate(x, scale_factor=0.5, mode="area"), IMAGE),
    "columns": (lambda x: F.unfold(x, (2, 3), padding=1, stride=2), IMAGE),
    "columns put back": (lambda x: F.fold(x, (6, 7), (2, 3), padding=1, stride=2), draw(2, 18, 16)),
    "columns with gaps": (lambda x: F.unfold(x, 2, dilation=2), IMAGE),
    "evaluated batch norm": (
        lambda x, w: F.batch_norm(x, x[0, :, 0, 0].detach(), w.detach().abs() + 0.1, w, None, False),
        IMAGE,
        draw(3),
    ),
    "one image": (
        lambda x: F.max_pool2d(x[0], 2) + F.avg_pool2d(x[0], 2) + F.adaptive_avg_pool2d(x[0], 3),
        IMAGE,
    ),
    "one image convolved": (lambda x, w: F.conv2d(x[0], w), IMAGE, draw(4, 3, 3, 3)),
    "patches": (lambda x: F.unfold(x, 2, stride=2), IMAGE),
    "power mean": (lambda x: F.lp_pool2d(x.abs() + 0.1, 2, 3, 2), IMAGE),
    "same padding, even": (lambda x, w: F.conv1d(x, w, padding="same"), SIGNAL, draw(4, 3, 4)),
    "same padding, odd": (lambda x, w: F.conv2d(x, w, padding="same"), IMAGE, draw(4, 3, 3, 3)),
    "sampled": (lambda x, g: F.grid_sample(x, torch.tanh(g), align_corners=False), IMAGE, draw(2, 4, 5, 2)),
    "sampled at the border": (
        lambda x, g: F.grid_sample(x, g, padding_mode="border", align_corners=True),
        IMAGE,
        draw(2, 4, 5, 2),
    ),
    "sampled from the nearest": (
        lambda x, g: F.grid_sample(x, torch.tanh(g), "nearest", align_corners=True),
        IMAGE,
        draw(2, 4, 5, 2),
    ),
    "shrunk smoothly": (
        lambda x: F.interpolate(x, size=(3, 4), mode="bilinear", antialias=True),
        IMAGE,
    ),
}


def triangle(below: int) -> Tensor:
    return torch.ones(5, 5, dtype=torch.bool).tril(below)


def recurrent(kind: Callable[..., tuple[Tensor, ...]], x: Tensor, *weights: Tensor) -> Tensor:
    state = torch.zeros(1, 2, 4, dtype=x.dtype)
    held = [state, state] if kind is torch.lstm else state
    return kind(x, held, list(weights), True, 1, 0.0, False, False, True)[0]


TOKEN_OPERATORS: dict[str, Case] = {
    "attention, causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *HEADS),
    "attention masked by truths": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=triangle(0)),
        *HEADS,
    ),
    "attention of rows that see nothing": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=triangle(-1)),
        *HEADS,
    ),
    "attention with a trained mask": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
        *HEADS,
        draw(5, 5),
    ),
    "attention with shared keys": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k * 2, enable_gqa=True),
        draw(2, 4, 5, 4),
        draw(2, 2, 5, 4),
    ),
    "attention without a batch": (
        lambda q, k: F.scaled_dot_product_attention(q, k, q * 2),
        draw(2, 5, 4),
        draw(2, 5, 4) * 2,
    ),
    "embedding by frequency": (
        lambda table, tokens: F.embedding(tokens, table, scale_grad_by_freq=True),
        draw(6, 3),
        TOKENS,
    ),
    "gated recurrence": (
        lambda x, *weights: recurrent(torch.gru, x, *weights),
        *(draw(2, 5, 3), draw(12, 3) * 0.5, draw(12, 4) * 0.5, draw(12), draw(12).flip(0)),
    ),
    "layer norm": (lambda x, w, b: F.layer_norm(x, [6], w, b), A, draw(6), draw(6)),
    "long short-term memory": (
        lambda x, *weights: recurrent(torch.lstm, x, *weights),
        *(draw(2, 5, 3), draw(16, 3) * 0.5, draw(16, 4) * 0.5, draw(16), draw(16).flip(0)),
    ),
    "root mean square norm": (lambda x, w: F.rms_norm(x, [6], w, 1e-5), A, draw(6)),
    "weight norm": (lambda v, g: torch._weight_norm(v, g, 0), draw(4, 3, 2), draw(4, 1, 1)),
    "weight norm of another axis": (lambda v, g: torch._weight_norm(v, g, 1), draw(4, 3, 2), draw(1, 3, 1)),
    "weighted bags": (
        lambda table, weights: F.embedding_bag(TOKENS, table, mode="sum", per_sample_weights=weights),
        draw(6, 3),
        draw(2, 4),
    ),
}
for mode in ("sum", "mean", "max"):
    TOKEN_OPERATORS |= {
        f"bags: {mode}": (
            lambda table, tokens, mode=mode: F.embedding_bag(tokens, table, mode=mode),
            draw(6, 3),
            TOKENS,
        ),
        f"bags, one of them empty: {mode}": (
            lambda table, mode=mode: F.embedding_bag(TOKENS[0], table, torch.tensor([0, 2, 2]), mode=mode),
            draw(6, 3),
        ),
        f"bags with padding: {mode}": (
            lambda table, mode=mode: F.embedding_bag(TOKENS, table, mode=mode, padding_idx=3),
            draw(6, 3),
        ),
        f"bags with the last offset: {mode}": (
            lambda table, mode=mode: F.embedding_bag(
                TOKENS.reshape(-1), table, torch.tensor([0, 3, 8]), mode=mode, include_last_offset=True
            ),
            draw(6, 3),
        ),
    }

LABELS = torch.tensor([1, 0, 2, 1])

LOSSES: dict[str, Case] = {
    "binary": (lambda x: F.binary_cross_entropy(x.sigmoid(), x.detach().sigmoid()), A),
    "binary of logits": (
        lambda x: F.binary_cross_entropy_with_logits(x, x.detach().sigmoid(), pos_weight=x.new_tensor(2.0)),
        A,
    ),
    "cross-entropy, smoothed": (lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.1), A),
    "cross-entropy, weighted": (
        lambda x: F.cross_entropy(x, LABELS, weight=x.new_ones(6) * 2, reduction="sum"),
        A,
    ),
    "cross-entropy of all but one": (lambda x: F.cross_entropy(x, torch.tensor([1, -100, 2, 1])), A),
    "cross-entropy of chances": (lambda x: F.cross_entropy(x, x.detach().softmax(1)), A),
    "cross-entropy of pixels": (lambda x: F.cross_entropy(x, torch.arange(84).reshape(2, 6, 7) % 3), IMAGE),
    "distances": (lambda x: F.huber_loss(x, B.to(x.dtype)) + F.smooth_l1_loss(x, B.to(x.dtype), beta=0.5), A),
    "divergence": (lambda x: F.kl_div(x.log_softmax(1), x.detach().softmax(1), reduction="batchmean"), A),
    "triplets": (lambda x: F.triplet_margin_loss(x, x.detach().flip(0), x.detach().roll(1, 0)), A),
}

CASES = {
    **ELEMENTWISE,
    **ACTIVATIONS,
    **WRITING,
    **INDEXING,
    **ARRANGING,
    **REDUCING,
    **IMAGES,
    **TOKEN_OPERATORS,
    **{f"loss: {name}": case for name, case in LOSSES.items()},
}


@pytest.mark.parametrize("name", CASES)
def test_every_operator(name: str) -> None:
    function, *arguments = CASES[name]
    check(function, *(argument.clone() for argument in arguments), tolerance=1e-4)


def test_cases_are_told_apart() -> None:
    """A dictionary would hide one of the same name."""
    parts = (
        ELEMENTWISE,
        ACTIVATIONS,
        WRITING,
        INDEXING,
        ARRANGING,
        REDUCING,
        IMAGES,
        TOKEN_OPERATORS,
        LOSSES,
    )
    assert sum(map(len, parts)) == len(CASES)


def whole_numbers(i: Tensor) -> list[Tensor]:
    quotients = [i // 2, -i // 3, torch.div(-i, 2, rounding_mode="trunc"), i % 3, -i % 3, torch.fmod(-i, 3)]
    bits = [i << 2, i >> 1, -i >> 1, i & 1, i | 4, i ^ 3, ~i]
    narrow = [
        i.int() * 2 + 1,
        i.int().max(),
        i.int().argmax(),
        i.byte() * 3,
        i.to(torch.int8) - 2,
        i.short().sum(),
    ]
    along = [
        *i.max(1),
        i.min(),
        *i.sort(dim=1, stable=True),
        i.cumsum(1),
        i.prod(1),
        i.amax(1),
        i.argmin(1),
        i @ i.t(),
    ]
    return [*quotients, *bits, *narrow, *along, *i.topk(2)]


def truths(i: Tensor) -> list[Tensor]:
    p, q = i > 1, i > 2
    logic = [
        p ^ q,
        p & q,
        p | q,
        ~p,
        torch.logical_xor(i, q),
        p * q,
        p + q,
        p == q,
        p < q,
        torch.where(p, q, i < 1),
    ]
    return [*logic, p.sum(), p.all(1), p.any(), p.max(1)[0], p.cumsum(1), torch.isin(i, torch.tensor([0, 1]))]


def kinds(i: Tensor) -> list[Tensor]:
    x = i / 2 - 1
    return [
        torch.isnan(x / x),
        torch.isinf(1 / x),
        torch.isfinite(1 / x),
        torch.signbit(x),
        x.int(),
        x.bool(),
        x > 0,
    ]


@pytest.mark.parametrize("function", [whole_numbers, truths, kinds])
def test_whole_numbers_and_truths(function: Function) -> None:
    def held(i: Tensor) -> list[Tensor]:
        return [each.to(torch.int64) for each in function(i)]

    for index, (got, want) in enumerate(zip(in_onnx(held, TOKENS), held(TOKENS), strict=True)):
        assert torch.equal(got, want), f"result {index}: {got} in place of {want}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_to(dtype: torch.dtype) -> None:
    """As a processor computes it: each operator in float32."""

    def half(x: Tensor) -> Tensor:
        y = x.to(dtype)
        return (torch.sigmoid(y @ y.t()) * y.sum(1)).float()

    torch.testing.assert_close(in_onnx(half, A)[0], half(A), atol=0.05, rtol=0.02)


UNSAYABLE: dict[str, Case] = {
    "linalg_cholesky_ex": (lambda x: torch.linalg.cholesky(x @ x.t() + torch.eye(4)), A),
    "_linalg_det": (lambda x: torch.linalg.det(x[:3, :3]), A),
    "linalg_matrix_exp": (lambda x: torch.matrix_exp(x[:4, :4]), A),
    "_linalg_solve_ex": (lambda x: torch.linalg.solve(x[:4, :4], x), A),
    "lgamma": (torch.lgamma, POSITIVE),
    "mode": (lambda x: x.mode(1)[0], A),
    "reflection_pad1d": (lambda x: F.pad(x, (-1, 2), mode="reflect"), SIGNAL),
}


@pytest.mark.parametrize("name", UNSAYABLE)
def test_what_onnx_cannot_say_is_refused_by_name(name: str) -> None:
    function, *arguments = UNSAYABLE[name]
    with pytest.raises(UnsupportedOperators, match=rf"aten\.{name}: ONNX (has no operator|cannot say it)"):
        in_onnx(function, *arguments)
