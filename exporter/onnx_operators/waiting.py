"""The operator by which a value waits for another one."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("frostline::after", mutates_args=())
def after(value: Tensor, awaited: Tensor) -> Tensor:
    """`value`, once `awaited` is there."""
    return value.clone()


@after.register_fake
def _(value: Tensor, awaited: Tensor) -> Tensor:
    return torch.empty_like(value)


AFTER = torch.ops.frostline.after.default
