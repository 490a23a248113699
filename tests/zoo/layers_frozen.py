"""What authors keep from training, and what they do to gradients."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.zoo.entry import Refusal
from tests.zoo.frames import CLASSES, FEATURES, WIDTH, on_images, on_vectors, refused, whole

IMAGE = (3, 12, 12)


def _conv_bn(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


def _head() -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, CLASSES))


class Transfer(nn.Module):
    """A backbone, a neck and a head; how the backbone is kept is up to the heirs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _conv_bn(3, WIDTH)
        self.neck = nn.Sequential(_conv_bn(WIDTH, WIDTH), _conv_bn(WIDTH, WIDTH))
        self.head = _head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.backbone(x)))


class FrozenBatchNorms(Transfer):
    """The recipe of fine-tuning: batch norms stay in evaluation mode, and their weights with them."""

    def __init__(self) -> None:
        super().__init__()
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.requires_grad = False
                module.bias.requires_grad = False

    def train(self, mode: bool = True) -> FrozenBatchNorms:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class FrozenBackboneStatistics(Transfer):
    """Only the backbone's statistics stay; its weights train."""

    def train(self, mode: bool = True) -> FrozenBackboneStatistics:
        super().train(mode)
        self.backbone.eval()
        return self


class EvalInForward(Transfer):
    def forward(self, x: Tensor) -> Tensor:
        self.backbone.eval()
        return super().forward(x)


class NoGradBackbone(Transfer):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(self.neck(x))


class DecoratedBackbone(Transfer):
    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.features(x)))


class GradByArgument(Transfer):
    def __init__(self, finetune: bool) -> None:
        super().__init__()
        self.finetune = finetune

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.finetune and self.training):
            x = self.backbone(x)
        return self.head(self.neck(x))


class DetachedBackbone(Transfer):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.backbone(x).detach()))


class DetachedBranch(Transfer):
    """The gradient of one of two paths is stopped."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x)
        return self.head(self.neck(x) * torch.sigmoid(x.detach()))


def _left_in_eval() -> nn.Module:
    model = Transfer()
    model.backbone.eval()
    return model


def _parameters_frozen() -> nn.Module:
    model = Transfer()
    for parameter in model.backbone.parameters():
        parameter.requires_grad = False
    return model


class FrozenBatchNorm2d(nn.Module):
    """Detection's: everything is a buffer."""

    def __init__(self, n: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.1), ("running_var", 0.9)):
            self.register_buffer(name, torch.full((n,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


class FrozenWeight(nn.Module):
    """One of its two parameters is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(FEATURES), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class MeanTeacher(nn.Module):
    """Keeps a copy of its layer that an outside loop would average; it takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(FEATURES, FEATURES)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)


class Autocast(nn.Module):
    def __init__(self, device: str, enabled: bool = True) -> None:
        super().__init__()
        self.device, self.enabled = device, enabled
        self.linear = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.enabled):
            x = self.linear(x)
        return x.float()


def _hooked() -> nn.Module:
    linear = nn.Linear(FEATURES, FEATURES)
    linear.register_forward_hook(lambda module, args, output: output * 2 + args[0])
    return linear


def _recording() -> nn.Module:
    linear = nn.Linear(FEATURES, FEATURES)
    seen: dict[str, Tensor] = {}

    def record(module: nn.Module, args: Any, output: Tensor) -> None:
        seen["features"] = output.detach()

    linear.register_forward_hook(record)
    return linear


def _pre_hooked() -> nn.Module:
    linear = nn.Linear(FEATURES, FEATURES)
    linear.register_forward_pre_hook(lambda module, args: (args[0].clamp(-1, 1),))
    return linear


def _backward_hooked() -> nn.Module:
    linear = nn.Linear(FEATURES, FEATURES)
    linear.register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0] * 0.1,))
    return linear


def _gradient_hooked() -> nn.Module:
    linear = nn.Linear(FEATURES, FEATURES)
    linear.weight.register_hook(lambda grad: grad * torch.eye(FEATURES))
    return linear


class ScaledGradient(nn.Module):
    """A hook on an activation."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        if x.requires_grad:
            x.register_hook(lambda grad: grad * 0.5)
        return x


class Reverse(torch.autograd.Function):
    """Turns the gradient around, as domain-adversarial networks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].neg() * ctx.alpha, None


class StraightThroughSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() <= 1).float()


class GradientReversal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Reverse.apply(x, 0.3)


class BinaryLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(StraightThroughSign.apply(x), StraightThroughSign.apply(self.weight), self.bias)


class RoundedLinear(nn.Linear):
    """Weights of eight bits, and a gradient that passes through."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().max() / 127
        quantized = (self.weight / scale).round().clamp(-128, 127) * scale
        return F.linear(x, self.weight + (quantized - self.weight).detach(), self.bias)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


def _symmetric() -> nn.Module:
    linear = nn.Linear(FEATURES, FEATURES)
    parametrize.register_parametrization(linear, "weight", Symmetric())
    return linear


class Checkpointed(nn.Module):
    def __init__(self, sequential: bool) -> None:
        super().__init__()
        convs = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))
        self.layers = nn.Sequential(
            *(nn.Sequential(conv, nn.GroupNorm(2, WIDTH), nn.SiLU()) for conv in convs)
        )
        self.sequential = sequential

    def forward(self, x: Tensor) -> Tensor:
        if self.sequential:
            return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)
        return checkpoint(self.layers, x, use_reentrant=False) if self.training else self.layers(x)


_BACKBONE = ("backbone.0", "backbone.1.weight", "backbone.1.bias")

ENTRIES = (
    whole("parameters_frozen", _parameters_frozen, IMAGE, notes="statistics of the frozen layer move on"),
    whole("batch_norms_in_eval", FrozenBatchNorms, IMAGE, frozen=("backbone.1", "neck.0.1", "neck.1.1")),
    whole("statistics_in_eval", FrozenBackboneStatistics, IMAGE, frozen=("backbone.1.running",)),
    whole("eval_in_forward", EvalInForward, IMAGE, frozen=("backbone.1.running",)),
    whole(
        "left_in_eval",
        _left_in_eval,
        IMAGE,
        frozen=("backbone.1.running",),
        notes="the backbone comes in evaluation mode, the model in training mode; model.train() would wake it",
    ),
    whole("model_in_eval", lambda: Transfer().eval(), IMAGE, notes="comes in evaluation mode altogether"),
    whole("no_grad_backbone", NoGradBackbone, IMAGE, frozen=_BACKBONE, notes="its statistics move"),
    whole("no_grad_decorator", DecoratedBackbone, IMAGE, frozen=_BACKBONE),
    whole("set_grad_enabled", lambda: GradByArgument(False), IMAGE, frozen=_BACKBONE),
    whole("set_grad_enabled_in_training", lambda: GradByArgument(True), IMAGE),
    whole("detached_backbone", DetachedBackbone, IMAGE, frozen=_BACKBONE),
    whole("detached_branch", DetachedBranch, IMAGE),
    on_images("frozen_batch_norm_of_buffers", lambda: FrozenBatchNorm2d(WIDTH), frozen=("layer.running",)),
    on_vectors("one_frozen_weight", FrozenWeight),
    on_vectors("mean_teacher", MeanTeacher),
    on_vectors("autocast", lambda: Autocast("cpu"), expected=refused("bfloat16")),
    on_vectors("autocast_disabled", lambda: Autocast("cpu", enabled=False)),
    on_vectors(
        "autocast_elsewhere", lambda: Autocast("cuda"), notes="does nothing on a CPU, which only warns"
    ),
    on_vectors("forward_hook", _hooked),
    on_vectors("forward_hook_that_records", _recording),
    on_vectors("forward_pre_hook", _pre_hooked),
    on_vectors("backward_hook", _backward_hooked, expected=refused("hook"), notes="scales gradients"),
    on_vectors(
        "gradient_hook",
        _gradient_hooked,
        expected=Refusal(("layer.weight", "hook")),
        notes="masks a weight's gradient",
    ),
    on_vectors("activation_hook", ScaledGradient, expected=refused("hook"), notes="halves the gradient"),
    on_vectors(
        "gradient_reversal",
        GradientReversal,
        expected=refused("autograd.Function"),
        notes="a backward of its own",
    ),
    on_vectors(
        "binary_linear",
        lambda: BinaryLinear(FEATURES, FEATURES),
        expected=refused("autograd.Function"),
        notes="straight-through, two Functions",
    ),
    on_vectors("rounded_linear", lambda: RoundedLinear(FEATURES, FEATURES)),
    on_vectors("parametrization", _symmetric),
    on_vectors("pruned", lambda: prune.l1_unstructured(nn.Linear(FEATURES, FEATURES), "weight", 0.5)),
    on_images("checkpoint", lambda: Checkpointed(False)),
    on_images("checkpoint_sequential", lambda: Checkpointed(True)),
)
