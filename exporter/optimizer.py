"""Optimizers written as pure functions, so that a step of one is just more of the traced graph.

A step comes in two forms. In one piece, each parameter is updated as soon as its gradient is known. In micro-batches,
the gradients of the parts are first accumulated in the optimizer's state and the parameters are updated at the end; both
forms are the same mathematics.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from frostline.protocol.errors import UsageError

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """What every optimizer has.

    Attributes
    ----------
    weight_decay : float
        How strongly parameters are drawn to zero; each optimizer says in which form.
    proximal : float
        The factor μ of FedProx's term μ/2 ‖w - w₀‖², w₀ the values received (Li et al., "Federated Optimization in
        Heterogeneous Networks", MLSys 2020, arXiv 1812.06127, eq. 2); 0 leaves it out. Devices then hold w₀ as well.
    clip_norm : float
        The norm of all gradients together is scaled down to this where it is larger, as
        `torch.nn.utils.clip_grad_norm_` does; 0 leaves it out. All gradients are then held until the last is known.
    """

    weight_decay: float = 0.0
    proximal: float = 0.0
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        for name in ("weight_decay", "proximal", "clip_norm"):
            self._check(name, getattr(self, name) >= 0, "at least 0")

    @abstractmethod
    def initial_state(self, parameters: Tensors, *, accumulating: bool = False) -> dict[str, Tensor]:
        """The state before the first step, all zeros; with room for gradients if they are to be accumulated."""

    def accumulate(
        self, name: str, parameter: Tensor, gradient: Tensor, state: Tensors, first: Tensor, share: float
    ) -> tuple[str, Tensor]:
        """Add a micro-batch's part of a parameter's gradient to the state: which entry, and its new value.

        `first` is a scalar, 1 for the first micro-batch of a step and 0 for the others; `share` is the fraction of the
        batch that the micro-batch is, which `gradient` has been multiplied by.
        """
        entry = f"gradient.{name}"
        return entry, gradient + state[entry] * (1 - first)

    @abstractmethod
    def update(
        self, parameters: Tensors, gradients: Tensors, state: Tensors, learning_rate: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step for some of the parameters: their new values and the new state they changed."""

    @abstractmethod
    def finish(
        self, parameters: Tensors, state: Tensors, learning_rate: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The step for gradients that have been accumulated: all new parameters and the state that changed."""

    def penalized(
        self, gradient: Tensor, parameter: Tensor, received: Tensor | None, share: float = 1.0
    ) -> Tensor:
        """The gradient with the proximal term's, times `share`."""
        if received is None:
            return gradient
        return torch.add(gradient, parameter - received, alpha=self.proximal * share)

    def clipped(self, gradients: Tensors) -> dict[str, Tensor]:
        """The gradients, scaled down together where their norm is too large."""
        if not self.clip_norm:
            return dict(gradients)
        norm = torch.sqrt(_sum((g * g).sum() for g in gradients.values()))
        # The smaller of 1 and clip_norm / (norm + 1e-6).
        scale = self.clip_norm / (self.clip_norm + torch.relu(norm + (1e-6 - self.clip_norm)))
        return {name: g * scale for name, g in gradients.items()}

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        value = getattr(self, name)
        if not holds or not math.isfinite(value):
            raise UsageError(f"{type(self).__name__}: {name} is {value}; give {wanted}")


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent, as `torch.optim.SGD` defines it; `weight_decay` is added to the gradient.

    Attributes
    ----------
    momentum : float
        0 keeps no state at all.
    nesterov : bool
        Look ahead by one momentum step.
    """

    momentum: float = 0.0
    nesterov: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("momentum", 0 <= self.momentum <= 1, "0 to 1")
        if self.nesterov and not self.momentum:
            raise UsageError("SGD: nesterov looks ahead by the momentum, which is 0; set a momentum")

    @property
    def _accumulates_in_momentum(self) -> bool:
        # μ·m + (g₁ + … + gₖ) / k can be summed up in m itself, so that gradients take no memory of their own.
        # Clipping needs the sum alone, and so does Nesterov's step.
        return self.momentum > 0 and not (self.nesterov or self.clip_norm)

    def initial_state(self, parameters: Tensors, *, accumulating: bool = False) -> dict[str, Tensor]:
        """Momentum buffers, if there is momentum, of the parameters' shapes and dtypes."""
        state = {f"momentum.{name}": torch.zeros_like(p) for name, p in parameters.items() if self.momentum}
        if accumulating and not self._accumulates_in_momentum:
            state |= _gradient_buffers(parameters)
        return state

    def accumulate(
        self, name: str, parameter: Tensor, gradient: Tensor, state: Tensors, first: Tensor, share: float
    ) -> tuple[str, Tensor]:
        """Into the momentum where that is possible, else into a buffer of the gradient's own."""
        if not self._accumulates_in_momentum:
            return super().accumulate(name, parameter, gradient, state, first, share)
        if self.weight_decay:
            gradient = torch.add(gradient, parameter, alpha=self.weight_decay * share)
        entry = f"momentum.{name}"
        return entry, gradient + state[entry] * (1 - (1 - self.momentum) * first)

    def update(
        self, parameters: Tensors, gradients: Tensors, state: Tensors, learning_rate: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step. A momentum of zero makes the first equal to PyTorch's, which starts from the gradient itself."""
        new_parameters, new_state = {}, {}
        for name, parameter in parameters.items():
            direction = gradients[name]
            if self.weight_decay:
                direction = torch.add(direction, parameter, alpha=self.weight_decay)
            if self.momentum:
                entry = f"momentum.{name}"
                new_state[entry] = torch.add(direction, state[entry], alpha=self.momentum)
                if self.nesterov:
                    direction = torch.add(direction, new_state[entry], alpha=self.momentum)
                else:
                    direction = new_state[entry]
            new_parameters[name] = parameter - direction * learning_rate
        return new_parameters, new_state

    def finish(
        self, parameters: Tensors, state: Tensors, learning_rate: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The step along the accumulated momentum or gradients."""
        if not self._accumulates_in_momentum:
            return self.update(
                parameters, self.clipped(_accumulated(parameters, state)), state, learning_rate
            )
        return {n: p - state[f"momentum.{n}"] * learning_rate for n, p in parameters.items()}, {}


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay, as `torch.optim.AdamW` defines it.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, arXiv 1711.05101, algorithm 2.

    Attributes
    ----------
    beta1, beta2 : float
        How slowly the running means of the gradient and of its square change.
    epsilon : float
        Keeps the division by the root of the latter finite.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            self._check(name, 0 < getattr(self, name) < 1, "a number between 0 and 1")
        self._check("epsilon", self.epsilon > 0, "a number above 0")

    def initial_state(self, parameters: Tensors, *, accumulating: bool = False) -> dict[str, Tensor]:
        """Two running means a parameter, of its shape and dtype, and the number of steps, a scalar."""
        state: dict[str, Tensor] = {}
        for name, p in parameters.items():
            state |= {f"mean.{name}": torch.zeros_like(p), f"square.{name}": torch.zeros_like(p)}
        if accumulating:
            state |= _gradient_buffers(parameters)
        dtype = next(iter(parameters.values())).dtype
        return {**state, "steps": torch.zeros((), dtype=dtype)}

    def update(
        self, parameters: Tensors, gradients: Tensors, state: Tensors, learning_rate: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step."""
        steps = state["steps"] + 1
        # 1 - βᵗ: taken as a difference in float32 it would be off by 1e-4 at the first step.
        mean_bias = -torch.expm1(steps * math.log(self.beta1))
        square_bias = torch.sqrt(-torch.expm1(steps * math.log(self.beta2)))
        step_size = learning_rate / mean_bias
        keep = 1 - learning_rate * self.weight_decay
        new_parameters, new_state = {}, {"steps": steps}
        for name, parameter in parameters.items():
            gradient = gradients[name]
            mean = state[f"mean.{name}"] * self.beta1 + gradient * (1 - self.beta1)
            square = state[f"square.{name}"] * self.beta2 + gradient * gradient * (1 - self.beta2)
            direction = mean / (torch.sqrt(square) / square_bias + self.epsilon)
            new_parameters[name] = parameter * keep - direction * step_size
            new_state |= {f"mean.{name}": mean, f"square.{name}": square}
        return new_parameters, new_state

    def finish(
        self, parameters: Tensors, state: Tensors, learning_rate: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The step along the accumulated gradients."""
        return self.update(parameters, self.clipped(_accumulated(parameters, state)), state, learning_rate)


def build_optimizer(name: str, *, momentum: float, nesterov: bool, **settings: float) -> Optimizer:
    """The optimizer of a name, `sgd` or `adamw`; the first two settings are SGD's alone.

    Raises
    ------
    UsageError
        If there is none of that name, or a setting is out of range.
    """
    if name == "sgd":
        return SGD(momentum=momentum, nesterov=nesterov, **settings)
    if name == "adamw":
        return AdamW(**settings)
    raise UsageError(f"optimizer {name!r} is not known: use sgd or adamw")


def _gradient_buffers(parameters: Tensors) -> dict[str, Tensor]:
    return {f"gradient.{name}": torch.zeros_like(p) for name, p in parameters.items()}


def _accumulated(parameters: Tensors, state: Tensors) -> dict[str, Tensor]:
    return {name: state[f"gradient.{name}"] for name in parameters}


def _sum(values: Iterable[Tensor]) -> Tensor:
    total, *rest = values
    for value in rest:
        total = total + value
    return total
