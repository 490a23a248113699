"""For each ATen operator the ONNX nodes that compute it."""
