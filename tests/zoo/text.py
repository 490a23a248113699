"""Classifiers over token ids: recurrent ones, bags, convolutions, encoders, and what is adapted to a task."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import CLASSES, architecture

VOCABULARY = 60
LENGTH = 12


class LSTMLanguageModel(nn.Module):
    """The next token after the last."""

    def __init__(self, dim: int = 16, hidden: int = 16) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.encoder = nn.Embedding(VOCABULARY, dim)
        self.rnn = nn.LSTM(dim, hidden, 2, dropout=0.2, batch_first=True)
        self.decoder = nn.Linear(hidden, CLASSES)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        emb = self.drop(self.encoder(tokens))
        output, _ = self.rnn(emb)
        return self.decoder(self.drop(output)[:, -1])


def lstm_language_model() -> nn.Module:
    return LSTMLanguageModel()


class FastText(nn.Module):
    """One vector for a text: the mean of its words."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(VOCABULARY, dim, mode="mean")
        self.fc = nn.Linear(dim, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.embedding(ids))


def fasttext() -> nn.Module:
    return FastText()


class TextCNN(nn.Module):
    """Kim: kernels of several widths, and the maximum over the sentence."""

    def __init__(self, dim: int = 16, filters: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, dim, padding_idx=0)
        self.convs = nn.ModuleList([nn.Conv2d(1, filters, (k, dim)) for k in (3, 4, 5)])
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(3 * filters, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).unsqueeze(1)
        xs = [F.relu(conv(x)).squeeze(3) for conv in self.convs]
        xs = [F.max_pool1d(i, i.size(2)).squeeze(2) for i in xs]
        return self.fc(self.dropout(torch.cat(xs, 1)))


def text_cnn() -> nn.Module:
    return TextCNN()


def char_cnn() -> nn.Module:
    """Characters one-hot, as Zhang et al. have them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Sequential(nn.Conv1d(VOCABULARY, 16, 7, padding=3), nn.ReLU(), nn.MaxPool1d(2))
            self.conv2 = nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2))
            self.fc = nn.Sequential(nn.Linear(48, 24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, CLASSES))

        def forward(self, ids: Tensor) -> Tensor:
            x = F.one_hot(ids, VOCABULARY).float().transpose(1, 2)
            return self.fc(self.conv2(self.conv1(x)).view(x.size(0), -1))

    return Net()


class MaskedEncoder(nn.Module):
    """nn.TransformerEncoder with a padding mask made of the ids; the mean over what is no padding."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, dim, padding_idx=0)
        self.position = nn.Parameter(torch.zeros(LENGTH, dim))
        layer = nn.TransformerEncoderLayer(dim, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.fc = nn.Linear(dim, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == 0
        x = self.embed(ids) * math.sqrt(self.embed.embedding_dim) + self.position
        x = self.encoder(x, src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1).float()
        return self.fc((x * kept).sum(1) / kept.sum(1).clamp(min=1.0))


def padded_encoder() -> nn.Module:
    return MaskedEncoder()


class BertSelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = heads, dim // heads
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(0.1)

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        x = x.view(*x.size()[:-1], self.num_attention_heads, self.attention_head_size)
        return x.permute(0, 2, 1, 3)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        query = self.transpose_for_scores(self.query(hidden_states))
        key = self.transpose_for_scores(self.key(hidden_states))
        value = self.transpose_for_scores(self.value(hidden_states))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(self.attention_head_size)
        if attention_mask is not None:
            scores = scores + attention_mask
        context = torch.matmul(self.dropout(nn.functional.softmax(scores, dim=-1)), value)
        context = context.permute(0, 2, 1, 3).contiguous()
        return context.view(*context.size()[:-2], -1)


class BertLayer(nn.Module):
    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.attention = BertSelfAttention(dim, heads)
        self.attention_output = nn.Linear(dim, dim)
        self.attention_norm = nn.LayerNorm(dim, eps=1e-12)
        self.intermediate, self.output = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.output_norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        attended = self.attention_output(self.attention(hidden_states, attention_mask))
        hidden_states = self.attention_norm(self.dropout(attended) + hidden_states)
        grown = F.gelu(self.intermediate(hidden_states))
        return self.output_norm(self.dropout(self.output(grown)) + hidden_states)


class BertClassifier(nn.Module):
    """Positions from a buffer, one type of token, the pooler's tanh; the mask is the lowest float32."""

    def __init__(self, dim: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, dim, padding_idx=0)
        self.position_embeddings = nn.Embedding(32, dim)
        self.token_type_embeddings = nn.Embedding(2, dim)
        self.register_buffer("position_ids", torch.arange(32).expand((1, -1)), persistent=False)
        self.embedding_norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(0.1)
        self.layer = nn.ModuleList([BertLayer(dim) for _ in range(layers)])
        self.pooler = nn.Sequential(nn.Linear(dim, dim), nn.Tanh())
        self.classifier = nn.Linear(dim, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        seq_length = input_ids.size(1)
        extended = (input_ids != 0)[:, None, None, :].to(dtype=self.classifier.weight.dtype)
        extended = (1.0 - extended) * torch.finfo(torch.float32).min
        hidden = self.word_embeddings(input_ids)
        hidden = hidden + self.token_type_embeddings(torch.zeros_like(input_ids))
        hidden += self.position_embeddings(self.position_ids[:, :seq_length])
        hidden = self.dropout(self.embedding_norm(hidden))
        for layer_module in self.layer:
            hidden = layer_module(hidden, extended)
        return self.classifier(self.dropout(self.pooler(hidden[:, 0])))


def bert_tiny() -> nn.Module:
    return BertClassifier()


class LoRALinear(nn.Module):
    """A frozen linear layer and the product of two small matrices beside it."""

    def __init__(self, base: nn.Linear, rank: int = 2, alpha: float = 4.0) -> None:
        super().__init__()
        self.base = base
        self.base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        self.lora_dropout = nn.Dropout(0.05)
        self.scaling = alpha / rank
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(self.lora_dropout(x))) * self.scaling


def lora_transformer() -> nn.Module:
    model = BertClassifier(layers=3)
    for parameter in model.parameters():
        parameter.requires_grad = False
    for layer in model.layer:
        for name in ("query", "value"):
            setattr(layer.attention, name, LoRALinear(getattr(layer.attention, name)))
    model.classifier.requires_grad_(True)
    return model


class Adapter(nn.Module):
    """Houlsby et al.: a bottleneck beside the identity."""

    def __init__(self, wrapped: nn.Module, dim: int, bottleneck: int = 4) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.down, self.up = nn.Linear(dim, bottleneck), nn.Linear(bottleneck, dim)

    def forward(self, *args: Tensor) -> Tensor:
        x = self.wrapped(*args)
        return x + self.up(F.relu(self.down(x)))


def adapter_transformer() -> nn.Module:
    """What trains are the adapters, the norms and the classifier."""
    model = BertClassifier()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for i, layer in enumerate(model.layer):
        model.layer[i] = Adapter(layer, 16)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)
    model.classifier.requires_grad_(True)
    return model


class T5Bias(nn.Module):
    """A bias for each bucket of relative positions: near ones by one, far ones by their logarithm."""

    def __init__(self, heads: int, buckets: int = 8, max_distance: int = 16) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(buckets, heads)
        self.buckets, self.max_distance = buckets, max_distance

    def forward(self, length: int) -> Tensor:
        position = torch.arange(length)[None, :] - torch.arange(length)[:, None]
        half = self.buckets // 2
        bucket = (position > 0).to(torch.long) * half
        distance = torch.abs(position)
        exact = half // 2
        large = exact + (
            torch.log(distance.float() / exact) / math.log(self.max_distance / exact) * (half - exact)
        ).to(torch.long)
        large = torch.min(large, torch.full_like(large, half - 1))
        bucket += torch.where(distance < exact, distance, large)
        return self.relative_attention_bias(bucket).permute(2, 0, 1).unsqueeze(0)


class T5Layer(nn.Module):
    """Root-mean-square norms, no biases, scores that are not scaled, and a gated GELU."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.o = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.wi_0, self.wi_1 = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.wo = nn.Linear(2 * dim, dim, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, position_bias: Tensor) -> Tensor:
        n, _t, c = x.shape
        q, k, v = (
            part.view(n, -1, self.heads, c // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(c, dim=2)
        )
        scores = torch.matmul(q, k.transpose(3, 2))
        scores += position_bias
        attended = torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)
        x = x + self.o(attended.transpose(1, 2).contiguous().view(n, -1, c))
        y = self.norm2(x)
        return x + self.wo(F.gelu(self.wi_0(y), approximate="tanh") * self.wi_1(y))


class T5Classifier(nn.Module):
    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.shared = nn.Embedding(VOCABULARY, dim)
        self.bias = T5Bias(heads)
        self.block = nn.ModuleList([T5Layer(dim, heads) for _ in range(2)])
        self.final_layer_norm = nn.RMSNorm(dim, eps=1e-6)
        self.out = nn.Linear(dim, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.shared(ids)
        position_bias = self.bias(ids.shape[1])
        for block in self.block:
            x = block(x, position_bias)
        return self.out(self.final_layer_norm(x).mean(1))


def t5_encoder() -> nn.Module:
    return T5Classifier()


class FNetLayer(nn.Module):
    """Mixes tokens by a cosine transform that is a matrix among the buffers, in place of attention."""

    def __init__(self, dim: int, length: int) -> None:
        super().__init__()
        steps = torch.arange(length, dtype=torch.float32)
        self.register_buffer(
            "transform", torch.cos(2 * math.pi * torch.outer(steps, steps) / length) / length**0.5
        )
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + torch.einsum("ts,nsc->ntc", self.transform, x))
        return self.norm2(x + self.ff(x))


def fourier_mixer() -> nn.Module:
    class Net(nn.Module):
        def __init__(self, dim: int = 16) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, dim)
            self.layers = nn.Sequential(FNetLayer(dim, LENGTH), FNetLayer(dim, LENGTH))
            self.head = nn.Linear(dim, CLASSES)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.layers(self.embed(ids)).amax(dim=1))

    return Net()


ENTRIES = (
    architecture(lstm_language_model, (LENGTH,), vocabulary=VOCABULARY, blocks=2),
    architecture(fasttext, (LENGTH,), vocabulary=VOCABULARY, blocks=1, notes="no features but the mean"),
    architecture(
        text_cnn, (LENGTH,), vocabulary=VOCABULARY, blocks=1, notes="three branches from the embedding"
    ),
    architecture(char_cnn, (LENGTH,), vocabulary=VOCABULARY, blocks=("conv1", "conv2")),
    architecture(
        padded_encoder,
        (LENGTH,),
        vocabulary=VOCABULARY,
        notes="the mask crosses every boundary; a sample of zeros alone gives NaN",
    ),
    architecture(bert_tiny, (LENGTH,), vocabulary=VOCABULARY, notes="the mask crosses every boundary"),
    architecture(
        lora_transformer,
        (LENGTH,),
        vocabulary=VOCABULARY,
        blocks=("layer.0", "layer.1", "layer.2"),
        notes="the base is frozen; lora_A gets a gradient of zero until lora_B has moved",
    ),
    architecture(
        adapter_transformer,
        (LENGTH,),
        vocabulary=VOCABULARY,
        notes="adapters, norms and classifier train",
    ),
    architecture(t5_encoder, (LENGTH,), vocabulary=VOCABULARY, notes="the bias crosses every boundary"),
    architecture(fourier_mixer, (LENGTH,), vocabulary=VOCABULARY),
)
