"""Blocks for `onnxruntime.training.artifacts`: the loss and the optimizers in the settings of ours.

Importing this needs onnxruntime-training.
"""

from __future__ import annotations

from typing import Any

from onnxruntime.training import onnxblock
from onnxruntime.training.onnxblock.optim.optim import AdamWOptimizer, ClipGradNorm

from frostline.exporter.optimizer import AdamW, Optimizer


class MeanLoss(onnxblock.Block):  # type: ignore[misc]
    """The part of the batch's mean cross-entropy that a micro-batch contributes.

    Gradients add up from one micro-batch to the next, so those of the batch are those of the parts' sum.
    """

    def __init__(self, micro_batches: int) -> None:
        super().__init__()
        self._cross_entropy = onnxblock.loss.CrossEntropyLoss()
        self._share = onnxblock.blocks.Constant(1 / micro_batches)
        self._multiply = onnxblock.blocks.Mul()
        self._micro_batches = micro_batches

    def build(self, logits: str, *others: str) -> str:
        """Add the loss of `logits`, the first of the model's outputs, and of an input `y`, int64."""
        loss: str = self._cross_entropy(logits, labels_name="y")
        return loss if self._micro_batches == 1 else self._multiply(loss, self._share())


class _TorchAdamW(AdamWOptimizer):  # type: ignore[misc]
    """Weight decay before the step, and epsilon after the bias correction, as in PyTorch."""

    def _build_optimizer_node(
        self, input_names: list[str], output_name: str, node_name: str, node_attributes: dict[str, Any]
    ) -> str:
        attributes = {**node_attributes, "adam_mode": 0}
        name: str = super()._build_optimizer_node(input_names, output_name, node_name, attributes)
        return name


def optimizer_block(settings: Optimizer) -> Any:
    """The block of an optimizer that `check_optimizer` has let through."""
    clip = ClipGradNorm(settings.clip_norm) if settings.clip_norm else None
    if not isinstance(settings, AdamW):
        return onnxblock.optim.SGD(clip)
    block = onnxblock.optim.AdamW(clip_grad=clip)
    betas = settings.beta1, settings.beta2
    block._adamw = _TorchAdamW(True, betas, settings.epsilon, settings.weight_decay)
    return block
