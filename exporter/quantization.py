"""Frozen blocks in int8: weights by channel, activations by ranges found on a calibration sample.

Static quantisation by torchao's pt2e flow with the quantizer of ExecuTorch's XNNPACK backend. A block's input and output stay
float32; what XNNPACK has no int8 kernel for, such as norms, does so inside as well.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from frostline.exporter.executorch_lowering import quiet


def quantized(block: nn.Module, x: Tensor, calibration: Tensor) -> nn.Module:
    """The block in evaluation mode with its products in int8.

    Parameters
    ----------
    x : Tensor
        A batch (N, *input_shape); only its shape and dtype matter.
    calibration : Tensor
        Samples (M, *input_shape) that activations are measured on, any number above 0.
    """
    with quiet():
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        observed = prepare_pt2e(torch.export.export(block, (x,), strict=False).module(), quantizer)
        with torch.no_grad():
            for batch in in_batches(calibration, len(x)):
                observed(batch)
        converted: nn.Module = convert_pt2e(observed)
    return converted


def in_batches(samples: Tensor, size: int) -> list[Tensor]:
    """Batches of exactly `size`; the last one is filled up with the first samples again."""
    missing = -len(samples) % size
    rows = torch.arange(len(samples) + missing) % len(samples)
    return list(samples[rows].split(size))
