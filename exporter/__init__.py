"""Compiles each block of a model, with an output module standing in for the rest, into a training artifact."""

# First of all, since it switches ONNX Runtime's reports off, and PyTorch may import ONNX Runtime.
import frostline.device_runtime  # noqa: F401
