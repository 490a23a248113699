"""Floating-point operations of a stage's programs: what a device's time for a step is estimated from.

Counted are matrix products and convolutions, a multiply and an add as two, over the operators that eager PyTorch runs on
fake tensors: no value is computed, so a count takes a fraction of a second and leaves the module and the random numbers alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import (
    FlopCounterMode,
    conv_flop_count,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from frostline.exporter.dropout import SeededDropout
from frostline.exporter.inputs import zero_inputs
from frostline.exporter.modes import mode
from frostline.exporter.part import prepare_parts
from frostline.exporter.recomputation import RecomputingForward
from frostline.exporter.stage import Stage

aten = torch.ops.aten


def step_flops(stage: Stage, batch: int, *, recompute: bool = False) -> int:
    """Count the operations of one training step on `batch` samples: both passes, without the optimizer.

    Micro-batches change nothing of it. With `recompute`, what the backward pass computes again counts again.
    """
    tensors = {**dict(stage.model.named_parameters()), **dict(stage.model.named_buffers())}
    # It runs the block for an example of its features, so it stands outside of the count.
    recomputing = RecomputingForward(stage) if recompute else None
    if recomputing:
        recomputing.prepare(batch)
    with mode(stage.model, training=True):
        prepare_parts(stage.model, batch)
    with mode(stage.model, training=True), _counting() as (counter, fake):
        values = {name: fake(tensor.detach()) for name, tensor in tensors.items()}
        for name in stage.trained:
            values[name].requires_grad_()
        x = zero_inputs(batch, stage.input_shape, stage.vocabulary)
        with SeededDropout(torch.tensor(0.0)) as dropout:
            logits = (
                recomputing(values, x, dropout) if recomputing else functional_call(stage.model, values, (x,))
            )
            loss = F.cross_entropy(logits, torch.zeros(batch, dtype=torch.int64))
            # Not `autograd.grad`: the counter follows modules by their inputs, and a parametrization's are parameters.
            loss.backward()
    return counter.get_total_flops()


def forward_flops(module: nn.Module, x: Tensor) -> int:
    """Count the operations of a module's forward pass on a batch of the shape and dtype of `x`, in evaluation mode."""
    with mode(module, training=False), _counting() as (counter, fake):
        values = {name: fake(buffer) for name, buffer in module.named_buffers()}
        for name, parameter in module.named_parameters():
            # A gradient that somebody wants keeps PyTorch from fused layers, whose products cannot be seen.
            values[name] = fake(parameter.detach()).requires_grad_()
        functional_call(module, values, (fake(x),))
    return counter.get_total_flops()


@contextlib.contextmanager
def _counting() -> Iterator[tuple[FlopCounterMode, Callable[[Tensor], Tensor]]]:
    """Count the operators of fake tensors within it; gives the counter, and what makes a tensor fake."""
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with torch.enable_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fakes, counter:
        yield counter, fakes.from_tensor


def _convolution_backward(
    gradient: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    bias: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
    **rest: Any,
) -> int:
    """The gradients of input and kernel, as far as they are wanted, take what the forward pass takes each.

    PyTorch's own formula counts the kernel's gradient as if there were no groups.
    """
    return sum(wanted[:2]) * conv_flop_count(list(x), list(weight), list(gradient), transposed)


def _attention(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *rest: Any, **named: Any
) -> int:
    flops: int = sdpa_flop_count(query, key, value)
    return flops


def _attention_backward(
    gradient: Sequence[int],
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    *rest: Any,
    **named: Any,
) -> int:
    flops: int = sdpa_backward_flop_count(gradient, query, key, value)
    return flops


_FORMULAS: dict[Any, Any] = {
    aten.convolution_backward: _convolution_backward,
    # PyTorch counts attention on accelerators only.
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
