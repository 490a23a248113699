"""Labelled samples a run trains and is evaluated on: built-in sets and folders of safetensors."""
