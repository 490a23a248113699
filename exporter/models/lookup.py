"""Finds a model by the name a configuration gives it: a built-in one or a user's ``package.module:factory``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from frostline.exporter.inputs import zero_inputs
from frostline.exporter.models.cnn import SMALL_CNN_BLOCKS, small_cnn
from frostline.exporter.models.mobilenet import MOBILENET_BLOCKS, mobilenet_v2
from frostline.exporter.models.resnet import RESNET_BLOCKS, resnet10, resnet18, resnet34
from frostline.exporter.models.sensor import SENSOR_BLOCKS, sensor_cnn
from frostline.exporter.models.text import text_transformer
from frostline.exporter.models.transformer import layer_names
from frostline.exporter.models.vgg import VGG_BLOCKS, vgg11, vgg16
from frostline.exporter.models.vit import vit
from frostline.protocol.errors import UsageError


@dataclass(frozen=True)
class ModelSpec:
    r"""A model with what is known about it before it is traced.

    Attributes
    ----------
    name
        The name it was asked for by.
    module
        The model: one input tensor (batch, \*input_shape), one output tensor of logits (batch, classes).
    input_shape
        Shape of one sample.
    classes
        Logits per sample.
    default_blocks
        Children to cut the model after when the configuration names none; ``None`` for a user's model.
    vocabulary
        Where the input is token ids, int64, how many there are; ``None`` where it is float32.
    """

    name: str
    module: nn.Module
    input_shape: tuple[int, ...]
    classes: int
    default_blocks: tuple[str, ...] | None
    vocabulary: int | None = None

    def example(self, batch: int) -> torch.Tensor:
        r"""Return an input (batch, \*input_shape) of zeros, in the dtype the model takes."""
        return zero_inputs(batch, self.input_shape, self.vocabulary)


@dataclass(frozen=True)
class _Input:
    """What a built-in model takes: its name in errors, and the option that sets each axis of a sample."""

    noun: str
    axes: tuple[str, ...]


_IMAGES = _Input("square images", ("channels", "input_size", "input_size"))
_SERIES = _Input("series", ("channels", "length"))
_TOKENS = _Input("token ids", ("length",))


@dataclass(frozen=True)
class _Builtin:
    """A factory, the blocks to cut after (or what names them, given the depth) and the input."""

    factory: Callable[..., nn.Module]
    blocks: tuple[str, ...] | Callable[[int], tuple[str, ...]]
    input: _Input = _IMAGES


_BUILTINS = {
    "resnet10": _Builtin(resnet10, RESNET_BLOCKS),
    "resnet18": _Builtin(resnet18, RESNET_BLOCKS),
    "resnet34": _Builtin(resnet34, RESNET_BLOCKS),
    "small_cnn": _Builtin(small_cnn, SMALL_CNN_BLOCKS),
    "vgg11": _Builtin(vgg11, VGG_BLOCKS),
    "vgg16": _Builtin(vgg16, VGG_BLOCKS),
    "mobilenet_v2": _Builtin(mobilenet_v2, MOBILENET_BLOCKS),
    "vit": _Builtin(vit, layer_names),
    "sensor_cnn": _Builtin(sensor_cnn, SENSOR_BLOCKS, _SERIES),
    "text_transformer": _Builtin(text_transformer, layer_names, _TOKENS),
}

BUILTIN_NAMES = tuple(_BUILTINS)


def build_model(
    name: str,
    options: Mapping[str, object],
    input_shape: tuple[int, ...] | None = None,
    classes: int | None = None,
    seed: int = 0,
    vocabulary: int | None = None,
) -> ModelSpec:
    """Build a model with weights that depend on nothing but ``seed``.

    Parameters
    ----------
    name
        A built-in name (`BUILTIN_NAMES`) or ``package.module:factory``, where the factory is any callable that
        returns an ``nn.Module``; the current directory is searched first.
    options
        Keyword arguments of the factory.
    input_shape
        Shape of one sample, without the batch. Required for a factory; for a built-in model it sets the options
        ``channels`` and ``input_size``, or ``length``.
    classes
        Logits per sample; sets the option ``classes`` where the factory has one. A factory without it has to be
        accompanied by this argument.
    seed
        Seed of torch's CPU generator while the factory runs; the generator's state is restored afterwards.
    vocabulary
        Number of token ids, for a model that takes int64 ids; sets the option ``vocabulary`` where the factory has
        one. A model given neither takes float32.

    Returns
    -------
    ModelSpec
        The model in training mode, on the CPU unless the factory moved it.

    Raises
    ------
    UsageError
        The name, an option or the input shape is wrong, or the factory failed or returned no ``nn.Module``.
    """
    if ":" in name:
        return _build_from_factory(name, options, input_shape, classes, seed, vocabulary)
    return _build_builtin(name, options, input_shape, classes, seed, vocabulary)


def _build_builtin(
    name: str,
    options: Mapping[str, object],
    input_shape: tuple[int, ...] | None,
    classes: int | None,
    seed: int,
    vocabulary: int | None,
) -> ModelSpec:
    builtin = _BUILTINS.get(name)
    if builtin is None:
        raise UsageError(
            f"model {name!r} is not built in{_suggestion(name, BUILTIN_NAMES)}: give one of "
            f"{', '.join(BUILTIN_NAMES)}, or 'package.module:factory' for a model of your own"
        )
    implied = {} if input_shape is None else _axis_options(name, builtin.input, input_shape)
    if classes is not None:
        implied["classes"] = classes
    if vocabulary is not None:
        if builtin.input is not _TOKENS:
            raise UsageError(
                f"model {name!r} takes {builtin.input.noun}, which have no vocabulary: leave it out"
            )
        implied["vocabulary"] = vocabulary
    merged = _merge(name, options, implied)
    _check_options(name, builtin.factory, merged)
    module = _construct(name, builtin.factory, merged, seed)
    defaults = {key: each.default for key, each in inspect.signature(builtin.factory).parameters.items()}
    sizes = cast(dict[str, int], {**defaults, **merged})
    return ModelSpec(
        name=name,
        module=module,
        input_shape=tuple(sizes[axis] for axis in builtin.input.axes),
        classes=sizes["classes"],
        default_blocks=builtin.blocks(sizes["depth"]) if callable(builtin.blocks) else builtin.blocks,
        vocabulary=sizes.get("vocabulary"),
    )


def _build_from_factory(
    name: str,
    options: Mapping[str, object],
    input_shape: tuple[int, ...] | None,
    classes: int | None,
    seed: int,
    vocabulary: int | None,
) -> ModelSpec:
    factory = _import_factory(name)
    if input_shape is None:
        raise UsageError(
            f"model {name!r} needs the shape of one sample: set its input shape, e.g. [3, 32, 32], without the batch"
        )
    settable = {*(_option_names(factory) or ()), *options}
    given = {"classes": classes, "vocabulary": vocabulary}
    implied = {key: value for key, value in given.items() if value is not None and key in settable}
    merged = _merge(name, options, implied)
    outputs = merged.get("classes") if classes is None else classes
    if not isinstance(outputs, int) or isinstance(outputs, bool) or outputs < 1:
        raise UsageError(
            f"model {name!r} needs its number of classes: set it to a whole number of at least 1, not {outputs!r}"
        )
    ids = merged.get("vocabulary") if vocabulary is None else vocabulary
    if ids is not None and (not isinstance(ids, int) or isinstance(ids, bool) or ids < 1):
        raise UsageError(f"model {name!r} has a vocabulary of {ids!r}: give a whole number of at least 1")
    _check_options(name, factory, merged)
    module = _construct(name, factory, merged, seed)
    return ModelSpec(name, module, tuple(input_shape), outputs, None, ids)


def _axis_options(name: str, taken: _Input, input_shape: tuple[int, ...]) -> dict[str, object]:
    """Return the options that make a built-in model take samples of a shape."""
    options = dict(zip(taken.axes, input_shape, strict=False))
    if input_shape != tuple(options.get(axis) for axis in taken.axes):
        raise UsageError(
            f"model {name!r} takes {taken.noun}, not samples of shape {list(input_shape)}: "
            f"give the input shape as [{', '.join(taken.axes)}]"
        )
    return dict(options)


def _merge(name: str, options: Mapping[str, object], implied: Mapping[str, object]) -> dict[str, object]:
    for key, value in implied.items():
        if options.get(key, value) != value:
            raise UsageError(
                f"model {name!r} has option {key!r} set to {options[key]!r}, but the data has {value!r}: "
                "remove the option or correct one of the two"
            )
    return {**options, **implied}


def _import_factory(name: str) -> Callable[..., object]:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"model {name!r} names no factory: write it as 'package.module:factory'")
    directory = str(Path.cwd())
    if directory not in sys.path:
        sys.path.insert(0, directory)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise UsageError(
            f"model {name!r}: module {module_name!r} cannot be imported ({_reason(error)}): "
            f"correct the name or the module, and run from the directory it is in (now {directory})"
        ) from error
    try:
        factory = operator.attrgetter(attribute)(module)
    except AttributeError as error:
        raise UsageError(
            f"model {name!r}: module {module_name!r} has no {attribute!r}"
            f"{_suggestion(attribute, tuple(vars(module)))}: name a function or class it defines"
        ) from error
    if not callable(factory):
        raise UsageError(
            f"model {name!r}: {attribute!r} is {type(factory).__name__}, which cannot be called: "
            "name a function or class that returns an nn.Module"
        )
    found: Callable[..., object] = factory
    return found


def _option_names(factory: Callable[..., object]) -> tuple[str, ...] | None:
    """Return the keyword names a factory declares, or ``None`` if it cannot be inspected."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(each.name for each in parameters if each.kind in named)


def _check_options(name: str, factory: Callable[..., object], options: Mapping[str, object]) -> None:
    accepted = _option_names(factory)
    if accepted is None:
        return
    parameters = inspect.signature(factory).parameters.values()
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    unknown = [] if takes_any else [key for key in options if key not in accepted]
    if unknown:
        raise UsageError(
            f"model {name!r} has no option {unknown[0]!r}{_suggestion(unknown[0], accepted)}: "
            f"its options are {', '.join(accepted) or 'none'}"
        )
    missing = [
        each.name
        for each in parameters
        if each.name in accepted and each.default is inspect.Parameter.empty and each.name not in options
    ]
    if missing:
        raise UsageError(f"model {name!r} needs the option {missing[0]!r}: set it among the model's options")


def _construct(
    name: str, factory: Callable[..., object], options: Mapping[str, object], seed: int
) -> nn.Module:
    # Only the CPU generator is forked and seeded: torch.manual_seed would reach accelerators that are not restored.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            module = factory(**options)
        except UsageError:
            raise
        except Exception as error:  # the factory is the user's code, which may raise anything
            given = ", ".join(f"{key}={value!r}" for key, value in options.items())
            raise UsageError(
                f"model {name!r}: its factory failed with ({given}): {_reason(error)}: correct the options or the factory"
            ) from error
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"model {name!r}: its factory returned {type(module).__name__}: make it return an nn.Module"
        )
    return module


def _suggestion(wrong: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(wrong, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
