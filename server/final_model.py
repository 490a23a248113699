"""The final model: weights for PyTorch and a program for devices, giving the same answers."""

from __future__ import annotations

import torch
from torch import nn

from frostline.exporter.artifact import arrays
from frostline.exporter.executorch_lowering import lower_delegated
from frostline.protocol.blobs import write_atomically
from frostline.protocol.errors import RunError
from frostline.protocol.tensors import encode_tensors
from frostline.server.run_folder import RunFolder


def write_final_model(folder: RunFolder, model: nn.Module, example: torch.Tensor) -> None:
    """Write `model.safetensors`, the model's whole state_dict, and `model.pte`.

    The program takes a batch like `example` and returns logits (batch, classes); XNNPACK executes what it can.

    Raises
    ------
    RunError
        If ExecuTorch cannot express the model; its weights are written then.
    """
    write_atomically(folder.model_path, encode_tensors(arrays(model.state_dict())))
    try:
        lowered = lower_delegated(model.eval(), [example])
    except Exception as error:  # The compiler raises anything, and the model was trained all the same.
        reason = str(error).strip().partition("\n")[0]
        raise RunError(f"ExecuTorch cannot express the model ({type(error).__name__}: {reason})") from error
    write_atomically(folder.eval_program_path, lowered.content)
