"""Models that want another target, another input or another output than one class for one tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.decoders import GPT, LENGTH, VOCABULARY, FlashAttention
from tests.zoo.entry import CLASSES, Entry, Refusal, architecture
from tests.zoo.multiscale import UNet
from tests.zoo.tables import AutoencoderClassifier


class NextToken(GPT):
    """Logits for every position."""

    def __init__(self) -> None:
        super().__init__(FlashAttention, layers=2)
        self.lm_head = nn.Linear(16, VOCABULARY, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.size(1)))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


def next_token_gpt() -> nn.Module:
    return NextToken()


class TiedHead(GPT):
    """The next token after the last, by the table that the tokens came from."""

    def __init__(self) -> None:
        super().__init__(FlashAttention, layers=2)
        self.lm_head = nn.Linear(16, VOCABULARY, bias=False)
        self.transformer.wte.weight = self.lm_head.weight


def tied_head_gpt() -> nn.Module:
    return TiedHead()


class Reconstruction(AutoencoderClassifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.reconstruct(x)


def autoencoder() -> nn.Module:
    return Reconstruction()


def segmentation_unet() -> nn.Module:
    return UNet(per_image=False)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.table = nn.Linear(5, 8)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, image: Tensor, metadata: Tensor) -> Tensor:
        return self.out(torch.cat([self.image(image), F.relu(self.table(metadata))], dim=1))


def image_and_metadata() -> nn.Module:
    return TwoInputs()


class Attributes(nn.Module):
    """Two logits for each of fourteen attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
        )
        self.out = nn.Linear(16, 14 * 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.features(x).mean((2, 3))).view(-1, 14, 2)


def multi_label() -> nn.Module:
    return Attributes()


class AuxiliaryHead(nn.Module):
    """A second head in training alone, as GoogLeNet has it."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.aux = nn.Linear(8, CLASSES)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        early = self.early(x)
        logits = self.out(self.late(early).mean((2, 3)))
        if self.training:
            return logits, self.aux(early.mean((2, 3)))
        return logits


def auxiliary_head() -> nn.Module:
    return AuxiliaryHead()


class Regression(nn.Module):
    """One number for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


def regression() -> nn.Module:
    return Regression()


def _other(*mentions: str) -> Refusal:
    return Refusal(mentions, gives="other")


ENTRIES = (
    architecture(next_token_gpt, (LENGTH,), vocabulary=VOCABULARY, expected=_other("12, 60")),
    Entry(
        name="tied_head_gpt",
        kind="architecture",
        build=tied_head_gpt,
        input_shape=(LENGTH,),
        classes=VOCABULARY,
        vocabulary=VOCABULARY,
        expected=Refusal(("transformer.wte.weight", "head")),
        notes="two blocks; the same table at both ends",
    ),
    Entry(
        name="tied_head_in_one_block",
        kind="architecture",
        build=tied_head_gpt,
        input_shape=(LENGTH,),
        classes=VOCABULARY,
        vocabulary=VOCABULARY,
        blocks=1,
        notes="one stage holds both ends",
    ),
    architecture(autoencoder, expected=_other("3, 32, 32"), frozen=("head",)),
    architecture(segmentation_unet, expected=_other("10, 32, 32")),
    architecture(image_and_metadata, expected=Refusal(("metadata",), gives="error")),
    architecture(multi_label, expected=_other("14, 2")),
    architecture(auxiliary_head, expected=_other("tuple"), notes="a tuple in training alone"),
    architecture(regression, (20,), expected=_other("logits")),
)
