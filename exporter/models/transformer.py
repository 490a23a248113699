"""The transformer encoder that the vision and the text model share.

Vaswani et al., "Attention Is All You Need" (NeurIPS 2017), with the normalisation ahead of each sublayer (Xiong et al.,
"On Layer Normalization in the Transformer Architecture", ICML 2020), which trains without a warm-up, and GELU (Hendrycks
& Gimpel, arXiv 1606.08415). There is no dropout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from frostline.exporter.models.layers import check_sizes
from frostline.protocol.errors import UsageError

EXPANSION = 4
"""How many times as wide the hidden layer of the perceptron is as the tokens."""

INITIAL_DEVIATION = 0.02
"""Standard deviation of initial weights, as in BERT (Devlin et al., NAACL 2019) and ViT."""


class SelfAttention(nn.Module):
    """Multi-head self-attention over all tokens, without a mask (section 3.2 of Vaswani et al.).

    Parameters
    ----------
    width
        Features of a token; ``heads`` divides it.
    heads
        Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return float tokens (batch, tokens, width) of ``tokens`` of the same shape."""
        query, key, value = self.query_key_value(tokens).split(self.output.in_features, dim=-1)
        attended = F.scaled_dot_product_attention(
            self._by_head(query), self._by_head(key), self._by_head(value)
        )
        mixed: torch.Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return mixed

    def _by_head(self, tokens: torch.Tensor) -> torch.Tensor:
        by_head: torch.Tensor = tokens.unflatten(-1, (self.heads, -1))
        return by_head.transpose(1, 2)


class TransformerLayer(nn.Module):
    """Self-attention and a perceptron with GELU, each behind a layer norm and with a skip connection.

    Parameters
    ----------
    width
        Features of a token; ``heads`` divides it.
    heads
        Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, EXPANSION * width), nn.GELU(), nn.Linear(EXPANSION * width, width)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return float tokens (batch, tokens, width) of ``tokens`` of the same shape."""
        tokens = tokens + self.attention(self.norm1(tokens))
        transformed: torch.Tensor = tokens + self.perceptron(self.norm2(tokens))
        return transformed


class TokenClassifier(nn.Module):
    """Learned positions, transformer layers named ``layer1`` on, a last norm, the mean over tokens and a classifier.

    Subclasses add the embedding in front.

    Parameters
    ----------
    classes
        Logits per sample.
    length
        Tokens in a sample.
    width
        Features of a token.
    depth
        Transformer layers.
    heads
        Attention heads.

    Raises
    ------
    UsageError
        A size is not a whole number of at least one, or ``heads`` does not divide ``width``.
    """

    def __init__(self, classes: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        check_sizes(classes=classes, width=width, depth=depth, heads=heads)
        if width % heads:
            raise UsageError(
                f"model option 'heads' is {heads}, which does not divide a width of {width}: "
                "give each head a whole number of features"
            )
        self.position = nn.Parameter(torch.empty(1, length, width))
        self.layers = layer_names(depth)
        for name in self.layers:
            self.add_module(name, TransformerLayer(width, heads))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def classify(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (batch, classes) of embedded float32 ``tokens`` (batch, length, width)."""
        tokens = tokens + self.position
        for name in self.layers:
            tokens = self.get_submodule(name)(tokens)
        logits: torch.Tensor = self.fc(self.norm(tokens).mean(1))
        return logits

    def initialise(self) -> None:
        """Draw linear layers, embeddings and positions from a truncated normal distribution, in place.

        Biases begin at zero. Uses torch's global CPU generator.
        """
        nn.init.trunc_normal_(self.position, std=INITIAL_DEVIATION)
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(layer.weight, std=INITIAL_DEVIATION)
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)


def layer_names(depth: int) -> tuple[str, ...]:
    """Return the names of the ``depth`` transformer layers of a `TokenClassifier`."""
    return tuple(f"layer{index + 1}" for index in range(depth))
