"""The agent that trains stages on a device. Importing it needs neither torch nor executorch."""

import os

# ONNX Runtime reports to its makers by default from 1.29 on, unless told before it is imported. What trains on a
# device's data tells nobody; whoever wants the reports sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
