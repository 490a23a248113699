"""Keyword spotters over spectrograms (1, frames, bands) or (bands, frames)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import CLASSES, architecture

SPECTROGRAM = (1, 49, 10)
BANDS = 20
FRAMES = 40


class DSCNN(nn.Module):
    """Zhang et al.: one wide convolution over time and bands, then depthwise-separable ones."""

    def __init__(self, channels: int = 16, blocks: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, kernel_size=(10, 4), stride=(2, 2), padding=(5, 1), bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(p=0.2)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            self.blocks.append(
                nn.Sequential(
                    nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                    nn.Conv2d(channels, channels, 1, bias=False),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                )
            )
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.relu(self.bn1(self.conv1(x))))
        for block in self.blocks:
            x = block(x)
        x = F.avg_pool2d(x, kernel_size=(x.shape[2], x.shape[3]))
        x = self.dropout(x.view(x.size(0), -1))
        return self.fc(x)


def ds_cnn() -> nn.Module:
    return DSCNN()


class SubSpectralNorm(nn.Module):
    """Batch norm over each group of bands."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.bn = nn.BatchNorm2d(channels * groups)

    def forward(self, x: Tensor) -> Tensor:
        n, c, f, t = x.size()
        x = x.view(n, c * self.groups, f // self.groups, t)
        return self.bn(x).view(n, c, f, t)


class BroadcastedBlock(nn.Module):
    """Kim et al.: what is found in the mean over bands is added to every band."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.freq_dw_conv = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0), groups=channels, bias=False)
        self.ssn1 = SubSpectralNorm(channels, 2)
        self.temp_dw_conv = nn.Conv2d(
            channels,
            channels,
            (1, 3),
            padding=(0, dilation),
            dilation=(1, dilation),
            groups=channels,
            bias=False,
        )
        self.bn = nn.BatchNorm2d(channels)
        self.swish = nn.SiLU()
        self.channel_drop = nn.Dropout2d(p=0.1)
        self.conv1x1 = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        x = self.ssn1(self.freq_dw_conv(x))
        auxiliary = x
        x = torch.mean(x, dim=2, keepdim=True)
        x = self.swish(self.bn(self.temp_dw_conv(x)))
        x = self.channel_drop(self.conv1x1(x))
        return F.relu(x + identity + auxiliary)


def bc_resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=(2, 1), padding=2), nn.BatchNorm2d(8), nn.ReLU(),
        BroadcastedBlock(8, 1), BroadcastedBlock(8, 2), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(),
        nn.Linear(8, CLASSES),
    )  # fmt: skip


class TCBlock(nn.Module):
    """Choi et al.: the bands are channels, and kernels run along time alone."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, (9, 1), (stride, 1), (4, 0), bias=False)
        self.bn1 = nn.BatchNorm2d(o, affine=True)
        self.conv2 = nn.Conv2d(o, o, (9, 1), 1, (4, 0), bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.downsample = nn.Sequential()
        if stride != 1 or i != o:
            self.downsample = nn.Sequential(
                nn.Conv2d(i, o, 1, (stride, 1), bias=False), nn.BatchNorm2d(o), nn.ReLU()
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.downsample(x))


class TCResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(BANDS, 16, (3, 1), padding=(1, 0), bias=False)
        self.layers = nn.Sequential(TCBlock(16, 16, 1), TCBlock(16, 24, 2), TCBlock(24, 32, 2))
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-1)
        x = self.layers(self.conv(x))
        x = F.adaptive_avg_pool2d(x, 1).squeeze(3).squeeze(2)
        return self.linear(self.dropout(x))


def tc_resnet() -> nn.Module:
    return TCResNet()


class KeywordTransformer(nn.Module):
    """Berg et al.: each frame is a token; norms follow the additions."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.to_patch_embedding = nn.Linear(BANDS, dim)
        self.pos_embedding = nn.Parameter(torch.randn(1, FRAMES + 1, dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.dropout = nn.Dropout(0.1)
        self.layers = nn.ModuleList()
        for _ in range(2):
            self.layers.append(
                nn.ModuleList(
                    [
                        nn.MultiheadAttention(dim, 2, batch_first=True),
                        nn.LayerNorm(dim),
                        nn.Sequential(nn.Linear(dim, 48), nn.GELU(), nn.Dropout(0.1), nn.Linear(48, dim)),
                        nn.LayerNorm(dim),
                    ]
                )
            )
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.to_patch_embedding(x.permute(0, 2, 1))
        b, n, _ = x.shape
        cls_tokens = self.cls_token.repeat(b, 1, 1)
        x = torch.cat((cls_tokens, x), dim=1)
        x += self.pos_embedding[:, : (n + 1)]
        x = self.dropout(x)
        for attention, norm1, mlp, norm2 in self.layers:
            x = norm1(attention(x, x, x)[0] + x)
            x = norm2(mlp(x) + x)
        return self.mlp_head(x[:, 0])


def kwt() -> nn.Module:
    return KeywordTransformer()


class SeparableConv1d(nn.Sequential):
    def __init__(self, i: int, o: int, kernel: int, dilation: int = 1, last: bool = False) -> None:
        super().__init__(
            nn.Conv1d(
                i, i, kernel, padding=dilation * (kernel - 1) // 2, dilation=dilation, groups=i, bias=False
            ),
            nn.Conv1d(i, o, 1, bias=False),
            nn.BatchNorm1d(o, eps=1e-3, momentum=0.1),
        )
        if not last:
            self.append(nn.ReLU())
            self.append(nn.Dropout(0.1))


class MatchboxBlock(nn.Module):
    def __init__(self, i: int, o: int, kernel: int, repeats: int) -> None:
        super().__init__()
        layers = [
            SeparableConv1d(i if r == 0 else o, o, kernel, last=r == repeats - 1) for r in range(repeats)
        ]
        self.mconv = nn.Sequential(*layers)
        self.res = nn.Sequential(nn.Conv1d(i, o, 1, bias=False), nn.BatchNorm1d(o))
        self.mout = nn.Sequential(nn.ReLU(), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.mout(self.mconv(x) + self.res(x))


def matchboxnet() -> nn.Module:
    return nn.Sequential(
        SeparableConv1d(BANDS, 24, 11), MatchboxBlock(24, 16, 13, 2), MatchboxBlock(16, 16, 15, 1),
        SeparableConv1d(16, 24, 5, dilation=2), nn.Conv1d(24, CLASSES, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
    )  # fmt: skip


class CRNN(nn.Module):
    """Convolutions, a bidirectional GRU over the frames, and its last output."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 8, (5, 5), stride=(4, 2), padding=(2, 2)), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.gru = nn.GRU(8 * 5, hidden, num_layers=1, batch_first=True, bidirectional=True)
        self.classifier = nn.Sequential(nn.Linear(2 * hidden, 24), nn.ReLU(), nn.Linear(24, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        n, c, t, f = x.shape
        x = x.permute(0, 2, 1, 3).contiguous().view(n, t, c * f)
        _, h = self.gru(x)
        return self.classifier(torch.cat((h[-2], h[-1]), dim=-1))


def crnn() -> nn.Module:
    return CRNN()


class AttentionRNN(nn.Module):
    """De Andrade et al.: the output in the middle asks which frames matter."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(BANDS, 16, 5, stride=4, padding=2), nn.BatchNorm1d(16), nn.ReLU())
        self.rnn = nn.LSTM(16, hidden, batch_first=True, bidirectional=True)
        self.query = nn.Linear(2 * hidden, 2 * hidden)
        self.out = nn.Linear(2 * hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.rnn(self.conv(x).transpose(1, 2))
        query = self.query(x[:, x.size(1) // 2])
        weights = torch.softmax(torch.bmm(x, query.unsqueeze(2)).squeeze(2), dim=1)
        return self.out(torch.sum(x * weights[..., None], dim=1))


def attention_rnn() -> nn.Module:
    return AttentionRNN()


ENTRIES = (
    architecture(ds_cnn, SPECTROGRAM, blocks=3),
    architecture(bc_resnet, (1, 20, 20)),
    architecture(tc_resnet, (BANDS, FRAMES), blocks=3),
    architecture(kwt, (BANDS, FRAMES), blocks=2, notes="in-place addition of a sliced position table"),
    architecture(matchboxnet, (BANDS, FRAMES), blocks=3),
    architecture(crnn, SPECTROGRAM, notes="13 steps of a GRU in two directions"),
    architecture(attention_rnn, (BANDS, FRAMES)),
)
