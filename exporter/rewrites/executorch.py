"""The rewrite table of the ExecuTorch lowering: ATen operator to function over faster ATen operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from frostline.exporter.rewrites import convolution, linear, normalization, pooling

aten = torch.ops.aten

REWRITES: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    aten.addmm.default: linear.addmm,
    aten.convolution.default: convolution.convolution,
    aten.convolution_backward.default: convolution.convolution_backward,
    aten.native_group_norm.default: normalization.group_norm,
    aten.native_group_norm_backward.default: normalization.group_norm_backward,
    aten.max_pool2d_with_indices.default: pooling.max_pool2d,
    aten.max_pool2d_with_indices_backward.default: pooling.max_pool2d_backward,
    aten.native_batch_norm.default: normalization.batch_norm,
    aten._native_batch_norm_legit.default: normalization.batch_norm,
    aten.native_batch_norm_backward.default: normalization.batch_norm_backward,
}
