"""Compiling for onnxruntime-training: its own four files in place of a traced step."""

from __future__ import annotations

from frostline.exporter.onnxruntime_target import OnnxRuntimeTarget
from frostline.protocol.messages import Engine


class OnnxRuntimeTrainingTarget(OnnxRuntimeTarget):
    """Stages by `frostline.exporter.onnxruntime_training_artifact`; frozen blocks in plain ONNX.

    What a stage takes is estimated from the step that plain ONNX Runtime would run.
    """

    engine: Engine = "onnxruntime-training"
    writes_in_place = True
    recomputes = False
    delegates = False


ONNXRUNTIME_TRAINING = OnnxRuntimeTrainingTarget()
