"""The final model: weights for PyTorch and a program for devices, giving the same answers."""

from __future__ import annotations

import torch
from torch import nn

from frostline.exporter.artifact import arrays
from frostline.exporter.executorch_lowering import lower_delegated
from frostline.protocol.blobs import write_atomically
from frostline.protocol.tensors import encode_tensors
from frostline.server.run_folder import RunFolder


def write_final_model(folder: RunFolder, model: nn.Module, example: torch.Tensor) -> None:
    """Write `model.safetensors`, the model's whole state_dict, and `model.pte`.

    The program takes a batch like `example` and returns logits (batch, classes); XNNPACK executes what it can.
    """
    write_atomically(folder.model_path, encode_tensors(arrays(model.state_dict())))
    lowered = lower_delegated(model.eval(), [example])
    write_atomically(folder.eval_program_path, lowered.content)
