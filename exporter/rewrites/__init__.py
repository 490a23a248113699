"""Rewrites of ATen operators into the few operators that a runtime executes fast."""
