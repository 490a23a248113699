"""A transformer encoder that classifies short texts; by default over bytes, which need no tokenizer.

Token and position embeddings as in Vaswani et al., "Attention Is All You Need" (NeurIPS 2017), with learned positions;
bytes as tokens as in Xue et al., "ByT5: Towards a Token-Free Future with Pre-trained Byte-to-Byte Models" (TACL 2022).
"""

from __future__ import annotations

import torch
from torch import nn

from frostline.exporter.models.layers import check_sizes
from frostline.exporter.models.transformer import TokenClassifier


class TextTransformer(TokenClassifier):
    """Token embedding, then a `TokenClassifier`.

    Every token counts, so shorter texts are filled up with an id of their own, such as zero among bytes.

    Parameters
    ----------
    classes
        Logits per text.
    vocabulary
        Number of token ids.
    length
        Tokens in a text.
    width, depth, heads
        As in `TokenClassifier`.

    Raises
    ------
    UsageError
        A size is not a whole number of at least one, or ``heads`` does not divide ``width``.
    """

    def __init__(
        self, classes: int, vocabulary: int, length: int, width: int, depth: int, heads: int
    ) -> None:
        check_sizes(vocabulary=vocabulary, length=length)
        super().__init__(classes, length, width, depth, heads)
        self.embedding = nn.Embedding(vocabulary, width)
        self.initialise()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (batch, classes) of int64 ``ids`` (batch, length), each below ``vocabulary``."""
        return self.classify(self.embedding(ids))


def text_transformer(
    classes: int = 4,
    vocabulary: int = 256,
    length: int = 64,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
) -> TextTransformer:
    """Build the network; options as in `TextTransformer`.

    Returns
    -------
    TextTransformer
        Weights drawn from torch's global CPU generator.

    Raises
    ------
    UsageError
        A size is not a whole number of at least one, or ``heads`` does not divide ``width``.
    """
    return TextTransformer(classes, vocabulary, length, width, depth, heads)
