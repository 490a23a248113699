"""Optimizers written as pure functions, so that a step of one is just more of the traced graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum and weight decay, as `torch.optim.SGD` defines them.

    Attributes
    ----------
    momentum : float
        0 keeps no state at all.
    weight_decay : float
        L2 penalty added to the gradient.
    """

    momentum: float = 0.0
    weight_decay: float = 0.0

    def initial_state(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Zeroed momentum buffers, one a parameter, of its shape and dtype; none without momentum."""
        if not self.momentum:
            return {}
        return {f"momentum.{name}": torch.zeros_like(p) for name, p in parameters.items()}

    def update(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        learning_rate: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step: the new parameters and the new state. `learning_rate` is a scalar tensor."""
        new_parameters, new_state = {}, {}
        for name, parameter in parameters.items():
            direction = gradients[name]
            if self.weight_decay:
                direction = torch.add(direction, parameter, alpha=self.weight_decay)
            if self.momentum:
                # A zero buffer makes the first step equal to PyTorch's, which starts from the gradient itself.
                direction = torch.add(direction, state[f"momentum.{name}"], alpha=self.momentum)
                new_state[f"momentum.{name}"] = direction
            new_parameters[name] = parameter - direction * learning_rate
        return new_parameters, new_state
