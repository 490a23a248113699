"""Which operators are taken apart before a graph is lowered to ExecuTorch: by PyTorch's decompositions, or our own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._decomp import core_aten_decompositions, decomposition_table
from torch._ops import OpOverload

from frostline.exporter.decompositions.table import DECOMPOSITIONS
from frostline.exporter.executorch_lowering import kernel_names

aten = torch.ops.aten

_INTO_ATEN = "torch._decomp.decompositions"
_REFERENCES = (
    aten.linalg_vector_norm.default,
    aten.tril_indices.default,
    aten.triu_indices.default,
)


@cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """Those into core ATen, and those of operators that the runtime has no kernel for, our own last."""
    known = {name.partition(".")[0] for name in kernel_names()}
    without_kernel = {
        operator: function
        for operator, function in decomposition_table.items()
        # Most others, of `torch._refs`, end in operators of their own.
        if (function.__module__ == _INTO_ATEN or operator in _REFERENCES)
        and isinstance(operator, OpOverload)
        and not operator._schema.is_mutable
        and not {operator._schema.name, f"{operator._schema.name}_copy"} & known
    }
    ours = {
        operator: function
        for operator, function in DECOMPOSITIONS.items()
        if not {operator._schema.name, f"{operator._schema.name}_copy"} & known
    }
    return {**ours, **without_kernel, **core_aten_decompositions()}
