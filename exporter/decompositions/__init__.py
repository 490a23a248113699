"""Operators of PyTorch's that runtimes lack, in plainer ones."""
