"""Compiles each block of a model, with an output module standing in for the rest, into a training artifact."""
