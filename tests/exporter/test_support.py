from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frostline.exporter.artifact import ExportOptions, compile_prefix, compile_stage
from frostline.exporter.cutting import cut
from frostline.exporter.executorch_lowering import (
    NO_KERNEL,
    LoweredProgram,
    UnsupportedOperators,
    lower_portable,
    quiet,
    run_program,
)
from frostline.exporter.stage import Stage, build_stage
from frostline.exporter.support import check_model, explain
from frostline.protocol.errors import RunError, UsageError

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
OPTIONS = ExportOptions(batch=2, classes=2)
aten = torch.ops.aten


class Apply(nn.Module):
    """Calls a function of one tensor."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _model(function: Callable[[Tensor], Tensor]) -> nn.Sequential:
    inner = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Apply(function))
    return nn.Sequential(inner, nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def _stage(function: Callable[[Tensor], Tensor]) -> Stage:
    return build_stage(cut(_model(function), ["0", "1"], IMAGES), 0, seed=0)


def _refused(function: Callable[[Tensor], Tensor]) -> str:
    with pytest.raises(UsageError) as caught:
        cut(_model(function), ["0", "1"], IMAGES)
    message = str(caught.value)
    assert "\n" not in message
    return message


def _not_compiled(stage: Stage) -> str:
    with pytest.raises(RunError) as caught:
        compile_stage(stage, OPTIONS)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("stage '0' cannot be compiled: ")
    return message


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: x * (x[x > 0].mean()), "aten.index of shape [3, 4, 8, 8]"),
        (lambda x: x * x.nonzero().sum(), "aten.nonzero of shape [3, 4, 8, 8]"),
        (lambda x: x * x.masked_select(x > 0).mean(), "aten.masked_select of shape [3, 4, 8, 8]"),
        (lambda x: x * x.unique().sum(), "aten._unique2 of shape [3, 4, 8, 8]"),
        (lambda x: x if x.sum() > 0 else -x, "Tensor.item of shape []"),
        (lambda x: x[:, : int(x.abs().sum()) + 1], "Tensor.item of shape []"),
    ],
)
def test_what_depends_on_values_is_refused(function: Callable[[Tensor], Tensor], operator: str) -> None:
    message = _refused(function)
    assert f"{operator} in module '0.1' (test_support.py:" in message
    assert "makes what follows depend on the values" in message
    assert "torch.where" in message


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, torch.tensor([1, 0, 3, 2])],
        lambda x: torch.where(x > 0, x, -x),
        lambda x: x.masked_fill(x > 0, 0.0),
        lambda x: x if x.shape[2] > 4 else -x,
    ],
)
def test_what_keeps_its_shape_is_let_through(function: Callable[[Tensor], Tensor]) -> None:
    model = _model(function)
    modes = [child.training for child in model.eval().modules()]
    check_model(model, IMAGES)
    assert [child.training for child in model.modules()] == modes
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in model.modules())


def test_complex_activations_are_refused() -> None:
    message = _refused(lambda x: torch.fft.ifft2(torch.fft.fft2(x)).real)
    assert (
        "of shape [3, 4, 8, 8] in module '0.1' returns complex64: complex numbers cannot be trained"
        in message
    )


def test_complex_parameters_are_refused() -> None:
    model = _model(torch.relu)
    model.register_parameter("phase", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))
    with pytest.raises(UsageError, match="tensor 'phase' of model Sequential is complex64"):
        cut(model, ["0", "1"], IMAGES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_float_types_are_refused(dtype: torch.dtype) -> None:
    stage = _stage(torch.relu)
    stage.model.output_module.to(dtype)
    with pytest.raises(
        UsageError, match=r"tensor 'output_module\..+' is float(64|16): devices train float32"
    ):
        compile_stage(stage, OPTIONS)


def test_an_operator_without_a_kernel_is_named_with_its_shape_and_module() -> None:
    message = _not_compiled(_stage(torch.erfinv))
    assert (
        "aten.erfinv of shape [2, 4, 8, 8] in module '0.1' (test_support.py:37): ExecuTorch has no kernel for it"
        in message
    )


def test_a_gradient_without_a_kernel_is_named_with_its_shape_and_module() -> None:
    stage = _stage(lambda x: x + F.pdist(x.flatten(1)).sum())
    message = explain(UnsupportedOperators(["aten::_pdist_backward"], NO_KERNEL), stage.model, IMAGES)
    assert "aten._pdist_backward of shape [1] in module '0.1'" in message
    assert "computing its gradient: ExecuTorch has no kernel for it" in message


def test_an_operator_that_only_the_frozen_prefix_lacks() -> None:
    with pytest.raises(
        RunError,
        match=r"cannot be compiled: aten\.erfinv of shape .* in module '0\.1' \(test_support\.py:37\): ",
    ):
        compile_prefix(_stage(torch.erfinv), batch=2)


def test_a_failure_that_names_no_operator_points_at_a_suspect() -> None:
    stage = _stage(lambda x: torch.linalg.inv(x + torch.eye(8)))
    message = explain(RuntimeError("cannot go on\nand more"), stage.model, IMAGES)
    assert (
        message
        == "aten.linalg_inv_ex of shape [2, 4, 8, 8] in module '0.1' (test_support.py:37): cannot go on"
    )
    ordinary = _stage(torch.relu)
    assert explain(RuntimeError("cannot go on"), ordinary.model, IMAGES) == "cannot go on"


def test_a_shape_that_training_alone_makes_depend_on_values() -> None:
    class Sometimes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x[x > 0].mean() if self.training else x

    model = _model(torch.relu)
    model.get_submodule("0").add_module("2", Sometimes())
    with pytest.raises(
        UsageError,
        match=r"aten.index of shape \[3, 4, 8, 8\] in module '0.2' \(test_support.py:\d+\) makes what",
    ):
        cut(model, ["0", "1"], IMAGES)


def test_all_modules_with_the_operator_are_listed() -> None:
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(4, 4), Apply(torch.erfinv)) for _ in range(2)), nn.Linear(4, 2)
    )
    error = UnsupportedOperators(["aten::as_strided", "aten::erfinv"], "no kernel")
    assert explain(error, model, torch.zeros(2, 4)) == (
        "aten.erfinv of shape [2, 4] in module '0.1' (or in '1.1'): no kernel; use another layer there"
    )
    error = UnsupportedOperators(["aten::lgamma"], "no kernel")
    assert explain(error, model, torch.zeros(2, 4)) == "aten.lgamma: no kernel; use another layer there"


def test_what_the_runtime_refuses_is_told_in_its_words() -> None:
    class TransposedConvolutionBackward(nn.Module):
        def forward(self, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            stride, padding, dilation, extra = [2, 2], [0, 0], [1, 1], [0, 0]
            mask = [True, True, False]
            found = aten.convolution_backward(
                grad, x, weight, None, stride, padding, dilation, True, extra, 1, mask
            )
            return found[0], found[1]

    arguments = [torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 4, 4), torch.zeros(4, 4, 2, 2)]
    lowered: LoweredProgram = lower_portable(TransposedConvolutionBackward(), arguments)
    with quiet():
        from executorch.extension.pybindings._portable_lib import _load_for_executorch_from_buffer

        module = _load_for_executorch_from_buffer(lowered.content)
        with pytest.raises(UnsupportedOperators) as caught:
            run_program(module, arguments)
    assert caught.value.operators == ("aten.convolution_backward",)
    assert "Transposed Convolution Backward not supported yet" in caught.value.reason
