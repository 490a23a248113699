"""Tables of vectors, looked up in every way; ids (N, 10) below 40."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.frames import FEATURES, Lambda, on_ids, refused

IDS = 40


class Averaged(nn.Module):
    """The mean of a table's rows."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).mean(dim=1)


class WeightedBag(nn.Module):
    """Each id has a learnt weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(IDS, FEATURES, mode="sum")
        self.importance = nn.Embedding(IDS, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bag(ids, per_sample_weights=self.importance(ids).squeeze(-1).softmax(-1))


class BagWithOffsets(nn.Module):
    """One flat list of ids and where each bag of five begins."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(IDS, 8, mode="mean")

    def forward(self, ids: Tensor) -> Tensor:
        offsets = torch.arange(0, ids.numel(), 5, device=ids.device)
        return self.bag(ids.reshape(-1), offsets).view(ids.size(0), -1)


class HashTrick(nn.Module):
    """Quotient and remainder look up two small tables."""

    def __init__(self) -> None:
        super().__init__()
        self.quotient, self.remainder = nn.Embedding(5, FEATURES), nn.Embedding(8, FEATURES)

    def forward(self, ids: Tensor) -> Tensor:
        return (self.quotient(ids // 8) * self.remainder(torch.remainder(ids, 8))).sum(1)


class OneHotProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(IDS, FEATURES))

    def forward(self, ids: Tensor) -> Tensor:
        counts = F.one_hot(ids, num_classes=IDS).to(self.weight.dtype).sum(1)
        return torch.log1p(counts) @ self.weight


class FunctionalLookup(nn.Module):
    """Rows by F.embedding and by indexing; the table is scaled first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(IDS, FEATURES))

    def forward(self, ids: Tensor) -> Tensor:
        table = F.normalize(self.weight, dim=-1)
        return F.embedding(ids, table).mean(1) + self.weight[ids[:, 0]] + table.index_select(0, ids[:, 1])


class MaskedMean(nn.Module):
    """The mean over ids that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(IDS, FEATURES, padding_idx=0)

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids.ne(0).unsqueeze(-1)
        total = self.table(ids).masked_fill(~mask, 0.0).sum(1)
        return total / mask.sum(1).clamp(min=1)


class Fields(nn.Module):
    """One table for each column, and a column whose id is a number as well."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(IDS, 4) for _ in range(3))
        self.number = nn.Linear(1, 4)

    def forward(self, ids: Tensor) -> Tensor:
        columns = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        return torch.cat([*columns, self.number(ids[:, 3:4].float() / IDS)], dim=-1)


class Positions(nn.Module):
    """Learnt positions by a range that follows the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(IDS, FEATURES), nn.Embedding(32, FEATURES)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.size(1), device=ids.device).unsqueeze(0).expand_as(ids)
        return torch.tanh(self.tokens(ids) + self.positions(positions)).amax(1)


class PackedSequence(nn.Module):
    """Sequences of several lengths, packed for an LSTM: the lengths are values."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm = nn.Embedding(IDS, 8), nn.LSTM(8, FEATURES, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        lengths = (ids != 0).sum(1).clamp(min=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(
            self.table(ids), lengths, batch_first=True, enforce_sorted=False
        )
        return self.lstm(packed)[1][0][-1]


class LastByLength(nn.Module):
    """The LSTM's output at the last token that is no padding, by gather."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm = nn.Embedding(IDS, 8), nn.LSTM(8, FEATURES, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        out, _ = self.lstm(self.table(ids))
        last = ((ids != 0).sum(1) - 1).clamp(min=0)
        return out.gather(1, last.view(-1, 1, 1).expand(-1, 1, out.size(2))).squeeze(1)


def _table(**options: object) -> nn.Module:
    return Averaged(nn.Embedding(IDS, FEATURES, **options))  # type: ignore[arg-type]


def _pretrained() -> nn.Module:
    return nn.Sequential(
        Averaged(nn.Embedding.from_pretrained(torch.randn(IDS, FEATURES), freeze=True)),
        nn.Linear(FEATURES, FEATURES),
    )


ENTRIES = (
    on_ids("embedding", _table),
    on_ids("embedding_padding", lambda: _table(padding_idx=3)),
    on_ids("embedding_max_norm", lambda: _table(max_norm=1.0), expected=refused("max_norm")),
    on_ids("embedding_scaled_by_frequency", lambda: _table(scale_grad_by_freq=True)),
    on_ids("embedding_sparse", lambda: _table(sparse=True), notes="the gradient may well be dense"),
    on_ids("embedding_pretrained", _pretrained),
    on_ids("embedding_bag_sum", lambda: nn.EmbeddingBag(IDS, FEATURES, mode="sum")),
    on_ids("embedding_bag_mean", lambda: nn.EmbeddingBag(IDS, FEATURES)),
    on_ids("embedding_bag_max", lambda: nn.EmbeddingBag(IDS, FEATURES, mode="max")),
    on_ids("embedding_bag_padding", lambda: nn.EmbeddingBag(IDS, FEATURES, mode="mean", padding_idx=0)),
    on_ids("embedding_bag_sparse", lambda: nn.EmbeddingBag(IDS, FEATURES, sparse=True)),
    on_ids("embedding_bag_weighted", WeightedBag),
    on_ids("embedding_bag_offsets", BagWithOffsets),
    on_ids("embedding_hash_trick", HashTrick),
    on_ids("embedding_one_hot", OneHotProduct),
    on_ids("embedding_functional", FunctionalLookup),
    on_ids("embedding_masked_mean", MaskedMean),
    on_ids("embedding_fields", Fields),
    on_ids("embedding_positions", Positions),
    on_ids(
        "ids_as_numbers",
        lambda: nn.Sequential(Lambda(lambda ids: ids.float() / IDS), nn.Linear(10, FEATURES)),
    ),
    on_ids("lstm_packed", PackedSequence, expected=refused("depend on the values")),
    on_ids("lstm_last_by_length", LastByLength),
)
