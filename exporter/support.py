"""Finds what no stage can train, and where in the model it is.

A training step is a fixed program over float32 tensors: what a tensor holds may not decide which operators run or what
shape they return, and nothing may be complex. `check_values` says so before a model is cut. Whether ExecuTorch can
execute an operator is known only once a stage is lowered; `explain` then finds the operator in the model again.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from frostline.exporter.capture import BY_VALUES, authors_line, calls_of, followed, line_of
from frostline.exporter.executorch_lowering import UnsupportedOperators, kernel_names
from frostline.exporter.modes import mode
from frostline.exporter.part import VISITOR
from frostline.exporter.random_numbers import seeded
from frostline.exporter.semantics import copies_of
from frostline.protocol.errors import UsageError, first_line

aten = torch.ops.aten

STAGE_PREFIXES = ("block.", "output_module.head.", "output_module.")
"""What a stage puts before the names of the model's children."""

MODULES_NAMED = 3
"""How many modules an error lists beside the first."""

_INDEXING = (aten.index.Tensor, aten._unsafe_index.Tensor)
_FROM_VALUES = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


@dataclass(frozen=True)
class Use:
    """One operator that ran in a model.

    Attributes
    ----------
    operator
        For example ``aten.cumsum``.
    module
        Qualified name of the innermost child it ran in; empty for the model's own forward.
    line
        The line of its author's code, such as ``nets.py:12``; empty where it is not known.
    shape
        Shape of its first tensor argument, or ``None`` without one.
    backward
        Whether it computed a gradient.
    by_value
        Whether what follows depends on the values of its arguments: the shape of its result, or a branch.
    """

    operator: str
    module: str
    line: str
    shape: tuple[int, ...] | None
    backward: bool
    by_value: bool

    def __str__(self) -> str:
        """For example ``aten.cumsum of shape [8, 4] in module 'layer1.0'``."""
        of = "" if self.shape is None else f" of shape {list(self.shape)}"
        where = f"module '{self.module}'" if self.module else "the model's own forward"
        where += f" ({self.line})" if self.line else ""
        return f"{self.operator}{of} in {where}" + (", computing its gradient" if self.backward else "")


def check_model(module: nn.Module, x: Tensor) -> None:
    """Refuse what no stage can train, before a model is captured.

    Parameters
    ----------
    module
        Any model; it runs in both modes and is not changed. What it raises itself is left to the capture.
    x
        A batch of its input.

    Raises
    ------
    UsageError
        For more inputs than one; tensors of another type than float32; batch norm that averages over all batches; complex
        values, and shapes and branches that depend on what a tensor holds. It names the parameter, or the operator with its
        shape and the module it is in.
    """
    title = type(module).__name__
    required = [
        each.name
        for each in inspect.signature(module.forward).parameters.values()
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    if len(required) > 1:
        raise UsageError(
            f"model {title} takes {len(required)} inputs ({', '.join(required)}): make its forward take one tensor"
        )
    _check_made(module)
    _check_hooks(module)
    check_dtypes(module)
    for name, child in module.named_modules():
        if isinstance(child, _NormBase) and child.track_running_stats and child.momentum is None:
            raise UsageError(
                f"module {name!r} averages its statistics over all batches since the start (momentum=None), which devices do "
                "not know: give it a momentum, such as 0.1"
            )
    _check_values(module, x)


def _check_values(module: nn.Module, x: Tensor) -> None:
    recorder = _Recorder(_refuse)
    fast = torch.backends.mha.get_fastpath_enabled()
    # In evaluation PyTorch's transformer layers would leave out padding, by the values of a mask.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for training in (False, True):
            tensors = copies_of(module)
            with (
                torch.no_grad(),
                seeded(),
                mode(module, training=training),
                recorder.watching(module),
                recorder,
                _Checking(recorder),
            ):
                functional_call(module, tensors, (x.clone(),), tie_weights=False)
    except UsageError:
        raise
    except Exception:  # running the model raises whatever its operators raise; capturing it reports that
        return
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _check_made(module: nn.Module) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(tensor):
            raise UsageError(
                f"module {name.rpartition('.')[0]!r} does not know its shape yet, as lazy layers do until they have seen a "
                "batch: run the model on one before it is exported"
            )


def _check_hooks(module: nn.Module) -> None:
    for name, tensor in module.named_parameters():
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            raise UsageError(
                f"tensor {name!r} of model {type(module).__name__} has a hook on its gradient, which devices would not run: "
                "write it in the forward pass, such as a mask that the tensor is multiplied by"
            )


def check_dtypes(module: nn.Module) -> None:
    """Check that all that a model or stage trains on is float32, as devices hold it.

    Raises
    ------
    UsageError
        Naming the parameter or buffer of another floating-point or complex dtype.
    """
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_complex():
            raise UsageError(
                f"tensor {name!r} of model {type(module).__name__} is {_name(tensor.dtype)}: complex numbers cannot be "
                "trained; hold real and imaginary parts as float32 tensors of their own"
            )
        if tensor.dtype != torch.float32 and tensor.is_floating_point():
            raise UsageError(
                f"tensor {name!r} is {_name(tensor.dtype)}: devices train float32; convert the model, as by model.float()"
            )


def explain(error: Exception, module: nn.Module, x: Tensor) -> str:
    """Put what compiling a stage raised into one line, with the operator, its shape and its module where it has one.

    Parameters
    ----------
    error
        What PyTorch or ExecuTorch raised.
    module
        The stage's model, which maps ``x`` to logits; it is not changed.
    x
        A batch of its input.
    """
    uses = _uses(copy.deepcopy(module), x)
    if isinstance(error, UnsupportedOperators):
        # Those that the lowering made itself are not in the model.
        names = [each.removesuffix("_functional") for each in error.operators]
        found = [[use for use in uses if use.operator.removesuffix("_") == each] for each in names]
        named = next((_listed(each) for each in found if each), ", ".join(error.operators))
        return f"{named}: {error.reason}; use another layer there"
    suspects = [use for use in uses if use.by_value] or [
        use for use in uses if not _may_be_lowered(use.operator)
    ]
    return f"{_listed(suspects)}: {first_line(error)}" if suspects else first_line(error)


def _uses(module: nn.Module, x: Tensor) -> list[Use]:
    """Every operator of a pass forward and backward, or of as much of it as runs."""
    uses: list[Use] = []

    def hear(use: Use, result: Any) -> None:
        # The stage's own names are stripped: what is left is the model's.
        prefix = next((each for each in STAGE_PREFIXES if use.module.startswith(each)), "")
        uses.append(replace(use, module=use.module.removeprefix(prefix)))

    recorder = _Recorder(hear)
    trained = [each for each in module.parameters() if each.requires_grad]
    with contextlib.suppress(Exception), recorder.watching(module), recorder, torch.enable_grad():
        torch.autograd.grad(module.train()(x).sum(), trained, allow_unused=True)
    return uses


def _listed(uses: Sequence[Use]) -> str:
    """The first use, and the other modules with the same operator."""
    others = [use.module for use in uses if use.module != uses[0].module]
    named = ", ".join(f"'{name}'" for name in list(dict.fromkeys(others))[:MODULES_NAMED])
    return f"{uses[0]}{f' (or in {named})' if named else ''}"


def _may_be_lowered(operator: str) -> bool:
    """Tell whether an operator has a kernel, a copying variant with one, or a decomposition into others."""
    name = operator.partition(".")[2].removesuffix("_")
    known = {each.partition("::")[2].partition(".")[0] for each in kernel_names()}
    decomposed = {each._schema.name.partition("::")[2] for each in core_aten_decompositions()}
    return bool({name, f"{name}_copy"} & (known | decomposed))


Heard = Callable[[Use, Any], None]
"""Told of each operator's use and its result."""


@dataclass
class _Scope:
    """Where the forward pass is, and in which module each of autograd's nodes was made."""

    stack: list[str] = field(default_factory=list)
    made_in: dict[int, tuple[str, str]] = field(default_factory=dict)
    at: tuple[str, str] | None = None
    """The module and line of the operator that a part of a cut model runs."""

    @property
    def place(self) -> tuple[str, str]:
        """The module and the line that are running."""
        return self.at or (self.stack[-1] if self.stack else "", "")

    def enter(self, name: str) -> None:
        """A child is called."""
        self.stack.append(name)
        self.at = None

    def leave(self) -> None:
        """A child returns, or fails, which the caller may survive."""
        if self.stack:
            self.stack.pop()
        self.at = None

    def visit(self, node: fx.Node) -> None:
        """A part runs an operator."""
        calls = calls_of(node)
        self.at = (calls[-1].path if calls else "", line_of(node))


class _Recorder(TorchDispatchMode):
    """Tells of every ATen operator that runs, and of the module it runs in.

    A module's operators run between its hooks. A gradient's operator belongs to the autograd node being run, which
    carries the number it got in the forward pass.
    """

    def __init__(self, heard: Heard) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._heard = heard
        self._scope = _Scope()

    @property
    def place(self) -> tuple[str, str]:
        """The module and the line that are running."""
        return self._scope.place

    @contextlib.contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Follow which child of a module is running."""
        visiting = VISITOR.set(self._scope.visit)
        try:
            with followed(module, self._scope.enter, lambda *_: self._scope.leave()):
                yield
        finally:
            VISITOR.reset(visiting)

    @contextlib.contextmanager
    def deaf(self) -> Iterator[None]:
        """Tell of nothing for a while."""
        heard, self._heard = self._heard, lambda use, result: None
        try:
            yield
        finally:
            self._heard = heard

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        node = torch._C._current_autograd_node()
        if node is None:
            module, line = self._scope.place
            # The node of this operator took the last number; an operator without a node must not claim that.
            self._scope.made_in.setdefault(torch.autograd._get_sequence_nr() - 1, (module, line))
        else:
            module, line = self._scope.made_in.get(node._sequence_nr(), ("", ""))
        first = next((each for each in pytree.tree_leaves(args) if isinstance(each, Tensor)), None)
        shape = None if first is None else tuple(first.shape)
        name = str(func._schema.name).replace("::", ".")
        name = "Tensor.item" if func is aten._local_scalar_dense.default else name
        by_value = _by_value(func, args)
        if by_value and node is None:
            line = line or authors_line()
        self._heard(Use(name, module, line, shape, node is not None, by_value), result)
        return result


class _Checking(TorchFunctionMode):
    """Leaves out functions that look at values only to check them."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if given.get("generator") is not None:
            path, _ = self._recorder.place
            where = f"module '{path}'" if path else "the model's own forward"
            raise UsageError(
                f"{where} draws from a torch.Generator of its own ({authors_line()}): devices draw from the step's seed; "
                "leave the generator out"
            )
        # Without the number of classes their number is the largest id.
        checks = func is F.one_hot and (args[1:] or given.get("num_classes", -1)) not in (-1, (-1,))
        with self._recorder.deaf() if checks else contextlib.nullcontext():
            return func(*args, **given)


def _refuse(use: Use, result: Any) -> None:
    tensors = [each for each in pytree.tree_leaves(result) if isinstance(each, Tensor)]
    numbers = next((each.dtype for each in tensors if each.is_complex()), None)
    if numbers is not None:
        raise UsageError(
            f"{use} returns {_name(numbers)}: complex numbers cannot be trained; compute with real and imaginary parts"
        )
    if use.by_value:
        raise UsageError(f"{use} makes what follows depend on the values of a tensor: {BY_VALUES}")


def _by_value(function: Any, arguments: Sequence[Any]) -> bool:
    if function in _INDEXING:
        masks = (torch.bool, torch.uint8)
        return any(each is not None and each.dtype in masks for each in arguments[1])
    return any(tag in function.tags for tag in _FROM_VALUES)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
