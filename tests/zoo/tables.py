"""Networks over feature vectors, fields of ids, sets and point clouds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import CLASSES, architecture

FEATURES = (20,)
FIELDS = 6
ROWS = 50
"""Ids of every field are below this bound, as one matrix of ids has one bound."""


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def mlp_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm1d(20), nn.Linear(20, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(32, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, CLASSES),
    )  # fmt: skip


def self_normalizing() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(20, 32), nn.SELU(), nn.AlphaDropout(0.1), nn.Linear(32, 32), nn.SELU(), nn.AlphaDropout(0.1),
        nn.Linear(32, CLASSES),
    )  # fmt: skip
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    return model


class ResidualMLP(nn.Module):
    """Gorishniy et al.'s ResNet for tables."""

    class Block(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.normalization = nn.BatchNorm1d(dim)
            self.linear0, self.linear1 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

        def forward(self, x: Tensor) -> Tensor:
            z = F.relu(self.linear0(self.normalization(x)))
            z = F.dropout(z, 0.2, self.training)
            return x + self.linear1(z)

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.first_layer = nn.Linear(20, dim)
        self.layers = nn.ModuleList(ResidualMLP.Block(dim) for _ in range(3))
        self.last_normalization = nn.BatchNorm1d(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_layer(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(F.relu(self.last_normalization(x)))


def residual_mlp() -> nn.Module:
    return ResidualMLP()


class Highway(nn.Module):
    def __init__(self, size: int, num_layers: int) -> None:
        super().__init__()
        self.nonlinear = nn.ModuleList([nn.Linear(size, size) for _ in range(num_layers)])
        self.linear = nn.ModuleList([nn.Linear(size, size) for _ in range(num_layers)])
        self.gate = nn.ModuleList([nn.Linear(size, size) for _ in range(num_layers)])

    def forward(self, x: Tensor) -> Tensor:
        for nonlinear, linear, gate in zip(self.nonlinear, self.linear, self.gate, strict=True):
            g = torch.sigmoid(gate(x))
            x = g * F.relu(nonlinear(x)) + (1 - g) * linear(x)
        return x


def highway() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 16), Highway(16, 2), nn.Linear(16, CLASSES))


class Maxout(nn.Module):
    def __init__(self, i: int, o: int, pieces: int = 3) -> None:
        super().__init__()
        self.lin = nn.Linear(i, o * pieces)
        self.o, self.pieces = o, pieces

    def forward(self, x: Tensor) -> Tensor:
        m, _ = self.lin(x).view(*x.shape[:-1], self.o, self.pieces).max(-1)
        return m


def maxout() -> nn.Module:
    return nn.Sequential(Maxout(20, 24), nn.Dropout(0.2), Maxout(24, 16), nn.Linear(16, CLASSES))


class SplineLayer(nn.Module):
    """A sum of radial functions on each edge, as Kolmogorov-Arnold networks have, beside a SiLU."""

    def __init__(self, i: int, o: int, grid: int = 5) -> None:
        super().__init__()
        self.register_buffer("grid", torch.linspace(-2.0, 2.0, grid))
        self.base = nn.Linear(i, o)
        self.spline_weight = nn.Parameter(torch.randn(o, i, grid) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        basis = torch.exp(-((x[..., None] - self.grid) ** 2))
        return self.base(F.silu(x)) + torch.einsum("big,oig->bo", basis, self.spline_weight)


def kan() -> nn.Module:
    return nn.Sequential(SplineLayer(20, 12), SplineLayer(12, 12), nn.Linear(12, CLASSES))


class FourierFeatures(nn.Module):
    def __init__(self, i: int, o: int, scale: float = 0.5) -> None:
        super().__init__()
        self.register_buffer("B", torch.randn(i, o) * scale)

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * torch.pi * x @ self.B
        return torch.cat([torch.sin(x), torch.cos(x)], dim=-1)


def fourier_features() -> nn.Module:
    return nn.Sequential(
        FourierFeatures(20, 16),
        nn.Linear(32, 24),
        nn.ReLU(),
        nn.Linear(24, 24),
        nn.ReLU(),
        nn.Linear(24, CLASSES),
    )


class DLRM(nn.Module):
    """A bag of three ids for each field, the products of all pairs of fields, and a perceptron."""

    def __init__(self, dim: int = 8, bag: int = 3) -> None:
        super().__init__()
        self.bag = bag
        self.emb_l = nn.ModuleList(nn.EmbeddingBag(ROWS, dim, mode="sum") for _ in range(FIELDS))
        li, lj = zip(*((i, j) for i in range(FIELDS) for j in range(i)), strict=True)
        self.register_buffer("li", torch.tensor(li))
        self.register_buffer("lj", torch.tensor(lj))
        self.bot_l = nn.Sequential(nn.Linear(FIELDS * dim, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.top_l = nn.Sequential(nn.Linear(16 + len(li), 24), nn.ReLU(), nn.Linear(24, CLASSES))

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids.view(-1, FIELDS, self.bag)
        ly = torch.stack([emb(ids[:, k]) for k, emb in enumerate(self.emb_l)], dim=1)
        pairs = torch.bmm(ly, ly.transpose(1, 2))[:, self.li, self.lj]
        return self.top_l(torch.cat([self.bot_l(ly.flatten(1)), pairs], dim=1))


def dlrm() -> nn.Module:
    return DLRM()


class NeuMF(nn.Module):
    """He et al.: the product of two vectors beside a perceptron over two others; (user, item) ids."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.user_mf, self.item_mf = nn.Embedding(ROWS, dim), nn.Embedding(ROWS, dim)
        self.user_mlp, self.item_mlp = nn.Embedding(ROWS, dim), nn.Embedding(ROWS, dim)
        self.mlp = nn.Sequential(
            nn.Linear(2 * dim, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 8), nn.ReLU()
        )
        self.predict = nn.Linear(dim + 8, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        user, item = ids[:, 0], ids[:, 1]
        mf = self.user_mf(user) * self.item_mf(item)
        mlp = self.mlp(torch.cat([self.user_mlp(user), self.item_mlp(item)], dim=-1))
        return self.predict(torch.cat([mf, mlp], dim=-1))


def neural_collaborative_filtering() -> nn.Module:
    return NeuMF()


class TwoTower(nn.Module):
    """Vectors of length one; the class is the nearest of ten learnt items."""

    def __init__(self, dim: int = 12) -> None:
        super().__init__()
        self.history = nn.EmbeddingBag(ROWS, dim, mode="mean", padding_idx=0)
        self.query_tower = nn.Sequential(nn.Linear(dim, 24), nn.ReLU(), nn.Linear(24, dim))
        self.items = nn.Parameter(torch.randn(CLASSES, dim))
        self.item_tower = nn.Linear(dim, dim)
        self.log_temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, ids: Tensor) -> Tensor:
        query = F.normalize(self.query_tower(self.history(ids)), dim=-1)
        items = F.normalize(self.item_tower(self.items), dim=-1)
        return query @ items.T * self.log_temperature.exp()


def two_tower() -> nn.Module:
    return TwoTower()


class WideAndDeep(nn.Module):
    """All fields share one table, each at its own offset."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.arange(FIELDS) * ROWS)
        self.wide = nn.Embedding(FIELDS * ROWS, CLASSES)
        self.embedding = nn.Embedding(FIELDS * ROWS, dim)
        self.deep = nn.Sequential(
            nn.Linear(FIELDS * dim, 24),
            nn.BatchNorm1d(24),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(24, CLASSES),
        )
        self.bias = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.offsets.unsqueeze(0)
        return self.wide(x).sum(dim=1) + self.bias + self.deep(self.embedding(x).view(-1, FIELDS * 8))


def wide_and_deep() -> nn.Module:
    return WideAndDeep()


class FactorizationMachine(nn.Module):
    """Pairs of fields by the square of the sum less the sum of the squares."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(FIELDS * ROWS, dim)
        self.register_buffer("offsets", torch.arange(FIELDS) * ROWS, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        e = self.embedding(x + self.offsets)
        return self.mlp(0.5 * (e.sum(1).pow(2) - e.pow(2).sum(1)))


def factorization_machine() -> nn.Module:
    return FactorizationMachine()


class FTTransformer(nn.Module):
    """Each number becomes a token of its own; a class token reads them."""

    def __init__(self, dim: int = 12) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(20, dim).uniform_(-0.3, 0.3))
        self.bias = nn.Parameter(torch.empty(20, dim).uniform_(-0.3, 0.3))
        self.cls = nn.Parameter(torch.zeros(dim))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    dim, 2, 24, 0.1, activation="relu", batch_first=True, norm_first=True
                )
                for _ in range(2)
            )
        )
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.weight[None] * x[..., None] + self.bias[None]
        tokens = torch.cat([self.cls.expand(len(x), 1, -1), tokens], dim=1)
        return self.head(self.blocks(tokens)[:, 0])


def ft_transformer() -> nn.Module:
    return FTTransformer()


class AutoencoderClassifier(nn.Module):
    """The classes are read from what a decoder would rebuild the image of; the decoder stays in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1), nn.ReLU(),
            nn.ConvTranspose2d(8, 3, 3, stride=2, padding=1, output_padding=1), nn.Sigmoid(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16 * 8 * 8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def autoencoder_classifier() -> nn.Module:
    return AutoencoderClassifier()


class PointNet(nn.Module):
    """Points (N, points, 3): the same perceptron for each, and the maximum over all, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 24, 1), nn.Conv1d(48, 32, 1)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm1d(16), nn.BatchNorm1d(24), nn.BatchNorm1d(32)
        self.fc1, self.fc2 = nn.Linear(32, 16), nn.Linear(16, CLASSES)
        self.bn4, self.dropout = nn.BatchNorm1d(16), nn.Dropout(p=0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        everywhere = torch.max(x, 2, keepdim=True)[0].repeat(1, 1, x.shape[2])
        x = self.bn3(self.conv3(torch.cat([x, everywhere], 1)))
        x = torch.max(x, 2, keepdim=True)[0].view(-1, 32)
        return self.fc2(self.dropout(F.relu(self.bn4(self.fc1(x)))))


def pointnet() -> nn.Module:
    return PointNet()


def deep_sets() -> nn.Module:
    class DeepSets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.phi = nn.Sequential(nn.Linear(4, 16), nn.ELU(), nn.Linear(16, 16), nn.ELU())
            self.rho = nn.Sequential(nn.Linear(16, 16), nn.ELU(), nn.Linear(16, CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            return self.rho(self.phi(x).sum(dim=-2))

    return DeepSets()


class Siamese(nn.Module):
    """Both images come in one tensor, six channels; the same trunk sees each."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.out = nn.Linear(16, CLASSES)

    def forward_once(self, x: Tensor) -> Tensor:
        return self.trunk(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return self.out(torch.abs(self.forward_once(first) - self.forward_once(second)))


def siamese() -> nn.Module:
    return Siamese()


class MixtureOfExperts(nn.Module):
    """Every expert runs; the gate's two largest weights count."""

    def __init__(self, experts: int = 3, dim: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(20, dim)
        self.gate = nn.Linear(dim, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 24), nn.GELU(), nn.Linear(24, dim)) for _ in range(experts)
        )
        self.out = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        scores = self.gate(x)
        top, index = scores.topk(2, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, index, top.softmax(-1))
        y = torch.stack([expert(x) for expert in self.experts], dim=1)
        return self.out(x + (weights.unsqueeze(-1) * y).sum(1))


def mixture_of_experts() -> nn.Module:
    return MixtureOfExperts()


class GraphNetwork(nn.Module):
    """Two graph convolutions over sensors whose neighbours are known: the matrix is a buffer."""

    def __init__(self, nodes: int = 8, dim: int = 16) -> None:
        super().__init__()
        ring = torch.eye(nodes) + torch.eye(nodes).roll(1, 0) + torch.eye(nodes).roll(-1, 0)
        degree = ring.sum(1).pow(-0.5)
        self.register_buffer("adjacency", degree[:, None] * ring * degree[None, :])
        self.gc1, self.gc2 = nn.Linear(5, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.adjacency @ self.gc1(x))
        x = F.dropout(x, 0.2, training=self.training)
        x = F.relu(self.adjacency @ self.gc2(x))
        return self.out(x.mean(1))


def graph_convolution() -> nn.Module:
    return GraphNetwork()


ENTRIES = (
    architecture(mlp, FEATURES),
    architecture(mlp_batch_norm, FEATURES),
    architecture(self_normalizing, FEATURES),
    architecture(residual_mlp, FEATURES, blocks=3),
    architecture(highway, FEATURES),
    architecture(maxout, FEATURES),
    architecture(kan, FEATURES),
    architecture(fourier_features, FEATURES),
    architecture(dlrm, (FIELDS * 3,), vocabulary=ROWS, blocks=1),
    architecture(neural_collaborative_filtering, (2,), vocabulary=ROWS, blocks=1),
    architecture(
        two_tower, (8,), vocabulary=ROWS, blocks=1, notes="ten items are parameters; padding in the bags"
    ),
    architecture(wide_and_deep, (FIELDS,), vocabulary=ROWS, blocks=1),
    architecture(factorization_machine, (FIELDS,), vocabulary=ROWS, blocks=1),
    architecture(ft_transformer, FEATURES),
    architecture(autoencoder_classifier, frozen=("decoder",), notes="forward leaves the decoder out"),
    architecture(pointnet, (24, 3)),
    architecture(deep_sets, (10, 4)),
    architecture(siamese, (6, 32, 32), blocks=1, notes="the trunk runs twice"),
    architecture(mixture_of_experts, FEATURES, blocks=1, notes="topk and scatter"),
    architecture(graph_convolution, (8, 5)),
)
