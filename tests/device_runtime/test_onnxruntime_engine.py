from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from frostline.device_runtime.engine import open_runtime
from frostline.device_runtime.onnx_program import OnnxProgram
from frostline.protocol.artifact import read_artifact
from frostline.protocol.blobs import BlobStore, reference_to
from frostline.protocol.errors import RunError


def doubling(opset: int = 18) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def test_a_program_writes_into_the_memory_it_is_given() -> None:
    program = OnnxProgram(doubling().SerializeToString(), "test")
    x, y = np.array([1, 2], np.float32), np.zeros(2, np.float32)
    address = y.ctypes.data
    program.run({"x": x}, {"y": y})
    assert y.tolist() == [2, 4] and y.ctypes.data == address


def newer_opset() -> bytes:
    return doubling(opset=99).SerializeToString()


def newer_ir() -> bytes:
    model = doubling()
    model.ir_version = 99
    return model.SerializeToString()


@pytest.mark.parametrize("content", [newer_opset, newer_ir], ids=lambda made: made.__name__)
def test_a_program_of_a_newer_onnx_says_what_to_upgrade(content: object) -> None:
    assert callable(content)
    with pytest.raises(RunError) as raised:
        OnnxProgram(content(), "training")
    message = str(raised.value)
    assert "is too old for it: pip install --upgrade onnxruntime" in message and "\n" not in message


def test_what_is_no_program_is_refused_in_one_line() -> None:
    with pytest.raises(RunError, match=r"^training program: ONNX Runtime cannot load it: ") as raised:
        OnnxProgram(b"no program", "training")
    assert "\n" not in str(raised.value)


def test_a_program_that_is_not_what_its_manifest_says_is_refused(variants: Path, tmp_path: Path) -> None:
    """It is given bare memory, so nothing it writes may be larger than that."""
    manifest, _ = read_artifact(variants / "onnxruntime" / "whole")
    content = doubling().SerializeToString()
    store = BlobStore(tmp_path)
    store.put(content)
    training = manifest.training.model_copy(update={"file": reference_to(content)})
    session = open_runtime("onnxruntime").open_stage(
        manifest.model_copy(update={"training": training}), store
    )
    parts = [(np.zeros((4, 1, 8, 8), np.float32), np.zeros(4, np.int64))]
    with pytest.raises(RunError, match="training program: it does not take and return what its manifest"):
        session.step(parts, 0.1)
