"""Every activation of torch.nn, and some that people write themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.frames import FEATURES, WIDTH, function_on, on_images, on_tokens, on_vectors


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(FEATURES, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x)
        return x + y


class BiasedAttention(nn.Module):
    """Options that few use: extra keys, no biases, a float mask, weights that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(FEATURES, 2, bias=False, add_bias_kv=True, add_zero_attn=True)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(10))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        y, _ = self.attention(x, x, x, attn_mask=self.mask, average_attn_weights=False)
        return y.transpose(0, 1)


class Swish(nn.Module):
    """A slope that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class FReLU(nn.Module):
    """The larger of a pixel and what a depthwise convolution finds around it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.max(x, self.conv(x))


class SplineLikeActivation(nn.Module):
    """Piecewise linear by a table of knots, found by searchsorted."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(-2, 2, 7))
        self.values = nn.Parameter(torch.linspace(-1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.values[torch.searchsorted(self.knots, x.contiguous())]


ENTRIES = (
    on_vectors("elu", lambda: nn.ELU(alpha=0.7)),
    on_vectors("hardshrink", nn.Hardshrink),
    on_vectors("hardsigmoid", nn.Hardsigmoid),
    on_vectors("hardtanh", lambda: nn.Hardtanh(-0.5, 2.0)),
    on_images("hardswish", nn.Hardswish),
    on_vectors("leaky_relu", lambda: nn.LeakyReLU(0.1, inplace=True)),
    on_vectors("log_sigmoid", nn.LogSigmoid),
    on_images("prelu", nn.PReLU),
    on_images("prelu_each_channel", lambda: nn.PReLU(WIDTH)),
    on_vectors("relu6", lambda: nn.ReLU6(inplace=True)),
    on_vectors("rrelu", nn.RReLU, notes="a random slope for each value in training"),
    on_vectors("selu", nn.SELU),
    on_vectors("celu", lambda: nn.CELU(alpha=0.5)),
    on_vectors("gelu", nn.GELU),
    on_images("gelu_tanh", lambda: nn.GELU(approximate="tanh")),
    on_vectors("sigmoid", nn.Sigmoid),
    on_images("silu", lambda: nn.SiLU(inplace=True)),
    on_images("mish", nn.Mish),
    on_vectors("softplus", lambda: nn.Softplus(beta=2.0, threshold=1.0)),
    on_vectors("softshrink", lambda: nn.Softshrink(0.1)),
    on_vectors("softsign", nn.Softsign),
    on_vectors("tanh", nn.Tanh),
    on_vectors("tanhshrink", nn.Tanhshrink),
    on_vectors("threshold", lambda: nn.Threshold(0.1, -0.5)),
    on_images("glu", lambda: nn.GLU(dim=1), out=WIDTH // 2),
    on_tokens("glu_last", nn.GLU, out=FEATURES // 2),
    on_vectors("softmin", lambda: nn.Softmin(dim=1)),
    on_tokens("softmax", lambda: nn.Softmax(dim=-1)),
    on_tokens("softmax_first", lambda: nn.Softmax(dim=1)),
    on_images("softmax_2d", nn.Softmax2d),
    on_vectors("log_softmax", lambda: nn.LogSoftmax(dim=-1)),
    on_tokens("multihead_attention", SelfAttention),
    on_tokens("multihead_attention_options", BiasedAttention, notes="a mask with -inf"),
    on_vectors("swish_learnt", Swish),
    on_images("frelu", FReLU),
    on_vectors("table_activation", SplineLikeActivation, notes="searchsorted"),
    function_on(on_vectors, "squared_relu", lambda x: torch.square(F.relu(x))),
    function_on(on_vectors, "snake", lambda x: x + torch.sin(x) ** 2),
    function_on(on_tokens, "geglu", lambda x: x[..., :8] * F.gelu(x[..., 8:]), out=FEATURES // 2),
    function_on(on_images, "crelu", lambda x: torch.cat([F.relu(x), F.relu(-x)], 1), out=2 * WIDTH),
)
