"""Buffers of every kind, and tensors that are changed in place."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import Refusal
from tests.zoo.frames import FEATURES, WIDTH, function_on, on_images, on_tokens, on_vectors, refused

STEPS = 10


class InfiniteMask(nn.Module):
    """Scores plus a buffer of -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((STEPS, STEPS), -math.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(x @ x.transpose(1, 2) / 4 + self.mask, dim=-1) @ x


class LongMask(nn.Module):
    """A boolean mask for sequences of up to 32 steps, cut to those there are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tril(torch.ones(32, 32, dtype=torch.bool)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        T = x.size(1)  # noqa: N806
        scores = (x @ x.mT).masked_fill(~self.mask[:T, :T], -1e9)
        return scores.softmax(-1) @ x


class RelativeBias(nn.Module):
    """An index among the buffers, used by its view(-1)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * STEPS - 1) * 0.1)
        position = torch.arange(STEPS)
        self.register_buffer("index", position[:, None] - position[None, :] + STEPS - 1)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table[self.index.view(-1)].view(STEPS, STEPS)
        return (x @ x.transpose(1, 2) + bias).softmax(-1) @ x


class SinusoidTable(nn.Module):
    """A parameter that is never trained, as fairseq and BERT's heirs keep it."""

    def __init__(self) -> None:
        super().__init__()
        angle = torch.arange(STEPS)[:, None] / 100 ** (torch.arange(FEATURES)[None, :] / FEATURES)
        self.weights = nn.Parameter(
            torch.where(torch.arange(FEATURES) % 2 == 0, angle.sin(), angle.cos()), False
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weights[: x.size(1)].detach()


class PlainTensor(nn.Module):
    """A constant that nobody registered."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.std = torch.linspace(-0.1, 0.1, FEATURES), torch.full((FEATURES,), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class DoubleTable(nn.Module):
    """A float64 buffer that is read as float32."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(0, 1, FEATURES, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table.to(x.dtype)


class CountedForward(nn.Module):
    """Counts its batches; nothing reads the count."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return torch.tanh(x)


class WarmedUp(nn.Module):
    """What the layer computes depends on how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return x * torch.clamp((self.steps + 1) / 100.0, max=1.0)


class PythonCounter(nn.Module):
    """The same with a Python number, of which a program would keep the first."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * min(1.0, 0.1 * self.calls)


class MeanInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.running_mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return x - self.running_mean


class MeanReassigned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running_mean = 0.9 * self.running_mean + 0.1 * x.mean(0).detach()
        return x - self.running_mean


class MeanCopied(nn.Module):
    """Through .data, and the result of this batch for this batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(1, WIDTH, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3), keepdim=True)
        if self.training:
            self.running_mean.data.copy_(self.running_mean.lerp(mean.data, 0.1))
        else:
            mean = self.running_mean
        return x - mean


class Codebook(nn.Module):
    """The nearest of eight codes, which follow the mean of what chose them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(8, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        one_hot = F.one_hot(torch.cdist(x.detach(), self.codes).argmin(-1), 8).type_as(x)
        if self.training:
            with torch.no_grad():
                means = one_hot.T @ x / one_hot.sum(0).clamp(min=1)[:, None]
                self.codes.lerp_(means, 0.01)
        return x + (one_hot @ self.codes - x).detach()


class Centred(nn.Module):
    """A parameter is changed in the forward pass, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(FEATURES, FEATURES) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.sub_(self.weight.mean())
        return F.linear(x, self.weight)


def _added(x: Tensor) -> Tensor:
    y = torch.sin(x)
    y += x
    return y


def _zeroed(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 0
    return x


def _assigned(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], x.shape[1] + 2, x.shape[2])
    out[:, 1:-1, :] = x
    out[:, 0] = x[:, -1]
    return out


def _filled(x: Tensor) -> Tensor:
    y = x * 1.5
    return y.masked_fill_(x > 1, 1.0)


def _view_added(x: Tensor) -> Tensor:
    y = x * 2
    y[:, :4].add_(x[:, 4:8])
    y.view(-1)[0:3].mul_(0.5)
    return y


def _copied(x: Tensor) -> Tensor:
    out = x.new_empty(x.size(0), 2 * x.size(1))
    out[:, ::2].copy_(x)
    out[:, 1::2].copy_(-x)
    return out


def _columns(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    state = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        state = 0.5 * state + x[:, t]
        out[:, t] = state
    return out


def _scattered(x: Tensor) -> Tensor:
    index = torch.tensor([3, 1, 2])
    y = x.clone().index_fill_(1, index, 0.25)
    y.index_add_(1, torch.tensor([0, 0, 5]), x[:, :3])
    y[:, [7, 9]] = x[:, [9, 7]]
    return y


def _diagonal(x: Tensor) -> Tensor:
    scores = x @ x.transpose(1, 2)
    scores.diagonal(dim1=-2, dim2=-1).fill_(-10.0)
    return scores.softmax(-1) @ x


def _arithmetic(x: Tensor) -> Tensor:
    y = x + 0.0
    y -= 0.1
    y *= 1.1
    y /= 1.2
    return y.pow_(2).add_(0.1).neg_().clamp_(min=-1.0)


class InputInPlace(nn.Module):
    """Changes what it is given; the stem's result is read by nobody else."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0).sub_(0.1)
        return F.relu_(x)


ENTRIES = (
    on_tokens("buffer_infinite_mask", InfiniteMask),
    on_tokens("buffer_long_mask", LongMask, notes="not in the state; cut by a shape"),
    on_tokens("buffer_index_view", RelativeBias),
    on_tokens("sinusoid_parameter", SinusoidTable),
    on_vectors("plain_tensor_attribute", PlainTensor),
    on_vectors("buffer_of_float64", DoubleTable, expected=Refusal(("layer.table", "float64"))),
    on_vectors("counted_forward", CountedForward),
    on_vectors(
        "warm_up_by_count",
        WarmedUp,
        expected=Refusal(("layer.steps",)),
        notes="an int64 state that matters",
    ),
    on_vectors("python_counter", PythonCounter, expected=refused("calls"), notes="two equal batches differ"),
    on_vectors("running_mean_in_place", MeanInPlace),
    on_vectors("running_mean_reassigned", MeanReassigned),
    on_images("running_mean_copied", MeanCopied),
    on_vectors("codebook_by_running_means", Codebook),
    on_vectors(
        "parameter_changed_in_forward",
        Centred,
        expected=Refusal(("layer.weight",)),
        notes="the optimizer is not alone in changing it",
    ),
    function_on(on_images, "add_in_place", _added),
    on_images("relu_in_place", lambda: nn.ReLU(inplace=True)),
    function_on(on_vectors, "slice_set_to_zero", _zeroed),
    function_on(on_tokens, "slices_assigned", _assigned),
    function_on(on_vectors, "masked_fill_in_place", _filled),
    function_on(on_vectors, "view_changed_in_place", _view_added),
    function_on(on_vectors, "copied_into_slices", _copied, out=2 * FEATURES),
    function_on(on_tokens, "loop_that_fills_columns", _columns),
    function_on(on_vectors, "index_fill_and_add", _scattered),
    function_on(on_tokens, "diagonal_filled", _diagonal),
    function_on(on_vectors, "arithmetic_in_place", _arithmetic),
    on_images("input_changed_in_place", InputInPlace),
)
