from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from frostline.exporter.layout import Layout

KERNELS = {
    "1-D": (nn.Conv1d(3, 5, 2), (0, 2, 1)),
    "2-D": (nn.Conv2d(3, 5, (2, 4)), (0, 2, 3, 1)),
    "3-D": (nn.Conv3d(3, 5, (2, 3, 4)), (0, 2, 3, 4, 1)),
    "one input channel": (nn.Conv2d(1, 5, 3), (0, 2, 3, 1)),
    "one output channel": (nn.Conv2d(3, 1, 3), (0, 2, 3, 1)),
    "1x1": (nn.Conv2d(3, 5, 1), (0, 2, 3, 1)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (0, 2, 3, 1)),
    "single value": (nn.Conv2d(1, 1, 1), (0, 2, 3, 1)),
}


def _canonical_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(torch.Size(shape[axis + 1 :]).numel() for axis in range(len(shape)))


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.GroupNorm(2, 4)),
        nn.Linear(4, 3),
    )


def test_only_kernels_of_convolutions_are_held_in_another_order(model: nn.Module) -> None:
    layout = Layout.channels_last(model)
    kernels = ("0.weight", "2.weight", "3.0.weight")
    assert dict(layout.axes) == dict.fromkeys(kernels, (0, 2, 3, 1))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in layout.axes:
            assert torch.equal(layout.held(name, tensor), tensor)
            assert layout.held_view(name, tensor) is tensor
            assert layout.model(name, tensor) is tensor


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["plain", "turned"])
@pytest.mark.parametrize(("convolution", "axes"), KERNELS.values(), ids=KERNELS)
def test_kernels_are_held_with_channels_last_and_come_back(
    convolution: nn.Module, axes: tuple[int, ...], memory: torch.memory_format
) -> None:
    layout = Layout.channels_last(nn.Sequential(convolution))
    assert dict(layout.axes) == {"0.weight": axes}
    weight: Tensor = convolution.get_parameter("weight").detach()
    if weight.dim() == 4:
        weight = weight.contiguous(memory_format=memory)
    held = layout.held("0.weight", weight)
    assert held.shape == (weight.shape[0], *weight.shape[2:], weight.shape[1])
    assert held.stride() == _canonical_strides(held.shape)
    assert torch.equal(held, layout.held_view("0.weight", weight))
    assert torch.equal(held[0, ..., 0], weight[0, 0])
    back = layout.model("0.weight", held)
    assert torch.equal(back, weight)
    assert back.data_ptr() == held.data_ptr()


def test_held_tensors_are_copies_and_views_of_them_differentiable() -> None:
    convolution = nn.Conv2d(2, 3, 2)
    layout = Layout.channels_last(nn.Sequential(convolution))
    held = layout.held("0.weight", convolution.weight.detach())
    assert held.data_ptr() != convolution.weight.data_ptr()
    leaf = held.requires_grad_()
    layout.model("0.weight", leaf)[2, 1, 0, 1].backward()
    assert leaf.grad is not None
    assert leaf.grad.nonzero().tolist() == [[2, 0, 1, 1]]
