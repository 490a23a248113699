"""How modules are put together, and what comes out that cannot be trained as a classifier."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import Refusal
from tests.zoo.frames import CLASSES, FEATURES, WIDTH, Frame, Lambda, on_images, on_tokens, on_vectors, whole

VECTOR = (20,)


class ListOfLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(FEATURES, FEATURES) for _ in range(3)])
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(FEATURES)) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x) * self.scales[i]
            if i < len(self.layers) - 1:
                x = F.relu(x)
        return x


class DictOfLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({"left": nn.Linear(FEATURES, 8), "right": nn.Linear(FEATURES, 8)})
        self.gains = nn.ParameterDict(
            {"left": nn.Parameter(torch.ones(8)), "right": nn.Parameter(torch.ones(8))}
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.gains[name] * branch(x) for name, branch in self.branches.items()], dim=-1)


class ConvBlock(nn.Sequential):
    def __init__(self, channels: int) -> None:
        super().__init__(
            OrderedDict(
                conv=nn.Conv2d(channels, channels, 3, padding=1), norm=nn.BatchNorm2d(channels), act=nn.ReLU()
            )
        )

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) + input


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return F.relu(self.norm(self.conv(x)))


class SharedByName(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class TiedTransposed(nn.Module):
    """Encodes and decodes by the same matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(FEATURES, 8)
        self.bias = nn.Parameter(torch.zeros(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.encode(x)), self.encode.weight.t(), self.bias)


class NeverUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.spare = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 3)
        self.unused = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class UsedElsewhere(nn.Module):
    """A second head whose result is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.aux = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 2)

    def forward(self, x: Tensor, with_aux: bool = False) -> Tensor:
        out = self.linear(x)
        aux = self.aux(out)
        return torch.cat([out, aux], dim=-1) if with_aux else out


class KeywordArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)

    def _apply_scale(self, *args: Tensor, scale: float = 1.0, **options: Any) -> Tensor:
        return args[0] * scale if options.get("positive", True) else -args[0]

    def forward(
        self, x: Tensor, mask: Tensor | None = None, scale: float = 0.5, return_dict: bool | None = None
    ) -> Tensor:
        x = self._apply_scale(self.linear(x), scale=scale, positive=return_dict is None)
        return x if mask is None else x * mask


@dataclass
class Config:
    hidden_size: int = FEATURES
    hidden_act: str = "gelu"
    num_hidden_layers: int = 2


class Configured(nn.Module):
    """Layers by a configuration, functions by their names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList(
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.num_hidden_layers)
        )
        self.activation_fn = {"gelu": F.gelu, "relu": F.relu}[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        states: tuple[Tensor, ...] = (x,)
        for layer in self.layer:
            states = (*states, self.activation_fn(layer(states[-1])))
        return {"last": states[-1], "all": states}["last"]


class Defensive(nn.Module):
    """Checks, warnings and formats."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise ValueError(f"expected 2D input (got {x.dim()}D input)")
        torch._assert(x.shape[1] == FEATURES, "unexpected width")
        try:
            weight = self.linear.weight.to(device=x.device, dtype=x.dtype)
        except AttributeError:
            return x
        message = f"{type(self).__name__} got {tuple(x.shape)} of {x.dtype}"
        return F.linear(x, weight, self.linear.bias) if message else x


class Inner(nn.Module):
    """Tuples, dictionaries and None between its own parts, one tensor outside."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(FEATURES, FEATURES)

        def forward(
            self, states: dict[str, Tensor], cache: Tensor | None
        ) -> tuple[dict[str, Tensor], Tensor]:
            hidden = torch.tanh(self.linear(states["hidden"]))
            return {"hidden": hidden}, hidden if cache is None else cache + hidden

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Inner.Part(), Inner.Part()])

    def forward(self, x: Tensor) -> Tensor:
        states, cache = {"hidden": x}, None
        for part in self.parts:
            states, cache = part(states, cache)
        assert cache is not None
        return states["hidden"] + cache


class ZeroInitialized(nn.Module):
    """A branch whose last norm starts at zero: what is before it gets no gradient in the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH))
        nn.init.zeros_(self.branch[1].weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.branch(x))


class GeneratedWeights(nn.Module):
    """A small network makes the weights of a linear layer, for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Linear(FEATURES, FEATURES * 4 + 4)

    def forward(self, x: Tensor) -> Tensor:
        made = self.maker(x)
        weight, bias = made[:, : FEATURES * 4].view(-1, 4, FEATURES), made[:, FEATURES * 4 :]
        return torch.cat([x, torch.einsum("noi,ni->no", weight, x) + bias], dim=1)


class WeightAsProperty(nn.Module):
    """A weight that is low-rank and positive, made whenever it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(FEATURES, 3)), nn.Parameter(torch.randn(3, FEATURES))

    @property
    def weight(self) -> Tensor:
        return F.softplus(self.u @ self.v)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Residual3(nn.Module):
    """Skips over one and over two layers: several tensors are alive at every place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(FEATURES, FEATURES) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = F.relu(self.b(a)) + x
        return F.relu(self.c(b)) + a


class SubModuleMethod(nn.Module):
    """Calls a method of a child that is not its forward."""

    class Child(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(FEATURES, FEATURES)

        def encode(self, x: Tensor) -> Tensor:
            return self.linear(x)

    def __init__(self) -> None:
        super().__init__()
        self.child = SubModuleMethod.Child()

    def forward(self, x: Tensor) -> Tensor:
        return self.child.encode(x) + self.child.linear.forward(x)


def _mlp(out: int = CLASSES) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(20, FEATURES), nn.ReLU(), nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, out)
    )


def _shared_across() -> nn.Module:
    model = _mlp()
    model.add_module("4", nn.Linear(FEATURES, FEATURES))
    model.append(nn.Linear(FEATURES, CLASSES))
    model[4].weight = model[2].weight
    return model


class Returning(nn.Module):
    def __init__(self, as_dict: bool) -> None:
        super().__init__()
        self.net, self.as_dict = _mlp(), as_dict

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        logits = self.net(x)
        return {"logits": logits} if self.as_dict else (logits, x)


def _half_of(dtype: torch.dtype) -> nn.Module:
    model = _mlp()
    model[2].to(dtype)
    model.insert(2, Lambda(lambda x: x.to(dtype)))
    model.insert(4, Lambda(lambda x: x.float()))
    return model


def _frozen() -> nn.Module:
    return _mlp().requires_grad_(False)


class Probabilities(nn.Module):
    """Ends in a softmax, which a cross-entropy takes for logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _mlp()

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.net(x), dim=1)


class BrokenShapes(nn.Module):
    """The author miscounted the features of a flattened image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 11 * 11, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).flatten(1))


class Overflowing(nn.Module):
    """Divides by zero: no loss is finite."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) / (x[:, :1] - x[:, :1])


def _renormed() -> nn.Module:
    """A child called layer inside of a child called layer, and names that Python could not write."""
    inner = Frame(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, FEATURES))
    return nn.Sequential(
        OrderedDict([("layer", inner), ("0-1", nn.Linear(FEATURES, FEATURES)), ("class", nn.ReLU())])
    )


def _refuse(*mentions: str, gives: Any = "logits") -> Refusal:
    return Refusal(mentions, gives=gives)


ENTRIES = (
    on_vectors("module_list", ListOfLayers),
    on_vectors("module_dict", DictOfLayers),
    on_images("sequential_subclass", lambda: ConvBlock(WIDTH)),
    on_vectors("lambda_layers", lambda: Lambda(lambda x: torch.tanh(x) + x)),
    on_images("module_called_twice", CalledTwice, notes="its statistics move twice in a step"),
    on_vectors("module_under_two_names", SharedByName),
    on_vectors("weight_used_transposed", TiedTransposed),
    on_vectors("parameter_never_used", NeverUsed, frozen=("layer.spare", "layer.unused")),
    on_vectors("result_thrown_away", UsedElsewhere, frozen=("layer.aux",)),
    on_vectors("keyword_arguments", KeywordArguments),
    on_vectors("configured", lambda: Configured(Config())),
    on_vectors("checks_and_messages", Defensive),
    on_vectors("dictionaries_between_parts", Inner),
    on_images("zero_initialized", ZeroInitialized, notes="the convolution stays for one step"),
    on_vectors("generated_weights", GeneratedWeights, out=FEATURES + 4),
    on_vectors("weight_as_property", WeightAsProperty),
    on_vectors("crossing_skips", Residual3),
    on_vectors("method_of_a_child", SubModuleMethod),
    on_vectors("odd_names", _renormed),
    on_tokens(
        "data_parallel", lambda: nn.DataParallel(nn.Linear(FEATURES, FEATURES)), notes="does nothing on a CPU"
    ),
    whole("log_probabilities", Probabilities, VECTOR),
    whole("names_with_numbers", _mlp, VECTOR),
    whole("blocks_by_name", _mlp, VECTOR, blocks=("0", "2")),
    whole(
        "weight_shared_across_blocks",
        _shared_across,
        VECTOR,
        blocks=("2", "4"),
        expected=_refuse("2.weight", "4"),
    ),
    whole("returns_a_tuple", lambda: Returning(False), VECTOR, expected=_refuse("tuple", gives="other")),
    whole("returns_a_dict", lambda: Returning(True), VECTOR, expected=_refuse("dict", gives="other")),
    whole(
        "logits_of_another_width", lambda: _mlp(37), VECTOR, expected=_refuse("37", "classes", gives="other")
    ),
    whole("one_class", lambda: _mlp(1), VECTOR, classes=1, expected=_refuse("classes")),
    whole(
        "weights_of_float16", lambda: _half_of(torch.float16), VECTOR, expected=_refuse("3.weight", "float16")
    ),
    whole(
        "weights_of_bfloat16",
        lambda: _half_of(torch.bfloat16),
        VECTOR,
        expected=_refuse("3.weight", "bfloat16"),
    ),
    whole(
        "weights_of_float64", lambda: _half_of(torch.float64), VECTOR, expected=_refuse("3.weight", "float64")
    ),
    whole("nothing_to_train", _frozen, VECTOR, expected=_refuse("requires_grad")),
    whole("wrong_shape_inside", BrokenShapes, (3, 12, 12), expected=_refuse("'fc'", "484", gives="error")),
    whole("logits_not_finite", Overflowing, VECTOR, expected=_refuse("finite", gives="other")),
)
