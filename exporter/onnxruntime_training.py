"""A stage as the four files of onnxruntime-training: training, evaluation and optimizer model, and checkpoint.

They are made by `onnxruntime.training.artifacts.generate_artifacts` of the last release, 1.19.2, and run with its
`CheckpointState`, `Module` and `Optimizer`. The checkpoint holds all tensors in the model's order and by the model's names,
with frozen parameters and buffers among those that are not trained. The training model takes `x` and `y`, and `seed` where
there is dropout, and returns the micro-batch's share of the batch's mean loss, the logits, and the new values of running
statistics, which the caller writes back. The evaluation model takes `x` and returns the logits.
"""

from __future__ import annotations

import copy
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from frostline.device_runtime.engine import INSTALL
from frostline.exporter.executorch_lowering import quiet
from frostline.exporter.inputs import random_inputs, zero_inputs
from frostline.exporter.modes import mode
from frostline.exporter.onnxruntime_training_functions import OPSET, TrainableFunctions
from frostline.exporter.optimizer import SGD, AdamW, Optimizer
from frostline.exporter.part import prepare_parts
from frostline.exporter.stage import Stage
from frostline.exporter.support import STAGE_PREFIXES, check_dtypes
from frostline.protocol.errors import FrostlineError, RunError, UsageError, first_line

if TYPE_CHECKING:
    import onnx

    from frostline.exporter.artifact import ExportOptions

IR_VERSION = 9
"""1.19.2 reads up to 10; newer versions of onnx write more."""

LOGITS = "logits"
_WRAPPED = "model."


@dataclass(frozen=True)
class TrainingArtifacts:
    """The four files, as bytes.

    Attributes
    ----------
    inputs : tuple of str
        What the training model takes, in order: `x`, `seed` where there is dropout, `y`.
    statistics : tuple of str
        The buffers whose new values the training model returns, after the loss and the logits.
    """

    training: bytes
    evaluation: bytes
    optimizer: bytes
    checkpoint: bytes
    inputs: tuple[str, ...]
    statistics: tuple[str, ...]


def check_optimizer(optimizer: Optimizer) -> None:
    """Check that onnxruntime-training has the optimizer in these settings.

    Raises
    ------
    UsageError
        Naming the first setting that it lacks.
    """
    lacking = ["proximal"]
    if isinstance(optimizer, SGD):
        lacking += ["momentum", "nesterov", "weight_decay"]
    elif not isinstance(optimizer, AdamW):
        raise UsageError(
            f"engine 'onnxruntime-training' has no optimizer {type(optimizer).__name__}: use SGD or AdamW, or the "
            "engine 'onnxruntime'"
        )
    for name in lacking:
        if getattr(optimizer, name):
            raise UsageError(
                f"engine 'onnxruntime-training' trains {type(optimizer).__name__} without {name}, which is "
                f"{getattr(optimizer, name)}: leave it out, or use the engine 'onnxruntime'"
            )


def generate_training_artifacts(
    stage: Stage, options: ExportOptions, micro_batches: int = 1
) -> TrainingArtifacts:
    """Compile a stage with its present values.

    Parameters
    ----------
    micro_batches : int
        Equal parts that the batch is trained in, their gradients accumulated.

    Raises
    ------
    UsageError
        If onnxruntime-training is not installed, or lacks the optimizer, or the batch does not divide into the parts.
    RunError
        Naming the stage and the operator that cannot be exported or has no gradient.
    """
    check_optimizer(options.optimizer)
    check_dtypes(stage.model)
    _check_norms(stage)
    samples, rest = divmod(options.batch, micro_batches)
    if rest:
        raise UsageError(f"a batch of {options.batch} cannot be trained in {micro_batches} equal parts")
    check_installed()
    with _explained(stage), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training, updated = _export_training(stage, samples)
        evaluation = _export_evaluation(stage, samples)
        return _generate(stage, options.optimizer, training, evaluation, micro_batches, updated)


def _check_norms(stage: Stage) -> None:
    for name, module in stage.model.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats and module.momentum is None:
            raise UsageError(
                f"stage {stage.name!r}: module {name!r} averages its statistics over all batches, which the engine "
                "'onnxruntime-training' cannot: give it a momentum"
            )


def check_installed() -> None:
    """Check that the package is here.

    Raises
    ------
    UsageError
        Saying what installs it.
    """
    try:
        with quiet():
            import onnxruntime.training.artifacts  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"engine 'onnxruntime-training' needs the package onnxruntime-training-cpu: {INSTALL['onnxruntime-training']} "
            f"({first_line(error)})"
        ) from None


class _TrainingForward(nn.Module):
    """Logits, and what the buffers become."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.updated: list[str] = []

    def forward(self, x: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        functions = TrainableFunctions(seed)
        with functions.replacing():
            logits = self.model(x)
        new = {name: functions.new_statistics(buffer) for name, buffer in self.model.named_buffers()}
        found = {name: value for name, value in new.items() if value is not None}
        self.updated = list(found)
        return logits, *found.values()


class _Forward(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits


def _export_training(stage: Stage, samples: int) -> tuple[onnx.ModelProto, list[str]]:
    """The forward pass in training, and the names of the buffers it returns new values of."""
    forward = _TrainingForward(copy.deepcopy(stage.model))
    x = random_inputs(samples, stage.input_shape, stage.vocabulary, torch.Generator().manual_seed(0))
    arguments = (x, torch.tensor(0.0))
    with mode(forward, training=True), torch.no_grad():
        prepare_parts(forward, samples)
        forward(*arguments)
        results = [LOGITS, *(_new(name) for name in forward.updated)]
        # The exporter leaves out a seed that nothing depends on.
        return _export(forward, arguments, ["x", "seed"], results), forward.updated


def _export_evaluation(stage: Stage, samples: int) -> onnx.ModelProto:
    """The forward pass in evaluation, with the same tensors by name as inputs."""
    forward = _Forward(copy.deepcopy(stage.model))
    x = zero_inputs(samples, stage.input_shape, stage.vocabulary)
    # Outside of training the exporter makes one tensor of those with equal values, such as fresh norms.
    with torch.no_grad():
        for tensor in forward.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    with mode(forward, training=False), torch.no_grad():
        prepare_parts(forward, samples)
        model = _export(forward, (x,), ["x"], [LOGITS])
    _move_to_inputs(model, [name for name, _ in _named_tensors(stage)])
    return model


def _export(
    module: nn.Module, arguments: tuple[Any, ...], inputs: Sequence[str], outputs: Sequence[str]
) -> onnx.ModelProto:
    import onnx

    fast = torch.backends.mha.get_fastpath_enabled()
    # In evaluation, transformers' layers would be one operator that is not exported.
    torch.backends.mha.set_fastpath_enabled(False)
    # On failure the exporter prints the whole graph; on standard error it is not heard.
    torch._C._jit_set_onnx_log_output_stream("stderr")
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            torch.onnx.export(
                module,
                arguments,
                path,
                dynamo=False,
                training=torch.onnx.TrainingMode.PRESERVE,
                do_constant_folding=False,
                keep_initializers_as_inputs=False,
                opset_version=OPSET,
                input_names=inputs,
                output_names=outputs,
            )
            model = onnx.load(path)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    model.ir_version = min(model.ir_version, IR_VERSION)
    _rename(model)
    return model


def _generate(
    stage: Stage,
    optimizer: Optimizer,
    training: onnx.ModelProto,
    evaluation: onnx.ModelProto,
    micro_batches: int,
    updated: Sequence[str],
) -> TrainingArtifacts:
    import onnx
    from onnxruntime.training import artifacts

    from frostline.exporter.onnxruntime_training_blocks import MeanLoss, optimizer_block
    from frostline.exporter.onnxruntime_training_graph import expand_training_graph, prepare_gradients

    norms = prepare_gradients(training)
    present = {each.name for each in training.graph.initializer}
    tensors = [(name, each) for name, each in _named_tensors(stage) if name in present]
    with tempfile.TemporaryDirectory() as folder:
        artifacts.generate_artifacts(
            training,
            requires_grad=[name for name, each in tensors if each.requires_grad],
            frozen_params=[name for name, each in tensors if not each.requires_grad],
            loss=MeanLoss(micro_batches),
            optimizer=optimizer_block(optimizer),
            artifact_directory=folder,
            additional_output_names=[LOGITS, *(_new(name) for name in updated)],
        )
        made = onnx.load(f"{folder}/training_model.onnx")
        expand_training_graph(made, norms)
        models = {
            "training": made,
            "eval": evaluation,
            "optimizer": onnx.load(f"{folder}/optimizer_model.onnx"),
        }
        for kind, model in models.items():
            model.ir_version = min(model.ir_version, IR_VERSION)
            Path(folder, f"{kind}_model.onnx").write_bytes(model.SerializeToString(deterministic=True))
        _check_loads(Path(folder))
        contents = {kind: Path(folder, f"{kind}_model.onnx").read_bytes() for kind in models}
        return TrainingArtifacts(
            training=contents["training"],
            evaluation=contents["eval"],
            optimizer=contents["optimizer"],
            checkpoint=Path(folder, "checkpoint").read_bytes(),
            inputs=tuple(each.name for each in made.graph.input if each.name in ("x", "seed", "y")),
            statistics=tuple(updated),
        )


def _check_loads(folder: Path) -> None:
    """Have the runtime find its kernels for all operators."""
    from onnxruntime.training.api import CheckpointState, Module, Optimizer

    state = CheckpointState.load_checkpoint(f"{folder}/checkpoint")
    module = Module(f"{folder}/training_model.onnx", state, f"{folder}/eval_model.onnx")
    Optimizer(f"{folder}/optimizer_model.onnx", module)


def _named_tensors(stage: Stage) -> Iterator[tuple[str, Tensor]]:
    yield from stage.model.named_parameters()
    yield from stage.model.named_buffers()


def _new(name: str) -> str:
    return f"new.{name}"


def _rename(model: onnx.ModelProto) -> None:
    """Give tensors the names they have in the stage's model."""
    renamed = {
        each.name: each.name.removeprefix(_WRAPPED)
        for each in model.graph.initializer
        if each.name.startswith(_WRAPPED)
    }
    for tensor in model.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]


def _move_to_inputs(model: onnx.ModelProto, names: Sequence[str]) -> None:
    from onnx import helper

    moved = [each for each in model.graph.initializer if each.name in set(names)]
    for tensor in moved:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        model.graph.initializer.remove(tensor)


@contextmanager
def _explained(stage: Stage) -> Iterator[None]:
    """What PyTorch, ONNX and its runtime raise becomes one line that names the stage."""
    # The exporter and the runtime's tools say on the root logger what only they can act on.
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    except FrostlineError:
        raise
    except Exception as error:  # each of the three has types of its own
        raise RunError(
            f"stage {stage.name!r} cannot be compiled for the engine 'onnxruntime-training': {_reason(error)}"
        ) from error
    finally:
        logging.disable(previous)


_NO_GRADIENT = re.compile(
    r"gradient builder has not been registered: (?P<operator>\w+) for node (?P<node>\S*)"
    r"|Could not find an implementation for (?P<kernel>\w+)\(\d+\) node with name '(?P<name>[^']*)'"
)


def _reason(error: Exception) -> str:
    found = _NO_GRADIENT.search(str(error))
    if found is None:
        return f"{first_line(error)}; use another layer there, or the engine 'onnxruntime'"
    operator = found["operator"] or found["kernel"].removesuffix("Grad")
    module = _module_of(found["node"] or found["name"])
    where = f" in module {module!r}" if module else ""
    return f"operator {operator}{where} has no gradient there: use another layer, or the engine 'onnxruntime'"


def _module_of(node: str) -> str:
    """The qualified name of the module a node was exported from, such as `layer1.0` of `/model/block/layer1.0/Elu`."""
    # Before each child's qualified name stand those of the modules around it.
    *_, module, _ = ["", *node.partition("_Grad/")[0].rstrip("/").split("/")]
    for prefix in STAGE_PREFIXES:
        module = module.removeprefix(prefix)
    return module
