"""The agent that trains stages on a device. Importing it needs neither torch nor executorch."""
