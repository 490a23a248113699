"""Networks over windows of readings: (channels, readings), or (readings, channels) where the paper has it so."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.zoo.entry import CLASSES, architecture

WINDOW = (6, 64)
READINGS = (16, 6)
"""Short, because a recurrent layer becomes one program of all its steps."""


class DeepConvLSTM(nn.Module):
    """Ordóñez & Roggen: convolutions along time for each sensor, then two LSTM layers."""

    def __init__(self, channels: int = 3, filters: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, filters, (5, 1))
        self.conv2 = nn.Conv2d(filters, filters, (5, 1))
        self.lstm1 = nn.LSTM(channels * filters, hidden)
        self.lstm2 = nn.LSTM(hidden, hidden)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = x.permute(2, 0, 3, 1)
        x = x.reshape(x.shape[0], x.shape[1], -1)
        x = self.dropout(x)
        x, _ = self.lstm1(x)
        x, _ = self.lstm2(x)
        return self.fc(x[-1, :, :])


def deep_conv_lstm() -> nn.Module:
    return DeepConvLSTM()


class LSTMClassifier(nn.Module):
    """Begins at states of zeros that it makes itself."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.hidden_size = hidden
        self.lstm = nn.LSTM(6, hidden, num_layers=2, batch_first=True, dropout=0.2)
        self.fc = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(2, x.size(0), self.hidden_size).to(x.device)
        c0 = torch.zeros(2, x.size(0), self.hidden_size).to(x.device)
        out, _ = self.lstm(x, (h0, c0))
        return self.fc(out[:, -1, :])


def lstm_classifier() -> nn.Module:
    return LSTMClassifier()


class GRUClassifier(nn.Module):
    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(6, 12), nn.ReLU())
        self.gru = nn.GRU(12, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        _, h_n = self.gru(self.proj(x))
        return self.fc(h_n.squeeze(0))


def gru_classifier() -> nn.Module:
    return GRUClassifier()


class BiLSTM(nn.Module):
    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, hidden, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm(2 * hidden)
        self.fc = nn.Linear(4 * hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.lstm(x)
        out = self.norm(out)
        return self.fc(torch.cat((out.mean(1), out.max(1).values), dim=1))


def bidirectional_lstm() -> nn.Module:
    return BiLSTM()


class CellLoop(nn.Module):
    """A Python loop over the readings."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.cell = nn.LSTMCell(12, hidden)
        self.hidden = hidden
        self.fc = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.size(0), self.hidden)
        c = torch.zeros_like(h)
        for t in range(x.size(1)):
            h, c = self.cell(torch.tanh(self.embed(x[:, t])), (h, c))
        return self.fc(h)


def lstm_cell_loop() -> nn.Module:
    return CellLoop()


def elman_rnn() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(6, 16, nonlinearity="relu", batch_first=True)
            self.fc = nn.Linear(16, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.rnn(x)[0][:, -1])

    return Net()


def cnn_1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(6, 16, 5, padding=2), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2), nn.Dropout(0.2),
        nn.Conv1d(16, 24, 5, padding=2), nn.BatchNorm1d(24), nn.ReLU(), nn.MaxPool1d(2), nn.Dropout(0.2),
        nn.Conv1d(24, 32, 3, padding=1), nn.BatchNorm1d(32), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


class ResidualBlock1d(nn.Module):
    """Wang et al.: kernels of 8, 5 and 3, padded to the same length."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(c, o, k, padding="same") for c, k in ((i, 8), (o, 5), (o, 3)))
        self.bns = nn.ModuleList(nn.BatchNorm1d(o) for _ in range(3))
        self.shortcut = nn.Sequential(nn.Conv1d(i, o, 1), nn.BatchNorm1d(o)) if i != o else nn.BatchNorm1d(o)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for n, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
            y = bn(conv(y))
            y = F.relu(y) if n < 2 else y
        return F.relu(y + self.shortcut(x))


def resnet_1d() -> nn.Module:
    return nn.Sequential(
        ResidualBlock1d(6, 16), ResidualBlock1d(16, 24), ResidualBlock1d(24, 24),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(24, CLASSES),
    )  # fmt: skip


class InceptionModule1d(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.bottleneck = nn.Conv1d(i, o, 1, bias=False)
        self.convs = nn.ModuleList(nn.Conv1d(o, o, k, padding=k // 2, bias=False) for k in (19, 9, 5))
        self.maxconvpool = nn.Sequential(nn.MaxPool1d(3, stride=1, padding=1), nn.Conv1d(i, o, 1, bias=False))
        self.bn = nn.BatchNorm1d(4 * o)

    def forward(self, x: Tensor) -> Tensor:
        b = self.bottleneck(x)
        return F.relu(self.bn(torch.cat([conv(b) for conv in self.convs] + [self.maxconvpool(x)], dim=1)))


class InceptionTime(nn.Module):
    def __init__(self, filters: int = 6) -> None:
        super().__init__()
        width = 4 * filters
        self.inception = nn.ModuleList(InceptionModule1d(6 if d == 0 else width, filters) for d in range(3))
        self.shortcut = nn.Sequential(nn.Conv1d(6, width, 1, bias=False), nn.BatchNorm1d(width))
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        res = x
        for module in self.inception:
            x = module(x)
        x = F.relu(x + self.shortcut(res))
        return self.fc(x.mean(-1))


def inception_time() -> nn.Module:
    return InceptionTime()


class TemporalBlock(nn.Module):
    """Bai et al.: causal by cutting off what was padded behind."""

    def __init__(self, i: int, o: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.chomp = (kernel_size - 1) * dilation
        self.conv1 = weight_norm(nn.Conv1d(i, o, kernel_size, padding=self.chomp, dilation=dilation))
        self.conv2 = weight_norm(nn.Conv1d(o, o, kernel_size, padding=self.chomp, dilation=dilation))
        self.dropout = nn.Dropout(0.2)
        self.downsample = nn.Conv1d(i, o, 1) if i != o else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(F.relu(self.conv1(x)[:, :, : -self.chomp].contiguous()))
        out = self.dropout(F.relu(self.conv2(out)[:, :, : -self.chomp].contiguous()))
        res = x if self.downsample is None else self.downsample(x)
        return F.relu(out + res)


class TCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tcn = nn.Sequential(*(TemporalBlock(6 if i == 0 else 16, 16, 3, 2**i) for i in range(3)))
        self.linear = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.tcn(x)[:, :, -1])


def tcn() -> nn.Module:
    return TCN()


class WaveNet(nn.Module):
    """Gated dilated convolutions; the logits come from the sum of all skips."""

    def __init__(self, residual: int = 12, skip: int = 16, layers: int = 4) -> None:
        super().__init__()
        self.start = nn.Conv1d(6, residual, 1)
        self.filters, self.gates = nn.ModuleList(), nn.ModuleList()
        self.residuals, self.skips = nn.ModuleList(), nn.ModuleList()
        for i in range(layers):
            self.filters.append(nn.Conv1d(residual, residual, 2, dilation=2**i))
            self.gates.append(nn.Conv1d(residual, residual, 2, dilation=2**i))
            self.residuals.append(nn.Conv1d(residual, residual, 1))
            self.skips.append(nn.Conv1d(residual, skip, 1))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(skip, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        total: Tensor | float = 0.0
        for i, (f, g, r, s) in enumerate(
            zip(self.filters, self.gates, self.residuals, self.skips, strict=True)
        ):
            padded = F.pad(x, (2**i, 0))
            z = torch.tanh(f(padded)) * torch.sigmoid(g(padded))
            total = total + s(z)
            x = x + r(z)
        return self.end(total).mean(dim=2)


def wavenet() -> nn.Module:
    return WaveNet()


class PositionalEncoding(nn.Module):
    """The table of sines, as every tutorial has it."""

    def __init__(self, d_model: int, dropout: float = 0.1, max_len: int = 100) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p=dropout)
        position = torch.arange(max_len).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        pe = torch.zeros(1, max_len, d_model)
        pe[0, :, 0::2] = torch.sin(position * div_term)
        pe[0, :, 1::2] = torch.cos(position * div_term)
        self.register_buffer("pe", pe)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pe[:, : x.size(1)]
        return self.dropout(x)


class HARTransformer(nn.Module):
    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.input_proj = nn.Sequential(
            nn.Conv1d(6, dim, 1), nn.GELU(), nn.Conv1d(dim, dim, 3, padding=1), nn.GELU()
        )
        self.position = PositionalEncoding(dim)
        layer = nn.TransformerEncoderLayer(dim, nhead=2, dim_feedforward=48, dropout=0.1, activation="gelu")
        self.transformer_encoder = nn.TransformerEncoder(layer, num_layers=2, norm=nn.LayerNorm(dim))
        self.imu_head = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, CLASSES)
        )

    def forward(self, src: Tensor) -> Tensor:
        src = self.input_proj(src.transpose(1, 2)).transpose(1, 2)
        src = self.position(src).permute(1, 0, 2)
        target = self.transformer_encoder(src)
        return self.imu_head(target.mean(0))


def har_transformer() -> nn.Module:
    return HARTransformer()


class HARLayers(nn.Module):
    """nn.TransformerEncoderLayer batch first, each layer called by name, norms first."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(6, dim)
        self.encoder = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(dim, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
                for _ in range(3)
            )
        )
        self.classify = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.encoder(self.embed(x))[:, -1])


def har_encoder_layers() -> nn.Module:
    return HARLayers()


class PatchTST(nn.Module):
    """Each channel is a series of patches of its own, normed by its own mean and deviation."""

    def __init__(self, channels: int = 6, patch: int = 8, dim: int = 16) -> None:
        super().__init__()
        self.patch = patch
        self.value = nn.Linear(patch, dim)
        self.position = nn.Parameter(torch.randn(1, 15, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(dim, 2, 32, batch_first=True, activation=F.gelu)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(channels * dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True).detach()
        std = torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5).detach()
        x = (x - mean) / std
        n, c, _ = x.shape
        x = x.unfold(-1, self.patch, self.patch // 2)
        x = self.encoder(self.value(x.reshape(n * c, -1, self.patch)) + self.position)
        return self.head(x.reshape(n, c, -1, x.size(-1)).mean(2).flatten(1))


def patch_tst() -> nn.Module:
    return PatchTST()


ENTRIES = (
    architecture(deep_conv_lstm, (16, 3), notes="time comes first in the LSTM"),
    architecture(lstm_classifier, READINGS, blocks=1),
    architecture(gru_classifier, READINGS, blocks=2),
    architecture(bidirectional_lstm, READINGS, blocks=1),
    architecture(
        lstm_cell_loop, (8, 6), blocks=1, notes="no module's output is the features of all readings"
    ),
    architecture(elman_rnn, READINGS, blocks=1),
    architecture(cnn_1d, WINDOW, blocks=3),
    architecture(resnet_1d, WINDOW, blocks=3),
    architecture(inception_time, WINDOW, notes="one shortcut over all modules"),
    architecture(tcn, WINDOW, blocks=3, notes="weight norm"),
    architecture(
        wavenet,
        WINDOW,
        frozen=("residuals.3",),
        notes="skips cross; nothing reads the last residual convolution",
    ),
    architecture(har_transformer, READINGS, blocks=2, notes="time comes first in the encoder"),
    architecture(har_encoder_layers, READINGS, blocks=("encoder.0", "encoder.1", "encoder.2")),
    architecture(patch_tst, WINDOW, blocks=1, notes="the encoder's batch is n x c: no place to cut"),
)
