"""Arithmetic beyond the everyday, and operators that no fixed program over real numbers has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.frames import FEATURES, WIDTH, Lambda, function_on, on_images, on_tokens, on_vectors, refused


class Distances(nn.Module):
    """How far a vector is from eight centres, in several measures."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(8, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        euclid = torch.cdist(x, self.centres)
        city = torch.cdist(x, self.centres, p=1.0)
        cosine = F.cosine_similarity(x.unsqueeze(1), self.centres, dim=-1)
        first = F.pairwise_distance(x, self.centres[0].expand_as(x), keepdim=True)
        return torch.cat([euclid, city, cosine, first], dim=1)


class BilinearPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(FEATURES, FEATURES, 12)
        self.similarity, self.distance = nn.CosineSimilarity(dim=1), nn.PairwiseDistance(p=2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        both = torch.stack([self.similarity(x, y), self.distance(x, y)], dim=1)
        return torch.cat([self.bilinear(x, y), both], dim=1)


class LinearAttention(nn.Module):
    """Sums over the past instead of scores."""

    def forward(self, x: Tensor) -> Tensor:
        k = F.elu(x) + 1
        context = torch.cumsum(k.unsqueeze(-1) * x.unsqueeze(-2), dim=1)
        return torch.einsum("ntc,ntcd->ntd", k, context) / torch.cumsum(k, dim=1).sum(-1, keepdim=True)


class Fourier(nn.Module):
    """FNet's mixing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real


class GlobalFilter(nn.Module):
    """A filter in the frequencies, whose weight is held as two real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.complex_weight = nn.Parameter(torch.randn(12, 7, WIDTH, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.rfft2(x.permute(0, 2, 3, 1), dim=(1, 2), norm="ortho")
        x = x * torch.view_as_complex(self.complex_weight)
        return torch.fft.irfft2(x, s=(12, 12), dim=(1, 2), norm="ortho").permute(0, 3, 1, 2)


class Gated(nn.Module):
    """Computes the layer where a sum is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if y.abs().sum() > 0:
            return y
        return x


class HaltingLoop(nn.Module):
    """Goes on until nothing is large any more."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        while x.abs().max() > 1.0:
            x = 0.5 * x
        return x


def _statistics(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, dim=1, keepdim=True)
    std = x.std(dim=1, keepdim=True, unbiased=False)
    return torch.cat([(x - mean) / torch.sqrt(var + 1e-3), std, x.var(1, keepdim=True)], dim=1)


def _order_statistics(x: Tensor) -> Tensor:
    median = x.median(dim=1, keepdim=True).values
    third, _ = torch.kthvalue(x, 3, dim=1, keepdim=True)
    return torch.cat([x - median, third], dim=1)


def _norms(x: Tensor) -> Tensor:
    a = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    b = F.normalize(x, p=1.0, dim=1)
    c = torch.linalg.vector_norm(x, ord=3, dim=1, keepdim=True)
    return a + b + c + torch.linalg.matrix_norm(x)[:, None, None]


def _accumulations(x: Tensor) -> Tensor:
    return torch.cumsum(x, 1) + torch.cumprod(torch.sigmoid(x), dim=1) + torch.logcumsumexp(x, dim=1)


def _running_extremes(x: Tensor) -> Tensor:
    return torch.cummax(x, dim=1).values - torch.cummin(x, dim=1)[0]


def _reductions(x: Tensor) -> Tensor:
    return (
        x
        - torch.logsumexp(x, dim=1, keepdim=True)
        + x.amin(1, keepdim=True)
        + torch.prod(x.cos(), 1, keepdim=True)
    )


def _clamped(x: Tensor) -> Tensor:
    bound = x.abs().mean(dim=1, keepdim=True)
    y = torch.clamp(x, -bound, bound)
    return torch.maximum(y, torch.tensor(-0.5)) + torch.minimum(x, y.clip(max=1.0)) + x.clamp_max(2.0)


def _divisions(x: Tensor) -> Tensor:
    y = torch.fmod(x, 0.7) + torch.remainder(x, 0.3) + x % 1.5
    return y + torch.floor_divide(x.detach(), 0.5) * 0.1 + torch.div(x, 0.25, rounding_mode="trunc") * 0.1


def _powers(x: Tensor) -> Tensor:
    y = torch.exp2(x) + torch.pow(2.0, -x) + x**3 + torch.expm1(x)
    return y + torch.log1p(x**2) + (x.abs() + 0.1) ** 0.3 + torch.float_power(x.abs() + 0.1, 0.7).float()


def _angles(x: Tensor) -> Tensor:
    y = torch.atan2(x, x.flip(1) + 0.1) + torch.atan(x) + torch.asinh(x) + torch.tan(0.1 * x)
    return y + torch.asin(0.9 * torch.tanh(x)) + torch.sinh(0.5 * x) + torch.hypot(x, x.flip(1))


def _special(x: Tensor) -> Tensor:
    y = torch.erf(x) + torch.erfinv(0.9 * torch.tanh(x)) + torch.erfc(x)
    return (
        y
        + torch.lgamma(x.abs() + 1.0)
        + torch.sinc(x)
        + torch.logit(torch.sigmoid(x))
        + torch.xlogy(x, x.abs() + 1)
    )


def _rounded(x: Tensor) -> Tensor:
    y = torch.round(x) + torch.floor(2 * x) + x.ceil() + torch.trunc(x) + torch.frac(x)
    return (
        y
        + x.sign()
        + torch.heaviside(x.detach(), x.new_zeros(()))
        + torch.nan_to_num(x / x.abs().clamp(min=0.1))
        + x
    )


def _compared(x: Tensor) -> Tensor:
    y = x.eq(x.max(1, keepdim=True)[0]).float() + torch.logical_or(x > 1, x.lt(-1)).to(x.dtype)
    return x + y + torch.isclose(x, x.round(), atol=0.1).type_as(x) + (x != 0).all(dim=1, keepdim=True) * 0.5


def _products(x: Tensor) -> Tensor:
    gram = torch.bmm(x, x.transpose(1, 2))
    y = torch.baddbmm(x, gram, x, beta=0.5, alpha=0.1) + torch.tensordot(x, x[0] * 0.1, dims=([2], [1])).mean(
        -1, True
    )
    return (
        y
        + torch.outer(x[:, 0, 0], x[0, :, 0])[..., None] * 0.1
        + torch.kron(x[:, :1, :4], x.new_ones(1, 1, 4)) * 0.1
    )


def _lerped(x: Tensor) -> Tensor:
    y = (
        torch.lerp(x, torch.tanh(x), 0.3)
        + torch.addcmul(x, x, x, value=0.1)
        + torch.addcdiv(x, x, x.abs() + 1)
    )
    return y + torch.diff(x, dim=1, prepend=x[:, :1]) + torch.trapezoid(x, dim=1)[:, None] * 0.1


def _integers(x: Tensor) -> Tensor:
    """Bins of a histogram as an index."""
    bins = ((x.clamp(-1.99, 1.99) + 2) * 2).long()
    one_hot = F.one_hot(bins, num_classes=8).float()
    return (
        x + one_hot.mean(-1) + torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0])) * 0.1 + (bins % 2).float()
    )


def _covariance(x: Tensor) -> Tensor:
    """Second-order pooling with a root by Newton's iteration."""
    x = x.flatten(2)
    x = x - x.mean(2, keepdim=True)
    a = x @ x.transpose(1, 2) / x.size(2) + 0.1 * torch.eye(x.size(1))
    trace = a.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    y, z, eye = a / trace, torch.eye(x.size(1)).expand_as(a), 3.0 * torch.eye(x.size(1))
    for _ in range(3):
        t = 0.5 * (eye - z @ y)
        y, z = y @ t, t @ z
    return (y * trace.sqrt()).unsqueeze(-1)


def _shifted_by_item(x: Tensor) -> Tensor:
    shift = x.abs().mean().item()
    return x + shift


def _cut_by_value(x: Tensor) -> Tensor:
    length = int(x.abs().sum()) % 5 + 3
    return x[:, :length]


def _masked(x: Tensor) -> Tensor:
    return x * x[x > 0].mean()


def _nonzero(x: Tensor) -> Tensor:
    return x + x.gt(0).nonzero().float().mean()


def _selected(x: Tensor) -> Tensor:
    return x + torch.masked_select(x, x > 0).sum()


def _unique(x: Tensor) -> Tensor:
    return x + torch.unique(x.round()).numel()


def _as_list(x: Tensor) -> Tensor:
    return x * torch.tensor(x.detach().abs().mean(0).tolist())


def _through_numpy(x: Tensor) -> Tensor:
    import numpy

    return x + torch.from_numpy(numpy.abs(x.detach().cpu().numpy()).mean(axis=1, keepdims=True))


_VALUES = "depend"
"""Part of "depends on the values of a tensor"."""

ENTRIES = (
    on_vectors("distances", Distances, out=25),
    on_vectors("bilinear_layer", BilinearPair, out=14),
    on_tokens("linear_attention", LinearAttention),
    function_on(on_vectors, "variance_and_deviation", _statistics, out=FEATURES + 2),
    function_on(on_vectors, "median_and_kthvalue", _order_statistics, out=FEATURES + 1),
    function_on(on_vectors, "quantile", lambda x: x - torch.quantile(x, 0.3, dim=1, keepdim=True)),
    function_on(on_tokens, "norms_of_vectors", _norms),
    function_on(on_tokens, "cumulative_sums", _accumulations),
    function_on(on_tokens, "cumulative_extremes", _running_extremes),
    function_on(on_vectors, "logsumexp_and_product", _reductions),
    function_on(on_vectors, "clamp_by_tensors", _clamped),
    function_on(on_vectors, "divisions", _divisions),
    function_on(on_vectors, "powers", _powers),
    function_on(on_vectors, "angles", _angles),
    function_on(on_vectors, "special_functions", _special, expected=refused("use another layer")),
    function_on(on_vectors, "rounding", _rounded),
    function_on(on_vectors, "comparisons", _compared),
    function_on(on_tokens, "products", _products),
    function_on(on_vectors, "lerp_addcmul_diff", _lerped),
    function_on(on_vectors, "integers_as_bins", _integers),
    function_on(on_images, "covariance_pooling", _covariance),
    on_tokens("fourier_transform", Fourier, expected=refused("complex")),
    on_images("fourier_filter", GlobalFilter, expected=refused("complex")),
    function_on(
        on_tokens,
        "inverse",
        lambda x: torch.linalg.inv(x @ x.mT + torch.eye(10)) @ x,
        expected=refused("linalg_inv"),
    ),
    function_on(
        on_tokens,
        "singular_values",
        lambda x: x * torch.linalg.svdvals(x)[:, :, None],
        expected=refused("linalg_svd"),
    ),
    on_vectors("branch_on_values", Gated, expected=refused(_VALUES)),
    on_vectors("loop_on_values", HaltingLoop, expected=refused(_VALUES)),
    function_on(on_vectors, "item", _shifted_by_item, expected=refused("item")),
    function_on(on_tokens, "length_by_value", _cut_by_value, expected=refused(_VALUES)),
    function_on(on_vectors, "boolean_index", _masked, expected=refused(_VALUES, "index")),
    function_on(on_vectors, "nonzero", _nonzero, expected=refused(_VALUES, "nonzero")),
    function_on(on_vectors, "masked_select", _selected, expected=refused(_VALUES, "masked_select")),
    function_on(on_vectors, "unique", _unique, expected=refused(_VALUES, "unique")),
    function_on(on_vectors, "values_as_a_list", _as_list, expected=refused(_VALUES)),
    function_on(on_vectors, "through_numpy", _through_numpy, expected=refused("numpy")),
    on_vectors(
        "sequential_of_lambdas", lambda: nn.Sequential(Lambda(torch.sin), Lambda(torch.abs), Lambda(F.silu))
    ),
)
