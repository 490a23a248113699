"""PyTorch's functions as a training graph of ONNX Runtime needs them: made of operators that it has gradients for.

Norms over batches and groups become one node each that stands in for them while gradients are built;
`frostline.exporter.onnxruntime_training_graph` then puts operators in its place.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.onnx import symbolic_helper
from torch.overrides import TorchFunctionMode

from frostline.exporter.rewrites.dropout import bernoulli
from frostline.protocol.errors import UsageError

OPSET = 17
"""The newest that the gradients of onnxruntime-training 1.19.2 cover for all operators; layer norm is one since."""

STAND_IN = "BatchNormInternal"
"""The operator that stands in for norms: the one that the runtime's own transformations make of batch norm."""


class TrainableFunctions:
    """Functions without gradients in ONNX Runtime, composed of others.

    Dropout is drawn as `frostline.exporter.dropout` draws it: a function of the seed and of the order of the draws.
    """

    def __init__(self, seed: Tensor) -> None:
        self._draws = 0
        self._seed = seed
        self._new: list[tuple[Tensor, Tensor]] = []

    @contextlib.contextmanager
    def replacing(self) -> Iterator[None]:
        """Within it, they take the place of PyTorch's.

        A mode hears what models and graphs call; PyTorch's own Python functions call each other by name, past any mode.
        """
        replaced = {**_REPLACED, **self._replaced()}
        by_name: dict[str, Any] = {
            each.__name__: new for each, new in replaced.items() if hasattr(F, each.__name__)
        }
        with mock.patch.multiple(F, **by_name), _Replacing(replaced):
            yield

    def new_statistics(self, buffer: Tensor) -> Tensor | None:
        """What a norm made of a buffer of running statistics, which itself stays as it is."""
        return next((new for old, new in reversed(self._new) if old is buffer), None)

    def _latest(self, buffer: Tensor) -> Tensor:
        new = self.new_statistics(buffer)
        return buffer if new is None else new

    def _replaced(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """The functions that drop, by what they replace."""
        values = (F.dropout, torch.dropout)
        channels = (F.dropout1d, F.dropout2d, F.dropout3d, torch.feature_dropout)
        refused = (F.alpha_dropout, F.feature_alpha_dropout, torch.alpha_dropout, torch.feature_alpha_dropout)
        return {
            **dict.fromkeys(values, self._drop_values),
            **dict.fromkeys(channels, self._drop_channels),
            **{each: functools.partial(_refuse, each.__name__) for each in refused},
            F.scaled_dot_product_attention: self._attend,
            F.batch_norm: self._batch_norm,
        }

    def _drop_values(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, **_: Any
    ) -> Tensor:
        """`torch.nn.functional.dropout`."""
        return self._dropped(x, tuple(x.shape), p) if training else x

    def _drop_channels(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, **_: Any
    ) -> Tensor:
        """`torch.nn.functional.dropout2d` and its like, for batches."""
        return self._dropped(x, (*x.shape[:2], *[1] * (x.dim() - 2)), p) if training else x

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`torch.nn.functional.scaled_dot_product_attention`, spelt out."""
        if enable_gqa:
            raise _unsupported("scaled_dot_product_attention with enable_gqa")
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = torch.matmul(query * factor, key.transpose(-2, -1))
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -math.inf)
            scores = scores + attn_mask
        weights = self._drop_values(torch.softmax(scores, -1), dropout_p)
        return torch.matmul(weights, value)

    def _dropped(self, x: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
        if p == 0:
            return x
        # A traced size is a tensor; the programs' shapes are fixed.
        kept = bernoulli([int(size) for size in shape], 1 - p, self._seed, self._draws)
        self._draws += 1
        return x * (kept * (1 / (1 - p) if p < 1 else 0.0))

    def _batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        scale, shift = _affine(x, weight, bias)
        if not training and running_mean is not None and running_var is not None:
            axes = (1, -1, *[1] * (x.dim() - 2))
            scale = scale / torch.sqrt(running_var + eps)
            return x * scale.reshape(axes) + (shift - running_mean * scale).reshape(axes)
        if running_mean is None or running_var is None:
            return cast(Tensor, _norm(x, scale, shift, scale, shift, 0, eps, 0.0)[0])
        # A layer that is called twice goes on from what the first call made of them.
        statistics = (self._latest(running_mean), self._latest(running_var))
        y, mean, variance = _norm(x, scale, shift, *statistics, 0, eps, momentum or 0.0)
        self._new += [(running_mean, mean), (running_var, variance)]
        return cast(Tensor, y)


class _Replacing(TorchFunctionMode):
    def __init__(self, replaced: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self._replaced = replaced
        self._by_name = {each.__name__: new for each, new in replaced.items()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if isinstance(func, OpOverload):
            # Parts of a cut model call operators where PyTorch's layers call functions.
            name = func._schema.name.partition("::")[2]
            replaced = self._by_name.get(name)
            if replaced is not None:
                return replaced(*_as_function(name, args), **(kwargs or {}))
        return self._replaced.get(func, func)(*args, **(kwargs or {}))


def _as_function(name: str, args: Sequence[Any]) -> Sequence[Any]:
    """An operator's arguments in the order of the function of the same name."""
    if name in ("batch_norm", "instance_norm"):
        x, weight, bias, mean, variance, *rest = args
        return x, mean, variance, weight, bias, *rest[:3]
    return args[:5] if name == "group_norm" else args


@torch.library.custom_op(
    "frostline::norm",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor variance, int groups, float epsilon, float momentum) "
        "-> (Tensor, Tensor, Tensor)"
    ),
)
def _norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    groups: int,
    epsilon: float,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`x` normalised over groups of channels, or over the batch without groups; the running statistics after it."""
    mean, variance = mean.clone(), variance.clone()
    if groups:
        size = (x.shape[0], x.shape[1], math.prod(x.shape[2:]))
        y = torch.native_group_norm(x, weight, bias, *size, groups, epsilon)[0]
    else:
        y = torch.native_batch_norm(x, weight, bias, mean, variance, True, momentum, epsilon)[0]
    return y, mean, variance


@symbolic_helper.parse_args("v", "v", "v", "v", "v", "i", "f", "f")
def _stand_in(
    graph: Any,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    groups: int,
    epsilon: float,
    momentum: float,
) -> tuple[Any, ...]:
    """The node a norm is exported as, with the settings that its expansion needs as attributes."""
    results = graph.op(
        f"com.microsoft::{STAND_IN}",
        *(x, weight, bias, mean, variance),
        outputs=5,
        epsilon_f=epsilon,
        momentum_f=momentum,
        groups_i=groups,
        shape_i=x.type().sizes(),
    )
    for result, like in zip(results, (x, mean, variance, mean, variance), strict=True):
        result.setType(like.type())
    return tuple(results[:3])


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    scale, shift = _affine(x, weight, bias)
    return cast(Tensor, _norm(x, scale, shift, scale, shift, num_groups, eps, 0.0)[0])


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_mean is not None or not use_input_stats:
        raise _unsupported("instance_norm with running statistics")
    return _group_norm(x, int(x.shape[1]), weight, bias, eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    channels = int(x.shape[1])
    scale = torch.ones(channels) if weight is None else weight
    return scale, torch.zeros(channels) if bias is None else bias


def _hardswish(x: Tensor, inplace: bool = False) -> Tensor:
    return x * (torch.clamp(x + 3, 0, 6) * (1 / 6))


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    return torch.clamp(x + 3, 0, 6) * (1 / 6)


def _hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    if min_val:
        return torch.clamp(x, min_val, max_val)
    # The gradient of a clip there is 1 at its ends, where PyTorch's is 0: a norm of few values ends exactly at zero.
    positive = F.relu(x)
    return positive - F.relu(positive - max_val)


def _relu6(x: Tensor, inplace: bool = False) -> Tensor:
    return _hardtanh(x, 0.0, 6.0)


def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    # The larger of x and 0, and what is left of the logarithm: neither overflows.
    scaled = x * beta
    return (F.relu(scaled) + torch.log(1 + torch.exp(-torch.abs(scaled)))) * (1 / beta)


def _mish(x: Tensor, inplace: bool = False) -> Tensor:
    return x * torch.tanh(_softplus(x))


def _silu(x: Tensor, inplace: bool = False) -> Tensor:
    return x * torch.sigmoid(x)


def _elu(x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    return F.relu(x) + (torch.exp(-F.relu(-x)) - 1) * alpha


def _celu(x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    return F.relu(x) + (torch.exp(-F.relu(-x) * (1 / alpha)) - 1) * alpha


def _selu(x: Tensor, inplace: bool = False) -> Tensor:
    # The constants of Klambauer et al., "Self-Normalizing Neural Networks", NeurIPS 2017.
    return _elu(x, 1.6732632423543772) * 1.0507009873554805


def _refuse(name: str, *_: Any, **__: Any) -> Tensor:
    raise _unsupported(name)


def _unsupported(what: str) -> UsageError:
    return UsageError(
        f"{what} cannot be trained by the engine 'onnxruntime-training': use engine 'onnxruntime'"
    )


_REPLACED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.hardtanh: _hardtanh,
    F.relu6: _relu6,
    F.hardswish: _hardswish,
    F.hardsigmoid: _hardsigmoid,
    F.softplus: _softplus,
    F.mish: _mish,
    F.elu: _elu,
    F.celu: _celu,
    F.selu: _selu,
    F.silu: _silu,
}

torch.onnx.register_custom_op_symbolic("frostline::norm", _stand_in, OPSET)  # type: ignore[attr-defined]
