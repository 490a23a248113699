"""A small vision transformer (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021) for 32×32 images.

Patches are small since the images are. The classifier reads the mean over tokens rather than a class token (Beyer et
al., "Better plain ViT baselines for ImageNet-1k", arXiv 2205.01580).
"""

from __future__ import annotations

import torch
from torch import nn

from frostline.exporter.models.layers import check_sizes
from frostline.exporter.models.transformer import TokenClassifier
from frostline.protocol.errors import UsageError


class VisionTransformer(TokenClassifier):
    """Patch embedding, then a `TokenClassifier` with one token a patch.

    Parameters
    ----------
    classes
        Logits per image.
    channels
        Channels of the input image.
    width, depth, heads
        As in `TokenClassifier`.
    patch
        Height and width of a patch in pixels; divides ``input_size``.
    input_size
        Height and width of the images in pixels.

    Raises
    ------
    UsageError
        A size is not a whole number of at least one, ``heads`` does not divide ``width``, or ``patch`` does not divide
        ``input_size``.
    """

    def __init__(
        self, classes: int, channels: int, width: int, depth: int, heads: int, patch: int, input_size: int
    ) -> None:
        check_sizes(channels=channels, patch=patch, input_size=input_size)
        if input_size % patch:
            raise UsageError(
                f"model option 'patch' is {patch}, which does not divide images of {input_size} pixels: "
                "give a divisor of the input size"
            )
        super().__init__(classes, (input_size // patch) ** 2, width, depth, heads)
        self.embedding = nn.Conv2d(channels, width, patch, patch)
        self.initialise()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (batch, classes) of float32 ``images`` (batch, channels, height, width)."""
        return self.classify(self.embedding(images).flatten(2).transpose(1, 2))


def vit(
    classes: int = 10,
    channels: int = 3,
    width: int = 128,
    depth: int = 6,
    heads: int = 4,
    patch: int = 4,
    input_size: int = 32,
) -> VisionTransformer:
    """Build the network; options as in `VisionTransformer`.

    Returns
    -------
    VisionTransformer
        Weights drawn from torch's global CPU generator.

    Raises
    ------
    UsageError
        A size is not a whole number of at least one, ``heads`` does not divide ``width``, or ``patch`` does not divide
        ``input_size``.
    """
    return VisionTransformer(classes, channels, width, depth, heads, patch, input_size)
